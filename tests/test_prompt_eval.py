"""prompt_eval.py: greedy answers of two models, each with its own tokenizer, offline."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import prompt_eval
from utils.errors import UserError
from utils.utils import load_hf_tokenizer

ROOT = Path(__file__).resolve().parents[1]
STORIES = ROOT.parent / "shared" / "data" / "stories260K"
RUN_PROMPT = ROOT / "evaluation_scripts" / "run_prompt.sh"
TEXTS = {
    "base": ["Human: how do you see a bird? Assistant: with a telescope, or with your own eyes."] * 3,
    "tuned": ["Human: a frog went to the moon and wrote short poems there. Assistant: who told you?"] * 3,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small only lose time to threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_tokenizer(texts):
    """A byte-level BPE whose ids depend on the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=300,
            initial_alphabet=alphabet,
            special_tokens=["<s>", "<pad>", "</s>"],
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def make_model(tokenizer, seed, spare_rows=12):
    """A tiny random Llama with more rows than the tokenizer has tokens."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + spare_rows,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=0.5,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def pairs():
    """Two models with different tokenizers: name -> (model, tokenizer)."""
    tokenizers = {name: make_tokenizer(texts) for name, texts in TEXTS.items()}
    return {name: (make_model(tokenizer, seed), tokenizer) for seed, (name, tokenizer) in enumerate(tokenizers.items())}


@pytest.fixture(scope="module")
def folders(pairs, tmp_path_factory):
    """The same two pairs on disk; the fine-tuned one in half precision."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name, (model, tokenizer) in pairs.items():
        tokenizer.save_pretrained(root / name)
        model.save_pretrained(root / name)
    half = AutoModelForCausalLM.from_pretrained(root / "tuned", dtype=torch.float16)
    half.save_pretrained(root / "tuned")
    return root


@torch.no_grad()
def reference_greedy(model, ids, steps, allowed, ends):
    """Greedy decoding the slow way: a full forward pass per token, without a cache."""
    ids = list(ids)
    for _ in range(steps):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float()
        banned = torch.ones_like(logits, dtype=torch.bool)
        banned[allowed] = False
        ids.append(int(logits.masked_fill(banned, float("-inf")).argmax()))
        if ids[-1] in ends:
            break
    return ids


def generated_ids(monkeypatch, model, tokenizer, inputs, **kwargs):
    """The ids behind `prompt_eval.generate`, and its text."""
    seen = []
    original = model.generate
    with monkeypatch.context() as patch:
        patch.setattr(model, "generate", lambda **kw: seen.append(original(**kw)) or seen[-1])
        text = prompt_eval.generate(model, tokenizer, inputs, **kwargs)
    return seen[0].tolist(), text


@pytest.mark.parametrize("name", ["base", "tuned"])
@pytest.mark.parametrize("prompt", prompt_eval.PROMPTS["English"][:3])
def test_greedy_is_the_argmax_of_full_forward_passes(pairs, monkeypatch, name, prompt):
    model, tokenizer = pairs[name]
    inputs = tokenizer(prompt, return_tensors="pt")
    ids, text = generated_ids(monkeypatch, model, tokenizer, inputs, max_new_tokens=24)
    allowed = sorted(tokenizer.get_vocab().values())
    expected = reference_greedy(model, inputs["input_ids"][0].tolist(), 24, allowed, {2})
    assert ids == [expected]
    assert text == [tokenizer.decode(expected, skip_special_tokens=True)]
    assert text[0].startswith(prompt)


@pytest.mark.skipif(not STORIES.exists(), reason="the pretrained model of ../shared is not here")
def test_greedy_on_a_pretrained_model(monkeypatch):
    model, tokenizer = prompt_eval.load(str(STORIES), "cpu")
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    ids, text = generated_ids(monkeypatch, model, tokenizer, inputs, max_new_tokens=40)
    allowed = sorted(tokenizer.get_vocab().values())
    assert ids == [reference_greedy(model, inputs["input_ids"][0].tolist(), 40, allowed, {2})]
    assert "Once upon a time, there was a little" in text[0]
    assert "<s>" not in text[0]


