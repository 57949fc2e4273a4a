"""`hf-mamba report RUN [RUN ...]`: one HTML page about one run or several, also while they go on.

The page is a single file without scripts from elsewhere: curves are inline SVG (html.py), so it can be mailed or
kept with the run. It is made of what the run's folder holds, and says where something is missing.
"""

import argparse
import datetime
import html
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hf_mamba.files import Unreadable, read_small, write_whole
from hf_mamba.names import BAD_STEPS_FILE, PLAN_FILE, RUN_FILE, SAMPLES_FILE, STATUS_FILE
from hf_mamba.plan import FsdpPlan
from hf_mamba.report.curves import MAX_SHOWN, Curves
from hf_mamba.report.html import Axis, Series, page, plot, table
from hf_mamba.run.log import is_step, read_lines

REPORT_FILE = "report.html"
SAMPLES = 100  # texts that are shown, at most twice as many


class Drawn(NamedTuple):
    """A plot of the page."""

    title: str
    unit: str
    keys: tuple[str, ...]  # in the log
    axis: Axis = Axis.NEAR


CURVES = (
    Drawn("Loss", "nats per token", ("loss", "eval_loss")),
    Drawn("Bits per byte", "of held-out text", ("eval_bits_per_byte",)),
    Drawn("Learning rate", "", ("learning_rate",), Axis.ZERO),
    Drawn("Gradient norm", "before clipping", ("grad_norm",), Axis.LOGARITHMIC),
    Drawn("Throughput", "tokens per second", ("tokens_per_second",), Axis.ZERO),
    Drawn("Model FLOPs utilisation", "of the device's peak", ("mfu",), Axis.PERCENT),
    Drawn("Waiting for data", "of the time", ("data_wait_share",), Axis.PERCENT),
    Drawn("Memory", "GB", ("memory_gb",), Axis.ZERO),
    Drawn("Updates withheld", "so far", ("bad_steps",), Axis.ZERO),
)
# What a word of the overview means, under the pointer.
MEANS = {
    "remaining": "by the pace of the last lines of the log",
    "tokens": "read by all devices so far, in training",
    "loss": "mean cross-entropy of the steps since the line of the log before, in nats per token",
    "evaluation loss": "mean cross-entropy of all held-out tokens, in nats per token",
    "perplexity": "the exponential of the evaluation loss",
    "bits per byte": "the evaluation loss by bytes of text: it compares models with different tokenizers",
    "ranks": "processes that train together, one for each device",
    "memory, predicted": "the largest of a step, of one device",
    "memory, measured": "the largest so far, of the device that has most",
    "updates withheld": "steps whose loss or gradients were not finite, or far outside the run's own: not applied",
}
BY_SOURCE = {"training": "loss/", "evaluation": "eval_loss/"}
# of which the last value is shown
FIGURES = (
    *("step", "loss", "eval_loss", "eval_perplexity", "eval_bits_per_byte"),
    *("bad_steps", "memory_gb", "memory_predicted_gb"),
)


@dataclass(frozen=True)
class RunData:
    """What a run's folder holds."""

    name: str
    folder: Path
    plan: dict[str, Any]  # plan.json of this or of an older version; empty where it is missing
    log: Curves
    status: dict[str, Any]
    samples: dict[int, str]  # what the model wrote, by step
    bad_steps: frozenset[int] = frozenset()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs; several are drawn side by side")
    parser.add_argument("--output", help=f"the page; by default {REPORT_FILE} in the (first) run's folder")


def run(args: argparse.Namespace) -> int:
    """Write the page.

    Raises:
        ValueError: a folder that is not a run's, or a page that cannot be written.
    """
    data = [read_run(Path(folder)) for folder in args.runs]
    target = Path(args.output) if args.output else data[0].folder / REPORT_FILE
    if not args.output and hasattr(os, "getuid") and target.parent.stat().st_uid != os.getuid():
        raise ValueError(f"{target.parent} is another user's folder, which is only read. Write --output FILE.")
    try:
        write_whole(target, render(_named_apart(data)))
    except OSError as error:
        raise ValueError(f"{target} cannot be written: {error.strerror}. Write another --output.") from None
    print(target)
    return 0


def main(argv: Sequence[str]) -> int:
    """`hf-mamba report RUN [RUN ...] [--output FILE]`"""
    parser = argparse.ArgumentParser(prog="hf-mamba report", description=__doc__, allow_abbrev=False)
    add_arguments(parser)
    return run(parser.parse_args(list(argv)))


