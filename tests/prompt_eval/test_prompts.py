"""The prompts of a comparison: the built-in ones letter by letter, and those of files."""

import pytest

from tests.prompt_eval.test_answers import resolved
from utils.errors import UserError
from utils.prompt_eval.prompts import PROMPTS, read_prompt_file


def test_the_built_in_prompts_letter_by_letter():
    assert PROMPTS == {
        "English": [
            "Human: Please tell me about Microsoft in a few sentence? Assistant:",
            "Human: Explain the moon landing to a 6 year old in a few sentences. Assistant:",
            "Human: Write a short poem about a wise frog. Assistant:",
            "Human: Who was president of the United States in 1955? Assistant:",
            "Human: How does a telescope work? Assistant:",
            "Human: Why do birds migrate south for the winter? Assistant:",
        ],
        "Chinese": [
            "Human: 请用几句话介绍一下微软? Assistant:",
            "Human: 用几句话向6岁的孩子解释登月。 Assistant:",
            "Human: 写一首关于一只聪明的青蛙的短诗。 Assistant:",
            "Human: 谁是1955年的美国总统? Assistant:",
            "Human: 望远镜是如何工作的? Assistant:",
            "Human: 鸟类为什么要南迁过冬? Assistant:",
        ],
        "Japanese": [
            "Human: マイクロソフトについて簡単に教えてください。 Assistant:",
            "Human: 6歳児に月面着陸を短い文で説明する。 Assistant:",
            "Human: 賢いカエルについて短い詩を書いてください。 Assistant:",
            "Human: 1955年のアメリカ合衆国大統領は誰? Assistant:",
            "Human: 望遠鏡はどのように機能しますか? Assistant:",
            "Human: 鳥が冬に南に移動するのはなぜですか? Assistant:",
        ],
    }


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "\ufeffHuman: one? Assistant:\r\n\n  \nHuman: two? Assistant:\n"),
        ("a.json", '[{"prompt": "Human: one? Assistant:"}, {"prompt": "Human: two? Assistant:", "chosen": 3}]'),
        ("a.jsonl", '{"prompt": "Human: one? Assistant:"}\n{"prompt": "Human: two? Assistant:"}\n'),
    ],
)
def test_prompt_files(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    prompts = ["Human: one? Assistant:", "Human: two? Assistant:"]
    assert read_prompt_file(str(tmp_path / name)) == prompts
    config = resolved("--prompt", "first", "--prompt_file", str(tmp_path / name))
    assert config.prompts == ("first", *prompts)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", " \n\n", "is empty"),
        ("a.json", "", "is empty"),
        ("a.json", "[]", "is empty"),
        ("a.jsonl", '{"prompt": "x"}\n{"text": "y"}', r'record 2 \(line 2\) has no "prompt"'),
        ("a.jsonl", '{"prompt": " "}', r'record 1 \(line 1\) has an empty text under "prompt"'),
        ("a.json", '[{"prompt": ["x"]}]', r'has a list under "prompt"'),
        ("a.jsonl", '{"prompt": "x"', "is not valid JSON"),
        ("a.csv", "x", ".csv is none of .txt, .json and .jsonl"),
        ("prompts", "x", "no ending is none of"),
    ],
)
def test_prompt_files_that_can_not_be_used(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_prompt_file(str(tmp_path / name))
