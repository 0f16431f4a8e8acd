"""The lines of a comparison in the terminal: answers one below the other, and figures."""

from collections.abc import Sequence

from utils.prompt_eval.answer_metrics import Figures
from utils.prompt_eval.answers import Results
from utils.prompt_eval.config import HEADINGS, STRATEGIES, EvalConfig
from utils.train.perplexity import describe_source


def show_answers(config: EvalConfig, results: dict[str, Results]) -> None:
    """Print the models' answers to each prompt, one below the other."""
    for number in range(len(config.prompts)):
        for strategy in config.strategies:
            for name, result in results.items():
                print(f"=========={HEADINGS[name]}: {STRATEGIES[strategy]}=========")
                print_utils([answer.prompt + answer.text for answer in result.answers[strategy][number]])
        print("====================prompt end=============================\n\n", flush=True)


def print_utils(gen_output: Sequence[str]) -> None:
    """Print the texts, each between blank lines."""
    for text in gen_output:
        print(f"\n{text}\n")


def show_figures(figures: Figures, results: dict[str, Results]) -> None:
    """Print the figures of every strategy and model, wins where answers were scored, and the models' perplexities."""
    for strategy, of_strategy in figures.items():
        for name in results:
            values = ", ".join(
                f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {'none' if value is None else value}"
                for key, value in of_strategy[name].items()
            )
            print(f"{STRATEGIES[strategy]}, {HEADINGS[name]}: {values}")
        if "wins" in of_strategy:
            wins = of_strategy["wins"]
            print(f"{STRATEGIES[strategy]}: finetune wins {wins['win']}, ties {wins['tie']}, loses {wins['loss']}")
    for name, result in results.items():
        if result.evaluation:
            whole = result.evaluation
            print(f"{HEADINGS[name]}: ppl: {whole.perplexity}, loss: {whole.loss}")
            print(f"{HEADINGS[name]}: token accuracy: {whole.accuracy:.2%}")
            for source, one in whole.sources.items():
                print(f"{HEADINGS[name]}, {describe_source(source, one)}")
