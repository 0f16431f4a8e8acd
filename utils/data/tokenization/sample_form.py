"""What a sample is: its tokenizer, its end, its length, its labels."""

from typing import NamedTuple

import datasets
from transformers import PreTrainedTokenizerBase

from utils.data.outcomes import BOOKS, BOOKS_FEATURE, UNREAD, UNREAD_FEATURE
from utils.data.prompt_dataset import ID_COLUMNS
from utils.errors import UserError

DEFAULT_END_TOKEN = "<|endoftext|>"
TRUNCATE = "truncate"
DROP = "drop"
ERROR = "error"


class SampleForm(NamedTuple):
    """What a sample is."""

    tokenizer: PreTrainedTokenizerBase
    end_token: str  # the token that ends every sample, as text
    max_seq_len: int
    completion_only: bool = False  # label only the responses (phase 1)
    end_text: str | None = None  # in place of `end_token`: added to each text before it is encoded
    overlong: str = TRUNCATE  # or DROP or ERROR: what becomes of samples longer than `max_seq_len`

    @property
    def end_id(self) -> int | None:
        """The id of the end token, see `end_token_id`; None with `end_text`.

        Read it once, not per row: it looks up the whole vocabulary.
        """
        return None if self.end_text is not None else end_token_id(self.tokenizer, self.end_token)

    @property
    def special(self) -> dict[str, int]:
        """The id of each special token by its text; read it once too."""
        tokenizer = self.tokenizer
        ids = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        return ids | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


def end_token_id(tokenizer: PreTrainedTokenizerBase, end_of_conversation_token: str) -> int:
    """Return the id that ends every sample.

    Raises:
        UserError: the tokenizer has no such single token.
    """
    token_id = tokenizer.get_vocab().get(end_of_conversation_token)
    if token_id is None:
        raise UserError(
            f"the end-of-conversation token {end_of_conversation_token!r} is not one token of this tokenizer "
            f"(its own end token is {tokenizer.eos_token!r}): use that, or add it with --add_eot_token."
        )
    return token_id


def end_of_conversation_token(tokenizer: PreTrainedTokenizerBase, eot_token: str | None, model_name: str) -> str:
    """Return the text of the token that ends every sample: `eot_token`, or the tokenizer's eos where it is None.

    Args:
        eot_token: `--eot_token` where `--add_eot_token` is given, else None.
        model_name: the model whose tokenizer this is, for the message.

    Raises:
        UserError: there is no end token, or it is not one token of the tokenizer.
    """
    token = tokenizer.eos_token if eot_token is None else eot_token
    if token is None:
        raise UserError(f"the tokenizer of {model_name} has no end token: add one with --add_eot_token.")
    end_token_id(tokenizer, token)
    return token


def sample_features(phase: int, completion_only: bool) -> datasets.Features:
    """Return the columns of tokenized rows, `BOOKS` and `UNREAD` among them."""
    ids = {name: datasets.List(datasets.Value("int32")) for name in ID_COLUMNS[phase]}
    features = datasets.Features(ids | {BOOKS: BOOKS_FEATURE, UNREAD: UNREAD_FEATURE})
    if completion_only:
        features["label_spans"] = datasets.List(datasets.Value("int32"))
    return features


class Rule(NamedTuple):
    """How one phase's samples are made of ids; read once, not for every row."""

    phase: int
    end_id: int | None
    sample: SampleForm
    bos: str | None
    special: dict[str, int]  # id of each special token