def test_rows_without_a_token_are_never_generated(pairs, monkeypatch):
    _, tokenizer = pairs["base"]
    model = make_model(tokenizer, seed=3)
    direction = torch.randn(32)
    with torch.no_grad():  # whatever the hidden state, one of these two rows wins by far
        model.lm_head.weight[-1] = 1000 * direction
        model.lm_head.weight[-2] = -1000 * direction
    inputs = tokenizer("Human: why? Assistant:", return_tensors="pt")
    with torch.no_grad():
        assert int(model(**inputs).logits[0, -1].argmax()) >= len(tokenizer)
    ids, _ = generated_ids(monkeypatch, model, tokenizer, inputs, max_new_tokens=20)
    assert max(ids[0]) < len(tokenizer)
    assert prompt_eval.unknown_token_ids(model, tokenizer) == list(range(300, 312))


def test_attention_mask_reaches_the_model(pairs):
    """Padding on the left changes nothing. With pad = eos, generate cannot guess the mask from the ids."""
    model = pairs["base"][0]
    tokenizer = make_tokenizer(TEXTS["base"])
    tokenizer.pad_token = tokenizer.eos_token
    prompts = ["Human: why? Assistant:", "Human: how do you see a bird in the moon light? Assistant:"]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    together = prompt_eval.generate(model, tokenizer, batch, max_new_tokens=16)
    alone = [
        prompt_eval.generate(model, tokenizer, tokenizer(p, return_tensors="pt"), max_new_tokens=16)[0] for p in prompts
    ]
    assert together == alone


@pytest.mark.parametrize("known_to", ["tokenizer", "checkpoint"])
def test_answer_ends_at_the_end_token(pairs, monkeypatch, known_to):
    """The second token of the answer is declared an end, in the tokenizer or in the generation config."""
    model, tokenizer = pairs["base"][0], make_tokenizer(TEXTS["base"])
    inputs = tokenizer("Human: why? Assistant:", return_tensors="pt")
    free, _ = generated_ids(monkeypatch, model, tokenizer, inputs, max_new_tokens=8)
    stop = inputs["input_ids"].shape[1] + 2
    end = free[0][stop - 1]
    assert end != free[0][stop - 2] and len(free[0]) > stop
    if known_to == "tokenizer":
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    else:
        monkeypatch.setattr(model.generation_config, "eos_token_id", [2, end])
    assert end in prompt_eval.end_token_ids(model, tokenizer)
    stopped, _ = generated_ids(monkeypatch, model, tokenizer, inputs, max_new_tokens=8)
    assert stopped == [free[0][:stop]]


def test_each_model_has_its_own_tokenizer(pairs, capsys):
    (base, base_tokenizer), (tuned, tuned_tokenizer) = pairs["base"], pairs["tuned"]
    prompt = "Human: who wrote short poems? Assistant:"
    assert base_tokenizer(prompt)["input_ids"] != tuned_tokenizer(prompt)["input_ids"]
    args = prompt_eval.build_parser().parse_args(
        [
            "--model_name_or_path_baseline=a",
            "--model_name_or_path_finetune=b",
            "--max_new_tokens=12",
        ]
    )
    prompt_eval.prompt_eval(args, base, tuned, base_tokenizer, "cpu", [prompt], tuned_tokenizer)
    answers = [
        prompt_eval.generate(model, own, own(prompt, return_tensors="pt"), max_new_tokens=12)[0]
        for model, own in [(base, base_tokenizer), (tuned, tuned_tokenizer)]
    ]
    assert capsys.readouterr().out == (
        f"==========Baseline: Greedy=========\n\n{answers[0]}\n\n"
        f"==========finetune: Greedy=========\n\n{answers[1]}\n\n"
        "====================prompt end=============================\n\n\n"
    )


@pytest.mark.parametrize("language", ["English", "Chinese", "Japanese"])
def test_six_prompts_per_language(language):
    prompts = prompt_eval.PROMPTS[language]
    assert len(set(prompts)) == 6
    assert all(p.startswith("Human: ") and p.endswith(" Assistant:") for p in prompts)
    assert all(p.isascii() for p in prompts) == (language == "English")


