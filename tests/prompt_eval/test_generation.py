"""The two searches of `search.py` equal the papers' reference token for token, batched, on any family."""

import random

import pytest
import torch
from generation_reference import contrastive, diverse_beams
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    Qwen3Config,
    RwkvConfig,
)

from utils.errors import UserError
from utils.prompt_eval.search import contrastive_search, diverse_beam_search

VOCABULARY, PAD, END = 29, 2, 1
PROMPTS = 4
SPECIAL = {"vocab_size": VOCABULARY, "bos_token_id": 0, "pad_token_id": PAD, "eos_token_id": END}
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.6, **SPECIAL}
GATED = {**SMALL, "intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64}
CONFIGS = {
    "opt": OPTConfig(**SMALL, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=64, init_std=0.6),
    "gpt2": GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **SPECIAL, initializer_range=0.6),
    "llama": LlamaConfig(**GATED),
    "bloom": BloomConfig(hidden_size=16, n_layer=2, n_head=2, **SPECIAL, initializer_range=0.6),
    "gpt_neox": GPTNeoXConfig(**SMALL, intermediate_size=24, max_position_embeddings=64),
    "qwen3": Qwen3Config(**GATED),
    "mistral": MistralConfig(**GATED, sliding_window=6),
    "gemma2": Gemma2Config(**GATED, sliding_window=6),
    "mamba": MambaConfig(hidden_size=16, num_hidden_layers=2, state_size=4, **SPECIAL, initializer_range=0.6),
}
# Thirteen batches of four prompts in each of these families for each search, one batch in each of the others.
MANY = ("opt", "gpt2", "llama", "bloom")
CASES = [(family, seed) for family in CONFIGS for seed in range(13 if family in MANY else 1)]


def make(family, seed):
    """A random model whose every matrix matters, in float64: rounding must not decide."""
    torch.manual_seed(seed)
    # Their softmax is in float32, which float64's lowest number, the mask, doesn't fit: NaN where rows are padded.
    dtype = torch.float32 if family in ("bloom", "gemma2") else torch.float64
    model = AutoModelForCausalLM.from_config(CONFIGS[family], dtype=dtype).eval()
    model.generation_config.eos_token_id = END
    return model


def make_prompts(rng):
    return [[rng.randrange(3, VOCABULARY) for _ in range(rng.randint(1, 9))] for _ in range(PROMPTS)]


def batch(prompts):
    longest = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[PAD] * (longest - len(p)) + p for p in prompts]),
        "attention_mask": torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts]),
    }


def answers_of(output, prompt_length):
    """Ids up to the end token, per row."""
    found = []
    for row in output[:, prompt_length:].tolist():
        found.append(row[: row.index(END) + 1] if END in row else row)
    return found


def search(model, prompts, steps, method, **options):
    inputs = batch(prompts)
    output = model.generate(
        **inputs, custom_generate=method, max_new_tokens=steps, eos_token_id=[END], pad_token_id=PAD, **options
    )
    return answers_of(output, inputs["input_ids"].shape[1])


@pytest.mark.parametrize(("family", "seed"), CASES)
def test_contrastive_search_is_the_papers(family, seed):
    model, rng = make(family, seed), random.Random(seed)
    prompts, top_k, alpha, steps = make_prompts(rng), rng.randint(2, 5), rng.choice([0.3, 0.6, 0.8]), 8
    found = search(model, prompts, steps, contrastive_search, top_k=top_k, penalty_alpha=alpha)
    assert found == [contrastive(model, prompt, top_k, alpha, steps, {END}) for prompt in prompts]


@pytest.mark.parametrize(("family", "seed"), CASES)
def test_diverse_beam_search_is_the_papers(family, seed):
    model, rng = make(family, seed), random.Random(seed)
    beams, groups = rng.choice([(2, 2), (4, 2), (4, 4), (6, 3), (3, 1)])
    penalty, answers, steps = rng.choice([0.3, 1.0, 5.0]), rng.randint(1, beams), 6
    prompts = make_prompts(rng)
    found = search(
        model, prompts, steps, diverse_beam_search, num_beams=beams, num_beam_groups=groups,
        diversity_penalty=penalty, num_return_sequences=answers,
    )  # fmt: skip
    expected = [diverse_beams(model, p, beams, groups, penalty, steps, {END}, answers) for p in prompts]
    assert found == [answer for several in expected for answer in several]


