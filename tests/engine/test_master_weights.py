"""Master weights begin as what the checkpoint holds; a checkpoint in the training dtype is not loaded in float32."""

import json
import re

import pytest
import torch
from conftest import ROOT, make_tiny_opt
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

    def created(config, model, ds_config, groups):
        print("LOADED", sorted({str(p.dtype) for p in model.parameters()}), flush=True)
        return create(config, model, ds_config, groups)

    def watched(config, engine, tokenizer):
        flat = flat_masters(engine)
        worst = 0.0
        for name, parameter in engine.module.named_parameters():
            master = flat[id(parameter)] if id(parameter) in flat else safe_get_full_fp32_param(parameter)
            if name in stored:  # an embedding may have more rows
                worst = max(worst, (master[: len(stored[name])] - stored[name].float()).abs().max().item())
        print("WORST", worst, {str(p.dtype) for p in engine.module.parameters()}, flush=True)
        raise SystemExit(0)

    main.create_engine, main.rehearse_saving = created, watched
    main.run(argv)


@pytest.mark.parametrize(
    ("stored", "stage", "ranks"),
    [
        ("float32", 0, 1),
        ("float32", 1, 1),
        ("float16", 2, 1),
        ("bfloat16", 0, 1),
        ("float32", 3, 2),
        ("bfloat16", 3, 1),
    ],
)
def test_masters_are_what_is_stored(stored, stage, ranks, tiny_opt, run_arguments, tmp_path):
    folder = tmp_path / stored
    AutoModelForCausalLM.from_pretrained(tiny_opt, dtype=getattr(torch, stored)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "demo" / "tiny_opt").save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["dtype"] == stored
    arguments = [str(folder) if argument == str(tiny_opt) else argument for argument in run_arguments]
    arguments = [argument.replace("fp32", "bf16") for argument in arguments]
    printed = finished_run([*arguments, "--zero_stage", stage], ranks, program=show_masters)
    loaded = "torch.bfloat16" if stored == "bfloat16" or stage == 3 else "torch.float32"
    assert f"LOADED ['{loaded}']" in printed
    worst, dtypes = re.search(r"WORST (\S+) (.*)", printed).groups()
    assert float(worst) == 0 and dtypes == "{'torch.bfloat16'}"


def show_restored(argv: list[str]) -> None:
    """main.py that stops before the first step and prints what of its masters came from files."""
    import main

    restore = main.restore_stored_masters

    def watched(engine, name):
        trained = [key for key, one in engine.module.named_parameters() if one.requires_grad and "lora_" not in key]
        print("RESTORED", restore(engine, name), len(trained), flush=True)
        raise SystemExit(0)

    main.restore_stored_masters = watched
    main.run(argv)


def test_a_grown_embedding_and_lora_under_zero_3(run_arguments, tmp_path):
    """Files of another format; odd sizes leave the last rank padding; LoRA's own weights are in no file."""
    folder = make_tiny_opt(tmp_path / "base", vocab_size=1801, hidden_size=52, word_embed_proj_dim=52, ffn_dim=101)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    own = {name.removeprefix("model."): weight for name, weight in weights.items()}
    torch.save(own, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)  # which can't be mapped
    arguments = [argument.replace("fp32", "bf16") for argument in run_arguments]
    arguments += ["--model_name_or_path", folder, "--zero_stage", "3", "--lora_dim", "2"]
    printed = finished_run(arguments, 2, program=show_restored)
    restored, trained = map(int, re.search(r"RESTORED (\d+) (\d+)", printed).groups())
    assert restored == trained > 20 and "Master weights:" not in printed
