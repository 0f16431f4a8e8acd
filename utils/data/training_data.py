"""Load the training and evaluation data of a run, prepared whole or streamed."""

from argparse import Namespace

from transformers import PreTrainedTokenizerBase

from utils.data.data_utils import PromptDataset, create_prompt_dataset
from utils.data.formats.custom import parse_columns
from utils.data.streaming import SFT_PHASE, create_prompt_stream
from utils.data.tokenization.tokenize_rows import end_of_conversation_token
from utils.run_config import window_size


def create_data(
    args: Namespace, tokenizer: PreTrainedTokenizerBase, ahead: bool
) -> tuple[PromptDataset, PromptDataset]:
    """Training and evaluation data: prepared whole and cached, or with `--streaming` read window by window."""
    end_token, columns = end_of_conversation_token(args, tokenizer), parse_columns(args.columns)
    if args.streaming:
        return create_prompt_stream(
            args.local_rank, [*args.data_path, *args.sft_only_data_path], args.data_output_path, args.seed, tokenizer,
            args.max_seq_len, end_token, window_size(args), args.completion_only_loss, columns, args.chat_template,
            ahead,
        )  # fmt: skip
    return create_prompt_dataset(
        args.local_rank, args.data_path, args.data_split, args.data_output_path, SFT_PHASE, args.seed, tokenizer,
        args.max_seq_len, end_token, args.sft_only_data_path, num_proc=args.preprocessing_num_workers,
        completion_only=args.completion_only_loss, columns=columns, chat_template=args.chat_template,
    )  # fmt: skip