def test_all_argument_problems_are_said_together():
    models = ["--model_name_or_path_baseline=a", "--model_name_or_path_finetune=b"]
    wrong = ["--num_return_sequences=2", "--top_k=8", "--max_new_tokens=0", "--prompt", " "]
    with pytest.raises(UserError) as error:
        prompt_eval.parse_args([*models, *wrong])
    for name in ["--num_return_sequences 2", "--top_k 8", "--max_new_tokens 0", "--prompt"]:
        assert name in str(error.value)
    assert len(str(error.value).splitlines()) == 4
    assert prompt_eval.parse_args([*models, "--prompt", "x", "--prompt", "y"]).prompt == ["x", "y"]


def test_refusals_of_the_functions(pairs):
    model, tokenizer = pairs["base"]
    inputs = tokenizer("Human: why? Assistant:", return_tensors="pt")
    with pytest.raises(UserError, match="greedy decoding has one answer"):
        prompt_eval.generate(model, tokenizer, inputs, num_return_sequences=2)
    with pytest.raises(UserError, match="diverse beam search"):
        prompt_eval.generate(model, tokenizer, inputs, num_beams=4, num_beam_groups=2)
    with pytest.raises(UserError, match="contrastive search"):
        prompt_eval.generate_constrastive_search(model, tokenizer, inputs)
    with pytest.raises(UserError, match="256 positions"):
        prompt_eval.generate(model, tokenizer, inputs, max_new_tokens=256)


def test_half_precision_is_widened_on_the_cpu_only(folders):
    assert json.loads((folders / "tuned" / "config.json").read_text())["dtype"] == "float16"
    model, tokenizer = prompt_eval.load(str(folders / "tuned"), "cpu")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.get_output_embeddings().weight.shape[0] == len(tokenizer) + 12
    assert not model.training
    elsewhere, _ = prompt_eval.load(str(folders / "tuned"), "meta")
    assert {p.dtype for p in elsewhere.parameters()} == {torch.float16}


def test_a_checkpoint_that_is_not_there(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"config.json is missing"):
        prompt_eval.load(str(tmp_path / "empty"), "cpu")
    with pytest.raises(UserError, match="no such folder"):
        prompt_eval.load(str(tmp_path / "nowhere"), "cpu")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="nobody/nothing: cannot be loaded"):
        prompt_eval.load("nobody/nothing", "cpu")


def run_script(arguments, cwd, **environment):
    """run_prompt.sh with this interpreter as `python`."""
    keep = {k: v for k, v in os.environ.items() if k not in ("BASELINE", "FINETUNED")}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(RUN_PROMPT), *arguments],
        cwd=cwd,
        env={**keep, "PATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_run_prompt_end_to_end(folders, pairs):
    """Relative folders, from elsewhere; BASELINE as argument, FINETUNED from the environment."""
    prompt = "Human: why? Assistant:"
    done = run_script(
        ["base", "--max_new_tokens", "8", "--prompt", prompt, "--prompt", "Human: how? Assistant:"],
        cwd=folders,
        FINETUNED="tuned",
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    for heading in ["==========Baseline: Greedy=========", "==========finetune: Greedy========="]:
        assert done.stdout.count(heading) == 2
    for name in ["base", "tuned"]:
        tokenizer = load_hf_tokenizer(str(folders / name), fast_tokenizer=True)
        model = AutoModelForCausalLM.from_pretrained(folders / name, dtype=torch.float32)
        inputs = tokenizer(prompt, return_tensors="pt")
        answer = prompt_eval.generate(model, tokenizer, inputs, max_new_tokens=8)[0]
        assert f"\n{answer}\n" in done.stdout


def test_run_prompt_shows_a_mistake_without_a_traceback(folders):
    done = run_script(["base", "missing", "--num_return_sequences", "3"], cwd=folders)
    assert done.returncode == 2
    assert "--num_return_sequences 3: only greedy decoding" in done.stderr
    assert "Traceback" not in done.stderr


def test_run_prompt_needs_the_finetuned_model(tmp_path):
    for arguments in [[], ["base"], ["--language", "Chinese"]]:
        done = run_script(arguments, cwd=tmp_path)
        assert done.returncode == 2
        assert "FINETUNED is missing" in done.stderr
        assert "usage: bash evaluation_scripts/run_prompt.sh" in done.stderr
