"""Describe a saved model: its card (README.md) with the loss curves, and the chat template it was trained with."""

import json
import os
import shlex
import sys
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

from utils.data.formats.chat_template import AS_IS, AUTO, HUMAN_ASSISTANT, SPEAKERS, ChatFormat, render
from utils.export import other_programs
from utils.export.next_steps import saved_architecture
from utils.export.owned_files import CARD
from utils.logging.console import say
from utils.logging.loss_curve import PICTURE, draw_losses
from utils.logging.metrics_file import METRICS_FILE, curve, read_metrics
from utils.notation import parse_source
from utils.run_config import RunConfig

TEMPLATE_FILE = "chat_template.jinja"  # where transformers looks for it
EXAMPLE = [
    {"role": "user", "content": "How many legs has a spider?"},
    {"role": "assistant", "content": "Eight."},
    {"role": "user", "content": "And a bird?"},
    {"role": "assistant", "content": "Two."},
]
SETTINGS = (
    "max_seq_len", "packing", "completion_only_loss", "per_device_train_batch_size", "gradient_accumulation_steps",
    "learning_rate", "lr_scheduler_type", "num_warmup_steps", "weight_decay", "num_train_epochs", "max_steps",
    "streaming", "dtype", "dropout", "disable_dropout", "neftune_noise_alpha", "lora_dim", "lora_alpha",
    "lora_rslora", "lora_plus_ratio", "quantize_base",
    "lora_module_name", "lora_learning_rate", "only_optimize_lora", "zero_stage", "seed",
)  # fmt: skip
LORA_SETTINGS = tuple(name for name in SETTINGS if name.startswith("lora_") or name == "only_optimize_lora")


def describe_model(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, records: str | None = None, picture: bool = True
) -> Callable[[str], None]:
    """Return a function that writes card, curves and chat template into the folder of a model that is being saved.

    Args:
        records: the folder of the run's metrics; None for `--output_dir`.
        picture: draw the curves.
    """
    output_dir = config.args.output_dir if records is None else records

    def write(folder: str) -> None:
        template = chat_template(config.args.chat_template, tokenizer, config.eot_token)
        if template is not None:
            with open(os.path.join(folder, TEMPLATE_FILE), "w", encoding="utf-8") as file:
                file.write(template)
        has_records = os.path.isfile(os.path.join(output_dir, METRICS_FILE))
        if has_records and picture:
            draw_losses(output_dir, folder)
        with open(os.path.join(folder, CARD), "w", encoding="utf-8") as file:
            metrics = read_metrics(output_dir) if has_records else []
            file.write(model_card(config.args, config.decisions, metrics, saved_architecture(folder)))

    return write


# ------------------------------------------------------------------------------------------------ the card


def model_card(
    args: Namespace, decisions: dict[str, Any], records: list[dict[str, float]], architecture: str | None
) -> str:
    """Return the card as Markdown with the header that the hub reads.

    Args:
        args: the run's arguments as given.
        decisions: what was decided from them, see `RunConfig.decisions`.
        records: those of metrics.jsonl up to the state that is saved.
        architecture: the model class that config.json names.
    """
    sources = [parse_source(text).name for text in (*args.data_path, *args.sft_only_data_path)]
    title = os.path.basename(os.path.normpath(args.model_name_or_path))
    parts = [
        card_header(args.model_name_or_path, sources),
        f"# {title}, fine-tuned",
        f"`{args.model_name_or_path}` after supervised fine-tuning on {', '.join(f'`{name}`' for name in sources)}.",
        "## Perplexity",
        perplexity_table(records),
    ]
    if records:
        parts.append(f"![training and evaluation loss over the optimizer steps]({PICTURE})")
    parts += ["## Settings", settings_table(args, decisions)]
    if args.lora_dim > 0:
        parts.append("The LoRA weights are merged in.")
    parts += ["## Use", *use(architecture)]
    parts += ["## Command", f"```text\n{command_line()}\n```"]
    return "\n\n".join(parts) + "\n"


def use(architecture: str | None) -> list[str]:
    """Return how the model is used, by the programs that read its class, as parts of Markdown."""
    parts = ["With transformers: `AutoModelForCausalLM.from_pretrained`."]
    if commands := other_programs.commands("FOLDER", architecture):
        lines = "\n".join(f"{command}  # {purpose}" for purpose, command in commands.items())
        parts.append(f"In other programs:\n\n```bash\n{lines}\n```")
    notes = other_programs.notes(architecture)
    return [*parts, "\n".join(f"* {note}" for note in notes)] if notes else parts


