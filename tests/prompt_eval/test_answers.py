"""Answers in batches equal answers one by one and end where they should; prompt files, beams and scorers."""

import sys
from dataclasses import FrozenInstanceError

import pytest
import torch
from conftest import ROOT, SHARED, needs_shared
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaConfig

import prompt_eval
from tests.model.test_families import CONFIGS
from utils.errors import UserError
from utils.prompt_eval.answers import answer_batch, answer_prompts, check_length, encode, read_answer
from utils.prompt_eval.arguments import build_parser
from utils.prompt_eval.comparison import ask
from utils.prompt_eval.config import EvalConfig
from utils.prompt_eval.models import check_fit
from utils.prompt_eval.prompts import PROMPTS
from utils.prompt_eval.scorer import score_answers

MODELS = ["--model_name_or_path_baseline=a", "--model_name_or_path_finetune=b"]
FAMILIES = {**CONFIGS, "mamba": MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=1816, state_size=4)}
# Of very different lengths, so that the shortest one is mostly padding.
MANY = [*PROMPTS["English"], "Human: Why? Assistant:", "Human:" + " And how does a telescope work?" * 3 + " Assistant:"]


def resolved(*flags):
    """The configuration of a comparison of two models."""
    return EvalConfig.resolve(prompt_eval.parse_args([*MODELS, *flags]))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "demo" / "tiny_opt")


def random_model(family):
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(FAMILIES[family], dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name and "wte" not in name:
                parameter.mul_(20)  # so that what stands before a token matters, not the token alone
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_answers_greedily_as_one_by_one(family, tokenizer):
    model, settings = random_model(family), {"max_new_tokens": 12}
    ids = tokenizer(MANY)["input_ids"]
    together = answer_prompts(model, tokenizer, ids, settings, batch_size=len(MANY))
    alone = answer_prompts(model, tokenizer, ids, settings, batch_size=1)
    uneven = answer_prompts(model, tokenizer, ids, settings, batch_size=3)
    assert together == alone == uneven
    assert len({answers[0].text for answers in together}) > 2, "answers that are all alike would show nothing"


@needs_shared
@pytest.mark.parametrize("strategy", ["greedy", "beam", "diverse_beam", "contrastive"])
def test_a_batch_of_a_pretrained_model_answers_as_one_by_one(strategy):
    model, own = prompt_eval.load(str(SHARED / "stories260K"), "cpu")
    settings = resolved(f"--strategies={strategy}", "--max_new_tokens=40").decoding(strategy)
    prompts = [
        "Once upon a time",
        "The dog",
        "Lily wanted to play in the park, but her mom said",
        "One day, a big bird",
    ]
    ids = own(prompts)["input_ids"]
    together = answer_prompts(model, own, ids, settings, batch_size=4)
    assert together == answer_prompts(model, own, ids, settings, batch_size=1)
    assert ("there was a little" in together[0][0].text) or strategy == "contrastive"
    assert together[0][0].prompt == "Once upon a time" and together[0][0].text.startswith(", ")


def rows_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("written", "text", "ended"),
    [
        (" It has lenses.</s> Never read.", " It has lenses.", True),
        (" It has lenses. Human: And why?", " It has lenses.", True),
        ("\n\nHuman:", "", True),
        (" A SuperHuman: runs", " A SuperHuman: runs", False),
        (" It has", " It has", False),
        (" \u4f60\u597dHuman: x", " \u4f60\u597d", True),
    ],
)
def test_where_an_answer_ends(tokenizer, written, text, ended):
    prompt, new = tokenizer("Human: How? Assistant:")["input_ids"], rows_of(tokenizer, written)
    answer = read_answer(tokenizer, prompt, new, [tokenizer.eos_token_id])
    assert (answer.prompt, answer.text, answer.ended) == ("Human: How? Assistant:", text, ended)
    assert answer.tokens == len(rows_of(tokenizer, text))


