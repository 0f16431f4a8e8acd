"""prompt_eval.py with two models that have tokenizers of their own, offline: its functions, arguments and scripts."""

import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import prompt_eval
from utils.errors import UserError
from utils.model.tokenizer import load_hf_tokenizer
from utils.prompt_eval.answers import answer_batch, end_token_ids, unknown_token_ids
from utils.prompt_eval.comparison import check_checkpoints
from utils.prompt_eval.config import STRATEGIES, EvalConfig

ROOT = Path(__file__).resolve().parents[2]
STORIES = ROOT.parent / "shared" / "data" / "stories260K"
SCRIPTS = ROOT / "evaluation_scripts"
BOTH = ["--model_name_or_path_baseline", "base", "--model_name_or_path_finetune", "tuned"]
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
    assert unknown_token_ids(model, tokenizer) == list(range(300, 312))


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
    assert end in end_token_ids(model, tokenizer)
    stopped, _ = generated_ids(monkeypatch, model, tokenizer, inputs, max_new_tokens=8)
    assert stopped == [free[0][:stop]]


def test_each_model_has_its_own_tokenizer(pairs, capsys):
    (base, base_tokenizer), (tuned, tuned_tokenizer) = pairs["base"], pairs["tuned"]
    prompt = "Human: who wrote short poems? Assistant:"
    assert base_tokenizer(prompt)["input_ids"] != tuned_tokenizer(prompt)["input_ids"]
    args = prompt_eval.parse_args(
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


def test_the_originals_arguments_are_enough(pairs, capsys):
    """Callers of the original's `prompt_eval` know its arguments only, and tell both models' tokenizer once."""
    model, tokenizer = pairs["base"]
    args = Namespace(
        model_name_or_path_baseline="a", model_name_or_path_finetune="b", num_beams=1, num_beam_groups=1, top_k=4,
        penalty_alpha=0.6, num_return_sequences=1, max_new_tokens=5, language="English",
    )  # fmt: skip
    typed = dict(vars(args))
    prompt_eval.prompt_eval(args, model, model, tokenizer, torch.device("cpu"), ["Human: why? Assistant:"])
    inputs = tokenizer("Human: why? Assistant:", return_tensors="pt")
    [answer] = prompt_eval.generate(model, tokenizer, inputs, max_new_tokens=5)
    assert capsys.readouterr().out.count(f"\n\n{answer}\n\n") == 2
    assert vars(args) == typed


def test_all_argument_problems_are_said_together(monkeypatch):
    models = ["--model_name_or_path_baseline=a", "--model_name_or_path_finetune=b"]
    wrong = {
        "--num_return_sequences 2": "greedy decoding has one answer per prompt",
        "--top_k 0": "at least 1 is needed",
        "--max_new_tokens -1": "at least 1 is needed",
        "--penalty_alpha 1.5": "between 0 and 1",
        "--temperature 0.0": "above 0",
        "--top_p 0.0": "between 0 and 1",
        "--sampling_top_k -1": "at least 0 is needed",
        "--seed -1": "between 0 and",
        "--data_split 1,x": "",
        "--scorer_command no-such-program": "there is no program",
        "--prompt_file nowhere.txt": "cannot be read",
        "--strategies greedy,nucleus": "'nucleus' is none of greedy,",
        "--report prompt_eval.py": "that is a file",
    }
    arguments = [word for pair in wrong for word in pair.split(" ", 1)]
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError) as error:
        prompt_eval.parse_args([*arguments, "--model_name_or_path_baseline=a", "--prompt", " "])
    lines = str(error.value).splitlines()
    assert lines[0] == "15 problems:"
    assert any("--model_name_or_path_finetune is missing" in line for line in lines)
    for flag, reason in wrong.items():
        name = flag.split()[0]
        assert any(name in line and reason in line for line in lines), flag
    assert prompt_eval.parse_args([*models, "--prompt", "x", "--prompt", "y"]).prompt == ["x", "y"]


