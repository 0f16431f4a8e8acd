"""The chat: the conversation keeps its form, each model remembers its own answers, and streams them."""

import io

import pytest
import torch
from conftest import ROOT, make_tiny_opt
from transformers import AutoModelForCausalLM, AutoTokenizer

import prompt_eval
from utils.errors import UserError
from utils.prompt_eval.answers import answer_batch, encode
from utils.prompt_eval.chat import AnswerPrinter, Speaker, chat, fitting_turns, next_prompt
from utils.prompt_eval.config import EvalConfig


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "demo" / "tiny_opt")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = make_tiny_opt(tmp_path_factory.mktemp("chat"), init_std=0.6)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def make_config(*flags):
    flags = ["--interactive", "--model_name_or_path_finetune=b", "--max_new_tokens=6", *flags]
    return EvalConfig.resolve(prompt_eval.parse_args(flags))


def talk(speakers, questions, *flags):
    """What was printed when these questions were asked; then the input ends."""
    output, left = io.StringIO(), list(questions)

    def ask(prompt):
        output.write(prompt)
        if not left:
            raise EOFError
        return left.pop(0)

    chat(speakers, make_config(*flags), ask, output)
    return output.getvalue()


def test_the_form_of_a_conversation():
    assert next_prompt([], "Why?") == " Human: Why? Assistant:"
    turns = [("Why?", "Because."), ("Really?", "Yes.")]
    assert next_prompt(turns, "And?") == (
        " Human: Why? Assistant: Because. Human: Really? Assistant: Yes. Human: And? Assistant:"
    )


@pytest.mark.parametrize("strategy", ["greedy", "beam", "contrastive"])
def test_each_model_remembers_its_own_answers(model, tokenizer, strategy, monkeypatch):
    other = AutoModelForCausalLM.from_config(model.config).eval()
    asked = []
    monkeypatch.setattr(
        "utils.prompt_eval.chat.encode", lambda own, texts, device: asked.append(texts[0]) or encode(own, texts, device)
    )
    speakers = [Speaker("Baseline", other, tokenizer), Speaker("finetune", model, tokenizer)]
    printed = talk(
        speakers, ["Why?", "", "And how?", "/help", "/clear", "Who?", "/quit", "never"], f"--strategies={strategy}"
    )
    settings = make_config(f"--strategies={strategy}").decoding(strategy)

    def answer(speaker, prompt):
        return answer_batch(speaker.model, tokenizer, encode(tokenizer, [prompt], "cpu"), **settings)[0].text.strip()

    expected = []
    for speaker in speakers:
        first = answer(speaker, " Human: Why? Assistant:")
        second = f" Human: Why? Assistant: {first} Human: And how? Assistant:"
        expected.append([" Human: Why? Assistant:", second, " Human: Who? Assistant:"])
        for prompt in expected[-1]:
            assert f"{speaker.name}: {answer(speaker, prompt)}\n" in printed
    assert asked == [prompt for of_both in zip(*expected, strict=True) for prompt in of_both]
    assert printed.count("A new conversation.") == 1 and "never" not in printed and printed.count("/clear begins") == 2


def test_answers_are_streamed(model, tokenizer):
    """The printer hands words on before the answer is complete, and all of them together are the answer."""
    pieces = []

    class Output(io.StringIO):
        def write(self, text):
            pieces.append(text)
            return super().write(text)

    printer = AnswerPrinter(tokenizer, Output())
    text = " A worm has no legs, as everyone knows."
    printer.put(torch.tensor([5, 6, 7]))  # the prompt, which is not shown
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        printer.put(torch.tensor([token]))
    printer.end()
    assert "".join(pieces) == text.strip() and len([piece for piece in pieces if piece]) > 4


def test_the_next_human_is_not_streamed(tokenizer):
    output = io.StringIO()
    printer = AnswerPrinter(tokenizer, output)
    printer.put(torch.tensor([5]))
    for token in tokenizer(" Yes.\n\nHuman: And why?", add_special_tokens=False)["input_ids"]:
        printer.put(torch.tensor([token]))
    printer.end()
    assert output.getvalue() == "Yes.\n\n"