def test_an_answer_that_is_cut_has_not_ended(tokenizer):
    model = random_model("llama")
    [answer] = answer_batch(model, tokenizer, encode(tokenizer, ["Human: Well? Assistant:"], "cpu"), max_new_tokens=3)
    assert not answer.ended and answer.tokens == 3


def test_samples_depend_on_the_seed_alone(tokenizer):
    model = random_model("gpt2")

    def answers(strategies, *flags):
        config = resolved(f"--strategies={strategies}", "--max_new_tokens=6", *flags)
        return ask(config, model, tokenizer, "baseline")

    once, again = (answers("multinomial,beam_multinomial") for _ in range(2))
    assert once == again
    assert answers("beam_multinomial") == {"beam_multinomial": once["beam_multinomial"]}
    assert answers("beam_multinomial", "--seed=5")["beam_multinomial"] != once["beam_multinomial"]


def test_sampling_follows_temperature_and_top_p(tokenizer):
    """Next to no temperature, or no other tokens to draw from: the greedy answer; and a penalty changes that one."""
    model = random_model("gpt2")

    def answers(*flags):
        return next(iter(ask(resolved("--max_new_tokens=8", *flags), model, tokenizer, "baseline").values()))

    greedy = answers()
    assert answers("--strategies=multinomial", "--temperature=1e-6") == greedy
    assert answers("--strategies=multinomial", "--top_p=1e-6") == greedy
    assert answers("--strategies=multinomial") != greedy
    assert answers("--repetition_penalty=3") != greedy


def test_several_answers_stay_with_their_prompt(tokenizer):
    model = random_model("gpt2")
    flags = ["--strategies=multinomial,diverse_beam", "--num_return_sequences=3", "--max_new_tokens=4"]
    config = resolved(*flags, "--num_beams=4", "--num_beam_groups=2")
    for found in ask(config, model, tokenizer, "baseline").values():
        assert [[answer.prompt for answer in answers] for answers in found] == [[p] * 3 for p in config.prompts]


def beams_of(*flags):
    config = resolved(*flags)
    return config.num_beams, config.num_beam_groups


def test_beams_that_were_left_at_one_are_chosen_and_said(capsys):
    assert beams_of() == (1, 1)
    assert capsys.readouterr().out == ""
    assert beams_of("--strategies=beam") == (4, 1)
    assert beams_of("--strategies=diverse_beam") == (4, 4)
    assert beams_of("--strategies=diverse_beam", "--num_beam_groups=2") == (4, 2)
    assert beams_of("--strategies=diverse_beam", "--num_beams=6") == (6, 6)
    assert beams_of("--strategies=beam", "--num_return_sequences=7") == (7, 1)
    assert capsys.readouterr().out.count("Beams: ") == 5
    assert beams_of("--strategies=diverse_beam", "--num_beams=6", "--num_beam_groups=3") == (6, 3)
    assert capsys.readouterr().out == ""
    assert beams_of("--num_beams=6") == (6, 1)
    assert "--num_beams: no effect, since none of the --strategies uses beams" in capsys.readouterr().out
    with pytest.raises(UserError, match="no multiple of --num_beam_groups 4"):
        beams_of("--strategies=diverse_beam", "--num_beams=6", "--num_beam_groups=4")
    with pytest.raises(UserError, match="4 beams give at most 4 answers"):
        beams_of("--strategies=beam", "--num_beams=4", "--num_return_sequences=5")


def test_arguments_stay_as_typed():
    """What is decided from the arguments is in the configuration alone."""
    flags = [*MODELS, "--strategies=all", "--prompt_file", str(ROOT / "data" / "eval.json")]
    args = prompt_eval.parse_args(flags)
    config = EvalConfig.resolve(args)
    assert vars(args) == vars(build_parser().parse_args(flags)) and config.args is args
    assert (args.strategies, args.num_beams, args.prompt) == ("all", 1, None)
    with pytest.raises(FrozenInstanceError):
        config.num_beams = 8


