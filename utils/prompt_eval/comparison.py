"""The steps of a comparison between loading and reporting: check both checkpoints, ask a model, measure its answers."""

import sys

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from utils.errors import UserError, join_problems
from utils.machine.device import set_random_seed
from utils.prompt_eval.answer_metrics import Figures, compare_scores, summarize
from utils.prompt_eval.answers import Answer, Answers, Results, answer_prompts, check_length
from utils.prompt_eval.config import CHAT, HEADINGS, EvalConfig
from utils.prompt_eval.forms import describe_form, prompt_ids
from utils.prompt_eval.models import load_config_and_tokenizer
from utils.prompt_eval.references import add_scores
from utils.prompt_eval.scorer import score_answers


def check_checkpoints(config: EvalConfig) -> dict[str, PreTrainedTokenizerBase]:
    """Check, without loading the models, that both can answer every prompt; returns each model's tokenizer.

    Raises:
        UserError: a checkpoint can't be loaded, or a prompt is too long for it; all problems in one message.
    """
    problems, tokenizers = [], {}
    for name, path in config.models.items():
        try:
            model_config, tokenizers[name] = load_config_and_tokenizer(path, config.extra_token)
            prompts = prompt_ids(tokenizers[name], config)
        except UserError as err:
            problems.append(str(err))
            continue
        for number, ids in enumerate(prompts, start=1):
            try:
                check_length(model_config, len(ids), config.args.max_new_tokens, f"{path}: prompt {number}")
            except UserError as err:
                problems.append(str(err))
    if problems:
        raise UserError(join_problems(list(dict.fromkeys(problems))))
    print(describe_form(config, tokenizers))
    vocabularies = [tokenizer.get_vocab() for tokenizer in tokenizers.values()]
    if vocabularies[0] != vocabularies[1]:
        print(
            "Tokenizers: the two models have different ones, and each answers with its own. Answer lengths in tokens "
            "and perplexities count each model's own tokens and can't be compared: compare lengths in words instead"
        )
    return tokenizers


def ask(config: EvalConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> Answers:
    """Return one model's answers to all prompts by every strategy.

    Every strategy starts from the same seed, so that its answers do not depend on which other strategies are used.
    """
    answers = {}
    prompts = prompt_ids(tokenizer, config)
    total = len(config.prompts) * len(config.strategies)
    with logging.tqdm(total=total, desc=HEADINGS[name], unit="prompt", file=sys.stderr) as bar:
        for strategy in config.strategies:
            set_random_seed(config.args.seed)
            answers[strategy] = answer_prompts(
                model, tokenizer, prompts, config.decoding(strategy), config.args.batch_size, bar.update
            )
    return answers


def measure(config: EvalConfig, results: dict[str, Results]) -> tuple[Figures, UserError | None]:
    """Return every strategy's figures, with scores and wins if there is a scorer; and the scorer's error, if any.

    The error is returned, not raised: a scorer that fails must not cost the answers and the other figures.
    """
    figures: Figures = {strategy: {} for strategy in config.strategies}
    answers: dict[tuple[str, str], list[Answer]] = {
        (strategy, name): [answer for of_prompt in result.answers[strategy] for answer in of_prompt]
        for strategy in config.strategies
        for name, result in results.items()
    }
    for (strategy, name), given in answers.items():
        texts, tokens, ended = zip(*((answer.text, answer.tokens, answer.ended) for answer in given), strict=True)
        figures[strategy][name] = summarize(texts, tokens, ended)
    add_scores(config, results, figures)
    if config.args.scorer_command is None:
        return figures, None
    try:
        pairs = [
            (config.prompts[number] if config.args.prompt_form == CHAT else answer.prompt, answer.text.strip())
            for strategy, name in answers
            for number, of_prompt in enumerate(results[name].answers[strategy])
            for answer in of_prompt
        ]
        scores = iter(score_answers(config.args.scorer_command, pairs))
    except UserError as err:
        return figures, err
    for (strategy, name), given in answers.items():
        figures[strategy].setdefault("scores", {})[name] = [next(scores) for _ in given]
    for of_strategy in figures.values():
        of_strategy["wins"] = compare_scores(*of_strategy["scores"].values())
    return figures, None
