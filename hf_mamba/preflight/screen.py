"""A plan for people: its arithmetic, what was changed, and every problem with what to write instead."""

from __future__ import annotations

import sys
from typing import IO

from hf_mamba.plan import Checked, Plan, Refused
from hf_mamba.preflight.cost.memory import show

_COLOURS = {"changed": "yellow", "note": "cyan", "problem": "red", "ready": "green", "not": "red"}


def _number(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def _short(count: int | None) -> str:
    """A number of parameters as people say it: " (6.89B)"."""
    for unit, size in (("B", 10**9), ("M", 10**6)):
        if count and count >= size:
            return f" ({count / size:.2f}{unit})"
    return ""


def _in_deepspeeds_words(plan: Plan | Refused, checked: Checked) -> str:
    """The batch under DeepSpeed's names, and what it reads back."""
    known, read = plan.known, checked.deepspeed or {}
    names = ("micro_batch_size", "gradient_accumulation_steps", "world_size")
    micro, accumulation, world = (_number(known.get(name)) for name in names)
    total = known.get("global_batch_size")
    text = f"train_batch_size {_number(total)} = train_micro_batch_size_per_gpu {micro} x "
    text += f"gradient_accumulation_steps {accumulation} x world size {world}"
    back = read.get("train_batch_size")
    return text + (f"; DeepSpeed reads back {back}: {'equal' if back == total else 'not equal'}" if back else "")


def _rows(plan: Plan | Refused, checked: Checked) -> list[tuple[str, str, str]]:
    """(what, value, where it comes from)"""
    known = plan.known

    def number(name: str) -> str:
        return _number(known.get(name))

    estimated = known.get("parameters", {}).get("estimated")
    model = f"{known.get('preset') or 'own'}: estimated {_number(estimated)} parameters{_short(estimated)}"
    if checked.parameters is not None and estimated:
        actual = sum(checked.parameters.values())
        model += f"; actual {_number(actual)}, deviation {(actual - estimated) / estimated:.1%}"
    ds_config = known.get("ds_config")
    stage = f"ZeRO stage {ds_config['zero_optimization'].get('stage', '?')}" if ds_config else "not used"
    fsdp = known.get("fsdp")
    factors = map(number, ("micro_batch_size", "gradient_accumulation_steps", "world_size"))
    batch = f"{number('global_batch_size')} = {' x '.join(factors)}  (micro x accumulation x ranks)"
    rows = [
        ("model", model, "model_config"),
        ("processes", f"{number('num_processes')}, data-parallel {number('world_size')}", "world_size"),
        ("global batch", batch, "global_batch_size"),
        ("micro-batch", number("micro_batch_size"), "micro_batch_size"),
        ("accumulation", number("gradient_accumulation_steps"), "gradient_accumulation_steps"),
        ("tokens per step", f"{number('tokens_per_step')} in rows of {number('seq_len')}", "seq_len"),
        ("steps", f"{number('total_steps')}, {number('total_tokens')} tokens", "total_steps"),
        ("warm-up", f"{number('warmup_steps')} steps", "warmup_steps"),
        ("precision", known["dtype"], "dtype"),
        *([("scan", f"{checked.backend} backend{_on(checked.threads)}", "")] if checked.backend else []),
        *([("memory", _memory(checked.memory), "")] if checked.memory else []),
        ("DeepSpeed", stage, "ds_config.zero_optimization.stage"),
        *([("", _in_deepspeeds_words(plan, checked), "")] if ds_config else []),
        *([("FSDP", str(fsdp), "fsdp")] if fsdp else []),
    ]
    return [(what, value, plan.provenance.get(key, "")) for what, value, key in rows]


def _on(threads: int | None) -> str:
    """ ", 2 threads" of a step on a CPU."""
    return "" if threads is None else f", {threads} thread{'s' * (threads != 1)}"


def _memory(sizes: dict[str, int]) -> str:
    return f"{show(sizes['predicted_bytes'])} a process at its peak, of {show(sizes['usable_bytes'])} that it may use"


def _findings(plan: Plan | Refused, checked: Checked) -> list[tuple[str, str]]:
    """(label, text), in the order of the report; a text without a label continues the one before."""
    lines = [("changed", f"{m.old} -> {m.new}: {m.why}.") for m in plan.migrations]
    lines += [("note", note) for note in (*plan.notes, *checked.notes)]
    for number, problem in enumerate(plan.problems, 1):
        lines.append((f"problem {number}", f"{problem.key}: found {problem.found}"))
        lines += [("", f"    why: {problem.why}"), ("", f"    fix: {problem.fix}")]
        lines += [("", f"    more: hf-mamba rules {problem.id}")] if problem.id else []
    lines.append(("ready to start", "") if plan.ok else (f"not started: {len(plan.problems)} problem(s)", ""))
    return lines


def print_report(
    plan: Plan | Refused, file: IO[str] | None = None, provenance: bool = False, checked: Checked | None = None
) -> None:
    """Print the plan: a coloured table on a terminal, plain text in a pipe.

    Args:
        provenance: also list where every number comes from.
        checked: what was found out about it here.
    """
    stream, checked = file or sys.stdout, checked or Checked()
    encoding = getattr(stream, "encoding", None) or "utf-8"

    def printable(text: str) -> str:
        """The text with what the stream cannot show (a lone surrogate) as an escape."""
        return text.encode(encoding, "backslashreplace").decode(encoding)

    listed = [("", f"  {key}: {where}") for key, where in plan.provenance.items()] if provenance else []
    rows = _rows(plan, checked)
    lines = [(label, printable(text)) for label, text in listed + _findings(plan, checked)]
    if stream.isatty():
        _print_rich(rows, lines, stream)
        return
    for what, value, where in rows:
        print(printable(f"{what:<16} {value}" + (f"   [{where}]" if where else "")), file=stream)
    for label, text in lines:
        print(" ".join(part for part in (label, text) if part), file=stream)


def _print_rich(rows: list[tuple[str, str, str]], lines: list[tuple[str, str]], stream: IO[str]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=stream, highlight=False)
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    for what, value, where in rows:
        table.add_row(what, Text(value), Text(where, style="dim"))
    console.print(table)
    for label, text in lines:
        styled = Text(label, style=_COLOURS.get(label.split()[0], "") if label else "")
        console.print(Text(" ").join(part for part in (styled, Text(text)) if part.plain))
