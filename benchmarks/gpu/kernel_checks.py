"""Checks of the GPU's attention and loss kernels against float32 and float64 on the CPU: a part of `check.py`.

    python benchmarks/gpu/kernel_checks.py attention|loss|step --dtype bf16 [--device cpu]

`step` checks the optimizer's sweep against DeepSpeed's own step, both on the device.

Each case prints a line as soon as it is done, `CASE` and a JSON object, so a crash loses no earlier case.
"""

import argparse
import copy
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from deepspeed.ops.adam import FusedAdam  # noqa: E402
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

import utils.module.attention  # noqa: E402
from utils.data.batching.collate import collate_free, collate_padded  # noqa: E402
from utils.engine import sweep_step  # noqa: E402
from utils.machine.device import to_device  # noqa: E402
from utils.machine.precision import DTYPES  # noqa: E402
from utils.model.layout_check import choose_layout  # noqa: E402
from utils.module import chunk_loss  # noqa: E402
from utils.module.attention import clear_documents, set_documents  # noqa: E402
from utils.module.fused_loss import LogitTransform, fused_loss, summed_loss  # noqa: E402
from utils.module.row_kernels import FLASH_CAPABILITY  # noqa: E402

VOCABULARY = 120
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**SMALL, "intermediate_size": 192, "num_key_value_heads": 2, "max_position_embeddings": 512, "head_dim": 64}
# They cover windows shorter than the documents, fewer key heads, heads of 80 as in OPT-2.7b, soft-capped scores, and
# values narrower than queries.
FAMILIES: dict[str, dict[str, Any]] = {
    "opt": {**SMALL, "ffn_dim": 256, "word_embed_proj_dim": 128, "max_position_embeddings": 512},
    "opt, heads of 80": {
        **SMALL, "hidden_size": 320, "ffn_dim": 256, "word_embed_proj_dim": 320, "max_position_embeddings": 512,
    },
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 128, "n_layer": 2, "n_head": 4},
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "gpt_neox": {**SMALL, "intermediate_size": 256, "max_position_embeddings": 512},
    "llama": LLAMA,
    "qwen3": LLAMA,
    "gemma2": {**LLAMA, "sliding_window": 24, "query_pre_attn_scalar": 64},
    "mistral": {**LLAMA, "sliding_window": 24},
    "deepseek_v3": {
        **SMALL, "intermediate_size": 192, "num_key_value_heads": 4, "max_position_embeddings": 512, "kv_lora_rank": 32,
        "q_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "n_routed_experts": 4,
        "first_k_dense_replace": 2, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
    },
}  # fmt: skip
NO_ROWS, SOFT_CAPPED = ("bloom",), ("gemma2",)  # trains in padded batches; can't use a kernel for rows
LENGTHS = (13, 130, 1, 64, 77)
# Largest difference allowed: of the logits relative to the largest one, of the loss relative to itself, and of the
# gradients relative to their norm. On a CPU the logits differ by at most 6e-7 (fp32), 2.5e-3 and 1.5e-2; gradients
# differ most for OPT, whose ReLU has a kink.
LIMITS = {"fp32": (1e-4, 1e-4, 1e-3), "fp16": (1e-2, 1e-3, 6e-2), "bf16": (6e-2, 5e-3, 1.5e-1)}

# Of the master weights relative to their norm, and of the gradients' norm, which DeepSpeed sums in float32: for 264,000
# gradients on a CPU it is off by 1.4e-5.
STEP_LIMITS = {"weights": 1e-5, "norm": 1e-4}


def make(family: str) -> torch.nn.Module:
    """Return a random float32 model without dropout, with weights large enough that a leak shows."""
    config = AutoConfig.for_model(family.split(",")[0], **{**FAMILIES[family], "pad_token_id": 0})
    torch.manual_seed(1)
    # Soft-capped scores are right in transformers' eager attention alone, whatever it takes by itself.
    attention = {"attn_implementation": "eager"} if family in SOFT_CAPPED else {}
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model


def documents() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    ids = [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in LENGTHS]
    return [{"input_ids": one, "labels": one.clone()} for one in ids]


