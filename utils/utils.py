"""Re-export the names that scripts written for DeepSpeed-Chat import from `utils.utils`.

Code of this repository imports each name from the file that defines it.
"""

from utils.distributed.ranks import get_all_reduce_mean, is_rank_0, print_rank_0
from utils.distributed.zero3 import params_to_fetch as _z3_params_to_fetch
from utils.engine.engine import get_optimizer_grouped_parameters
from utils.export.hf_model import save_hf_format, save_zero_three_model
from utils.machine.device import set_random_seed, to_device
from utils.model.rlhf_helpers import (
    ExponentialMovingAverage,
    MovingAverage,
    load_state_dict_into_model,
    moving_average,
)
from utils.model.tokenizer import get_tokenizer, load_hf_tokenizer

__all__ = [
    "ExponentialMovingAverage",
    "MovingAverage",
    "_z3_params_to_fetch",
    "get_all_reduce_mean",
    "get_optimizer_grouped_parameters",
    "get_tokenizer",
    "is_rank_0",
    "load_hf_tokenizer",
    "load_state_dict_into_model",
    "moving_average",
    "print_rank_0",
    "save_hf_format",
    "save_zero_three_model",
    "set_random_seed",
    "to_device",
]