def read_run(folder: Path) -> RunData:
    """Read what there is; a run that has just begun has little.

    Raises:
        ValueError: the folder is not a run's.
    """
    if not (folder / RUN_FILE).is_file():
        raise ValueError(f"{folder} holds no {RUN_FILE}, so it is not a run's folder. Give a run's --output_dir.")
    bad_steps = frozenset(row["step"] for row in read_lines(folder / BAD_STEPS_FILE) if is_step(row.get("step")))
    return RunData(
        folder.resolve().name,
        folder,
        _json(folder / PLAN_FILE),
        Curves(folder, {key for curve in CURVES for key in curve.keys}, BY_SOURCE.values(), FIGURES),
        _json(folder / STATUS_FILE),
        _read_samples(folder / SAMPLES_FILE),
        bad_steps,
    )


def _read_samples(path: Path) -> dict[int, str]:
    """The texts by step; of very many, every second is left out, as often as it takes."""
    texts: dict[int, str] = {}
    for row in read_lines(path):
        if isinstance(step := row.get("step", 0), int):
            texts[int(step)] = str(row.get("text", ""))
        if len(texts) > 2 * SAMPLES:
            texts = {step: texts[step] for step in sorted(texts)[::2]}
    return texts


def _json(path: Path) -> dict[str, Any]:
    """An object of a run's file; empty where the file is missing or is not what a run writes."""
    try:
        found = json.loads(read_small(path))
    except (Unreadable, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _named_apart(runs: Sequence[RunData]) -> list[RunData]:
    """Runs of the same name get their folder's path as a name."""
    names = [run.name for run in runs]
    return [RunData(**{**vars(run), "name": str(run.folder)}) if names.count(run.name) > 1 else run for run in runs]


def render(runs: Sequence[RunData]) -> str:
    """The page, as HTML."""
    now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
    parts = [f"<p class=note>Made {now} from what the runs had written by then.</p>", _overview(runs)]
    parts += ["<div class=plots>", *_plots(runs), "</div>"]
    for one in runs:
        parts.append(_samples(one))
        parts.append(_readable(lambda one=one: _configuration(one)))  # type: ignore[misc]
    return page(" and ".join(run.name for run in runs), "\n".join(part for part in parts if part))


UNREADABLE = "not readable: this is not what a run writes"


def _readable(part: Callable[[], str]) -> str:
    """A part of the page, or that the run's files do not hold what it shows: they may be anybody's."""
    try:
        return part()
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError):
        return UNREADABLE


def _overview(runs: Sequence[RunData]) -> str:
    lines: dict[str, list[str]] = {}
    for one in runs:
        for key, entry in _ENTRIES.items():
            lines.setdefault(key, []).append(_readable(lambda entry=entry, one=one: str(entry(one))))  # type: ignore[misc]
    rows = [[key, *values] for key, values in lines.items() if any(values)]
    return table(["", *(run.name for run in runs)], rows, means=MEANS)


def _step(one: RunData) -> int:
    return one.log.last("step") or 0


def _of_total(one: RunData) -> str:
    total = one.plan.get("total_steps")
    return f"{_step(one):,}" + (f" of {total:,}" if total else "")


def _tokens(one: RunData) -> str:
    each = one.plan.get("tokens_per_step")
    return f"{_step(one) * each:,}" if each and _step(one) else ""


_ENTRIES: dict[str, Callable[[RunData], Any]] = {
    "status": lambda one: one.status.get("status", "unknown"),
    "step": _of_total,
    "remaining": lambda one: _remaining(one, _step(one), one.plan.get("total_steps")),
    "tokens": _tokens,
    "loss": lambda one: _show(one.log.last("loss")),
    "evaluation loss": lambda one: _show(one.log.last("eval_loss")),
    "perplexity": lambda one: _show(one.log.last("eval_perplexity")),
    "bits per byte": lambda one: _show(one.log.last("eval_bits_per_byte")),
    "parameters": lambda one: f"{one.plan['parameters']['estimated'] or 0:,}" if one.plan else "",
    "ranks": lambda one: one.plan.get("world_size", ""),
    "precision": lambda one: one.plan.get("dtype", ""),
    "DeepSpeed": lambda one: _stage(one.plan),
    "FSDP": lambda one: _fsdp(one.plan),
    "memory, predicted": lambda one: _memory(one, "memory_predicted_gb"),
    "memory, measured": lambda one: _memory(one, "memory_gb"),
    "resumed at step": lambda one: _some(one.log.resumed),
    "updates withheld": lambda one: _withheld(one),
}