def one_by_one(model: torch.nn.Module) -> tuple[torch.Tensor, float]:
    """Return [tokens, vocabulary] logits and the summed loss of plain transformers in float32; keep its gradients."""
    rows, total = [], 0.0
    for document in documents():
        ids = document["input_ids"]
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        loss = F.cross_entropy(logits[:-1], ids[1:], reduction="sum")
        loss.backward()
        rows.append(logits.detach())
        total += loss.item()
    return torch.cat(rows), total


def gradients(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.grad.float().cpu().flatten() for parameter in model.parameters()])


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference relative to that of `expected`."""
    return ((actual - expected).norm() / expected.norm()).item()


def kernel_meant(family: str, dtype: str, device: torch.device) -> str:
    """Return the kernel that must be used for a family's rows on this device."""
    if device.type != "cuda" or family in (*NO_ROWS, *SOFT_CAPPED):
        return "none"
    has_flash = torch.cuda.get_device_capability(device) >= FLASH_CAPABILITY
    if has_flash and dtype != "fp32":
        return "flash"
    return "none" if dtype == "bf16" or "sliding_window" in FAMILIES[family] else "efficient"


def note_kernels() -> set[str]:
    """Return a set that from now on gets the names of the kernels that are used."""
    used: set[str] = set()
    plain = utils.module.attention.kernels_for

    def noting(*args: Any) -> list[Any]:
        found = plain(*args)
        used.update(kernel.__name__ for kernel in found[:1])
        return found

    utils.module.attention.kernels_for = noting
    return used


def train_once(model: torch.nn.Module, batch: dict[str, Any], device: torch.device) -> tuple[float, int | None]:
    """Return the loss of a forward and backward, and how often the host waited for the GPU (None on a CPU)."""
    if device.type != "cuda":
        loss = summed_loss(model, batch)
        loss.backward()
        return loss.item(), None
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        loss = summed_loss(model, batch)
        loss.backward()
        torch.cuda.set_sync_debug_mode("default")
    return loss.item(), sum("called a synchronizing" in str(warning.message) for warning in noted)


def attention(dtype: str, device: torch.device) -> Iterator[dict[str, Any]]:
    """Check each family: documents in one row on the device against one by one in float32 on the CPU."""
    used = note_kernels()
    for family in FAMILIES:
        reference = make(family)
        model = copy.deepcopy(reference).to(device, DTYPES[dtype])
        expected, expected_loss = one_by_one(reference)
        used.clear()
        layout = choose_layout(model, "free", VOCABULARY, device)
        samples = documents()
        batch = collate_free(samples) if layout == "free" else collate_padded(samples, 0)
        batch = to_device(batch, device)
        set_documents(batch.get("document_lengths"), batch.get("cu_seqlens"))
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids") if key in batch}
        with torch.no_grad():
            logits = model(**inputs, use_cache=False).logits.float().cpu()
        if layout == "free":
            logits = logits[0]
        else:
            logits = torch.cat([row[:length] for row, length in zip(logits, LENGTHS, strict=True)])
        loss, waits = train_once(model, batch, device)
        clear_documents()
        found = {
            "logits": ((logits - expected).abs().max() / expected.abs().max()).item(),
            "loss": abs(loss - expected_loss) / expected_loss,
            "gradients": distance(gradients(model), gradients(reference)),
        }
        right = all(value < limit for value, limit in zip(found.values(), LIMITS[dtype], strict=True))
        right &= layout == ("longest" if family in NO_ROWS else "free")
        kernel = ", ".join(sorted(used)) or "none"
        right &= kernel == kernel_meant(family, dtype, device)
        yield {"case": family, "right": right, **found, "layout": layout, "kernel": kernel, "waits": waits}


LOSS_CASES: dict[str, dict[str, Any]] = {
    "plain": {}, "bias": {"bias": True}, "soft-capped": {"softcap": 5.0}, "scaled": {"scale": 0.25},
    "all, frozen weight": {"bias": True, "softcap": 5.0, "scale": 0.25, "frozen": True},
}  # fmt: skip


