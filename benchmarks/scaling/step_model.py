"""What a training step moves between GPUs, and how long it takes: plain arithmetic, every assumption an argument.

Volumes are bytes one rank sends in a step. In the ZeRO paper's terms (Rajbhandari et al. 2020,
https://arxiv.org/abs/1910.02054, section 7), for Psi weights: an all-reduce costs 2 Psi, a reduce-scatter and an
all-gather Psi each, which for N ranks are times (N - 1) / N. So plain data parallelism and stages 1 and 2 move 2 Psi,
stage 3 moves 3 Psi. ZeRO++ (Wang et al. 2023, https://arxiv.org/abs/2306.10209) with hpZ keeps a second copy of the
weights in each node, so that the gather of the backward stays within it.

DeepSpeed 0.19.8 differs from the paper in two points, which `benchmarks/scaling/scaling.py` measures: with its default
use_multi_rank_bucket_allreduce stages 1 and 2 all-reduce gradients (2 Psi) where the paper reduce-scatters (Psi); and
stage 3 gathers an embedding that is the head too for each of its uses.
"""

from typing import NamedTuple

BYTES_16 = 2


class Traffic(NamedTuple):
    """Payloads of one optimizer step, in bytes: the whole tensors, whatever the number of ranks."""

    all_reduce: float = 0.0
    reduce_scatter: float = 0.0
    all_gather: float = 0.0  # over all ranks
    gather_in_node: float = 0.0  # over the ranks of a node (hpZ)

    def sent(self, ranks: int, node: int) -> float:
        """Bytes a rank sends, over all kinds of links, by ring algorithms."""
        across = (ranks - 1) / ranks * (2 * self.all_reduce + self.reduce_scatter + self.all_gather)
        inside = min(node, ranks)
        return across + (inside - 1) / inside * self.gather_in_node


class Cluster(NamedTuple):
    """GPUs and what joins them; bytes and FLOPs per second."""

    node: int = 8  # GPUs of a node
    in_node: float = 450e9  # NVLink 4 of an H100, each direction of a GPU
    between: float = 50e9  # 400 Gb/s of network a node, shared by its GPUs
    peak: float = 989e12  # dense 16-bit FLOPs of a GPU, H100 SXM
    share_of_peak: float = 0.4  # that the step reaches while it computes
    overlap: float = 0.5  # share of the communication that hides behind computing, as far as there is any


class Work(NamedTuple):
    """A model and what one rank does in an optimizer step."""

    parameters: float
    trainable: float
    tokens: float  # of one rank in one micro batch
    flops_per_token: float
    accumulation: int = 1
    tied: float = 0.0  # weights of an embedding that is the head too


class Step(NamedTuple):
    """An optimizer step on a cluster."""

    seconds: float
    computing: float  # seconds
    communication: float  # seconds, hidden ones included
    exposed: float  # seconds of it that nothing hides
    sent: float  # bytes a rank sends
    tokens_per_second: float  # over all ranks


def traffic(
    stage: int, parameters: float, trainable: float, element: int = BYTES_16, accumulation: int = 1,
    as_published: bool = False, hpz: bool = False, live: float = 0.0, tied: float = 0.0,
) -> Traffic:  # fmt: skip
    """Payloads of one optimizer step.

    Args:
        stage: ZeRO stage, 0 to 3.
        parameters, trainable: numbers of weights, and of those that train: only they have gradients, but stage 3
            gathers all of them, in the forward and in the backward.
        element: bytes of a weight and of a gradient on the wire.
        accumulation: micro batches a step; stages 2 and 3 reduce in each, and stage 3 gathers in each.
        as_published: the paper's reduce-scatter at stages 1 and 2, not DeepSpeed's all-reduce.
        hpz: stage 3 keeps the backward's gather within a node.
        live: weights stage 3 leaves gathered after the forward (stage3_max_live_parameters; 3e7 here), so that the
            backward need not gather them. Nothing beside a model of billions, all of a small one.
        tied: weights of an embedding that is the head too: released after the first use, stage 3 gathers it for the
            second again, in the forward and in the backward.
    """
    weights, gradients = element * parameters, element * trainable
    if stage == 0:
        return Traffic(all_reduce=gradients)
    if stage in (1, 2):
        reduced = gradients * (accumulation if stage == 2 else 1)
        if as_published:
            return Traffic(reduce_scatter=reduced, all_gather=gradients)
        return Traffic(all_reduce=reduced, all_gather=gradients)
    released = 0 if live >= parameters else 1
    forward = (weights + released * element * tied) * accumulation
    backward = released * element * (parameters - live + tied) * accumulation
    reduced = gradients * accumulation
    if hpz:
        return Traffic(reduce_scatter=reduced, all_gather=forward, gather_in_node=backward)
    return Traffic(reduce_scatter=reduced, all_gather=forward + backward)


def communication_seconds(moved: Traffic, ranks: int, cluster: Cluster) -> float:
    """Rings over all ranks: within one node at its links' rate; beyond, at the slower of both kinds of link.

    A node's GPUs share its network, but a ring leaves a node once: with rings side by side, one a GPU, each has an
    equal part of the network, and moves an equal part of the bytes. So the network's whole rate counts.
    """
    node = min(cluster.node, ranks)
    inside = (node - 1) / node * moved.gather_in_node / cluster.in_node
    payload = 2 * moved.all_reduce + moved.reduce_scatter + moved.all_gather
    rate = cluster.in_node if ranks <= cluster.node else min(cluster.in_node, cluster.between)
    return inside + (ranks - 1) / ranks * payload / rate


def step(work: Work, moved: Traffic, ranks: int, cluster: Cluster) -> Step:
    """Time of one optimizer step: computing, and what of the communication it doesn't hide."""
    tokens = work.tokens * work.accumulation
    computing = tokens * work.flops_per_token / (cluster.share_of_peak * cluster.peak)
    communication = communication_seconds(moved, ranks, cluster)
    exposed = communication - min(cluster.overlap * communication, computing)
    seconds = computing + exposed
    sent = moved.sent(ranks, cluster.node)
    return Step(seconds, computing, communication, exposed, sent, ranks * tokens / seconds)


def state_bytes(stage: int, parameters: float, trainable: float, ranks: int, hpz_node: int = 0) -> float:
    """Weights, gradients and AdamW's states of one rank in mixed precision, by the ZeRO paper's section 5: 16 bytes.

    Args:
        hpz_node: GPUs of a node that keep a second copy of the weights among them; 0 for none.
    """
    weights, gradients, states = 2 * parameters, 2 * trainable, 12 * trainable
    divided = [states / (ranks if stage >= 1 else 1), gradients / (ranks if stage >= 2 else 1)]
    second = weights / min(hpz_node, ranks) if hpz_node else 0.0
    return weights / (ranks if stage >= 3 else 1) + sum(divided) + second
