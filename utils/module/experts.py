"""What LoRA leaves of a mixture of experts: transformers 5 joins a layer's experts in tensors [experts, out, in]."""

from torch import nn

from utils.distributed.zero3 import whole_numel, whole_shape


def describe_joined_experts(model: nn.Module) -> str | None:
    """Return a line on the experts that LoRA can't wrap, since they are no layers; None where there are none.

    Experts that are Linear layers are wrapped like any. Call it when what trains is decided.
    """
    joined = [weight for name, weight in model.named_parameters() if len(whole_shape(weight)) == 3 and "expert" in name]
    if not joined:
        return None
    size = sum(whole_numel(weight) for weight in joined)
    trains = sum(weight.requires_grad for weight in joined)
    what = f"{len(joined)} tensors of joined experts ({size:,} parameters), which LoRA can't wrap,"
    if trains:
        return f"{what} train whole, as all that is not wrapped; --only_optimize_lora freezes them"
    return f"{what} stay frozen"