def test_the_next_human_is_streamed_where_it_is_asked_for(tokenizer):
    output = io.StringIO()
    printer = AnswerPrinter(tokenizer, output, stop_at_human=False)
    printer.put(torch.tensor([5]))
    for token in tokenizer(" Yes.\n\nHuman: And why?", add_special_tokens=False)["input_ids"]:
        printer.put(torch.tensor([token]))
    printer.end()
    assert output.getvalue() == "Yes.\n\nHuman: And why?"


def test_the_oldest_turns_are_forgotten_when_positions_end(model, tokenizer):
    speaker = Speaker("finetune", model, tokenizer)  # 256 positions
    turns = [(f"What is {number}?", "It is a number. " * 6) for number in range(12)]
    forgotten = fitting_turns(speaker, turns, "And?", 6)

    def tokens(first):
        return len(tokenizer(next_prompt(turns[first:], "And?"))["input_ids"])

    assert 0 < forgotten < 12 and tokens(forgotten) + 6 <= 256 < tokens(forgotten - 1) + 6
    with pytest.raises(UserError, match="exceed the 256 positions of finetune"):
        fitting_turns(speaker, [], "why " * 300, 6)
    printed = talk([speaker], ["why " * 300, "Why?"])
    assert "[that question has" in printed and printed.count("finetune: ") == 2


def test_a_conversation_needs_a_model_and_has_no_report():
    with pytest.raises(UserError, match="give a model to talk to"):
        prompt_eval.parse_args(["--interactive"])
    with pytest.raises(UserError, match="a conversation has no report"):
        make_config("--report=x")
    with pytest.raises(UserError, match="asks what you type and measures nothing: leave out --prompt, --data_path"):
        make_config("--prompt=Why?", "--data_path", "x")


CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_a_model_is_asked_in_its_own_chat_template(model, monkeypatch):
    """Special tokens as the template writes them, none added; and another model beside it in its own form."""
    own, plain = (AutoTokenizer.from_pretrained(ROOT / "demo" / "tiny_opt") for _ in range(2))
    own.chat_template = CHATML
    asked = []
    monkeypatch.setattr(
        "utils.prompt_eval.chat.answer_batch",
        lambda model, tokenizer, inputs, **settings: (
            asked.append(inputs["input_ids"][0].tolist()) or answer_batch(model, tokenizer, inputs, **settings)
        ),
    )
    printed = talk([Speaker("finetune", model, own), Speaker("Baseline", model, plain)], ["Why?", "How?"])
    assert "finetune is asked in its own chat template\n" in printed
    assert "Baseline is asked in the Human/Assistant form\n" in printed
    first = "<|user|>Why?</s><|assistant|>"
    assert asked[0] == own(first, add_special_tokens=False)["input_ids"]
    assert asked[1] == plain(" Human: Why? Assistant:")["input_ids"]
    assert own.decode(asked[2]).startswith(first) and own.decode(asked[2]).endswith("</s><|user|>How?</s><|assistant|>")


def test_a_template_that_refuses_is_said(model, tokenizer):
    own = AutoTokenizer.from_pretrained(ROOT / "demo" / "tiny_opt")
    own.chat_template = "{{ raise_exception('system first') }}"
    printed = talk([Speaker("finetune", model, own)], ["Why?"])
    assert "finetune: [the chat template can't be rendered: system first]" in printed
    own.chat_template = "{# for later #}"
    assert "finetune: [the chat template writes nothing for a question" in talk(
        [Speaker("finetune", model, own)], ["?"]
    )


def test_bytes_of_another_encoding_are_no_fault_of_the_template(model, tokenizer):
    """A terminal in latin-1: what Python keeps of a byte is no text, which a tokenizer would refuse."""
    printed = talk([Speaker("one", model, tokenizer)], [b"Caf\xe9?".decode("utf-8", "surrogateescape"), "Why?"])
    assert printed.count("Human: one: ") == 2 and "can't be rendered" not in printed
