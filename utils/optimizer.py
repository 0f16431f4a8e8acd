"""AdamW in the fastest form this machine can run."""

import subprocess
from argparse import Namespace

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

from utils.utils import get_optimizer_grouped_parameters, print_rank_0

BETAS = (0.9, 0.95)


def create_optimizer(model: torch.nn.Module, args: Namespace) -> torch.optim.Optimizer:
    """DeepSpeedCPUAdam with `--offload`, FusedAdam otherwise, torch's AdamW where their kernels don't build.

    All three are AdamW (decoupled weight decay) with betas (0.9, 0.95).
    """
    groups = get_optimizer_grouped_parameters(model, args.weight_decay, args.lora_learning_rate)
    kernel = DeepSpeedCPUAdam if args.offload else FusedAdam
    try:
        optimizer = kernel(groups, lr=args.learning_rate, betas=BETAS)
    except (RuntimeError, ImportError, OSError, subprocess.CalledProcessError, AssertionError) as err:
        reason = " ".join(str(err).split())[:200]
        print_rank_0(f"Optimizer: torch AdamW, since {kernel.__name__} can't be built here ({reason})")
        return torch.optim.AdamW(groups, lr=args.learning_rate, betas=BETAS)
    print_rank_0(f"Optimizer: {kernel.__name__}")
    return optimizer
