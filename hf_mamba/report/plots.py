"""Pictures of a run, from the lines of its log."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def plot_loss(history: Sequence[Mapping[str, Any]], path: Path, tokens_per_step: int, title: str) -> Path | None:
    """Draw training and evaluation loss against tokens, with the learning rate below.

    Args:
        history: the lines of the run's log; see `read_history`.
        path: the PNG to write.
        tokens_per_step: turns steps into tokens.

    Returns:
        The path, or None when nothing was logged.
    """
    train = [(row["step"], row["loss"]) for row in history if "loss" in row]
    evaluated = [(row["step"], row["eval_loss"]) for row in history if "eval_loss" in row]
    rates = [(row["step"], row["learning_rate"]) for row in history if "learning_rate" in row]
    if not train and not evaluated:
        return None
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    for points, style, label in ((train, "-", "training"), (evaluated, "o-", "evaluation")):
        if points:
            steps, values = zip(*points, strict=True)
            loss.plot([step * tokens_per_step for step in steps], values, style, label=label, markersize=4)
    loss.set_ylabel("cross-entropy (nats per token)")
    loss.set_title(title)
    loss.grid(alpha=0.3)
    loss.legend()
    if rates:
        steps, values = zip(*rates, strict=True)
        rate.plot([step * tokens_per_step for step in steps], values, color="tab:gray")
    rate.set_ylabel("learning rate")
    rate.set_xlabel("tokens")
    rate.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    return path
