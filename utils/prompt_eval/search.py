"""Contrastive and diverse beam search, which transformers no longer ships: callables for `generate(custom_generate=)`.

Both work on batches padded on the left, with the model's own key-value cache, for any decoder-only family whose cache
can be reordered. `generate` prepares inputs, cache, processors and stopping criteria; this module only searches.
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from utils.errors import UserError

CACHE_NAMES = ("past_key_values", "cache_params")  # Mamba's is called cache_params


@torch.no_grad()
def contrastive_search(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    top_k: int = 4,
    penalty_alpha: float = 0.6,
    **model_kwargs: Any,
) -> torch.Tensor:
    """Decode by contrastive search (Su et al. 2022, https://arxiv.org/abs/2202.06417, equation 5).

    Of the `top_k` likeliest next tokens, choose the one that maximizes (1 - alpha) * its probability - alpha * the
    largest cosine between its last-layer hidden state and those of all tokens before it, prompt included, padding
    excluded.

    Args:
        input_ids: [rows, prompt length], padded on the left.
        top_k: candidates; each costs a forward of one token, all in one batch of rows * top_k.

    Returns:
        [rows, prompt length + answer length], ended rows filled with the pad id.

    Raises:
        UserError: several answers were requested (the search is deterministic), or the cache can't be reordered.
    """
    if generation_config.num_return_sequences > 1:
        raise UserError(
            f"contrastive search has one answer, not num_return_sequences={generation_config.num_return_sequences}"
        )
    model_kwargs["output_hidden_states"] = True
    outputs = model._prefill(input_ids, generation_config, model_kwargs)
    model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
    rows, device = len(input_ids), input_ids.device
    scores = logits_processor(input_ids, _at_least_float(outputs.logits[:, -1]))
    top_k = min(top_k, scores.shape[-1])
    before = _directions(outputs.hidden_states[-1])
    mask = model_kwargs.get("attention_mask")
    seen = mask[:, : before.shape[1]].bool() if mask is not None else before.new_ones(before.shape[:2]).bool()
    # From here on the model sees every row once per candidate.
    model_kwargs = _repeated(model_kwargs, top_k)
    _reorder(model, model_kwargs, torch.arange(rows, device=device).repeat_interleave(top_k))
    running = torch.ones(rows, dtype=torch.bool, device=device)
    while running.any():
        likeliest, candidates = scores.topk(top_k)
        outputs = _forward(model, candidates.flatten()[:, None], model_kwargs)
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        after = _directions(outputs.hidden_states[-1][:, -1]).view(rows, top_k, -1)
        cosines = (after @ before.transpose(1, 2)).masked_fill(~seen[:, None], -torch.inf)
        confidence = scores.softmax(-1).gather(1, candidates)
        value = (1 - penalty_alpha) * confidence - penalty_alpha * cosines.amax(-1)
        # Where fewer than top_k tokens are allowed, forbidden ones are among the candidates.
        chosen = value.masked_fill(likeliest == -torch.inf, -torch.inf).argmax(-1)

        tokens = _pick(candidates, chosen).where(running, _pad_id(generation_config))
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
        before = torch.cat([before, _pick(after, chosen)[:, None]], dim=1)
        seen = F.pad(seen, (0, 1), value=True)
        winners = torch.arange(rows, device=device) * top_k + chosen
        _reorder(model, model_kwargs, winners.repeat_interleave(top_k))
        scores = logits_processor(input_ids, _at_least_float(outputs.logits[winners, -1]))
        running &= ~stopping_criteria(input_ids, None)
    return input_ids


@torch.no_grad()
def diverse_beam_search(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    num_beam_groups: int = 1,
    diversity_penalty: float = 0.5,
    **model_kwargs: Any,
) -> torch.Tensor:
    """Decode by diverse beam search (Vijayakumar et al. 2016, https://arxiv.org/abs/1610.02424, algorithm 1).

    The beams are divided into groups that choose tokens one after another: a token's log-probability loses
    `diversity_penalty` for every beam of an earlier group that chose the same token at the same step (Hamming
    diversity). As in the paper, the penalized scores add up and rank the answers. Beams end by the rules of
    transformers' beam search, so that one group gives that search's answers: an ended beam leaves its group with
    score / length ** length_penalty, and a group is done when its best running beam, divided in the same way, can't
    beat the worst of its `beams / groups` ended ones.

    Args:
        input_ids: [prompts * num_beams, prompt length], padded on the left, each prompt num_beams times.

    Returns:
        [prompts * num_return_sequences, prompt length + longest beam], best first, padded with the pad id.

    Raises:
        UserError: num_beams is no multiple of num_beam_groups, or the cache can't be reordered.
    """
    beams, length_penalty = generation_config.num_beams, generation_config.length_penalty
    if beams % num_beam_groups:
        raise UserError(f"num_beams {beams} is no multiple of num_beam_groups {num_beam_groups}")
    prompts, width, prompt_length = len(input_ids) // beams, beams // num_beam_groups, input_ids.shape[1]
    ends = generation_config.eos_token_id
    # Enough candidates that `width` beams remain when the best ones all end.
    kept = width * (1 + max(1, len(ends) if isinstance(ends, list) else 1))
    groups = [
        _Group(input_ids.view(prompts, num_beam_groups, width, -1)[:, number], generation_config)
        for number in range(num_beam_groups)
    ]
    first_rows = (torch.arange(prompts, device=input_ids.device) * beams)[:, None]
    outputs = model._prefill(input_ids, generation_config, model_kwargs)
    while True:
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        log_probs = logits_processor(input_ids, _at_least_float(outputs.logits[:, -1]).log_softmax(-1))
        log_probs = log_probs.view(prompts, num_beam_groups, width, -1)
        taken = log_probs.new_zeros(prompts, log_probs.shape[-1])
        divisor = (input_ids.shape[1] + 1 - prompt_length) ** length_penalty
        sources = []
        for number, group in enumerate(groups):
            penalized = log_probs[:, number] - diversity_penalty * taken[:, None]
            parents = group.step(penalized, min(kept, penalized[0].numel()), stopping_criteria, divisor)
            continues = ~group.done[:, None] & (group.scores > -torch.inf)
            taken.scatter_add_(1, group.running[..., -1], continues.to(taken))
            sources.append(first_rows + number * width + parents)
        if all(group.done.all() for group in groups):
            return _best(groups, generation_config.num_return_sequences)[:, : input_ids.shape[1] + 1]
        input_ids = torch.stack([group.running for group in groups], dim=1).flatten(0, 2)
        _reorder(model, model_kwargs, torch.stack(sources, dim=1).flatten())
        outputs = _forward(model, input_ids[:, -1:], model_kwargs)


class _Group:
    """The beams of one group for all prompts.

    running [prompts, width, length] and their summed scores [prompts, width], best first; ended [prompts, width,
    max_length], padded with the pad id, and their divided scores, -inf where no beam has ended yet; done [prompts].
    """

    def __init__(self, prompts: torch.Tensor, config: GenerationConfig) -> None:
        self.running = prompts
        # At first all beams of a prompt are the same, so only one of them counts.
        self.scores = torch.full(prompts.shape[:2], -torch.inf, device=prompts.device)
        self.scores[:, 0] = 0
        self.pad = _pad_id(config)
        self.ended = prompts.new_full((*prompts.shape[:2], config.max_length), self.pad)
        self.ended_scores = torch.full_like(self.scores, -torch.inf)
        self.done = torch.zeros(len(prompts), dtype=torch.bool, device=prompts.device)

    def step(
        self, log_probs: torch.Tensor, kept: int, stopping_criteria: StoppingCriteriaList, divisor: float
    ) -> torch.Tensor:
        """Extend every beam by one token; returns [prompts, width], the beam from which each running one comes."""
        width, length = self.running.shape[1:]
        scores, places = (self.scores[..., None] + log_probs).flatten(1).topk(kept)
        parents, tokens = places // log_probs.shape[-1], places % log_probs.shape[-1]
        texts = torch.cat([_pick_many(self.running, parents), tokens[..., None]], dim=-1)
        stops = stopping_criteria(texts.flatten(0, 1), None).view_as(tokens)

        among_best = torch.arange(kept, device=tokens.device) < width
        counts = stops & among_best & ~self.done[:, None]
        filled = F.pad(texts, (0, self.ended.shape[-1] - length - 1), value=self.pad)
        divided = (scores / divisor).masked_fill(~counts, -torch.inf)
        self.ended_scores, order = torch.cat([self.ended_scores, divided], dim=1).topk(width)
        self.ended = _pick_many(torch.cat([self.ended, filled], dim=1), order)

        self.scores, order = scores.masked_fill(stops, -torch.inf).topk(width)
        self.running = _pick_many(texts, order)
        self.done |= self.scores[:, 0] / divisor <= self.ended_scores.amin(-1)
        self.done |= self.scores[:, 0] == -torch.inf  # no beam is left, even where a score is NaN
        return parents.gather(1, order)


def _best(groups: list[_Group], answers: int) -> torch.Tensor:
    """Return the best ended beams of all groups, [prompts * answers, max_length]."""
    scores = torch.cat([group.ended_scores for group in groups], dim=1)
    ended = torch.cat([group.ended for group in groups], dim=1)
    return _pick_many(ended, scores.topk(answers)[1]).flatten(0, 1)


def _forward(model: PreTrainedModel, new_tokens: torch.Tensor, model_kwargs: dict[str, Any]) -> Any:
    """Run the model on [rows, 1] new tokens over the cache, and return its output."""
    inputs = model.prepare_inputs_for_generation(new_tokens, next_sequence_length=1, **model_kwargs)
    return model(**inputs, return_dict=True)


def _reorder(model: PreTrainedModel, model_kwargs: dict[str, Any], rows: torch.Tensor) -> None:
    """Make cache row i a copy of the former row `rows[i]`; the number of rows may change."""
    cache = next((model_kwargs[name] for name in CACHE_NAMES if model_kwargs.get(name) is not None), None)
    if not hasattr(cache, "reorder_cache"):
        raise UserError(
            f"{type(model).__name__} keeps no cache that can be reordered: of the strategies only greedy and "
            "multinomial work with it"
        )
    cache.reorder_cache(rows)


def _repeated(model_kwargs: dict[str, Any], times: int) -> dict[str, Any]:
    """Return the arguments with every row of their tensors repeated; the cache is left to `_reorder`."""
    return {
        name: value.repeat_interleave(times, dim=0) if torch.is_tensor(value) else value
        for name, value in model_kwargs.items()
    }


def _at_least_float(logits: torch.Tensor) -> torch.Tensor:
    """Return half precision as float32, anything else unchanged."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _directions(hidden: torch.Tensor) -> torch.Tensor:
    """Return hidden states as vectors of length 1, for cosines."""
    return F.normalize(_at_least_float(hidden), dim=-1)


def _pick(values: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Pick a choice per row: [rows, choices, ...] and [rows] -> [rows, ...]."""
    return values[torch.arange(len(values), device=values.device), chosen]


def _pick_many(values: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Pick n choices per row: [rows, choices, ...] and [rows, n] -> [rows, n, ...]."""
    return values[torch.arange(len(values), device=values.device)[:, None], chosen]


def _pad_id(config: GenerationConfig) -> int:
    """Return the id that pads ended rows."""
    ends = config.eos_token_id
    first_end = ends[0] if isinstance(ends, list) else ends
    return next(token for token in (config.pad_token_id, first_end, 0) if token is not None)