def test_refusals_of_the_functions(pairs):
    model, tokenizer = pairs["base"]
    inputs = tokenizer("Human: why? Assistant:", return_tensors="pt")
    with pytest.raises(UserError, match="greedy decoding has one answer"):
        prompt_eval.generate(model, tokenizer, inputs, num_return_sequences=2)
    with pytest.raises(UserError, match="contrastive search has one answer"):
        prompt_eval.generate_constrastive_search(model, tokenizer, inputs, num_return_sequences=2)
    with pytest.raises(UserError, match="256 positions"):
        prompt_eval.generate(model, tokenizer, inputs, max_new_tokens=256)


def test_the_functions_known_from_the_original_decode_in_every_way(pairs):
    model, tokenizer = pairs["base"]
    inputs = tokenizer("Human: why? Assistant:", return_tensors="pt")
    ways = {
        "beams": prompt_eval.generate(model, tokenizer, inputs, num_beams=3, num_return_sequences=2, max_new_tokens=6),
        "groups": prompt_eval.generate(
            model, tokenizer, inputs, num_beams=4, num_beam_groups=4, num_return_sequences=4, max_new_tokens=6,
            diversity_penalty=50.0,
        ),
        "samples": prompt_eval.generate(
            model, tokenizer, inputs, do_sample=True, num_return_sequences=3, max_new_tokens=6
        ),
        "contrastive": prompt_eval.generate_constrastive_search(model, tokenizer, inputs, max_new_tokens=6),
    }  # fmt: skip
    assert {name: len(texts) for name, texts in ways.items()} == {
        "beams": 2, "groups": 4, "samples": 3, "contrastive": 1,
    }  # fmt: skip
    assert all(text.startswith("Human: why? Assistant:") for texts in ways.values() for text in texts)
    assert len(set(ways["groups"])) == 4


def test_the_end_tokens_of_a_checkpoint_survive_loading(folders, tmp_path):
    """A run with --add_eot_token, and chat models, end answers with another token than the tokenizer's eos."""
    shutil.copytree(folders / "base", tmp_path / "base")
    file = tmp_path / "base" / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": [2, 7]}))
    model, tokenizer = prompt_eval.load(str(tmp_path / "base"), "cpu")
    assert end_token_ids(model, tokenizer) == [2, 7]


def test_what_a_checkpoint_says_about_sampling_does_not_count(folders, tmp_path):
    """Both models decode in the same way, whatever stands in their generation configs."""
    shutil.copytree(folders / "base", tmp_path / "base")
    file = tmp_path / "base" / "generation_config.json"
    own = {"do_sample": True, "temperature": 9.0, "top_k": 3, "repetition_penalty": 5.0, "num_beams": 3}
    file.write_text(json.dumps({**json.loads(file.read_text()), **own}))
    plain, changed = (prompt_eval.load(str(root / "base"), "cpu") for root in (folders, tmp_path))
    inputs = plain[1]("Human: why? Assistant:", return_tensors="pt")
    assert changed[0].generation_config.repetition_penalty == 5.0
    assert answer_batch(*changed, inputs, max_new_tokens=20) == answer_batch(*plain, inputs, max_new_tokens=20)


def test_half_precision_is_widened_on_the_cpu_only(folders):
    assert json.loads((folders / "tuned" / "config.json").read_text())["dtype"] == "float16"
    model, tokenizer = prompt_eval.load(str(folders / "tuned"), "cpu")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.get_output_embeddings().weight.shape[0] == len(tokenizer) + 12
    assert not model.training
    elsewhere, _ = prompt_eval.load(str(folders / "tuned"), "meta")
    assert {p.dtype for p in elsewhere.parameters()} == {torch.float16}


def test_the_dtype_asked_for(folders):
    assert prompt_eval.load(str(folders / "tuned"), "cpu", "bf16")[0].dtype == torch.bfloat16
    assert prompt_eval.load(str(folders / "tuned"), "meta", "fp32")[0].dtype == torch.float32


