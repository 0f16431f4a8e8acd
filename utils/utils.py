"""Re-export the names that scripts written for DeepSpeed-Chat import from `utils.utils`.

Code of this repository imports each name from the file that defines it.
"""

from utils.distributed.ranks import get_all_reduce_mean, print_rank_0
from utils.engine.engine import get_optimizer_grouped_parameters
from utils.export.hf_model import save_hf_format, save_zero_three_model
from utils.machine.device import set_random_seed, to_device
from utils.model.tokenizer import load_hf_tokenizer

__all__ = [
    "get_all_reduce_mean",
    "get_optimizer_grouped_parameters",
    "load_hf_tokenizer",
    "print_rank_0",
    "save_hf_format",
    "save_zero_three_model",
    "set_random_seed",
    "to_device",
]
