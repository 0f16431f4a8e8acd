"""Read a saved model back and compare it with the one that was trained.

Always: every tensor against the checksum of what was gathered, the names that plain transformers asks for (a load
without memory), and the tokenizer. Up to a size: the logits of the reloaded model too, which needs it in CPU memory;
above it each merged weight against the forward of its trained layer (`utils.export.merged`).
"""

from __future__ import annotations

import math
import os
from typing import NamedTuple

import torch
import transformers
from safetensors import SafetensorError, safe_open

from utils.errors import UserError
from utils.export.owned_files import WEIGHT_NAMES
from utils.export.weights import WrittenTensor, tensor_checksum
from utils.module.remote_code import is_trusted

# Above so many bytes of weights the saved model is not run: rank 0's CPU would hold and compute all of it.
FORWARD_LIMIT = 16 * 10**9
SAMPLE_TOKENS = 64  # of the text whose logits are compared
PROBES = (
    "Human: How many legs has a spider? Assistant: Eight.", "  two spaces,\n\na line; 3.14 and 蜘蛛有八条腿。 ü €",
)  # fmt: skip
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
LOADING_ERRORS = (OSError, ValueError, RuntimeError, KeyError, SafetensorError)


class Verification(NamedTuple):
    """What was compared, and found equal."""

    tensors: int = 0  # read back, each with the checksum of what was gathered
    size: int = 0  # bytes of them
    difference: float | None = None  # of the logits, relative to the largest; None: no forward
    merged: int = 0  # LoRA layers whose own forward gave the merged weight

    def words(self, folder: str) -> list[str]:
        """Return the printed lines."""
        lines = [
            f"Read back from {folder}: {self.tensors} tensors ({self.size / 1e9:.2f} GB) have the checksums of what "
            "was gathered, plain transformers finds each weight by name, and the tokenizer is the one trained with"
        ]
        if self.difference is not None:
            return [
                *lines,
                f"Saved to {folder} and verified: reloaded logits differ by {self.difference:.1e} of the largest",
            ]
        if self.merged:
            lines.append(f"Merged: the weights of {self.merged} LoRA layers are, to rounding, what the layers compute")
        return [
            *lines,
            f"Saved to {folder} and verified by checksums: above {FORWARD_LIMIT / 1e9:.0f} GB of weights no second "
            "model is run to compare logits",
        ]


