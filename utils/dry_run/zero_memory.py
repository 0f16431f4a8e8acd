"""Estimate the bytes one device needs under DeepSpeed, from a model's counts and a run's settings: plain arithmetic.

ZeRO (Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054) divides AdamW's state by the number of ranks at stage
1, the gradients too at stage 2, the weights too at stage 3. What exists beside that, and when, was read off DeepSpeed
0.19.8 and measured (`benchmarks/memory_estimate.py`); it is more than the paper's 16 bytes a weight:

  * without ZeRO fp32 has no master copy; 16 bits have one, and start with a float32 gradient of zeros for each weight
    (the step itself needs a small buffer only, `utils/engine/sweep_step.py`);
  * stages 1 and 2 peak alike with one micro batch a step: stage 1 is the stage 2 optimizer, which clears every gradient
    once its bucket is reduced and keeps this rank's part. With accumulation stage 1 keeps all of them until the last
    micro batch, stage 2 never does. (Summed on two ranks: `tests/dry_run/test_memory.py`);
  * under ZeRO there is a float32 master in fp32 too, a copy of the weights;
  * gradients pass through buckets of `reduce_bucket_size` elements: two with `overlap_comm` at stages 1 and 2, one at
    stage 3 and a copy while it is reduced. A GPU reserves them whole, a CPU only what is written to.
"""

from typing import Any, NamedTuple

from utils.module.nf4 import BITS

FULL = 4  # bytes of a float32
MOMENTS = 8  # AdamW's two, in float32
DEFAULT_BUCKET = 500_000_000  # DeepSpeed's, in elements
UNBUCKETED = 500_000_000  # elements DeepSpeed's plain all-reduce joins at a time


class Setting(NamedTuple):
    """How a model is trained."""

    stage: int
    ranks: int
    offload: bool
    dtype_bytes: int  # of weights and gradients: 4 or 2
    on_cpu: bool = False  # pages nobody writes to take no memory
    bucket: int = DEFAULT_BUCKET  # elements
    overlap: bool = True
    gathered: int = 60_000_000  # stage3_max_live_parameters and stage3_prefetch_bucket_size together, in elements
    accumulates: bool = False  # several micro batches a step
    reduces_in_float32: bool = False  # gradients of 16 bits, as DeepSpeed does where ranks share rows
    nvme: bool = False  # what is offloaded goes to files (with offload alone)
    sub_group: int = 1_000_000_000  # elements of a rank's part of the optimizer that are read and written at a time
    swap_buffers: int = 5  # each of a rank's part of the largest weight


class Sizes(NamedTuple):
    """Of the model and its largest micro batch (`activation_memory.Counts`); bytes but for the first three."""

    parameters: int
    trainable: int
    largest: int
    activations: int
    forward: int
    backward: int
    with_gradients: int
    offloaded: int = 0
    quantized: int = 0  # parameters in 4 bits
    largest_quantized: int = 0  # parameters of one such weight


class Estimate(NamedTuple):
    """Bytes on one device; `peak` is the largest of `moments`, and not all parts are there at once."""

    weights: int
    gradients: int
    optimizer: int  # master weights and moments
    activations: int
    logits: int  # head, logits and loss, at the end of the forward
    buffers: int  # buckets and gathered weights
    moments: dict[str, int]  # most bytes while starting, in the forward and backward, and in the step
    host: int  # bytes of CPU memory per rank, with offload of states or activations

    @property
    def peak(self) -> int:
        return max(self.moments.values())


def setting_from_config(config: dict[str, Any], ranks: int, dtype_bytes: int, on_cpu: bool) -> Setting:
    """Read off a DeepSpeed configuration what the estimate needs."""
    zero = config["zero_optimization"]
    gathered = zero.get("stage3_max_live_parameters", 1e9) + zero.get("stage3_prefetch_bucket_size", 5e7)
    device = zero.get("offload_optimizer", {}).get("device", "none")
    return Setting(
        zero["stage"], ranks, device != "none", dtype_bytes, on_cpu,
        int(zero.get("reduce_bucket_size", DEFAULT_BUCKET)), bool(zero.get("overlap_comm", False)), int(gathered),
        config.get("gradient_accumulation_steps", 1) > 1,
        config.get("sequence_parallel_size", 1) > 1 and dtype_bytes < FULL,
        device == "nvme",
        int(zero.get("sub_group_size", Setting._field_defaults["sub_group"])),
        zero.get("offload_param", {}).get("buffer_count", Setting._field_defaults["swap_buffers"]),
    )  # fmt: skip


def estimate(sizes: Sizes, setting: Setting) -> Estimate:
    """Return the bytes one device needs; every rank is taken to hold an equal part."""
    if setting.stage == 0:
        guess = _without_zero(sizes, setting)
    else:
        guess = _stage_1_or_2(sizes, setting) if setting.stage < 3 else _stage_3(sizes, setting)
    if setting.reduces_in_float32:
        copy = FULL * min(sizes.trainable, setting.bucket)
        moments = {**guess.moments, "backward": guess.moments["backward"] + copy}
        guess = guess._replace(buffers=guess.buffers + copy, moments=moments)
    if sizes.quantized:  # one weight at a time is turned back for its products
        plain = setting.dtype_bytes * sizes.largest_quantized
        moments = {**guess.moments, "backward": guess.moments["backward"] + plain}
        guess = guess._replace(buffers=guess.buffers + plain, moments=moments)
    return guess._replace(host=guess.host + sizes.offloaded)


