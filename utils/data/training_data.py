"""Loads the training and evaluation data of a run: prepared whole and cached, or streamed window by window."""

from typing import TYPE_CHECKING, NamedTuple

from transformers import PreTrainedTokenizerBase

from utils.data.agreement import check_ranks_agree
from utils.data.formats.custom import own_options
from utils.data.formats.roles import parse_columns
from utils.data.mixture import DataSources
from utils.data.prepare import Preparation, prepare_prompt_data
from utils.data.prompt_dataset import PromptDataset
from utils.data.streaming import SFT_PHASE, create_prompt_stream
from utils.data.tokenization.tokenize_rows import SampleForm, end_of_conversation_token

if TYPE_CHECKING:
    from utils.run_config import RunConfig


class TrainingData(NamedTuple):
    """The data of a run."""

    train: PromptDataset  # with `--streaming` a `PromptStream`
    evaluation: PromptDataset


def load_training_data(config: "RunConfig", tokenizer: PreTrainedTokenizerBase) -> TrainingData:
    """Return the run's data: prepared whole and cached, or with `--streaming` read window by window.

    Raises:
        UserError: bad data, or no training sample is left.
    """
    args = config.args
    end_token = end_of_conversation_token(tokenizer, config.eot_token, args.model_name_or_path)
    sample = SampleForm(tokenizer, end_token, args.max_seq_len, args.completion_only_loss, overlong=args.overlong)
    date = config.template_date or args.template_date
    own = own_options(tokenizer, sample.end_id, parse_columns(args.columns), args.chat_template, args.train_turns, date)
    preparation = Preparation(
        config.local_rank, args.data_output_path, SFT_PHASE, args.seed, num_proc=args.preprocessing_num_workers
    )
    if args.streaming:
        names = [*args.data_path, *args.sft_only_data_path]
        is_ahead = config.device.type != "cpu"  # on a CPU, a second process would slow down the training
        stream = create_prompt_stream(
            names, sample, own, preparation, config.window_size, is_ahead, args.eval_data_path
        )
        check_ranks_agree(stream[0].content)
        return TrainingData(*stream)
    sources = DataSources(args.data_path, args.data_split, args.sft_only_data_path, args.eval_data_path)
    data = TrainingData(*prepare_prompt_data(sources, sample, own, preparation))
    check_ranks_agree(data.train.content)
    return data