def live_logits(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Return the logits [1, length, vocabulary] of the live model, float32 on the CPU. Every rank must call it."""
    training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=input_ids, use_cache=False).logits
    model.train(training)
    return logits.float().cpu()


def verify_folder(
    folder: str,
    written: dict[str, WrittenTensor],
    tokenizer: transformers.PreTrainedTokenizerBase,
    sample: torch.Tensor,
    expected: torch.Tensor | None,
) -> Verification:
    """Read a saved model back and compare it with the trained one.

    Args:
        written: what was gathered, by name.
        sample: [length] token ids.
        expected: [1, length, vocabulary] float32 logits of the live model on the first tokens; None: no forward.

    Raises:
        UserError: something is not what was written; the folder stays for inspection.
    """
    compare_tensors(folder, written)
    compare_tokenizers(folder, tokenizer, sample)
    check_names(folder)
    difference = None
    if expected is not None:
        difference = verify_saved_model(folder, sample[None, :SAMPLE_TOKENS], expected)
    size = sum(math.prod(entry.shape) * entry.dtype.itemsize for entry in written.values())
    return Verification(len(written), size, difference)


def compare_tensors(folder: str, written: dict[str, WrittenTensor]) -> None:
    """Read every tensor back, one at a time, and compare it with the checksum of what was gathered.

    Raises:
        UserError: one is missing, too many, or other than it was.
    """
    files = [name for name in os.listdir(folder) if WEIGHT_NAMES.fullmatch(name) and name.endswith(".safetensors")]
    found = {}
    try:
        for file in sorted(files):
            with safe_open(os.path.join(folder, file), framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118 (no dictionary)
                    tensor = stored.get_tensor(name)
                    found[name] = WrittenTensor(file, tensor.dtype, tuple(tensor.shape), tensor_checksum(tensor))
    except (OSError, SafetensorError) as err:
        raise UserError(f"the model saved in {folder} can't be read back: {err}. Don't use it.") from err
    other = sorted(name for name in {*found, *written} if found.get(name) != written.get(name))
    if other:
        raise UserError(
            f"the model saved in {folder} is not what was written: {len(other)} of {len(written)} tensors differ when "
            f"read back ({', '.join(other[:3])}). Is the disk sound? The folder was left for inspection; don't use it."
        )


def compare_tokenizers(folder: str, tokenizer: transformers.PreTrainedTokenizerBase, sample: torch.Tensor) -> None:
    """Load the saved tokenizer with plain transformers and compare it with the one trained with.

    Raises:
        UserError: it does not load, or has another length, special token or reading of a text.
    """
    try:
        again = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=is_trusted()
        )
    except (*LOADING_ERRORS, ImportError) as err:
        raise UserError(f"the tokenizer saved in {folder} does not load again: {err}") from err
    texts = [*PROBES, tokenizer.decode(sample[:SAMPLE_TOKENS].tolist())]
    pairs = {
        "length": (len(tokenizer), len(again)),
        **{name: (getattr(tokenizer, name), getattr(again, name)) for name in TOKEN_IDS},
        **{f"ids of {text[:30]!r}": (_ids(tokenizer, text), _ids(again, text)) for text in texts},
    }
    other = [
        f"{what}: {before} trained with, {after} saved" for what, (before, after) in pairs.items() if before != after
    ]
    if other:
        raise UserError(
            f"the tokenizer saved in {folder} is not the one trained with ({other[0]}). The folder was left for "
            "inspection; don't use it."
        )


def _ids(tokenizer: transformers.PreTrainedTokenizerBase, text: str) -> list[int] | str:
    """Return the ids of a text; for one that the tokenizer can't read (it has no token for the unknown), why."""
    try:
        return tokenizer(text)["input_ids"]
    except Exception as err:  # the Rust library raises bare ones
        return f"{type(err).__name__}: {err}"


def check_names(folder: str) -> None:
    """Load the folder with plain transformers, without memory for its weights: each must be found, and none be over.

    Raises:
        UserError: it does not load, or by other names than the saved ones.
    """
    try:
        _, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, device_map="meta", output_loading_info=True, local_files_only=True, trust_remote_code=is_trusted()
        )
    except LOADING_ERRORS as err:
        raise UserError(f"the model saved in {folder} does not load again: {err}") from err
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(map(str, info[kind]))
        if names:
            raise UserError(
                f"the model saved in {folder} does not load again as it was: {len(names)} {kind.replace('_', ' ')} "
                f"({', '.join(names[:3])}). The folder was left for inspection; don't use it."
            )


def verify_saved_model(folder: str, input_ids: torch.Tensor, expected: torch.Tensor) -> float:
    """Load `folder` with plain transformers on the CPU and compare its logits with the live model's.

    Args:
        input_ids: [1, length] token ids.
        expected: [1, length, vocabulary] float32 logits of the live model on the same ids.

    Returns:
        the largest difference relative to the largest logit.

    Raises:
        UserError: it does not load, or differs by more than the dtype's rounding explains.
    """
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", local_files_only=True, trust_remote_code=is_trusted()
        )
    except LOADING_ERRORS as err:
        raise UserError(f"the model saved in {folder} does not load again: {err}") from err
    actual = live_logits(model, input_ids.cpu())
    if actual.shape == expected.shape:
        difference = ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-6)).item()
    else:
        difference = math.inf  # another vocabulary
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    if not difference <= tolerance:
        raise UserError(
            f"the model saved in {folder} is not the trained one: its logits differ by {difference:.2%} "
            f"(allowed {tolerance:.1%} in {model.dtype}). The folder was left for inspection; don't use it."
        )
    return difference