def test_there_are_two_hundred_cases_over_four_families():
    cases = [(family, seed, prompt) for family, seed in CASES if family in MANY for prompt in range(PROMPTS)]
    assert len(cases) >= 200 and len({family for family, *_ in cases}) == 4


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_one_group_is_plain_beam_search(family):
    """Another independent witness: the beam search transformers still has."""
    for seed in range(3):
        model, prompts = make(family, seed), make_prompts(random.Random(seed))
        settings = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 8, "pad_token_id": PAD}
        settings |= {"eos_token_id": [END, 5], "suppress_tokens": [6], "repetition_penalty": 1.3, "length_penalty": 0.7}
        inputs = batch(prompts)
        ours = model.generate(**inputs, custom_generate=diverse_beam_search, num_beam_groups=1, **settings)
        theirs = model.generate(**inputs, **settings)
        assert ours[:, : theirs.shape[1]].tolist() == theirs.tolist()
        assert (ours[:, theirs.shape[1] :] == PAD).all()


def test_contrastive_search_without_a_penalty_is_greedy():
    model, inputs = make("llama", 3), batch(make_prompts(random.Random(3)))
    settings = {"max_new_tokens": 8, "pad_token_id": PAD, "eos_token_id": [END], "repetition_penalty": 1.5}
    ours = model.generate(**inputs, custom_generate=contrastive_search, penalty_alpha=0.0, top_k=3, **settings)
    assert ours.tolist() == model.generate(**inputs, **settings).tolist()


def test_groups_that_may_not_agree_begin_differently():
    model, inputs = make("gpt2", 1), batch([[5, 6, 7]])
    settings = {"max_new_tokens": 4, "pad_token_id": PAD, "eos_token_id": None, "num_beams": 3}
    settings |= {"num_beam_groups": 3, "num_return_sequences": 3, "custom_generate": diverse_beam_search}
    apart = model.generate(**inputs, diversity_penalty=100.0, **settings)
    assert all(len(set(column)) == 3 for column in apart[:, 3:].T.tolist())
    together = model.generate(**inputs, diversity_penalty=0.0, **settings)
    assert len(set(map(tuple, together.tolist()))) == 1


def test_forbidden_tokens_are_never_chosen():
    """With two tokens allowed and five candidates, three of them are forbidden ones, unlike all that stands there."""
    model, prompts = make("llama", 0), [[4, 5, 4, 5], [5]]
    banned = [token for token in range(VOCABULARY) if token not in (4, 5)]
    found = search(model, prompts, 6, contrastive_search, top_k=5, penalty_alpha=0.9, suppress_tokens=banned)
    assert {token for answer in found for token in answer} <= {4, 5}
    assert found == [contrastive(model, prompt, 5, 0.9, 6, {END}, banned) for prompt in prompts]


def test_numbers_that_are_none_do_not_hang():
    model, inputs = make("llama", 0), batch([[4, 5]])
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    settings = {"max_new_tokens": 3, "num_beams": 2, "num_beam_groups": 2, "pad_token_id": PAD}
    assert model.generate(**inputs, custom_generate=diverse_beam_search, **settings).shape[0] == 1


def test_what_can_not_be_done_is_said():
    model, inputs = make("llama", 0), batch([[4, 5]])
    with pytest.raises(UserError, match="contrastive search has one answer, not num_return_sequences=2"):
        model.generate(**inputs, custom_generate=contrastive_search, num_return_sequences=2, do_sample=True)
    with pytest.raises(UserError, match="num_beams 4 is no multiple of num_beam_groups 3"):
        model.generate(**inputs, custom_generate=diverse_beam_search, num_beams=4, num_beam_groups=3)


@pytest.mark.parametrize("method", [contrastive_search, diverse_beam_search])
def test_a_family_without_a_cache_to_reorder_is_refused(method):
    config = RwkvConfig(hidden_size=16, num_hidden_layers=2, context_length=32, **SPECIAL)
    model = AutoModelForCausalLM.from_config(config).eval()
    options = {"num_beams": 2, "num_beam_groups": 2} if method is diverse_beam_search else {}
    with pytest.raises(UserError, match="RwkvForCausalLM keeps no cache that can be reordered"):
        model.generate(input_ids=torch.tensor([[4, 5]]), custom_generate=method, max_new_tokens=3, **options)
