"""The training loop of DeepSpeed-Chat's step 1, written anew in plain torch and transformers, without DeepSpeed.

Four switches of `Setting` are the mathematics of the original where main.py's are others on purpose. With all of them
off the loop computes what main.py computes; each one alone shows what that difference does.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

SWITCHES = {
    "count_padding": "padding is labelled too, as in the code of 2023",
    "mean_of_means": "a step's loss is the mean of its micro batches' means",
    "fixed_order": "every epoch has the order of the first: set_epoch is never called",
    "carry_over": "an epoch's incomplete step is filled from the next epoch; a last incomplete one is not taken",
}


@dataclass(frozen=True)
class Setting:
    """What is trained and how; the switches are those of `SWITCHES`."""

    model: str
    data: str  # a folder with train.json and eval.json: records with `prompt` and `chosen`
    max_seq_len: int = 64
    micro_batch: int = 8
    accumulation: int = 4
    epochs: int = 3
    learning_rate: float = 1e-3
    seed: int = 1234
    lora_dim: int = 0
    lora_learning_rate: float = 5e-4
    in_float64: bool = False  # the yardstick: two runs in float32 differ by as much as either differs from this one
    count_padding: bool = False
    mean_of_means: bool = False
    fixed_order: bool = False
    carry_over: bool = False


class Step(NamedTuple):
    """One optimizer step."""

    epoch: int  # of its last micro batch, from 1
    loss: float  # what was minimized
    real_loss: float  # per real label token, whatever was minimized: what main.py records


class Samples(NamedTuple):
    """All samples of a file, padded to the same length: [samples, max_seq_len]."""

    ids: torch.Tensor
    mask: torch.Tensor


class LoRALinear(nn.Module):
    """A frozen linear layer plus x R L / r, with R [in, r] and L [r, out], and lora_scaling 1."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear, self.rank = linear, rank
        self.right = nn.Parameter(torch.empty(linear.in_features, rank))
        self.left = nn.Parameter(torch.zeros(rank, linear.out_features))
        # As it is stored: torch reads fan-in from the last dimension, so the range is U(-1/sqrt(r), 1/sqrt(r)).
        nn.init.kaiming_uniform_(self.right, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + (x @ self.right @ self.left) / self.rank


def load_model(setting: Setting) -> nn.Module:
    """Load the model without dropout; with `lora_dim`, wrap the decoder's linear layers and train LoRA alone."""
    torch.manual_seed(setting.seed)  # LoRA's first weights are main.py's if they are drawn in the same way
    model = AutoModelForCausalLM.from_pretrained(setting.model, dtype=torch.float32).eval()  # eval: no dropout
    if setting.lora_dim > 0:
        model.requires_grad_(False)
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and "decoder.layers." in name:
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, LoRALinear(module, setting.lora_dim))
    return model.double() if setting.in_float64 else model


def read_samples(setting: Setting, split: str) -> Samples:
    """Tokenize one file in the published order of a data set used whole, padded to `max_seq_len`."""
    tokenizer = AutoTokenizer.from_pretrained(setting.model)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "right"  # as the original sets them
    records = json.loads((Path(setting.data) / f"{split}.json").read_text(encoding="utf-8"))
    order = np.arange(len(records), dtype=np.uint32)
    np.random.RandomState(setting.seed).shuffle(order)
    texts = [f" {records[row]['prompt']} {records[row]['chosen']}{tokenizer.eos_token}" for row in order]
    encoded = tokenizer(
        texts, max_length=setting.max_seq_len, padding="max_length", truncation=True, return_tensors="pt"
    )
    return Samples(encoded["input_ids"], encoded["attention_mask"])


def micro_batches(setting: Setting, count: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (epoch, positions of the samples) of every micro batch of the run."""
    for epoch in range(1, setting.epochs + 1):
        # The original's one order is that of torch's sampler. Here it is main.py's of the first epoch, so that both
        # train on the same samples there and a difference is due to the switches alone.
        order = np.random.default_rng([setting.seed, 1 if setting.fixed_order else epoch]).permutation(count)
        for start in range(0, count, setting.micro_batch):
            yield epoch, order[start : start + setting.micro_batch]


def optimizer_steps(setting: Setting, count: int) -> Iterator[list[tuple[int, np.ndarray]]]:
    """Yield the micro batches of every optimizer step of the run."""
    group: list[tuple[int, np.ndarray]] = []
    for micro in micro_batches(setting, count):
        if group and group[-1][0] != micro[0] and not setting.carry_over:
            yield group
            group = []
        group.append(micro)
        if len(group) == setting.accumulation:
            yield group
            group = []
    if group and not setting.carry_over:
        yield group


def token_losses(model: nn.Module, samples: Samples, rows: np.ndarray) -> torch.Tensor:
    """Return the loss of every token but the first, padding included: [samples, max_seq_len - 1]."""
    ids = samples.ids[rows]
    logits = model(input_ids=ids, attention_mask=samples.mask[rows], use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")


def train(setting: Setting) -> tuple[list[Step], float]:
    """Train; return every step, and the loss per real label token of eval.json afterwards."""
    model, samples = load_model(setting), read_samples(setting, "train")
    count = len(samples.ids)
    plain = [p for name, p in model.named_parameters() if p.requires_grad and not name.endswith((".right", ".left"))]
    lora = [p for name, p in model.named_parameters() if name.endswith((".right", ".left"))]
    groups = [{"params": plain, "lr": setting.learning_rate}, {"params": lora, "lr": setting.lora_learning_rate}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.95), weight_decay=0.0)
    per_epoch = math.ceil(math.ceil(count / setting.micro_batch) / setting.accumulation)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=0, num_training_steps=setting.epochs * per_epoch)

    steps, real = [], samples.mask[:, 1:].bool()
    labelled = real | setting.count_padding
    for group in optimizer_steps(setting, count):
        everything = np.concatenate([rows for _, rows in group])
        minimized = real_sum = 0.0
        for _, rows in group:
            losses = token_losses(model, samples, rows)
            divisor = labelled[rows].sum() * len(group) if setting.mean_of_means else labelled[everything].sum()
            loss = losses[labelled[rows]].sum() / divisor
            loss.backward()
            minimized += loss.item()
            real_sum += losses.detach()[real[rows]].sum().item()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        steps.append(Step(group[-1][0], minimized, real_sum / real[everything].sum().item()))
    return steps, held_out_loss(model, read_samples(setting, "eval"))


@torch.no_grad()
def held_out_loss(model: nn.Module, samples: Samples, at_once: int = 32) -> float:
    """Return the loss per real label token over all samples."""
    total, real = 0.0, samples.mask[:, 1:].bool()
    for rows in np.array_split(np.arange(len(real)), -(-len(real) // at_once)):
        total += token_losses(model, samples, rows)[real[rows]].sum().item()
    return total / real.sum().item()
