"""Sequence parallelism (`--sequence_parallel_size`): N ranks share every row of tokens, by DeepSpeed's Ulysses.

Each rank has one part of the row. For attention, queries, keys and values are exchanged so that each rank has the whole
row for its share of the heads; the output is exchanged back (Jacobs et al. 2023, https://arxiv.org/abs/2309.14509, and
Bekman et al. 2025, https://arxiv.org/abs/2506.13996). The exchange is DeepSpeed's; the attention inside it is
`document_attention`, so each document attends to itself alone. ZeRO divides states over all ranks; gradients are summed
over the ranks of a group and averaged over the groups (`averaged_over` of `utils.run_config`), which the weights of the
batches undo.
"""

from __future__ import annotations

from argparse import Namespace
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import transformers
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from transformers import PretrainedConfig

from utils.errors import UserError
from utils.module.attention import document_attention, set_exchange
from utils.module.remote_code import is_trusted

PROBE = "probed"  # a name in transformers' AttentionInterface
PROBE_TOKENS = 8


def start_sequence_parallel(size: int) -> Namespace | None:
    """Form groups of `size` ranks that share rows; return the `mpu` for `deepspeed.initialize`, None for size 1.

    Every rank must call this, once the process group is started.
    """
    _exchange.cache_clear()  # those of an earlier run hold its process groups
    if size == 1:
        set_exchange(None)
        return None
    parallel_state_sp.initialize_sequence_parallel(size)
    set_exchange(_exchanged_attention)
    # DeepSpeed's parallel_state_sp presents these groups as model parallel ones too. Without ZeRO, DeepSpeed would then
    # assume that the ranks of a group hold different weights, and add up gradient norms over them.
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    prefixes = ("initialize", "get_sequence_parallel", "get_sequence_data_parallel")
    functions = {
        name: value for name, value in vars(parallel_state_sp).items() if name.startswith(prefixes) and callable(value)
    }
    return Namespace(
        **functions, get_model_parallel_rank=lambda: 0, get_model_parallel_world_size=lambda: 1,
        get_model_parallel_group=lambda: alone,
    )  # fmt: skip


@cache
def _exchange(heads: int, key_heads: int, head_size: int) -> UlyssesSPAttentionHF:
    """Return DeepSpeed's exchange for one shape of attention: a model may have layers of several shapes."""
    return UlyssesSPAttentionHF(
        attn=document_attention, batch_size=1, attn_head_count=heads, attn_head_size=head_size,
        kv_head_count=key_heads, num_hidden_layers=1, seq_length_is_variable=True,
        process_group=parallel_state_sp.get_sequence_parallel_group(),
    )  # fmt: skip


def _exchanged_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """Compute `document_attention` of the whole row from every rank's part; return this rank's part of the output.

    query, key, value: [1, heads, tokens / N, head size].
    """
    exchange = _exchange(query.shape[1], key.shape[1], query.shape[3])
    # DeepSpeed gathers position ids for kernels that find documents by them. Ours has the lengths: one id is enough.
    kwargs["position_ids"] = torch.zeros(1, 1, dtype=torch.long, device=query.device)
    output, _ = exchange(module, query, key, value, *args, **kwargs)
    return output.unflatten(-1, (query.shape[1], -1)), None


# --------------------------------------------------------------------------------------- before loading


class _Shapes(NamedTuple):
    """Shapes one call of attention got: [1, heads, tokens, head size] each."""

    query: torch.Size
    key: torch.Size
    value: torch.Size


def check_sequence_parallel(config: PretrainedConfig, size: int) -> None:
    """Check that only attention mixes tokens in this model, and that `size` ranks can share its heads.

    The model is run without weights and data, on the meta device.

    Raises:
        UserError: something else mixes tokens, or the heads can't be divided.
    """
    calls, why = _attention_calls(config)
    layers = config.get_text_config().num_hidden_layers
    if why is None and len(calls) != layers:
        why = f"{len(calls)} of its {layers} layers take their attention from transformers' interface"
    if why is None and any(call.query[-1] != call.value[-1] for call in calls):
        why = "its values have another size than its queries"
    if why is not None:
        raise UserError(
            f"--sequence_parallel_size {size}: attention of model type {config.model_type!r} can't be shared by ranks "
            f"({why}). Leave it out; --tiled_mlp, --gradient_checkpointing and --zero_stage 3 save memory too."
        )
    for heads, key_heads in {(call.query[1], call.key[1]) for call in calls}:
        if heads % size or (key_heads % size and size % key_heads):
            raise UserError(
                f"--sequence_parallel_size {size} must divide the model's {heads} attention heads, and divide its "
                f"{key_heads} key-value heads or be a multiple of them: each rank takes a share of the heads."
            )


def _attention_calls(config: PretrainedConfig) -> tuple[list[_Shapes], str | None]:
    """Run the model on the meta device; return the shapes of its attention calls, and the error that ended it."""
    calls: list[_Shapes] = []

    def probe(
        module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        calls.append(_Shapes(query.shape, key.shape, value.shape))
        return document_attention(module, query, key, value, *args, **kwargs)

    transformers.AttentionInterface.register(PROBE, probe)
    try:
        with torch.device("meta"), torch.no_grad():
            # bf16: kernels of mixtures of experts ask for it on the meta device.
            model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=torch.bfloat16, trust_remote_code=is_trusted()
            ).eval()
            model.set_attn_implementation(PROBE)
            ids = torch.zeros(1, PROBE_TOKENS, dtype=torch.long)
            model(input_ids=ids, position_ids=ids, use_cache=False)
    except (NotImplementedError, ValueError, TypeError, RuntimeError, AssertionError) as err:
        return calls, " ".join(str(err).split())[:200]
    return calls, None
