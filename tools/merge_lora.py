"""Merge the LoRA that a DeepSpeed-Chat checkpoint holds beside its weights: a plain model folder comes out.

python -m tools.merge_lora FOLDER MERGED_FOLDER [--lora_alpha A]
"""

import argparse
import os
import shutil
import sys
import tempfile

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from utils.errors import UserError
from utils.model.checkpoint import stored_weights, weight_paths
from utils.model.model_utils import load_model_config

RIGHT, LEFT = "lora_right_weight", "lora_left_weight"


def merge(weights: dict[str, torch.Tensor], transposed: set[str], alpha: float) -> tuple[dict[str, torch.Tensor], int]:
    """Return the weights with each LoRA added to the weight beside it, in float32, and the number of these.

    Args:
        weights: by name; a right half is [in, r], a left half [r, out].
        transposed: names of the weights that are stored [in, out].
        alpha: the addition is scaled by `alpha / r`, 1 in DeepSpeed-Chat.

    Raises:
        UserError: a half has no partner, or its weight is not there.
    """
    merged = {name: tensor for name, tensor in weights.items() if not name.endswith((RIGHT, LEFT))}
    owners = sorted({name.rpartition(".")[0] for name in weights if name.endswith((RIGHT, LEFT))})
    for owner in owners:
        names = [f"{owner}.{leaf}" for leaf in (RIGHT, LEFT, "weight")]
        absent = [name for name in names if name not in weights]
        if absent:
            raise UserError(f"{' and '.join(absent)} missing: the LoRA of {owner} can't be merged.")
        right, left, weight = (weights[name].float() for name in names)
        product = right @ left * (alpha / right.shape[1])
        whole = weight + (product if names[2] in transposed else product.t())
        merged[names[2]] = whole.to(weights[names[2]].dtype)
    return merged, len(owners)


def main(argv: list[str] | None = None) -> None:
    """Write the merged folder and print what was merged."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="the folder with config.json and the weights that hold LoRA")
    parser.add_argument("output", help="folder to write; it must not exist")
    parser.add_argument("--lora_alpha", type=float, default=1.0, help="as in training; 1 is DeepSpeed-Chat's")
    args = parser.parse_args(argv)
    if os.path.exists(args.output):
        raise UserError(f"{args.output} exists: name a folder that does not.")
    config = load_model_config(args.folder)
    if not any(name.endswith(RIGHT) for name in stored_weights(args.folder)):
        raise UserError(f"{args.folder} holds no {RIGHT}: there is nothing to merge.")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    transposed = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    paths = weight_paths(args.folder)
    weights: dict[str, torch.Tensor] = {}
    for path in paths:
        weights.update(load_file(path) if path.endswith(".safetensors") else torch.load(path, weights_only=True))
    merged, count = merge(weights, transposed, args.lora_alpha)
    _write(merged, paths, args.folder, args.output)
    print(f"{count} layers merged, with alpha {args.lora_alpha:g}, into {args.output}")


def _write(merged: dict[str, torch.Tensor], paths: list[str], folder: str, output: str) -> None:
    """Write the weights and copy the folder's other files; the output folder is complete or absent."""
    parent = os.path.dirname(os.path.abspath(output))
    with tempfile.TemporaryDirectory(dir=parent) as work:
        target = os.path.join(work, "model")
        left_out = [*map(os.path.basename, paths), "*.index.json"]
        shutil.copytree(folder, target, ignore=shutil.ignore_patterns(*left_out))
        torch.save(merged, os.path.join(target, "pytorch_model.bin"))
        os.rename(target, output)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
