"""The layout check: before training, the model itself is tested for document attention and the fused loss.

Two short documents are computed in one row and one by one, and the results compared. A method that gives another result
with this model is not used, and a printed line says why.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PretrainedConfig

from utils.data.batching.batches import collate_for
from utils.data.batching.collate import collate_padded
from utils.distributed.ranks import print_rank_0
from utils.errors import UserError
from utils.machine.device import to_device
from utils.model.config_values import max_positions, windows
from utils.module.attention import clear_documents, restore_attention, set_documents, use_document_attention
from utils.module.fused_loss import can_fuse, install_loss, summed_loss

CAUSAL = 1e-4  # relative difference from which on a model looks ahead
FIRST, SECOND = 19, 11  # lengths of the documents: odd, so that no kernel's block ends with a document and hides a leak


def choose_layout(
    model: nn.Module,
    padding: str,
    vocabulary: int,
    device: torch.device,
    part: tuple[int, int] = (0, 1),
    longest: int | None = None,
) -> str:
    """Return the layout to train with: `padding`, or "longest" instead of "free" where document attention is wrong.

    The model is left with the attention for that layout and with the loss installed, fused where that is right. Every
    rank must call this.

    Args:
        model: the bare model, on its device.
        padding: "free", "longest" or "max_length", as asked for.
        vocabulary: the documents' token ids are below this.
        part: (k, N) where each rank gets part k of N of a row.
        longest: tokens of the longest document there will be; None: as many as the model has positions for.

    Raises:
        UserError: the model looks ahead, or the parts of a row give another result than the whole row.
    """
    generator = torch.Generator().manual_seed(0)
    length = first_length(model.config, longest)
    first, other, second = (
        torch.randint(0, vocabulary, (size,), generator=generator) for size in (length, length, SECOND)
    )
    training = model.training
    model.eval()
    with torch.no_grad():
        alone = [_logits(model, [document], device) for document in (first, second)]
        _check_causality(model, first, vocabulary, alone[0], device)
        if padding == "free":
            padding = _check_documents(model, first, other, second, alone, device)
        if padding == "longest":
            _check_padding(model, [first, second], alone, device)
        _check_loss(model, [first, second], alone, padding, device)
        if part[1] > 1:
            _check_parts(model, [first, second], alone, padding, device, part)
    clear_documents()
    model.train(training)
    return padding


def first_length(config: PretrainedConfig, longest: int | None) -> int:
    """Return the length of the first document: it reaches beyond every window and chunk that a document can reach.

    A window that no document is longer than changes nothing, and is not reached here either.
    """
    limits = [limit for limit in (longest, max_positions(config)) if limit is not None]
    reachable = [size for size in windows(config) if all(size < limit for limit in limits)]
    return min([max([0, *reachable]) + FIRST, *(max(limit, FIRST) for limit in limits)])


def _check_causality(
    model: nn.Module, document: torch.Tensor, vocabulary: int, logits: torch.Tensor, device: torch.device
) -> None:
    """Check that other tokens in the second half leave the logits of the first as they were.

    Both forwards have the same shapes, so a model that looks back alone gives the same to the last bit in any dtype.
    Experts are the exception: how many tokens an expert gets may change how its products round.

    Args:
        logits: of `document`, [tokens, vocabulary].

    Raises:
        UserError: it changes them: an encoder, whose loss as a causal model would be that of tokens it has seen.
    """
    kept = len(document) // 2
    changed = torch.cat([document[:kept], (document[kept:] + 1) % vocabulary])
    difference = _relative(_logits(model, [changed], device)[:kept], logits[:kept])
    rounds = next(model.parameters()).dtype != torch.float32 and any(
        "expert" in key for key, _ in model.named_modules()
    )
    # A difference that is no number is that of weights which are none: the training's first loss says so.
    if _any_rank(difference >= (5e-2 if rounds else CAUSAL), device):
        raise UserError(
            f"model type {model.config.model_type!r} looks ahead: other later tokens change the logits before them by "
            f"{difference:.1e} of the largest. It is an encoder, or set up as one (is_decoder in config.json), and "
            "can't be trained to continue texts: give a causal language model."
        )


def _samples(documents: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": ids, "labels": ids.clone()} for ids in documents]


def _batch(documents: list[torch.Tensor], padding: str, device: torch.device) -> dict[str, Any]:
    return to_device(collate_for(padding, 0, max(map(len, documents)))(_samples(documents)), device)


def _logits(model: nn.Module, documents: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Return [tokens, vocabulary] logits in float32 on the host; a single document is given as plain input ids."""
    row = _batch(documents, "free", device)
    if len(documents) == 1:
        clear_documents()
        return model(input_ids=row["input_ids"], use_cache=False).logits[0].float().cpu()
    set_documents(row["document_lengths"], row["cu_seqlens"])
    return model(input_ids=row["input_ids"], position_ids=row["position_ids"], use_cache=False).logits[0].float().cpu()


