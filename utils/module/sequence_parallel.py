"""`--sequence_parallel_size`: N ranks share every row of tokens, by DeepSpeed's Ulysses sequence parallelism.

Each rank has one part of the row. For attention, queries, keys and values are exchanged so that each rank has the whole
row for its share of the heads, and exchanged back after it (Jacobs et al. 2023, https://arxiv.org/abs/2309.14509, and
Bekman et al. 2025, https://arxiv.org/abs/2506.13996). The exchange is DeepSpeed's; the attention inside it is
`attention.py`'s, so documents stay apart. ZeRO divides states over all ranks; gradients are summed over the ranks of a
group and averaged over the groups (`averaged_over`), which the weights of `batches.py` undo.
"""

from argparse import Namespace
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig

from utils.errors import UserError
from utils.module.attention import Documents, document_attention
from utils.run_config import parse_gpus

PROBE = "probed"
PROBE_TOKENS = 8
_PROBED: list[tuple[torch.Size, torch.Size, torch.Size]] = []


def start_sequence_parallel(args: Namespace) -> Namespace | None:
    """Form the groups; returns what `deepspeed.initialize` takes as `mpu`, None without sequence parallelism.

    Every rank must call it, once the process group stands. A plan for GPUs that are not here forms none.
    """
    if args.sequence_parallel_size == 1 or parse_gpus(args.dry_run) is not None:
        return None
    parallel_state_sp.initialize_sequence_parallel(args.sequence_parallel_size)
    Documents.exchange = _exchanged_attention
    # DeepSpeed's own state names these groups model parallel ones too. Without ZeRO it would then take the ranks of a
    # group for holders of different weights: gradient norms would be added up over them.
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    names = ("initialize", *(f"get_sequence{data}_parallel" for data in ("", "_data")))
    taken = {
        name: value for name, value in vars(parallel_state_sp).items() if name.startswith(names) and callable(value)
    }
    return Namespace(
        **taken, get_model_parallel_rank=lambda: 0, get_model_parallel_world_size=lambda: 1,
        get_model_parallel_group=lambda: alone,
    )  # fmt: skip


@cache
def _exchange(heads: int, key_heads: int, head_size: int) -> UlyssesSPAttentionHF:
    """One for each shape of attention: a family may have layers of different ones."""
    return UlyssesSPAttentionHF(
        attn=document_attention, batch_size=1, attn_head_count=heads, attn_head_size=head_size,
        kv_head_count=key_heads, num_hidden_layers=1, seq_length_is_variable=True,
        process_group=parallel_state_sp.get_sequence_parallel_group(),
    )  # fmt: skip


def _exchanged_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """`document_attention` of the whole row, each rank giving its part and getting its part of the output.

    query, key, value: [1, heads, tokens / N, head size]. DeepSpeed wants position ids, to gather them for kernels that
    find documents by them. Ours has the lengths, so the smallest tensor will do.
    """
    exchange = _exchange(query.shape[1], key.shape[1], query.shape[3])
    kwargs["position_ids"] = torch.zeros(1, 1, dtype=torch.long, device=query.device)
    output, _ = exchange(module, query, key, value, *args, **kwargs)
    return output.unflatten(-1, (query.shape[1], -1)), None


# --------------------------------------------------------------------------------------- before loading


def _probe(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """`document_attention` that notes the shapes it is called with."""
    _PROBED.append((query.shape, key.shape, value.shape))
    return document_attention(module, query, key, value, *args, **kwargs)


AttentionInterface.register(PROBE, _probe)


def check_sequence_parallel(config: PretrainedConfig, size: int) -> None:
    """Run the model without weights or data, and see whether all its mixing of tokens is attention that can be shared.

    Raises:
        UserError: it is not, or its heads can't be divided.
    """
    name = config.model_type
    why = None
    _PROBED.clear()
    try:
        with torch.device("meta"), torch.no_grad():
            # In bf16, which experts' kernels ask for where there are no data.
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
            model.set_attn_implementation(PROBE)
            ids = torch.zeros(1, PROBE_TOKENS, dtype=torch.long)
            model(input_ids=ids, position_ids=ids, use_cache=False)
    except (NotImplementedError, ValueError, TypeError, RuntimeError, AssertionError) as err:
        why = " ".join(str(err).split())[:200]
    layers = config.get_text_config().num_hidden_layers
    if why is None and len(_PROBED) != layers:
        why = f"{len(_PROBED)} of its {layers} layers take their attention from transformers' interface"
    if why is None and any(query[-1] != value[-1] for query, _, value in _PROBED):
        why = "its values have another size than its queries"
    if why is not None:
        raise UserError(
            f"--sequence_parallel_size {size}: attention of model type {name!r} can't be shared by ranks ({why}). "
            "Leave it out; --tiled_mlp, --gradient_checkpointing and --zero_stage 3 save memory too."
        )
    for heads, key_heads in {(query[1], key[1]) for query, key, _ in _PROBED}:
        if heads % size or (key_heads % size and size % key_heads):
            raise UserError(
                f"--sequence_parallel_size {size} must divide the model's {heads} attention heads, and divide its "
                f"{key_heads} key-value heads or be a multiple of them: each rank takes a share of the heads."
            )
