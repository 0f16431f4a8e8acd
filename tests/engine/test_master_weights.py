"""Master weights begin as what the checkpoint holds; a checkpoint in the training dtype is not loaded in float32."""

import json
import re

import pytest
import torch
from conftest import ROOT
from fork_runs import finished_run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def show_masters(argv: list[str]) -> None:
    """main.py that stops before the first step and prints how far its master weights are from the checkpoint."""
    from deepspeed.utils import safe_get_full_fp32_param

    import main
    from utils.engine.master_weights import flat_masters

    folder = argv[argv.index("--model_name_or_path") + 1]
    stored = load_file(f"{folder}/model.safetensors")
    create = main.create_engine

    def watched(config, model, ds_config, groups):
        print("LOADED", sorted({str(p.dtype) for p in model.parameters()}), flush=True)
        engine = create(config, model, ds_config, groups)
        flat = flat_masters(engine)
        worst = 0.0
        for name, parameter in engine.module.named_parameters():
            master = flat[id(parameter)] if id(parameter) in flat else safe_get_full_fp32_param(parameter)
            if name in stored:
                worst = max(worst, (master - stored[name].float()).abs().max().item())
        print("WORST", worst, {str(p.dtype) for p in engine.module.parameters()}, flush=True)
        raise SystemExit(0)

    main.create_engine = watched
    main.run(argv)


@pytest.mark.parametrize(("stored", "stage"), [("float32", 0), ("float32", 1), ("float16", 2), ("bfloat16", 0)])
def test_masters_are_what_is_stored(stored, stage, tiny_opt, run_arguments, tmp_path):
    folder = tmp_path / stored
    AutoModelForCausalLM.from_pretrained(tiny_opt, dtype=getattr(torch, stored)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "demo" / "tiny_opt").save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["dtype"] == stored
    arguments = [str(folder) if argument == str(tiny_opt) else argument for argument in run_arguments]
    arguments = [argument.replace("fp32", "bf16") for argument in arguments]
    printed = finished_run([*arguments, "--zero_stage", stage], program=show_masters)
    loaded = "torch.bfloat16" if stored == "bfloat16" else "torch.float32"
    assert f"LOADED ['{loaded}']" in printed
    worst, dtypes = re.search(r"WORST (\S+) (.*)", printed).groups()
    assert float(worst) == 0 and dtypes == "{'torch.bfloat16'}"
