"""The commands that a run ends with."""

import json
import shlex

import gguf
import pytest
from conftest import ROOT
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tools.tiny_families import families, tiny_config
from utils.errors import UserError
from utils.export.model_card import use
from utils.export.next_steps import next_steps, next_steps_text
from utils.export.other_programs import LLAMA_CPP, VLLM, notes
from utils.module.empty_model import empty_model
from utils.prompt_eval.arguments import parse_args

CLASSES = {name for found in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
           for name in ([found] if isinstance(found, str) else found)}  # fmt: skip
FORMATS = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}


def test_our_own_commands_can_be_typed(tmp_path):
    """Scripts that exist, and arguments that prompt_eval.py takes; a folder with a blank in its name stays one word."""
    base, folder = str(tmp_path / "a base"), str(tmp_path / "an output")
    commands = [shlex.split(command) for command in next_steps(base, folder, "LlamaForCausalLM").values()]
    own = [words for words in commands if words[0] == "bash"]
    assert len(own) == 2
    for words in own:
        assert (ROOT / words[1]).is_file() and words[-1] == folder
    assert own[1][2:] == [base, folder]
    assert parse_args(["--model_name_or_path_baseline", base, "--model_name_or_path_finetune", folder])
    assert all(folder in words for words in commands)


def saved(folder, *architectures: str) -> str:
    (folder / "config.json").write_text(json.dumps({"architectures": list(architectures)}))
    return next_steps_text("base", str(folder))


def test_each_stands_in_a_line_of_its_own(tmp_path):
    lines = saved(tmp_path, "LlamaForCausalLM").splitlines()
    steps = next_steps("base", str(tmp_path), "LlamaForCausalLM").values()
    assert lines[0] == "What next:" and len(lines) == 1 + len(steps) == 6
    assert all(command in line for line, command in zip(lines[1:], steps, strict=True))


@pytest.mark.parametrize(("architecture", "vllm", "llama_cpp"), [
    ("OPTForCausalLM", True, False), ("LlamaForCausalLM", True, True), ("GPT2LMHeadModel", True, True),
    ("XGLMForCausalLM", False, False), ("CTRLLMHeadModel", False, False), ("BertLMHeadModel", False, False),
    ("MyOwnForCausalLM", False, False),
])  # fmt: skip
def test_no_command_of_a_program_that_does_not_know_the_model(tmp_path, architecture, vllm, llama_cpp):
    for text in (saved(tmp_path, architecture), "\n".join(use(architecture))):
        assert ("vllm serve" in text) == vllm and (f"vLLM has no {architecture}" in text) == (not vllm)
        assert ("convert_hf_to_gguf.py" in text) == llama_cpp
        assert (f"llama.cpp's converter does not know {architecture}" in text) == (not llama_cpp)
    (tmp_path / "config.json").write_text("{}")
    assert "names no class" in next_steps_text("base", str(tmp_path)) and len(notes(None)) == 2


def test_the_tables_name_classes_and_formats_that_exist():
    """gguf lists every format, and reads the embeddings of each family by the name they have in a saved model."""
    assert set(LLAMA_CPP) | VLLM <= CLASSES
    assert set(LLAMA_CPP.values()) <= set(FORMATS) and "opt" not in FORMATS
    read = 0
    for family in families():
        name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
        if name not in LLAMA_CPP or "Conditional" in str(name):
            continue
        try:
            model = empty_model(tiny_config(family))
        except UserError:  # DBRX, which this version of transformers can't build
            continue
        embeddings = next(key for key, part in model.named_modules() if part is model.get_input_embeddings())
        table = gguf.get_tensor_name_map(FORMATS[LLAMA_CPP[name]], 2)
        assert table.get_name(f"{embeddings}.weight", try_suffixes=(".weight",)) == "token_embd.weight", name
        read += 1
    assert read > 50