def _withheld(one: RunData) -> str:
    """How many, and the first steps of them."""
    count = int(one.log.last("bad_steps") or 0)
    return f"{count:,}" + (f": step {_some(sorted(one.bad_steps))}" if one.bad_steps else "")


def _some(steps: Sequence[int]) -> str:
    """The first steps of a list."""
    return ", ".join(f"{step:,}" for step in steps[:8]) + (", …" if len(steps) > 8 else "")


def _stage(plan: Mapping[str, Any]) -> str:
    if not plan.get("ds_config"):
        return "not used" if plan else ""
    return f"ZeRO stage {plan['ds_config'].get('zero_optimization', {}).get('stage', 0)}"


def _fsdp(plan: Mapping[str, Any]) -> str:
    try:
        return str(FsdpPlan(**plan["fsdp"]))
    except (KeyError, TypeError):  # none, or another version's
        return ""


def _memory(one: RunData, key: str) -> str:
    value = one.log.last(key)
    if not isinstance(value, (int, float)):
        return ""
    whole = key == "memory_gb" and one.plan.get("training_arguments", {}).get("use_cpu")
    return f"{value:.2f} GB" + (", the whole process" if whole else "")


def _remaining(one: RunData, step: int, total: int | None) -> str:
    """Time to the end, by the pace of the last log lines."""
    steps = one.log.pace()
    if one.status.get("status") != "running" or not total or len(steps) < 2:
        return ""
    (first, begin), (last, end) = steps[0], steps[-1]
    if last <= first:
        return ""
    return str(datetime.timedelta(seconds=round((total - step) * (end - begin) / (last - first))))


def _show(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else ""


def _plots(runs: Sequence[RunData]) -> Iterable[str]:
    for title, unit, keys, axis in CURVES:
        series = []
        for key in keys:
            for one in runs:  # so that a run has its colour in every plot
                points = _points(one, key)
                if points:
                    label = (
                        one.name if len(keys) == 1 else f"{one.name}, {'evaluation' if 'eval' in key else 'training'}"
                    )
                    series.append(Series(label, points, dots="eval" in key))
        if series:
            yield plot(title, unit, series, axis)
    for what, key in BY_SOURCE.items():
        if by_source := _by_source(runs, key):
            yield plot(f"Loss by source in {what}", "nats per token", by_source)


def _points(one: RunData, key: str) -> list[tuple[float, float]]:
    """(tokens, value); steps where the plan is missing."""
    scale = one.plan.get("tokens_per_step")
    scale = scale if isinstance(scale, int) and 0 < scale < MAX_SHOWN else 1
    return [(step * scale, value) for step, value in one.log.points(key)]


def _by_source(runs: Sequence[RunData], start: str) -> list[Series]:
    found = [(one, key.removeprefix(start), _points(one, key)) for one in runs for key in one.log.keys(start)]
    dots = start.startswith("eval")
    return [Series(f"{one.name}, {source}", points, dots) for one, source, points in found if points]


def _samples(one: RunData) -> str:
    if not one.samples:
        return ""
    # a model that has learnt little may write nothing but line ends
    rows = [[f"{step:,}", re.sub(r"\n{3,}", "\n\n", text).rstrip()] for step, text in sorted(one.samples.items())]
    return f"<h2>What {html.escape(one.name)} writes</h2>" + table(["step", "text"], rows, cls="samples")


def _configuration(one: RunData) -> str:
    """Every decided number with where it came from."""
    if not (plan := one.plan):
        return ""
    values = {**{k: v for k, v in plan.items() if not isinstance(v, (dict, list))}, **plan["training_arguments"]}
    rows = []
    for key in sorted({*values, *plan["provenance"]}):
        value = values.get(key, _dotted(plan, key))
        if value is not None and not isinstance(value, (dict, list)):
            rows.append([key, str(value), plan["provenance"].get(key, "")])
    body = table(["what", "value", "where it comes from"], rows)
    return f"<details><summary>Configuration of {html.escape(one.name)}</summary>{body}</details>"


def _dotted(value: Any, key: str) -> Any:
    """`ds_config.a.b` in nested mappings; None where there is none."""
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return value