def test_a_checkpoint_that_is_not_there(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"config.json is missing"):
        prompt_eval.load(str(tmp_path / "empty"), "cpu")
    with pytest.raises(UserError, match="no such folder"):
        prompt_eval.load(str(tmp_path / "nowhere"), "cpu")
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no weights here"):
        prompt_eval.load(str(tmp_path / "empty"), "cpu")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="no usable model configuration at nobody/nothing"):
        prompt_eval.load("nobody/nothing", "cpu")


def run_script(arguments, cwd, script="run_prompt.sh", **options):
    """A script of evaluation_scripts/ with this interpreter as `python`; capitals are environment variables."""
    environment = {name: options.pop(name) for name in list(options) if name.isupper()}
    keep = {k: v for k, v in os.environ.items() if k not in ("BASELINE", "FINETUNED", "REPORT")}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(SCRIPTS / script), *map(str, arguments)],
        cwd=cwd,
        env={**keep, "PATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        **options,
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
    assert "--num_return_sequences 3: greedy decoding has one answer" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("script", ["run_prompt.sh", "run_report.sh", "run_chat.sh"])
def test_scripts_need_the_finetuned_model(tmp_path, script):
    for arguments in [[], ["base"], ["--language", "Chinese"]]:
        if arguments == ["base"] and script == "run_chat.sh":
            continue  # there the first one is the fine-tuned one
        done = run_script(arguments, tmp_path, script)
        assert done.returncode == 2
        assert "FINETUNED is missing" in done.stderr
        assert f"usage: bash evaluation_scripts/{script}" in done.stderr
        assert done.stderr.count("\n") == 1 or script != "run_prompt.sh"


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("run_*.sh")), ids=lambda path: path.name)
def test_scripts_are_strict_and_pass_arguments_on(script):
    text = script.read_text()
    assert "set -euo pipefail" in text and '"$@"' in text and "XXX" not in text
    assert os.access(script, os.X_OK) and "# usage: " in text


