"""Where generation stops, and what sampling draws from: the program's way and the original's."""

import pytest
import torch
from conftest import ROOT
from transformers import AutoTokenizer

import prompt_eval
from tests.prompt_eval.test_answers import random_model, resolved, rows_of
from utils.prompt_eval.answers import answer_batch, encode

SAID = " Yes. Human: And then? And so on, and on, and on."


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "demo" / "tiny_opt")


@pytest.fixture
def rambling(tokenizer, monkeypatch):
    """A model that says `SAID` over and over, whatever it is asked, a prompt, and the numbers of its steps."""
    model, prompt = random_model("llama"), "Human: Well? Assistant:"
    said = rows_of(tokenizer, SAID)
    length, plain, steps = len(tokenizer(prompt)["input_ids"]), model.forward, []

    def forward(input_ids, attention_mask=None, position_ids=None, **inputs):
        out = plain(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **inputs)
        steps.append(int(position_ids[0, -1]) + 1 - length)
        out.logits[:, -1, said[steps[-1] % len(said)]] += 1000
        return out

    monkeypatch.setattr(model, "forward", forward)
    return model, prompt, steps


@pytest.mark.parametrize("strategy", ["greedy", "multinomial", "diverse_beam", "contrastive"])
def test_generation_stops_at_the_next_human(tokenizer, rambling, strategy):
    """No more steps are made than up to the next "Human:"."""
    model, prompt, steps = rambling
    config = resolved(f"--strategies={strategy}", "--max_new_tokens=60", "--penalty_alpha=0")
    [answer] = answer_batch(model, tokenizer, encode(tokenizer, [prompt], "cpu"), **config.decoding(strategy))
    assert (answer.text, answer.ended) == (" Yes.", True)
    assert max(steps) <= len(rows_of(tokenizer, " Yes. Human:"))


@pytest.mark.parametrize("strategy", ["greedy", "multinomial", "diverse_beam", "contrastive"])
def test_generation_goes_on_where_it_is_told_to(tokenizer, rambling, strategy):
    model, prompt, _ = rambling
    flags = ["--no-stop_at_human", "--max_new_tokens=40", "--penalty_alpha=0"]
    config = resolved(f"--strategies={strategy}", *flags)
    [answer] = answer_batch(model, tokenizer, encode(tokenizer, [prompt], "cpu"), **config.decoding(strategy))
    assert answer.text.startswith(SAID) and (answer.tokens, answer.ended) == (40, False)
    assert 'answers go on after "Human:"' in config.settings and 'answers end at "Human:"' in resolved().settings


def test_the_functions_known_from_the_original_return_all_that_was_written(tokenizer, rambling):
    model, prompt, _ = rambling
    inputs = tokenizer(prompt, return_tensors="pt")
    ways = [{}, {"do_sample": True}, {"num_beams": 2}, {"num_beams": 2, "num_beam_groups": 2}]
    texts = [prompt_eval.generate(model, tokenizer, inputs, max_new_tokens=30, **way)[0] for way in ways]
    texts += prompt_eval.generate_constrastive_search(model, tokenizer, inputs, penalty_alpha=0, max_new_tokens=30)
    assert all(text.startswith(prompt + SAID) for text in texts) and len(texts) == 5


def test_sampling_draws_from_fifty_tokens_or_from_all(tokenizer, monkeypatch):
    """The tokens left to draw from: those whose score is not minus infinity when torch draws."""
    model, prompt = random_model("gpt2"), "Human: Well? Assistant:"
    inputs, drawn_from = tokenizer(prompt, return_tensors="pt"), []
    plain = torch.multinomial
    monkeypatch.setattr(
        torch, "multinomial", lambda p, *a, **k: drawn_from.append(int((p[0] > 0).sum())) or plain(p, *a, **k)
    )
    prompt_eval.generate(model, tokenizer, inputs, do_sample=True, max_new_tokens=2)
    for flags in ([], ["--sampling_top_k=7"], ["--sampling_top_k=0"]):
        config = resolved("--strategies=multinomial", "--max_new_tokens=2", *flags)
        answer_batch(model, tokenizer, inputs, **config.decoding("multinomial"))
    tokens = len(tokenizer.get_vocab())
    assert drawn_from[:6] == [50, 50, 50, 50, 7, 7] and all(50 < count <= tokens for count in drawn_from[6:])
    shown = resolved("--strategies=beam_multinomial", "--sampling_top_k=0").settings
    assert "sampling from all tokens, temperature 1.0, top-p 1.0" in shown
