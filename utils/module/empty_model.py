"""A model of a configuration without memory, for checks that need its modules and shapes alone."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PretrainedConfig

from utils.errors import UserError
from utils.module.remote_code import is_trusted


def empty_model(config: PretrainedConfig, **options: Any) -> transformers.PreTrainedModel:
    """Build a model on the meta device.

    Args:
        options: of `from_config`.

    Raises:
        UserError: the values of the configuration do not go together.
    """
    try:
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=is_trusted(), **options)
    except Exception as err:  # whatever a family's code raises on values it was not made for
        raise UserError(
            f"config.json of {config.name_or_path or 'the model'} describes no {config.model_type} model that can be "
            f"built ({type(err).__name__}: {' '.join(str(err).split())[:200]}): give the one of the weights."
        ) from err
