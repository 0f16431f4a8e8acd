"""Save the model that a run ends with: the best one, or the last, and the LoRA adapter; all verified."""

import deepspeed
from transformers import PreTrainedTokenizerBase

from utils.checkpoint.checkpointer import publish_best_model
from utils.data.training_data import TrainingData
from utils.distributed.ranks import print_rank_0
from utils.export.next_steps import next_steps_text
from utils.export.save import adapter_folder, export_form, save_verified_model
from utils.logging.console import phase
from utils.run_config import RunConfig


def save_final_model(
    engine: deepspeed.DeepSpeedEngine, tokenizer: PreTrainedTokenizerBase, data: TrainingData, config: RunConfig
) -> None:
    """Save the model, read it back with plain transformers, compare, and print what to type next.

    Every rank takes part.

    Raises:
        UserError: the folder can't be written, or holds another model than the trained one.
    """
    args = config.args
    if args.output_dir is None:
        print_rank_0("no --output_dir: the model is not saved")
        return
    print_rank_0("saving the final model ...")
    if not (args.load_best_model_at_end and publish_best_model(args.output_dir)):
        _save_last_model(engine, tokenizer, data, config)
    print_rank_0(next_steps_text(args.model_name_or_path, args.output_dir))


def _save_last_model(
    engine: deepspeed.DeepSpeedEngine, tokenizer: PreTrainedTokenizerBase, data: TrainingData, config: RunConfig
) -> None:
    args = config.args
    with phase("writing the model"):
        form = export_form(config, tokenizer)
        verified = save_verified_model(engine, tokenizer, data.train[0]["input_ids"], args.output_dir, form)
    if args.save_lora_adapter:
        print_rank_0(
            f"LoRA adapter saved to {adapter_folder(args.output_dir)}, for peft.PeftModel.from_pretrained on "
            f"{args.model_name_or_path}"
        )
    for line in verified.words(args.output_dir):
        print_rank_0(line)