def test_all_strategies_and_each_once():
    every = ("greedy", "multinomial", "beam", "beam_multinomial", "diverse_beam", "contrastive")
    assert resolved("--strategies=all").strategies == every
    assert resolved("--strategies", "beam, greedy,beam").strategies == ("beam", "greedy")
    with pytest.raises(UserError, match="greedy and contrastive decoding has one answer"):
        prompt_eval.parse_args([*MODELS, "--strategies=all", "--num_return_sequences=2"])


def command(program):
    return f"{sys.executable} -c '{program}'"


def test_a_scorer_gets_json_lines_and_gives_numbers():
    program = 'import sys, json\nfor line in sys.stdin: print(len(json.loads(line)["answer"]))'
    assert score_answers(command(program), [("p", "one\nline"), ("p", ""), ("q", "é\u2028")]) == [8, 0, 2]


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("print(1)", "printed 1 lines for 2 answers"),
        ("print(1); print()", "line 2 is no finite number: ''"),
        ("print(1); print(float(chr(110)+chr(97)+chr(110)))", "line 2 is no finite number: 'nan'"),
        ("import sys; sys.exit(chr(120) * 3)", "ended with status 1: xxx"),
    ],
)
def test_a_scorer_that_does_something_else(program, message):
    with pytest.raises(UserError, match=message):
        score_answers(command(program), [("p", "a"), ("p", "b")])


def test_lengths_are_checked_against_the_positions():
    check_length(CONFIGS["gpt2"], 100, 28)
    check_length(CONFIGS["bloom"], 10**6, 28)
    with pytest.raises(UserError, match="prompt 3 of 100 tokens and --max_new_tokens 29 exceed the model's 128 pos"):
        check_length(CONFIGS["gpt2"], 100, 29, "prompt 3")


def test_two_models_that_do_not_fit_together_are_refused(tiny_opt, monkeypatch):
    size = (tiny_opt / "model.safetensors").stat().st_size
    monkeypatch.setattr("utils.prompt_eval.models.free_memory", lambda device: 2 * size)
    check_fit([str(tiny_opt)] * 2, "cpu", "auto")
    monkeypatch.setattr("utils.prompt_eval.models.free_memory", lambda device: 2 * size - 1)
    with pytest.raises(UserError, match="talk to one at a time"):
        check_fit([str(tiny_opt)] * 2, "cpu", "auto")
    check_fit([str(tiny_opt)] * 2, "cpu", "bf16")


def test_a_device_that_is_not_there():
    with pytest.raises(UserError, match="--device cuda:97: not on this machine"):
        prompt_eval.chosen_device("cuda:97")
    with pytest.raises(UserError, match="--device toaster: not on this machine"):
        prompt_eval.chosen_device("toaster")


@pytest.mark.parametrize("flags", [[], ["--add_eot_token", "--eot_token", "<|end|>"], ["--completion_only_loss"]])
def test_perplexity_is_what_training_printed(run_arguments, run_inside, tiny_opt, tmp_path, capfd, flags):
    output = tmp_path / "out"
    status, printed, _ = run_inside(
        [*run_arguments, *flags, "--learning_rate", "1e-2", "--output_dir", output, "--per_device_eval_batch_size", "4"]
    )
    assert status == 0
    trained = [line for line in printed.splitlines() if line.startswith("ppl: ")]
    at = run_arguments.index("--data_path")
    models = ["--model_name_or_path_baseline", str(tiny_opt), "--model_name_or_path_finetune", str(output)]
    prompt_eval.main([*models, *map(str, run_arguments[at : at + 8]), *flags, "--max_new_tokens", "2"])
    shown = [line.split(": ", 1)[1] for line in capfd.readouterr().out.splitlines() if ": ppl: " in line]
    assert len(trained) == len(shown) == 2
    for before, after in zip(trained, shown, strict=True):
        numbers = [[float(part.split()[-1]) for part in line.split(",")] for line in (before, after)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-6)
    assert shown[0] != shown[1]
