"""Chat templates that behave like those of three families of models, each with a small tokenizer of its special tokens.

qwen: ChatML without BOS; tools and calls; the reasoning of earlier answers is left out; a turn ends in `<|im_end|>`.
llama: BOS in the text; today's date in a system turn of its own; one call an answer; white space is stripped.
gemma: BOS in the text; no system turn, turns must take turns; the assistant is called model.
"""

from functools import cache
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

from conftest import ROOT
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from utils.data.batching.collate import IGNORE_INDEX
from utils.data.formats.custom import own_options
from utils.data.open_sets import Preparation
from utils.data.prepare import prepare_data_set
from utils.data.prompt_dataset import PromptDataset
from utils.data.tokenization.tokenize_rows import SampleForm

QWEN = """\
{%- if tools %}{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{% endif %}
{{- '# Tools\\n' }}{% for tool in tools %}{{- (tool | tojson) + '\\n' }}{% endfor %}{{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{% endif %}
{%- set ns = namespace(asked=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- elif m.role == 'assistant' %}
{%- set thought = m.reasoning_content or '' %}{% set said = m.content or '' %}
{%- if not thought and '</think>' in said %}
{%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set said = said.split('</think>')[-1].lstrip('\\n') %}{% endif %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.asked and thought %}{{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}
{{- said }}
{%- for call in m.tool_calls or [] %}{{- '\\n' if said or not loop.first }}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) }}
{{- '}\\n</tool_call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""

LLAMA = """\
{{- bos_token }}{% set ns = namespace(start=0, system='') %}
{%- if messages[0].role == 'system' %}{% set ns.start = 1 %}{% set ns.system = messages[0].content | trim %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + strftime_now('%d %b %Y') + '\\n\\n' }}
{%- for tool in tools or [] %}{{- (tool | tojson) + '\\n' }}{% endfor %}{{- ns.system + '<|eot_id|>' }}
{%- for m in messages[ns.start:] %}
{%- if m.tool_calls %}
{%- if m.tool_calls | length != 1 %}{{- raise_exception('one call an answer') }}{% endif %}
{%- set call = m.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
{{- (call.arguments | tojson) + '}<|eot_id|>' }}
{%- elif m.role == 'tool' %}
{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + (m.content | tojson) + '<|eot_id|>' }}
{%- else %}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + (m.content | trim) + '<|eot_id|>' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

GEMMA = """\
{{- bos_token }}{% if messages[0].role == 'system' %}{{- raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + (m.content | trim) }}
{{- '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{% endif %}"""

# Template, special tokens, BOS, which the tokenizer puts before plain texts, and the token that ends a text.
KINDS = {
    "qwen": (QWEN, ["<|im_start|>", "<|im_end|>", "<|endoftext|>"], None, "<|im_end|>"),
    "llama": (
        LLAMA,
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|begin_of_text|>",
        "<|eot_id|>",
    ),
    "gemma": (GEMMA, ["<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>"], "<bos>", "<eos>"),
}


@cache
def tokenizer_of(kind: str, folder: str = "") -> PreTrainedTokenizerBase:
    """Return a tokenizer with the kind's template and special tokens.

    Args:
        folder: a tokenizer to add them to; empty: that of the demo's model.
    """
    template, special, bos, eos = KINDS[kind]
    tokenizer = AutoTokenizer.from_pretrained(folder or ROOT / "demo" / "tiny_opt")
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.add_special_tokens({"eos_token": eos} | ({"bos_token": bos} if bos else {}))
    tokenizer.bos_token = bos
    begun = [(bos, tokenizer.bos_token_id)] if bos else []
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing([bos, "$A"] if bos else ["$A"], None, begun)
    tokenizer.chat_template = template
    return tokenizer


class Sample(NamedTuple):
    """One sample of phase 1."""

    text: str
    labels: list[str]  # the texts of the runs of labelled tokens
    ids: list[int]
    is_label: list[bool]


def samples_of(path: Any, cache: Any, kind: str = "qwen", **changes: Any) -> list[Sample]:
    """Return all samples of data, by their ids; for the arguments see `parts_of`."""
    parts = parts_of(path, cache, kind, **changes)
    items = [part[place] for part in parts for place in range(len(part))]
    return as_samples(items, tokenizer_of(kind, changes.get("folder", "")))


def parts_of(
    path: Any, cache: Any, kind: str = "qwen", max_seq_len: int = 1024, folder: str = "", **changes: Any
) -> tuple[PromptDataset, PromptDataset]:
    """Prepare data in memory as a run with `--completion_only_loss` does; return (train, eval).

    Args:
        folder: of a tokenizer, see `tokenizer_of`.
        changes: completion_only, columns, chat_template, train_turns, date.
    """
    tokenizer = tokenizer_of(kind, folder)
    form = SampleForm(tokenizer, tokenizer.eos_token, max_seq_len, changes.pop("completion_only", True))
    own = own_options(tokenizer, form.end_id, **changes)
    return prepare_data_set(str(path), "10,0,0", form, own, Preparation(0, str(cache), 1, 1234))


def as_samples(items: list[dict], tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
    """Return items of a prepared data set as samples, by their ids."""
    found = []
    for item in items:
        ids, labels = item["input_ids"].tolist(), item["labels"].tolist()
        is_label = [label != IGNORE_INDEX for label in labels]
        assert all(label == token for label, token in zip(labels, ids, strict=True) if label != IGNORE_INDEX)
        runs = [
            [token for token, _ in run] for on, run in groupby(zip(ids, is_label, strict=True), itemgetter(1)) if on
        ]
        found.append(Sample(tokenizer.decode(ids), tokenizer.batch_decode(runs), ids, is_label))
    return sorted(found, key=lambda sample: sample.ids)
