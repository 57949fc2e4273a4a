"""Plots of the growth suite: time and memory against the length, both axes logarithmic."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .measure import Result


def plot_growth(results: list[Result], path: Path) -> None:
    """One panel for time and one for memory. A contestant's curve ends where it went over a limit, and says so."""
    figure, (time_axis, memory_axis) = plt.subplots(1, 2, figsize=(11, 4.5))
    for name in dict.fromkeys(result.name for result in results):
        own = [result for result in results if result.name == name]
        lengths = {id(result): int(result.setting.removeprefix("L=")) for result in own}
        timed = [(lengths[id(r)], r.median) for r in own if r.median is not None]
        sized = [(lengths[id(r)], r.peak_mb) for r in own if r.peak_mb]
        end = next((result.note for result in own if result.median is None), "")
        label = f"{name} ({end})" if end else name
        time_axis.plot(*zip(*timed, strict=True), marker="o", label=label)
        if sized:
            memory_axis.plot(*zip(*sized, strict=True), marker="o", label=label)
    for axis, title in ((time_axis, "seconds"), (memory_axis, "peak memory, MB")):
        axis.set(xscale="log", yscale="log", xlabel="sequence length L", ylabel=title)
        axis.set_xscale("log", base=2)
        axis.grid(True, which="both", alpha=0.3)
    time_axis.set_title("One 130m mixer, forward + backward, CPU")
    time_axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