def _weight_bytes(sizes: Sizes, setting: Setting) -> float:
    """Return the bytes of the whole model's weights."""
    return setting.dtype_bytes * (sizes.parameters - sizes.quantized) + BITS / 8 * sizes.quantized


def _without_zero(sizes: Sizes, setting: Setting) -> Estimate:
    size, trained = setting.dtype_bytes, sizes.trainable
    weights, gradients = _weight_bytes(sizes, setting), size * trained
    master = FULL * trained if size < FULL else 0
    optimizer = master + MOMENTS * trained
    joined = size * min(trained, UNBUCKETED)
    # Where ranks share rows the step is DeepSpeed's: all gradients in float32, and those joined.
    joined_in_float32 = 2 * FULL * trained if setting.reduces_in_float32 else 0
    earlier = gradients if setting.accumulates else 0
    alive = max(sizes.forward + earlier, sizes.backward + earlier, sizes.with_gradients)
    moments = {
        "start": weights + optimizer + (gradients if setting.on_cpu else FULL * trained) if master else weights,
        "backward": weights + optimizer + max(alive, gradients + joined),
        "step": weights + optimizer + gradients + joined_in_float32,
    }
    return _result(sizes, weights, gradients, optimizer, joined, moments, 0)


def _stage_1_or_2(sizes: Sizes, setting: Setting) -> Estimate:
    size, trained, part = setting.dtype_bytes, sizes.trainable, sizes.trainable / setting.ranks
    weights = _weight_bytes(sizes, setting)
    master, state = FULL * part, MOMENTS * part
    buckets = size * setting.bucket * (2 if setting.overlap else 1)
    gradients = size * part if setting.stage == 2 else size * trained
    if setting.on_cpu:
        # Gradients live in the bucket: it is as large as they are.
        written = size * min(trained, setting.bucket * (2 if setting.overlap else 1))
        in_backward = max(sizes.forward, sizes.with_gradients, written + size * part)
    else:
        written = buckets
        in_backward = max(sizes.forward, sizes.backward + buckets + size * part)
    host = 0.0
    if setting.offload:
        passing = size * sizes.largest  # a gradient on its way, on both sides
        host = master + state + FULL * part + size * part + passing
        optimizer = host if setting.on_cpu else 0
        weights += passing
    else:
        optimizer = master + state
    in_step = size * part
    if not setting.offload:
        # The gradients are joined, and in 16 bits the joined ones turned into float32, while the single ones are there.
        in_step += FULL * part + (size * part if size < FULL else 0)
    if setting.accumulates and setting.stage == 1:
        in_backward += gradients  # all of them wait for the last micro batch
    moments = {
        "start": weights + size * trained + (master if setting.on_cpu or not setting.offload else 0),
        "backward": weights + optimizer + in_backward,
        "step": weights + optimizer + in_step,
    }
    return _result(sizes, weights, gradients, optimizer, written, moments, host)


def _stage_3(sizes: Sizes, setting: Setting) -> Estimate:
    size, trained, part = setting.dtype_bytes, sizes.trainable, sizes.trainable / setting.ranks
    weights = size * sizes.parameters / setting.ranks
    master = FULL * part
    state = MOMENTS * part
    gradients = size * part
    live = size * min(sizes.parameters, sizes.largest + setting.gathered) if setting.ranks > 1 else 0
    reduced = size * min(trained, setting.bucket)
    bucket = reduced if setting.on_cpu else size * setting.bucket
    host = weights + master + state + FULL * part + gradients if setting.offload else 0
    if setting.offload and setting.nvme:
        host = gradients + _swap_memory(sizes, setting)
        weights = 0
    if not setting.offload:
        optimizer = master + state
    else:
        optimizer = host - weights - gradients if setting.on_cpu else 0
        if not setting.on_cpu:
            weights = gradients = 0
    held = weights + optimizer + gradients + bucket  # which stays from step to step
    moments = {
        "start": weights + master,
        "backward": held + live + max(sizes.forward, sizes.backward, reduced),
        "step": held + (0 if setting.offload else FULL * part),
    }
    return _result(sizes, weights, gradients, optimizer, bucket + live, moments, host)


def _swap_memory(sizes: Sizes, setting: Setting) -> float:
    """Return the bytes of DeepSpeed's swap buffers: four for a part of the optimizer, the others for weights."""
    group = min(sizes.trainable / setting.ranks, setting.sub_group + sizes.largest / setting.ranks)
    of_optimizer = 4 * FULL * group + setting.dtype_bytes * group * setting.ranks
    return of_optimizer + setting.swap_buffers * setting.dtype_bytes * sizes.largest / setting.ranks


def _result(
    sizes: Sizes, weights: float, gradients: float, optimizer: float, buffers: float, moments: dict, host: float
) -> Estimate:
    logits = max(sizes.forward - sizes.activations, 0)
    parts = (weights, gradients, optimizer, sizes.activations, logits, buffers)
    whole = {name: int(value) for name, value in moments.items()}
    return Estimate(*(int(value) for value in parts), whole, int(host))