def _check_documents(
    model: nn.Module,
    first: torch.Tensor,
    other: torch.Tensor,
    second: torch.Tensor,
    alone: list[torch.Tensor],
    device: torch.device,
) -> str:
    """Switch to document attention and return "free", or keep the model's own attention and return "longest".

    Args:
        first, second: the documents of the row.
        other: another document of `first`'s length.
        alone: logits of `first` and `second`, computed one by one.
    """
    before = use_document_attention(model)
    exact = next(model.parameters()).dtype == torch.float32
    try:
        together = _logits(model, [first, second], device)
        changed = _logits(model, [other, second], device)
        difference = _relative(together, torch.cat(alone))
        # Another first document must not change the second one's logits: both rows round alike in any dtype.
        leak = _relative(changed[len(first) :], together[len(first) :])
        right = difference < (1e-4 if exact else 5e-2) and leak < (1e-6 if exact else 1e-3)
        detail = f"logits differ by {difference:.1e} of the largest, {leak:.1e} with another neighbour"
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError) as err:  # RuntimeError: this torch or GPU has no such kernel
        right, detail = False, " ".join(str(err).split())[:300]
    if _any_rank(not right, device):
        restore_attention(model, before)
        print_rank_0(
            f"Padding: longest, not free: documents in one row are not kept apart by model type "
            f"{model.config.model_type!r} ({detail})"
        )
        return "longest"
    print_rank_0(f"Padding: free, no token is padding (checked on this model: {detail})")
    return "free"


def _check_padding(
    model: nn.Module, documents: list[torch.Tensor], alone: list[torch.Tensor], device: torch.device
) -> None:
    """Compute both documents with padding after them, and print it where they get other logits than alone.

    What is after a token has no part in it, but how long a row is may decide, where the best keys of a sparse
    attention are chosen among equals.
    """
    limit = max_positions(model.config) or math.inf
    width = int(min(max(map(len, documents)) + SECOND, limit))
    batch = to_device(collate_padded(_samples(documents), 0, width), device)
    clear_documents()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = model(**inputs, use_cache=False).logits.float().cpu()
    padded = [row[: len(document)] for row, document in zip(logits, documents, strict=True)]
    difference = _relative(torch.cat(padded), torch.cat(alone))
    if _any_rank(difference >= (1e-4 if next(model.parameters()).dtype == torch.float32 else 5e-2), device):
        print_rank_0(
            f"Padding: with model type {model.config.model_type!r} a padded sample gets other logits than alone, by "
            f"{difference:.1e} of the largest: its loss depends on the longest sample of its batch. Batches of one "
            "sample (--per_device_train_batch_size 1, --per_device_eval_batch_size 1) have no padding"
        )


def _check_loss(
    model: nn.Module, documents: list[torch.Tensor], alone: list[torch.Tensor], padding: str, device: torch.device
) -> None:
    """Install the fused loss if it gives what plain cross-entropy of the logits `alone` gives, else the plain loss."""
    if padding == "max_length":
        install_loss(model, fused=False)
        print_rank_0(
            "Padding: all to max_seq_len, and the loss from full logits: as the original program does, for comparison"
        )
        return
    if not can_fuse(model):
        install_loss(model, fused=False)
        print_rank_0("Loss: plain cross-entropy; the head is not a plain Linear, so it can't be fused")
        return
    install_loss(model, fused=True)
    expected = sum(
        nn.functional.cross_entropy(logits[:-1], document[1:], reduction="sum").item()
        for logits, document in zip(alone, documents, strict=True)
    )
    try:
        difference = abs(summed_loss(model, _batch(documents, padding, device)).item() - expected) / expected
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # something lies between the hidden states and the head, and their sizes differ (RemBERT)
        difference = math.inf
    if _any_rank(not difference < (1e-4 if next(model.parameters()).dtype == torch.float32 else 1e-2), device):
        install_loss(model, fused=False)
        print_rank_0(f"Loss: plain cross-entropy; fused it would differ by {difference:.1e} in this model")
        return
    print_rank_0(f"Loss: fused with the vocabulary projection (checked on this model: differs by {difference:.1e})")


def _check_parts(
    model: nn.Module,
    documents: list[torch.Tensor],
    alone: list[torch.Tensor],
    padding: str,
    device: torch.device,
    part: tuple[int, int],
) -> None:
    """Compare the logits of this rank's part of a row with those of the documents one by one.

    Raises:
        UserError: they differ on any rank.
    """
    difference, detail = math.inf, "its documents can't lie in one row"
    if padding == "free":
        row = to_device(collate_for("free", 0, len(documents[0]), part)(_samples(documents)), device)
        set_documents(row["document_lengths"], row["cu_seqlens"], part)
        logits = model(input_ids=row["input_ids"], position_ids=row["position_ids"], use_cache=False).logits[0]
        start = part[0] * len(logits)
        expected = torch.cat(alone)[start : start + len(logits)]
        difference = _relative(logits[: len(expected)].float().cpu(), expected) if len(expected) else 0.0
        detail = f"logits differ by {difference:.1e} of the largest"
    if _any_rank(not difference < (1e-4 if next(model.parameters()).dtype == torch.float32 else 5e-2), device):
        raise UserError(
            f"--sequence_parallel_size {part[1]}: the parts of a row don't give what the whole row gives with model "
            f"type {model.config.model_type!r} ({detail}): leave it out."
        )
    print_rank_0(f"Sequence parallelism: {part[1]} ranks share a row (checked on this model: {detail})")


def _relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference relative to the largest expected value."""
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()


def _any_rank(failed: bool, device: torch.device) -> bool:
    """Return on every rank whether the check failed on any: all ranks must train in the same layout."""
    flag = torch.tensor(float(failed), device=device)
    if dist.is_initialized():
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return flag.item() > 0
