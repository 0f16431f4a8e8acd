"""The loss curve of a run: as `loss.png`, and as an `<svg>` for an HTML page, colored by the page's style."""

import io
import math
import os
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

from utils.logging.metrics_file import METRICS_FILE, curve, read_metrics

WIDTH, HEIGHT = 900, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 14, 36
MOST_POINTS = 600  # of a curve in the svg; more can't be told apart
Point = tuple[float, float]
PICTURE = "loss.png"
MEAN_PARTS = 25  # the running mean is over 1/25 of the steps


def loss_curves(folder: str) -> str:
    """Return an `<svg>` of training and evaluation loss over the steps, and its caption; "" without metrics."""
    if not os.path.isfile(os.path.join(folder, METRICS_FILE)):
        return ""
    try:
        records = read_metrics(folder)
    except ValueError:  # the last line is not complete: the run still writes it, or was killed
        return ""
    curves = {
        "training": [(r["step"], r["loss"]) for r in records if r.get("loss") is not None],
        "evaluation": [(r["step"], r["eval_loss"]) for r in records if r.get("eval_loss") is not None],
    }
    everything = [point for points in curves.values() for point in points]
    if not everything:
        return ""
    last_step = max(step for step, _ in everything) or 1
    lowest, highest = min(loss for _, loss in everything), max(loss for _, loss in everything)
    ticks = nice_ticks(min(0.0, lowest) if lowest < highest / 4 else lowest, highest)
    low, high = ticks[0], max(ticks[-1], highest)

    def place(point: Point) -> Point:
        x = LEFT + point[0] / last_step * (WIDTH - LEFT - RIGHT)
        return x, HEIGHT - BOTTOM - (point[1] - low) / (high - low or 1) * (HEIGHT - TOP - BOTTOM)

    drawn = [_tick(place((0, tick)), f"{tick:g}") for tick in ticks]
    drawn += [
        f'<text x="{place((step, low))[0]:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{step:g}</text>'
        for step in nice_ticks(0, last_step)
        if step <= last_step
    ]
    for name, points in curves.items():
        places = [place(point) for point in thinned(points)]
        drawn.append(f'<polyline class="{name}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>')
        if name == "evaluation":
            drawn += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in places]
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="loss over the optimizer steps">'
        f"{''.join(drawn)}</svg>"
        "<figcaption>loss per label token (nats) over optimizer steps"
        '<span><i style="background:var(--accent)"></i> training</span>'
        '<span><i style="background:var(--after)"></i> evaluation</span></figcaption>'
    )


def _tick(place: Point, label: str) -> str:
    y = f"{place[1]:.1f}"
    return (
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
        f'<text x="{LEFT - 8}" y="{y}" dy="4" text-anchor="end">{label}</text>'
    )


def nice_ticks(low: float, high: float) -> list[float]:
    """Return four to nine round numbers, the first at or below `low` and the last at or above `high`."""
    span = (high - low) or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 6)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(number * step, 10) for number in range(first, max(last, first + 1) + 1)]


def thinned(points: Sequence[Point]) -> list[Point]:
    """Return every n-th point, and the last, so that at most about `MOST_POINTS` are left."""
    every = math.ceil(len(points) / MOST_POINTS) or 1
    return [*points[::every], *(points[-1:] if len(points) % every != 1 and every > 1 else [])]


def draw_losses(output_dir: str, folder: str | None = None) -> str:
    """Draw training and evaluation loss over the optimizer steps into `loss.png`; return its path, or why it has none.

    The loss of every step is drawn and, where there are enough steps, its running mean. A picture that can't be drawn
    must not end a run that has trained.

    Args:
        output_dir: the run's folder, with its metrics.
        folder: where the picture is written; None for `output_dir`.
    """
    records = read_metrics(output_dir)
    try:
        picture = _picture(tuple(curve(records, "loss")), tuple(curve(records, "eval_loss")))
    except Exception as err:  # whatever matplotlib raises
        return f"not drawn ({type(err).__name__}: {' '.join(str(err).split())[:200]})"
    path = os.path.join(folder or output_dir, PICTURE)
    with open(path, "wb") as file:
        file.write(picture)
    return path


@lru_cache(maxsize=1)  # at the end of a run the same picture is written twice: into its folder and its model's
def _picture(train: tuple[tuple[int, float], ...], evaluation: tuple[tuple[int, float], ...]) -> bytes:
    """Return the picture of both curves, of (step, loss) each, as a PNG file's content."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5), dpi=120)
    if train:
        steps, losses = zip(*train, strict=True)
        window = len(train) // MEAN_PARTS
        axes.plot(steps, losses, color="tab:blue", alpha=0.35 if window > 2 else 1, linewidth=1, label="training, step")
        if window > 2:
            mean = running_mean(losses, window)
            axes.plot(steps, mean, color="tab:blue", linewidth=1.8, label=f"training, mean of {window} steps")
    if evaluation:
        steps, losses = zip(*evaluation, strict=True)
        axes.plot(steps, losses, "o-", color="tab:orange", markersize=5, linewidth=1.8, label="evaluation")
        _name_last(axes, evaluation[-1])
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per label token (nats)")
    axes.grid(alpha=0.3)
    if train or evaluation:
        axes.legend()
    written = io.BytesIO()
    figure.subplots_adjust(left=0.09, right=0.985, bottom=0.1, top=0.975)  # tight_layout() would draw it twice
    figure.savefig(written, format="png")
    plt.close(figure)
    return written.getvalue()


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Return for each value the mean of the last `window` values up to it, or of all where there are fewer."""
    sums = [0.0, *accumulate(values)]
    starts = [max(0, place - window) for place in range(1, len(sums))]
    return [(sums[end] - sums[start]) / (end - start) for end, start in enumerate(starts, 1)]


def _name_last(axes: Any, point: tuple[float, float]) -> None:
    """Write the last evaluation's loss and perplexity beside its dot."""
    step, loss = point
    label = f"{loss:.4g}, perplexity {math.exp(loss):.4g}" if loss < 700 else f"{loss:.3g}"  # exp(710) overflows
    place = {"textcoords": "offset points", "xytext": (3, 9), "ha": "right", "fontsize": 9}
    axes.annotate(label, (step, loss), color="tab:orange", **place)