def card_header(base: str, sources: list[str]) -> str:
    """Return the YAML header. Only hub names go in it: the hub refuses a card that names a folder of someone's machine.

    The licence is that of base model and data, which the program does not know, so none is claimed.
    """
    lines = ["library_name: transformers", "pipeline_tag: text-generation"]
    if not os.path.exists(base):
        lines.append(f"base_model: {json.dumps(base)}")
    known = [name for name in sources if not os.path.exists(name) and name.count("/") == 1 and name != "local/jsonfile"]
    if known:
        lines += ["datasets:", *(f"- {json.dumps(name)}" for name in known)]
    return "\n".join(["---", *lines, "tags:", "- sft", "---"])


def perplexity_table(records: list[dict[str, float]]) -> str:
    """Return perplexity and loss on the evaluation data before training and as last measured, as Markdown."""
    losses = dict(curve(records, "eval_loss"))
    rows = [(step, figure, losses[step]) for step, figure in curve(records, "perplexity") if step in losses]
    if not rows:
        return "Not measured: there was no evaluation data."
    shown = rows if len(rows) == 1 else [rows[0], rows[-1]]
    lines = ["| optimizer steps | perplexity | loss per label token |", "| --- | --- | --- |"]
    lines += [f"| {step} | {figure:.4g} | {loss:.4f} |" for step, figure, loss in shown]
    return "On the evaluation data, exp(total loss / label tokens):\n\n" + "\n".join(lines)


def settings_table(args: Namespace, decisions: dict[str, Any]) -> str:
    """Return the settings that decide how the model was trained, as Markdown; those of LoRA only where it was used.

    A value that was decided otherwise than given shows both.
    """
    rows = []
    for name in SETTINGS:
        given = getattr(getattr(args, name), "value", getattr(args, name))
        used = decisions.get(name, given)
        if used is not None and (args.lora_dim > 0 or name not in LORA_SETTINGS):
            rows.append(f"| `{name}` | {used}{'' if used == given else f' (given: {given})'} |")
    return "\n".join(["| argument | value |", "| --- | --- |", *rows])


def command_line() -> str:
    """Return the command this process was started with."""
    return shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]])


# ------------------------------------------------------------------------------------------- the template


def chat_template(form: str, tokenizer: PreTrainedTokenizerBase, eot_token: str | None = None) -> str | None:
    """Return the template to save; None where the tokenizer's own stays, or where no template gives training's ids.

    Args:
        form: `--chat_template`.
        eot_token: the token of `--add_eot_token`.
    """
    if form not in (AUTO, HUMAN_ASSISTANT, AS_IS):
        with open(form, encoding="utf-8") as file:
            return file.read()
    if form == AS_IS or (tokenizer.chat_template and form == AUTO):
        return None
    template = human_assistant_template(tokenizer, eot_token or tokenizer.eos_token)
    if template is None:
        say("Chat template: none is saved; this tokenizer has other ids for the Human/Assistant form in a template")
    return template


def human_assistant_template(tokenizer: PreTrainedTokenizerBase, end: str) -> str | None:
    """Return a template that gives the ids of training's Human/Assistant form, special tokens and `end` included.

    None where no template can: some tokenizers encode a text that follows a special token in the same string in
    another way than a text before which they put that token themselves.
    """
    bare = tokenizer(EXAMPLE[0]["content"], add_special_tokens=False)["input_ids"]
    whole = tokenizer(EXAMPLE[0]["content"])["input_ids"]
    before = next((at for at in range(len(whole) - len(bare) + 1) if whole[at : at + len(bare)] == bare), None)
    if before is None:
        return None
    begin = "".join(tokenizer.convert_ids_to_tokens(whole[:before]))
    turns = "".join(
        f"{{%{'if' if number == 0 else 'elif'} message['role'] == '{role}'%}}{{{{ {_quoted(words + ' ')} }}}}"
        for number, (role, words) in enumerate(SPEAKERS.items())
    )
    template = (
        f"{{{{ {_quoted(begin)} }}}}{{%for message in messages%}}{turns}"
        "{%else%}{{ raise_exception('no place for a message of role ' + message['role']) }}{%endif%}"
        "{{ message['content'] }}{%endfor%}"
        f"{{%if add_generation_prompt%}}{{{{ {_quoted(SPEAKERS['assistant'])} }}}}"
        f"{{%elif messages and messages[-1]['role'] == 'assistant'%}}{{{{ {_quoted(end)} }}}}{{%endif%}}"
    )
    training = tokenizer(render(ChatFormat(), EXAMPLE))["input_ids"]
    end_id = tokenizer.convert_tokens_to_ids(end)
    training = training if training[-1] == end_id else [*training, end_id]
    rendered = tokenizer.apply_chat_template(EXAMPLE, chat_template=template, tokenize=True, return_dict=True)
    return template if rendered["input_ids"] == training else None


def _quoted(text: str) -> str:
    """Quote `text` as a string of the template language."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"
