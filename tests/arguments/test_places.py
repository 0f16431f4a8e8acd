"""Places that can't be used are named at the start: folders that are not there, full, or no folders."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT
from fork_runs import start_run


@pytest.fixture
def full_disk(tmp_path):
    """A file system of 64 KB."""
    folder = tmp_path / "full"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def refused(run_inside, arguments) -> str:
    status, printed, error = run_inside(arguments)
    assert status == 2 and "Traceback" not in error and error.count("error:") == 1, error
    assert "Tokenizer:" not in printed and "Model:" not in printed
    return error


def test_full_folder_of_temporary_files(run_arguments, run_inside, full_disk, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(full_disk))
    monkeypatch.setattr("tempfile.tempdir", None)
    error = refused(run_inside, run_arguments)
    assert f"the folder of temporary files, {full_disk}, can't take 50 MB" in error and "TMPDIR" in error


def test_temporary_files_elsewhere_are_said(run_arguments, run_inside, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    monkeypatch.setattr("tempfile.tempdir", None)
    status, printed, error = run_inside([*run_arguments, "--dry_run"])
    assert status == 0, error
    assert f"since TMPDIR {tmp_path / 'missing'} can't be written" in printed


def test_tensorboard_folder_that_is_a_file(run_arguments, run_inside, tmp_path):
    (tmp_path / "file").write_text("")
    flags = ["--enable_tensorboard", "--tensorboard_path", tmp_path / "file" / "logs"]
    error = refused(run_inside, [*run_arguments, *flags, "--output_dir", tmp_path / "out"])
    assert f"--tensorboard_path {tmp_path / 'file'}" in error and "can't be written" in error
    assert not (tmp_path / "out").exists()


NAMES = ["output_dir", "tensorboard_path", "deepspeed_config", "resume_from_checkpoint", "data_path", "chat_template"]


@pytest.mark.parametrize("name", NAMES)
def test_empty_names(run_arguments, run_inside, name):
    """As a script leaves them whose variable is not set: `--output_dir "$OUTPUT"`."""
    error = refused(run_inside, [*run_arguments, f"--{name}", ""])
    assert f"--{name} is empty" in error


@pytest.mark.parametrize("program", ["main", "prompt_eval"])
@pytest.mark.parametrize(
    "spelling", ["{parent}/tiny_otp", "./tiny_otp", "~/models/x/tiny", "a/b/c", "tiny opt", "tiny_opt/"]
)
def test_a_mistyped_model(run_arguments, run_inside, tiny_opt, capfd, program, spelling, monkeypatch):
    """No talk of hub names where only a path can be meant; one message, though the tokenizer is missing too."""
    monkeypatch.chdir(os.path.dirname(tiny_opt.parent))
    path = spelling.format(parent=tiny_opt.parent)
    if program == "main":
        error = refused(run_inside, [*run_arguments, "--model_name_or_path", path])
    else:
        import prompt_eval

        both = [f"--model_name_or_path_{which}={path}" for which in ("baseline", "finetune")]
        with pytest.raises(SystemExit) as stop:
            prompt_eval.run(both)
        error = capfd.readouterr().err
        assert stop.value.code == 2 and "Traceback" not in error
    assert error.count("there is no such folder") == 1 and "repo" not in error.lower(), error
    assert ("do you mean" in error) == ("tiny_otp" in path and path.startswith("/")), error


def test_a_model_that_is_a_file(run_arguments, run_inside, tiny_opt):
    error = refused(run_inside, [*run_arguments, "--model_name_or_path", tiny_opt / "config.json"])
    assert "is a file: give the folder it is in" in error


def test_a_name_that_may_be_one_on_the_hub(run_arguments, run_inside, tiny_opt, monkeypatch):
    monkeypatch.chdir(tiny_opt.parent)
    error = refused(run_inside, [*run_arguments, "--model_name_or_path", "tiny_otp"])
    assert f"tiny_otp is no folder (do you mean {tiny_opt}?), and as a name on the hub: " in error


def test_a_home_folder_that_the_shell_left_is_named(run_arguments, run_inside, tmp_path, monkeypatch):
    """`--output_dir=~/out` reaches the program as it is, and would make a folder named ~ in the working directory."""
    monkeypatch.setenv("HOME", "/home/ada")
    error = refused(run_inside, [*run_arguments, "--output_dir=~/out"])
    assert "--output_dir ~/out: the shell has not put a home folder in place of ~" in error
    assert "give /home/ada/out" in error


def test_an_output_folder_that_can_not_be_meant(run_arguments, run_inside, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "moved")
    error = refused(run_inside, [*run_arguments, "--output_dir", tmp_path / "link"])
    assert f"--output_dir {tmp_path}/link is a link to {tmp_path}/moved, which is not there" in error
    error = refused(run_inside, [*run_arguments, "--output_dir", os.fsdecode(bytes(tmp_path) + b"/latin-\xff")])
    assert "it is no UTF-8 text: give another name" in error
    name = os.fsdecode(bytes(tmp_path)) + "".join(map(chr, range(0xDCE6, 0xDCE7))) + "\udca8\udca1"  # UTF-8 as ASCII
    assert "set LC_ALL=C.UTF-8" in refused(run_inside, [*run_arguments, "--output_dir", name])


def test_a_tokenizer_that_can_not_be_written(run_arguments, tmp_path):
    """A limit on the size of files, which the temporary file of the check may not cross either."""
    run = start_run([*run_arguments, "--output_dir", tmp_path / "out"], file_limits={0: 20_000})
    assert run.wait() == [2] and "can't be saved (" in run.output() and "Traceback" not in run.output(), run.output()


@pytest.mark.parametrize("program", ["main.py", "prompt_eval.py"])
def test_a_working_directory_that_is_gone(program, tmp_path):
    """torch's native libraries would end the process with words of their own."""
    gone = tmp_path / "gone"
    gone.mkdir()
    command = f'cd "{gone}" && rmdir "{gone}" && exec "{sys.executable}" "{ROOT / program}" --model_name_or_path m'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "the working directory is not there any more" in done.stderr, done.stderr