def test_run_report_end_to_end(folders, tmp_path, monkeypatch):
    """All strategies, several prompts, a scorer: the report's three files, and the numbers in the terminal."""
    scorer = tmp_path / "scorer.py"
    scorer.write_text(
        "import json, sys\nfor line in sys.stdin:\n    record = json.loads(line)\n"
        "    assert set(record) == {'prompt', 'answer'}\n    print(len(record['answer']))\n"
    )
    prompts = ["Human: why? Assistant:", "Human: how do you see a bird? Assistant:"]
    given = [word for prompt in prompts for word in ("--prompt", prompt)]
    done = run_script(
        ["base", "tuned", "out", "--max_new_tokens", "6", *given, "--scorer_command", f"{sys.executable} {scorer}"],
        folders, "run_report.sh",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (folders / "out" / "results.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["strategy"], row["model"]) for row in rows] == [
        (prompt, strategy, model)
        for prompt in prompts
        for strategy in STRATEGIES
        for model in ("baseline", "finetuned")
    ]
    assert all(row["score"] == len(row["answer"].strip()) for row in rows)
    for strategy, title in STRATEGIES.items():
        pairs = [
            (a["score"], b["score"]) for a, b in zip(rows[::2], rows[1::2], strict=True) if a["strategy"] == strategy
        ]
        wins, losses = (sum(sign * (b - a) > 0 for a, b in pairs) for sign in (1, -1))
        assert f"{title}: finetune wins {wins}, ties {2 - wins - losses}, loses {losses}" in done.stdout
        assert done.stdout.count(f"==========finetune: {title}=========") == 2
    assert "Beams: 4 beams, 4 groups of one beam for diverse_beam" in done.stdout
    assert "Tokenizers: the two models have different ones" in done.stdout
    assert "Report: out/report.html" in done.stdout
    # The bar counts prompts on the error stream: the answers stay clean.
    assert "12/12" in done.stderr and "prompt/s" not in done.stdout
    monkeypatch.chdir(folders)
    prompt_eval.main([*BOTH, "--report", "again", "--strategies", "all", "--max_new_tokens", "6", *given])
    unscored = [{key: value for key, value in row.items() if key != "score"} for row in rows]
    lines = (folders / "again" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == unscored, "the same seed gives the same answers"


def test_a_scorer_that_fails_does_not_cost_the_answers(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folders)
    given = ["--prompt", "Human: why? Assistant:", "--max_new_tokens", "4", "--scorer_command", "false"]
    with pytest.raises(UserError, match="--scorer_command 'false' ended with status 1"):
        prompt_eval.main([*BOTH, *given, "--report", str(tmp_path / "report")])
    assert (tmp_path / "report" / "report.html").exists() and "finetune: Greedy" in capsys.readouterr().out


def test_prompts_that_are_too_long_are_named_before_a_model_is_loaded(folders, monkeypatch):
    monkeypatch.chdir(folders)
    monkeypatch.setattr(prompt_eval, "load", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(UserError) as error:
        prompt_eval.main([*BOTH, "--prompt", "Human: why? Assistant:", "--prompt", "why " * 300])
    for name in ("base", "tuned"):
        assert f"{name}: prompt 2 of " in str(error.value)
    assert "prompt 1" not in str(error.value) and "exceed the model's 256 positions" in str(error.value)


CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def chat_trained(folders, tmp_path):
    """The two models, the fine-tuned one with a chat template of its own."""
    for name in TEXTS:
        shutil.copytree(folders / name, tmp_path / name)
    (tmp_path / "tuned" / "chat_template.jinja").write_text(CHATML)
    return tmp_path


def test_prompts_in_the_models_own_chat_template(chat_trained, monkeypatch, capsys):
    """Each model's ids are those of the form it was trained in, whatever form the prompts came in."""
    monkeypatch.chdir(chat_trained)
    asked, original = [], LlamaForCausalLM.generate

    def generate(model, **given):
        rows = zip(given["input_ids"], given["attention_mask"], strict=True)
        asked.append({tuple(ids[mask.bool()].tolist()) for ids, mask in rows})
        return original(model, **given)

    monkeypatch.setattr(LlamaForCausalLM, "generate", generate)
    given = ["--prompt=Why?", "--prompt=Human: How? Assistant: So. Human: Why? Assistant:", "--max_new_tokens=2"]
    scorer = ["--scorer_command", f"{sys.executable} -c 'import sys; [print(len(line)) for line in sys.stdin]'"]
    prompt_eval.main([*BOTH, *given, *scorer, "--prompt_form", "chat"])
    printed = capsys.readouterr().out
    assert "Prompts: put as questions, Baseline in the Human/Assistant form and finetune in its own chat" in printed
    assert "; Human: and Assistant: in 1 of them are read as turns\n" in printed
    plain, own = (load_hf_tokenizer(name) for name in ("base", "tuned"))
    of_baseline = [" Human: Why? Assistant:", " Human: How? Assistant: So. Human: Why? Assistant:"]
    of_tuned = ["<|user|>Why?</s><|assistant|>", "<|user|>How?</s><|assistant|>So.</s><|user|>Why?</s><|assistant|>"]
    assert asked == [
        {tuple(plain(text)["input_ids"]) for text in of_baseline},
        {tuple(own(text, add_special_tokens=False)["input_ids"]) for text in of_tuned},
    ]


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        (["Human: Why? Assistant:", "<|user|>Why?</s><|assistant|>"], "1 of 2 without the chat template of finetune"),
        (["<|user|>Why?</s><|assistant|> "], None),
    ],
)
def test_bare_prompts_to_a_model_with_a_template_are_said(chat_trained, prompts, words, monkeypatch, capsys):
    monkeypatch.chdir(chat_trained)
    config = EvalConfig.resolve(prompt_eval.parse_args([*BOTH, *(f"--prompt={prompt}" for prompt in prompts)]))
    check_checkpoints(config)
    end = f", {words} (--prompt_form chat puts them in it)\n" if words else "\n"
    assert f"Prompts: asked as they are written{end}" in capsys.readouterr().out


def test_run_chat_end_to_end(folders):
    done = run_script(["tuned", "base", "--max_new_tokens", "5"], folders, "run_chat.sh", input="why?\n\nhow?\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finetune: ") == done.stdout.count("Baseline: ") == 2
