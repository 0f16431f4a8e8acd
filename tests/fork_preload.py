"""What the runs of tests/fork_runs.py share: all that they import, and what DeepSpeed asks about this machine."""

import gc
from importlib import import_module

from deepspeed.ops.op_builder.cpu import FusedAdamBuilder

from utils.machine.cpu_info import cache_cpu_info

for name in (
    "main",
    "matplotlib.pyplot",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # torch's compiler with it: 2 s of every start with ZeRO
    "pytest",  # for test modules that hold a program of their own
):
    import_module(name)
cache_cpu_info()
FusedAdamBuilder().cxx_args()  # asks for the processor's description, a second in every run otherwise
gc.freeze()  # a run's own collections, half a second each, needn't look at all this
