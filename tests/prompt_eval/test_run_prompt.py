"""What `run_prompt.sh` compares when it is told nothing."""

import os
import shutil

from tests.prompt_eval.test_prompt_eval import run_script


def noting_python(folder):
    """A `python` that notes its arguments, in place of the real one: the folder it lies in."""
    (folder / "bin").mkdir()
    (folder / "bin" / "python").write_text('#!/bin/sh\nshift\nprintf "%s\\n" "$@" >"$NOTES"\n')
    (folder / "bin" / "python").chmod(0o755)
    return folder / "bin"


def test_run_prompt_without_arguments(tmp_path):
    """The newest model of ./output*, against the demo's base model where it lies in there, else against OPT-1.3b."""
    environment = {"PATH": f"{noting_python(tmp_path)}:{os.environ['PATH']}", "NOTES": str(tmp_path / "notes")}

    def compared(*arguments):
        environment.pop("BASELINE", None)
        done = run_script(arguments, tmp_path, **environment)
        assert done.returncode == 0, done.stderr
        words = (tmp_path / "notes").read_text().split()
        given = dict(zip(words[:4:2], words[1:4:2], strict=True))
        models = given["--model_name_or_path_baseline"], given["--model_name_or_path_finetune"]
        assert done.stdout == f"Comparing {models[0]} with {models[1]}, the newest model in ./output*\n"
        assert words[4:] == [word for word in arguments if word.startswith("-")]
        return models

    for age, name in enumerate(["output_new", "output_demo", "output_demo/base", "output_unfinished"]):
        (tmp_path / name).mkdir()
        if name != "output_unfinished":
            (tmp_path / name / "config.json").write_text("{}")
            os.utime(tmp_path / name / "config.json", (1e9 - age, 1e9 - age))
    assert compared("--interactive") == ("facebook/opt-1.3b", "./output_new")
    shutil.rmtree(tmp_path / "output_new")
    assert compared() == ("./output_demo/base", "./output_demo")
    assert compared("other") == ("other", "./output_demo")
