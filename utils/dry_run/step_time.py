"""How long an optimizer step takes under one setting beside another: a simple model, for comparing settings alone.

It adds up, for one rank and one step:

  * the products, 2 operations a weight and token for the forward, as many for the gradient of the activations, again
    for that of the weights that train, and for the second forward of gradient checkpointing (3 to 4, that is 4/3);
  * reading the weights from the device's memory in each of these passes of each micro batch, which is what makes small
    micro batches slow;
  * what ZeRO sends (Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054): gradients once a step, at stages 2 and
    3 with every micro batch, and trained weights once a step (1 and 2) or all weights twice a micro batch (3);
  * what offload copies between device and CPU memory, and AdamW on the CPU.

Half of the communication hides behind the products, as far as there are any. The rates are those of an H100 and its
machine, 40% of its peak among them; of a CPU, round numbers. They are for ratios of settings: the time of a run is
measured, not taken from here.
"""

from typing import NamedTuple

ADAM_BYTES = 28  # of CPU memory a trained weight, read and written: gradient, weight and two moments in float32
OVERLAP = 0.5  # share of the communication that hides behind the products


class Machine(NamedTuple):
    """Rates of one rank's device: operations, or bytes, a second."""

    operations: float = 0.4 * 989e12
    memory: float = 3.35e12
    in_node: float = 450e9  # NVLink, each direction
    between: float = 50e9  # network of a node, which its ranks share
    to_host: float = 25e9  # PCIe, each direction
    host_memory: float = 50e9
    node: int = 8  # ranks of a node


CPU = Machine(operations=1e11, memory=1e10, in_node=5e9, between=1e9, to_host=1e10, host_memory=1e10)


class Load(NamedTuple):
    """What one rank does in an optimizer step."""

    parameters: int
    trainable: int
    element: float  # bytes of a weight as it is stored
    tokens: float  # of all micro batches
    accumulation: int
    ranks: int
    stage: int
    offload: bool
    checkpointing: bool


def step_seconds(load: Load, machine: Machine) -> float:
    """Return the seconds of a step."""
    share = load.trainable / load.parameters
    passes = 2 + share + load.checkpointing
    computing = 2 * passes * load.parameters * load.tokens / machine.operations
    reading = passes * load.element * load.parameters * load.accumulation / machine.memory
    rate = machine.in_node if load.ranks <= machine.node else min(machine.in_node, machine.between)
    sending = sent_bytes(load) / rate
    return computing + reading + max(sending * (1 - OVERLAP), sending - computing) + offload_seconds(load, machine)


def sent_bytes(load: Load) -> float:
    """Return the bytes a rank sends in a step by ring algorithms."""
    weights, gradients = load.element * load.parameters, load.element * load.trainable
    if load.stage < 3:
        reduced = gradients * (load.accumulation if load.stage == 2 else 1)
        payload = 2 * reduced if load.stage == 0 else reduced + gradients
    else:
        payload = (gradients + 2 * weights) * load.accumulation
    return (load.ranks - 1) / load.ranks * payload


def offload_seconds(load: Load, machine: Machine) -> float:
    """Return the seconds of copies between device and CPU memory, and of AdamW there."""
    if not load.offload:
        return 0.0
    part = load.trainable / load.ranks
    copied = 2 * load.element * part  # gradients there, new weights back
    if load.stage == 3:
        copied += 2 * load.element * load.parameters / load.ranks * load.accumulation
    return copied / machine.to_host + ADAM_BYTES * part / machine.host_memory
