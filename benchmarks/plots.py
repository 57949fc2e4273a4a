"""Plots of the growth suite: time and memory against the length, both axes logarithmic."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .measure import Result


def plot_growth(results: list[Result], path: Path, where: str) -> None:
    """One panel for time and one for memory. A curve that ends at a cross goes over a limit at the next length."""
    figure, (time_axis, memory_axis) = plt.subplots(1, 2, figsize=(11, 4.5))
    every = sorted({int(result.setting.removeprefix("L=")) for result in results})
    for name in dict.fromkeys(result.name for result in results):
        own = [result for result in results if result.name == name]
        lengths = {id(result): int(result.setting.removeprefix("L=")) for result in own}
        timed = [(lengths[id(r)], r.median) for r in own if r.median is not None]
        sized = [(lengths[id(r)], r.peak_mb) for r in own if r.peak_mb]
        end = next((result.note for result in own if result.median is None), "")
        label = f"{name}, then {end}" if end else name
        for axis, points in ((time_axis, timed), (memory_axis, sized)):
            if points:
                (line,) = axis.plot(*zip(*points, strict=True), marker="o", label=label)
                if end:
                    axis.plot(*points[-1], marker="x", markersize=12, color=line.get_color())
    for axis, title in ((time_axis, "seconds"), (memory_axis, "peak memory, MB")):
        axis.set_xscale("log", base=2)
        axis.set(yscale="log", xlabel="sequence length L", ylabel=title)
        axis.set_xticks(every, [str(length) for length in every])
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(True, which="both", alpha=0.3)
    figure.suptitle(f"One mixer of Mamba-130m, forward + backward, B = 1, {where}")
    time_axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)
