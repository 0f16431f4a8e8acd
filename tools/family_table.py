"""Try every causal family of transformers on a tiny random model and print a table of what was right.

    python -m tools.family_table [FAMILY ...]

Columns: a saved checkpoint loads with every weight and no other; what this program writes has the names and values of
`save_pretrained`; with dropout off two training forwards are equal, with dropout on they differ; weight decay leaves
biases and norms alone; samples end to end in one row give the loss of padded ones; LoRA's `auto` names layers that
train, and merged they give the same logits; PEFT reads the adapter and gives the same logits.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

from tools.tiny_families import VOCABULARY, families, tiny_config, tiny_model
from utils.data.batching.batches import collate_for
from utils.engine.engine import get_optimizer_grouped_parameters
from utils.errors import UserError
from utils.export.peft_adapter import check_adapter, save_lora_adapter
from utils.export.weights import write_weights
from utils.model.checkpoint import check_is_causal, check_weights, stored_weights
from utils.model.config_values import DROPOUT, OTHER_RANDOMNESS, is_probability, set_dropouts, values
from utils.model.layout_check import choose_layout
from utils.model.model_utils import set_module_dropouts
from utils.module.attention import clear_documents
from utils.module.fused_loss import summed_loss
from utils.module.lora import LinearLayer_LoRA, convert_linear_layer_to_lora, convert_lora_to_linear_layer
from utils.module.lora_names import describe_unreached

LENGTHS = (43, 7, 28)  # the first is longer than the windows and chunks of the tiny models
YES, REFUSED = "yes", "refused"


def loads(model: transformers.PreTrainedModel, folder: str) -> str:
    """Save with transformers; the check before loading finds nothing, and the loaded weights are the saved ones."""
    model.save_pretrained(folder)
    check_is_causal(folder, model.config)
    check_weights(folder, model.config, tell=False)
    again = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    wrong = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, again[name])]
    return f"{len(wrong)} weights differ" if wrong else YES


def names(model: transformers.PreTrainedModel, folder: str) -> str:
    """Compare the names and shapes this program writes with those of `save_pretrained`, which wrote `folder`."""
    published = {name: tuple(tensor.shape) for name, tensor in stored_weights(folder).items()}
    with tempfile.TemporaryDirectory() as own:
        write_weights(model, own, is_writer=True, max_shard_size="5GB")
        written = {name: tuple(tensor.shape) for name, tensor in stored_weights(own).items()}
    different = published.items() ^ written.items()
    return f"{len({name for name, _ in different})} differ" if different else YES


def dropout(family: str) -> str:
    """Compare two training forwards with dropout off, of a model that is configured with dropout on."""
    config = tiny_config(family)
    has_any = any(is_probability(v) and DROPOUT.search(n) and not OTHER_RANDOMNESS.search(n)
                  for _, n, v in values(config))  # fmt: skip
    set_dropouts(config, 0.5)
    try:
        model = tiny_model(config).train()
    except ValueError:  # the family refuses some dropout
        model = tiny_model(tiny_config(family)).train()
    set_module_dropouts(model, 0.5)
    ids = torch.randint(3, VOCABULARY, (1, LENGTHS[0]), generator=torch.Generator().manual_seed(1))
    differs = _training_difference(model, ids) > 0
    set_dropouts(model.config, 0.0)
    set_module_dropouts(model, 0.0)
    if _training_difference(model, ids) > 0:
        return "still random"
    return YES if differs else ("not used" if has_any else "has none")


def _training_difference(model: transformers.PreTrainedModel, ids: torch.Tensor) -> float:
    with torch.no_grad():
        first, second = (model(input_ids=ids, use_cache=False).logits for _ in range(2))
    return (first - second).abs().max().item()


def decay(model: transformers.PreTrainedModel) -> str:
    """Name norms and biases that are decayed, and matrices that are not; what a norm is tells its behaviour."""
    groups = get_optimizer_grouped_parameters(model, 0.1)
    decayed = {id(p) for group in groups if group["weight_decay"] > 0 for p in group["params"]}
    found = {name for name, p in model.named_parameters() if "bias" in name and id(p) in decayed}
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if _normalises(module):
            found |= {f"{name}.{leaf}" for leaf, parameter in own.items() if id(parameter) in decayed}
        elif (
            isinstance(module, (torch.nn.Linear, torch.nn.Embedding))
            and "bias" not in name
            and module.weight.requires_grad
        ):
            found |= {f"{name}.weight"} if id(module.weight) not in decayed else set()
    return f"wrong: {', '.join(sorted(found))[:90]}" if found else YES


def _normalises(module: torch.nn.Module) -> bool:
    """Whether a module with vectors alone gives the same for an input and for a multiple of it."""
    own = list(module.parameters(recurse=False))
    if not own or any(parameter.dim() != 1 for parameter in own) or next(module.children(), None) is not None:
        return False
    inputs = torch.randn(2, own[0].numel(), generator=torch.Generator().manual_seed(5))
    try:
        with torch.no_grad():
            first, second = module(inputs), module(64 * inputs)
            return bool(first.count_nonzero()) and torch.allclose(first, second, rtol=1e-2, atol=1e-3)
    except Exception:  # it takes something else than one tensor
        return False


def layout(model: transformers.PreTrainedModel) -> str:
    """Compare the loss of one row with that of padded rows, by the model's own attention, or name what is used."""
    generator = torch.Generator().manual_seed(2)
    documents = [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in LENGTHS]
    samples = [{"input_ids": ids, "labels": ids.clone()} for ids in documents]
    padded = collate_for("max_length", 0, 64)(samples)
    with torch.no_grad():
        logits = model(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"], use_cache=False).logits
        expected = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), padded["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum"
        ).item()
        chosen = choose_layout(model, "free", VOCABULARY, torch.device("cpu"), longest=64)
        actual = summed_loss(model, collate_for(chosen, 0, 64)(samples)).item()
    clear_documents()
    difference = abs(actual - expected) / expected
    return (YES if chosen == "free" else "longest") if difference < 1e-4 else f"{chosen}: loss differs {difference:.1e}"