def loss(dtype: str, device: torch.device) -> Iterator[dict[str, Any]]:
    """Check the fused loss and its gradients, in many chunks, against float64 on the CPU with the same inputs."""
    chunk_loss.CHUNK_BYTES = chunk_loss.CPU_CHUNK_BYTES = 2**20  # 87 rows at a time on a GPU
    rows, width, vocabulary = 700, 64, 3000
    generator = torch.Generator().manual_seed(4)
    shapes = {"hidden": (rows, width), "weight": (vocabulary, width), "bias": (vocabulary,)}
    values = {name: torch.randn(shape, generator=generator).to(DTYPES[dtype]) for name, shape in shapes.items()}
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    for name, case in LOSS_CASES.items():
        if not case.get("bias"):
            values_of = {key: value for key, value in values.items() if key != "bias"}
        else:
            values_of = values
        exact = {key: value.double().requires_grad_() for key, value in values_of.items()}
        here = {key: value.to(device, copy=True).requires_grad_() for key, value in values_of.items()}
        if case.get("frozen"):
            here["weight"].requires_grad_(False)
        scale, softcap = case.get("scale", 1.0), case.get("softcap")
        logits = F.linear(exact["hidden"], exact["weight"], exact.get("bias")) * scale
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        expected = F.cross_entropy(logits, targets, reduction="sum")
        (expected / 1000).backward()
        transform = LogitTransform(scale, softcap)
        actual = fused_loss(here["hidden"], here["weight"], here.get("bias"), targets.to(device), transform)
        (actual / 1000).backward()
        worst = max(
            distance(tensor.grad.double().cpu(), exact[key].grad)
            for key, tensor in here.items()
            if tensor.grad is not None
        )
        found = {"loss": abs(actual.item() - expected.item()) / expected.item(), "gradients": worst}
        _, loss_limit, gradient_limit = LIMITS[dtype]
        right = found["loss"] < loss_limit and worst < gradient_limit and actual.dtype == torch.float32
        yield {"case": name, "right": right, **found}


def wrapped(dtype: str, device: torch.device) -> tuple[torch.nn.Module, FP16_Optimizer]:
    """Return a model and DeepSpeed's wrapper of FusedAdam around its weights, in a decayed group and one without."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(257, 257) for _ in range(4))).to(device, DTYPES[dtype])
    matrices = [one for one in model.parameters() if one.dim() > 1]
    biases = [one for one in model.parameters() if one.dim() == 1]
    inner = FusedAdam([{"params": matrices, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}], lr=1e-2)
    return model, FP16_Optimizer(inner, low_precision_dtype=DTYPES[dtype], clip_grad=1.0)


def step(dtype: str, device: torch.device) -> Iterator[dict[str, Any]]:
    """Check steps in pieces of odd size, clipped or not, one skipped, and one with a weight without gradient."""
    sweep_step.PIECE[device.type] = 10_001
    (theirs, reference), (ours, optimizer) = wrapped(dtype, device), wrapped(dtype, device)
    swept = sweep_step.sweep_in_steps(SimpleNamespace(optimizer=optimizer, device=device))
    for size in (1e-4, 1.0, 30.0, float("inf"), 1e-2):
        for one, two in zip(theirs.parameters(), ours.parameters(), strict=True):
            one.grad = torch.randn_like(one) * size
            two.grad = one.grad.clone()
        theirs[1].bias.grad = ours[1].bias.grad = None
        skipped = [bool(reference.step()), bool(optimizer.step())]
        masters = zip(optimizer.fp32_groups_flat, reference.fp32_groups_flat, strict=True)
        norms = float(optimizer._global_grad_norm), float(reference._global_grad_norm)
        norm = 0.0 if norms[0] == norms[1] else abs(norms[0] / norms[1] - 1)  # both are infinite after a skipped step
        found = {"weights": max(distance(*pair) for pair in masters), "norm": norm}
        right = swept and skipped == [size == float("inf")] * 2
        right &= all(value < STEP_LIMITS[name] for name, value in found.items())
        yield {"case": f"gradients of {size:g}", "right": right, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["attention", "loss", "step"])
    parser.add_argument("--dtype", choices=list(DTYPES), required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    args = parser.parse_args()
    checks = {"attention": attention, "loss": loss, "step": step}
    for case in checks[args.what](args.dtype, torch.device(args.device)):
        print("CASE " + json.dumps(case), flush=True)


if __name__ == "__main__":
    main()
