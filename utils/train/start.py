"""Start a run: its log, process group, sequence parallel groups, configuration and seed."""

from argparse import Namespace

from utils.distributed.process_group import local_rank_of, start_process_group
from utils.distributed.ranks import print_rank_0
from utils.logging.library_log import LOG
from utils.machine.cpu_info import cache_cpu_info
from utils.machine.device import set_random_seed
from utils.machine.gpu_setup import let_segments_grow, use_tf32
from utils.module.sequence_parallel import start_sequence_parallel
from utils.run_config import RunConfig


def start_run(args: Namespace) -> tuple[RunConfig, Namespace | None]:
    """Return the run's configuration, and what `deepspeed.initialize` takes as `mpu`; every rank must call it.

    Raises:
        UserError: the device can't train in the requested precision, or --deepspeed_config can't be used.
    """
    cache_cpu_info()
    LOG.open(None if args.dry_run else args.output_dir)
    allocator = let_segments_grow(args.padding)
    device = start_process_group(local_rank_of(args.local_rank), args.ddp_timeout)
    config = RunConfig.resolve(args, device)
    for line in (allocator, use_tf32(args.tf32, config.dtype, device)):
        if line is not None:
            print_rank_0(line)
    groups = None if config.gpus is not None else start_sequence_parallel(args.sequence_parallel_size)
    set_random_seed(args.seed)
    return config, groups