def lora(model: transformers.PreTrainedModel, folder: str, family: str) -> tuple[str, str]:
    """Train LoRA's `auto` layers by one step; return what merging and what PEFT's reading of the adapter gave."""
    ids = torch.randint(3, VOCABULARY, (1, LENGTHS[0]), generator=torch.Generator().manual_seed(3))
    left_out = re.match(r"(\d+) .*left out.*text \((.*)\)", describe_unreached(model, "auto") or "")
    convert_linear_layer_to_lora(model, "auto", 4, lora_scaling=8)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LinearLayer_LoRA)}
    model(input_ids=ids, use_cache=False).logits.float().pow(2).mean().backward()
    still = [name for name, layer in layers.items() if layer.lora_left_weight.grad is None
             or not layer.lora_left_weight.grad.count_nonzero()]  # fmt: skip
    torch.manual_seed(4)
    for name, layer in layers.items():
        if name in still:  # the model does not call it here, and training leaves it at zero
            continue
        torch.nn.init.normal_(layer.lora_left_weight, std=0.05)
    live = _logits(model, ids)
    adapter = _adapter(model, family, folder, ids, live)
    merged = _logits(convert_lora_to_linear_layer(model), ids)
    difference = ((merged - live).abs().max() / live.abs().max()).item()
    result = f"merged differs {difference:.1e}" if difference > 1e-4 else YES
    if left_out and result == YES:
        leaves = sorted({name.rpartition(".")[2] for name in left_out[2].split(", ")})
        result = f"leaves out {left_out[1]} ({', '.join(leaves)})"
    if still and result == YES:
        leaves = sorted({name.rpartition(".")[2] for name in still})
        result = f"{len(still)} of {len(layers)} get no gradient ({', '.join(leaves)})"
    return result, adapter


def _adapter(model: Any, family: str, folder: str, ids: torch.Tensor, live: torch.Tensor) -> str:
    import peft

    try:
        check_adapter(model)
    except UserError:
        return REFUSED
    with tempfile.TemporaryDirectory() as written:
        save_lora_adapter(model, folder, written)
        base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        loaded = peft.PeftModel.from_pretrained(base, written).eval()
        difference = ((_logits(loaded, ids) - live).abs().max() / live.abs().max()).item()
    return f"differs {difference:.1e}" if difference > 1e-4 else YES


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits.float()


def family_row(family: str) -> list[str]:
    """Return the family's row: its name and seven results. What raises an error is a result too."""
    try:
        model = tiny_model(tiny_config(family))
        _logits(model, torch.full((1, 8), 3))
    except Exception as err:  # whatever a family's code raises on a made-up configuration
        return [family, f"no tiny model ({_short(err)})", *[""] * 6]
    with tempfile.TemporaryDirectory() as folder:
        steps = [
            lambda: loads(model, folder), lambda: names(model, folder), lambda: dropout(family), lambda: decay(model),
            lambda: layout(model),
        ]  # fmt: skip
        row = [family, *(_tried(step) for step in steps)]
        fresh = tiny_model(tiny_config(family))
        both = _tried(lambda: lora(fresh, folder, family))
    return [*row, *(both if isinstance(both, tuple) else (both, ""))]


def _tried(step: Callable[[], Any]) -> Any:
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return step()
    except UserError as err:
        return f"{REFUSED}: {_short(err).removeprefix('UserError: ')}"
    except Exception as err:  # the table is of such failures
        return f"error: {_short(err)}"


def _short(err: Exception) -> str:
    words = re.sub(r"\S*/tmp\w+", "the folder", " ".join(str(err).split()))
    return f"{type(err).__name__}: {words[:90]}".replace("|", "/")


HEADINGS = (
    "family", "loads strictly", "names as published", "dropout off", "decay groups", "free = padded", "LoRA auto",
    "adapter in PEFT",
)  # fmt: skip


def main(chosen: list[str]) -> None:
    """Print the table, and on stderr how long each family took."""
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    print(f"| {' | '.join(HEADINGS)} |\n|{' --- |' * len(HEADINGS)}")
    for family in chosen or families():
        start = time.perf_counter()
        print(f"| {' | '.join(family_row(family))} |", flush=True)
        print(f"{family}: {time.perf_counter() - start:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
