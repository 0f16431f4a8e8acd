"""Reads rows that bring token ids in place of texts, with what stands beside each token: labels or masks."""

from transformers import PreTrainedTokenizerBase

from utils.data.formats.column_text import Sample
from utils.data.formats.conversations import OF_TOKENS, Rows
from utils.errors import UserError

IGNORED = -100


def read_token_row(
    rows: Rows, sample: Sample, tokenizer: PreTrainedTokenizerBase | None, may_mask: bool
) -> tuple[list[int], list[int]]:
    """Return the token ids of a row, without its padding, and the starts and ends of their labels in turn.

    Args:
        may_mask: tokens that are not to be learned are left out of the loss; otherwise they are refused.

    Raises:
        UserError: the columns don't fit together, or the tokenizer has no such token.
    """
    ids = rows.value(sample, "input_ids") or []
    if any(token is None or token < 0 or (tokenizer and token >= len(tokenizer)) for token in ids):
        raise UserError("input_ids holds ids that this tokenizer does not have: tokenize the data with it.")
    beside = {role: _beside(rows, sample, role, len(ids)) for role in OF_TOKENS if role in rows.roles}
    labels, mask, attended = (beside.get(role) for role in OF_TOKENS)
    if labels is not None and any(label not in (IGNORED, token) for label, token in zip(labels, ids, strict=True)):
        raise UserError("labels must be the row's own input_ids, with -100 where nothing is to be learned.")
    learned = [label != IGNORED for label in labels] if labels is not None else mask or [1] * len(ids)
    if attended is not None and 0 in attended:
        kept = [at for at, is_text in enumerate(attended) if is_text]
        ids, learned = [ids[at] for at in kept], [learned[at] for at in kept]
    if not may_mask and not all(learned[1:]):
        name = rows.roles["labels" if labels is not None else "loss_mask"]
        raise UserError(f"{name} leaves tokens out: give --completion_only_loss, which reads it.")
    edges = [at for at in range(1, len(ids)) if bool(learned[at]) != (at > 1 and bool(learned[at - 1]))]
    return ids, edges if len(edges) % 2 == 0 else [*edges, len(ids)]


def _beside(rows: Rows, sample: Sample, role: str, tokens: int) -> list[int] | None:
    """Return what a column holds for each token of a row; None where the row has nothing there."""
    values = rows.value(sample, role)
    if values is None:
        return None
    name = rows.roles[role]
    if len(values) != tokens:
        advice = ", with -100 where nothing is to be learned" if role == "labels" else ""
        raise UserError(
            f"{name} has {len(values)} values beside {tokens} input_ids: it must have one for each{advice}."
        )
    if role != "labels" and any(value not in (0, 1) for value in values):
        raise UserError(f"{name} holds other values than 0 and 1.")
    return values
