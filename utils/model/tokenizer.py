"""Load the model's tokenizer from its folder or the hub."""

import json
import os
import tempfile
from importlib.util import find_spec

from transformers import AutoConfig, AutoTokenizer, GPT2Tokenizer, LlamaTokenizer, PreTrainedTokenizerBase

from utils.data.tokenization.tokenize_rows import end_of_conversation_token
from utils.distributed.ranks import print_rank_0
from utils.errors import UserError
from utils.module.remote_code import is_trusted

PROBE_TEXT = "Human: How many legs has a spider? Assistant: Eight. 蜘蛛有八条腿。"


def create_tokenizer(model_name_or_path: str, eot_token: str | None) -> PreTrainedTokenizerBase:
    """Load the model's own tokenizer, with `eot_token` added where `--add_eot_token` asks for it, and print it."""
    tokenizer = load_hf_tokenizer(model_name_or_path, True, eot_token)
    end_token = end_of_conversation_token(tokenizer, eot_token, model_name_or_path)
    print_rank_0(
        f"Tokenizer: {type(tokenizer).__name__}, {len(tokenizer)} entries; every sample ends with "
        f"{end_token!r}; padding is {tokenizer.pad_token!r}"
    )
    return tokenizer


def load_hf_tokenizer(
    model_name_or_path: str,
    fast_tokenizer: bool = True,
    add_special_tokens: str | list[str] | None = None,
) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to `model_name_or_path`: a folder is never looked up elsewhere.

    Args:
        model_name_or_path: a local folder, or a name on the hub.
        fast_tokenizer: use the Rust implementation where there is one.
        add_special_tokens: special tokens to add to those it has; a single one is the end-of-conversation token,
            which becomes its end token.

    Raises:
        UserError: the folder holds no tokenizer, or the hub name can't be reached.
    """
    tokenizer = _read_tokenizer(model_name_or_path, fast_tokenizer)
    if tokenizer.eos_token is None:
        _adopt_eos_of_config(tokenizer, model_name_or_path)
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        # Masks come from lengths here, never from ids, so sharing eos is safe and the vocabulary stays as it is.
        tokenizer.pad_token = tokenizer.eos_token
    if add_special_tokens:
        extra = [add_special_tokens] if isinstance(add_special_tokens, str) else list(add_special_tokens)
        tokenizer.add_special_tokens({"additional_special_tokens": extra}, replace_extra_special_tokens=False)
    if isinstance(add_special_tokens, str):
        tokenizer.eos_token = add_special_tokens
    if tokenizer.pad_token is None:
        # A new token is made only where there is no eos to share.
        if tokenizer.eos_token is not None:
            tokenizer.pad_token = tokenizer.eos_token
        else:
            tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.padding_side = "right"
    return tokenizer


def check_saving(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Save a tokenizer, load that, and compare: what would fail after training fails now.

    Raises:
        UserError: it can't be written, or what is loaded gives other ids.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            tokenizer.save_pretrained(folder)
        except Exception as err:  # tokenizers raises bare ones
            raise UserError(
                f"the tokenizer of {name} can't be saved ({' '.join(str(err).split())[:300]}), tried in {folder}: "
                "after training that would fail too."
            ) from err
        again = load_hf_tokenizer(folder)
    if again(PROBE_TEXT)["input_ids"] != tokenizer(PROBE_TEXT)["input_ids"]:
        raise UserError(
            f"the tokenizer of {name} gives other ids after being saved and loaded again: with this version of "
            "transformers a fine-tuned copy of it would be useless."
        )


def get_tokenizer(model_name_or_path: str, fast_tokenizer: bool = True) -> PreTrainedTokenizerBase:
    """Load the tokenizer of `model_name_or_path` as `load_hf_tokenizer` does, without further special tokens."""
    return load_hf_tokenizer(model_name_or_path, fast_tokenizer)


def _read_tokenizer(path: str, fast: bool) -> PreTrainedTokenizerBase:
    local = os.path.isdir(path)
    if local:
        files = set(os.listdir(path))
        known = {
            "tokenizer.json",
            "tokenizer.model",
            "vocab.json",
            "vocab.txt",
            "spiece.model",
            "tekken.json",
        }
        if not files & known:
            raise UserError(
                f"no tokenizer in the folder {path}: it has none of {', '.join(sorted(known))}. "
                "Put the model's tokenizer files there (tokenizer.save_pretrained(folder) writes them)."
            )
    try:
        if local and _is_bare_opt_vocabulary(path, files):
            return _opt_tokenizer(path)
        if local and _is_bare_llama_vocabulary(path, files):
            return LlamaTokenizer.from_pretrained(path, add_bos_token=True, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(
            path, use_fast=fast, local_files_only=local, trust_remote_code=is_trusted()
        )
        if not isinstance(tokenizer.chat_template, (str, dict, type(None))):
            raise ValueError(f"chat_template is {tokenizer.chat_template!r}, not a text")
        _try_length(tokenizer)
        return tokenizer
    except Exception as err:  # of many kinds, since the model's configuration is read too
        reason = " ".join(str(err).split())[:300]
        if not local:
            advice = "is the name right and the hub reachable? Offline, give the path of a downloaded folder"
        elif "tokenizer.model" in files and find_spec("sentencepiece") is None:
            advice = "tokenizer.model wants `pip install sentencepiece protobuf`"
        else:
            advice = "check that the folder's tokenizer files are complete"
        raise UserError(f"the tokenizer of {path} can't be loaded ({reason}): {advice}.") from err


def _try_length(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a ValueError where model_max_length is no number, which the first text would be compared with."""
    if isinstance(tokenizer.model_max_length, bool) or not isinstance(tokenizer.model_max_length, (int, float)):
        raise ValueError(f"model_max_length is {tokenizer.model_max_length!r}, not a number")


def _is_bare_opt_vocabulary(path: str, files: set[str]) -> bool:
    """True for OPT's vocab.json + merges.txt without the configuration that says how OPT uses them."""
    if "vocab.json" not in files or "tokenizer.json" in files or "tokenizer_config.json" in files:
        return False
    with open(os.path.join(path, "vocab.json"), encoding="utf-8") as file:
        vocab = json.load(file)
    return (vocab.get("<s>"), vocab.get("<pad>"), vocab.get("</s>")) == (0, 1, 2)


def _is_bare_llama_vocabulary(path: str, files: set[str]) -> bool:
    """True for a Llama's tokenizer.model without the configuration that says it starts with BOS and a space."""
    if "tokenizer.model" not in files or "tokenizer.json" in files or "tokenizer_config.json" in files:
        return False
    return "config.json" in files and _model_type(path) in ("llama", "mistral")


def _model_type(path: str) -> str:
    return AutoConfig.from_pretrained(path, trust_remote_code=is_trusted()).model_type


def _opt_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Load GPT-2's byte-level BPE as OPT uses it: every text starts with `</s>`, which also ends it."""
    return GPT2Tokenizer.from_pretrained(
        path,
        bos_token="</s>",
        eos_token="</s>",
        unk_token="</s>",
        pad_token="<pad>",
        add_bos_token=True,
        local_files_only=True,
    )


def _adopt_eos_of_config(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Use the model configuration's eos id where the tokenizer's own files name none."""
    try:
        local = os.path.isdir(path)
        config = AutoConfig.from_pretrained(path, local_files_only=local, trust_remote_code=is_trusted())
        eos = config.eos_token_id
    except Exception:  # what is wrong with the configuration is said where the model is checked
        return
    eos = eos[0] if isinstance(eos, list) and eos else eos
    if isinstance(eos, int) and eos < len(tokenizer):
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(eos)
