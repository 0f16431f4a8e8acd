"""`--sample_prompts`: the model's answers at each evaluation, which change nothing of the training."""

import json

import pytest
import torch
from conftest import make_tiny_opt
from fork_runs import copy_at_step, finished_run, outcome
from transformers import AutoModelForCausalLM, AutoTokenizer

from utils.errors import UserError
from utils.logging.metrics_file import read_samples
from utils.prompt_eval.prompts import read_sample_prompts

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTIONS = ["Why is the sky blue?", "What is an owl?"]


@pytest.fixture(scope="module")
def chat_setting(tmp_path_factory, cache_folder):
    """A model with a chat template, conversations, and two prompts: one a text, one a conversation."""
    folder = tmp_path_factory.mktemp("chat")
    model = make_tiny_opt(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(model)
    talks = [
        {"messages": [{"role": "user", "content": f"{number} legs?"}, {"role": "assistant", "content": "An owl. " * 5}]}
        for number in range(30)
    ]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, talks)))
    asked = [{"prompt": QUESTIONS[0]}, {"messages": [{"role": "user", "content": QUESTIONS[1]}]}]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, asked)))
    setting = [
        "--model_name_or_path", model, "--data_path", folder / "chats.jsonl", "--data_output_path", cache_folder,
        "--max_seq_len", "64", "--dtype", "fp32", "--per_device_train_batch_size", "4", "--max_steps", "6",
        "--eval_steps", "2", "--learning_rate", "1e-3",
    ]  # fmt: skip
    return setting, folder / "prompts.jsonl"


def reference(folder, prompts: list[str], adds_special: bool) -> list[str]:
    """The greedy answers of a saved model to each prompt alone, by transformers."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    answers = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=adds_special)["input_ids"]
        rows = sorted(set(range(model.config.vocab_size)).difference(tokenizer.get_vocab().values())) or None
        with torch.no_grad():
            out = model.generate(ids, max_new_tokens=100, do_sample=False, pad_token_id=1, suppress_tokens=rows)
        whole, asked = (tokenizer.decode(one, skip_special_tokens=True) for one in (out[0], ids[0]))
        answers.append(whole[len(asked) :])
    return answers


def test_answers_in_the_chat_template_change_nothing_of_the_training(chat_setting, tmp_path):
    """Dropout is on: a random number drawn or left out would change every later loss. Resuming keeps the file."""
    setting, prompts = chat_setting
    ask = ["--sample_prompts", prompts, "--report_to", "tensorboard", "--tensorboard_path", tmp_path / "events"]
    finished_run([*setting, "--output_dir", tmp_path / "without"])
    printed = finished_run([*setting, *ask, "--save_steps", "3", "--output_dir", tmp_path / "with"])
    assert outcome(tmp_path / "with") == outcome(tmp_path / "without")
    assert f"Sample prompts: 2 of {prompts}, asked in the tokenizer's chat template" in printed
    records = read_samples(str(tmp_path / "with"))
    assert [record["step"] for record in records] == [0, 0, 2, 2, 4, 4, 6, 6]
    rendered = [f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n" for question in QUESTIONS]
    assert [record["prompt"] for record in records] == rendered * 4
    assert [record["answer"] for record in records[-2:]] == reference(tmp_path / "with", rendered, False)
    assert records[0]["answer"] != records[-2]["answer"]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next((tmp_path / "events").rglob("events.out*")).parent))
    events.Reload()
    texts = events.Tensors("Eval/Samples/answer 2/text_summary")
    assert len(texts) == 4 and QUESTIONS[1] in texts[-1].tensor_proto.string_val[0].decode()

    resumed = copy_at_step(tmp_path / "with", tmp_path / "resumed", 3)
    finished_run([*setting, *ask, "--save_steps", "3", "--resume_from_checkpoint", "--output_dir", resumed])
    assert read_samples(str(resumed)) == records and outcome(resumed) == outcome(tmp_path / "with")


def test_two_ranks_under_zero_3_with_lora_answer_what_the_saved_model_answers(run_arguments, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(f" Human: {question} Assistant:" for question in QUESTIONS))
    setting = [
        *run_arguments, "--per_device_train_batch_size", "8", "--max_steps", "3", "--zero_stage", "3",
        "--lora_dim", "4", "--lora_module_name", "auto", "--lora_learning_rate", "1e-2",
    ]  # fmt: skip
    finished_run([*setting, "--output_dir", tmp_path / "without"], ranks=2)
    asked = ["--sample_prompts", tmp_path / "prompts.txt", "--output_dir", tmp_path / "with"]
    printed = finished_run([*setting, *asked], ranks=2)
    assert "asked as they are written" in printed and outcome(tmp_path / "with") == outcome(tmp_path / "without")
    last = [record for record in read_samples(str(tmp_path / "with")) if record["step"] == 3]
    prompts = [record["prompt"] for record in last]
    assert prompts == [f" Human: {question} Assistant:" for question in QUESTIONS]
    assert [record["answer"] for record in last] == reference(tmp_path / "with", prompts, True)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "\n \n", "is empty: write at least one prompt"),
        ("a.jsonl", '{"messages": [{"role": "assistant", "content": "x"}]}', "record 1 .line 1.: .* nothing to answer"),
        ("a.jsonl", '{"messages": 3}', 'record 1 .line 1.: "messages" is a number'),
        ("a.csv", "x", ".csv is none of"),
    ],
)  # fmt: skip
def test_files_that_can_not_be_used(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=f"--sample_prompts .*{message}"):
        read_sample_prompts(str(tmp_path / name))


def test_a_file_that_is_not_there_is_refused_before_the_model_is_loaded(run_inside, run_arguments, tmp_path):
    """With a prompt that is too long, in one start each."""
    asked = [*run_arguments, "--output_dir", tmp_path / "out", "--sample_prompts"]
    status, printed, error = run_inside([*asked, tmp_path / "none.txt"])
    assert status == 2 and "none.txt cannot be read" in error and "Model:" not in printed
    (tmp_path / "long.txt").write_text("owl " * 300)
    status, printed, error = run_inside([*asked, tmp_path / "long.txt"])
    assert status == 2 and "leaves no room for an answer in the model's 256 positions" in error
    status, _, error = run_inside([*run_arguments, "--sample_prompts", tmp_path / "long.txt"])
    assert status == 2 and "--sample_prompts needs --output_dir" in error
