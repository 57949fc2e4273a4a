"""A plan for people: its arithmetic, what was changed, and every problem with what to write instead."""

from __future__ import annotations

import sys
from typing import IO

from hf_mamba.plan import Plan

_COLOURS = {"changed": "yellow", "note": "cyan", "problem": "red", "ready": "green", "not": "red"}


def _number(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def _rows(plan: Plan) -> list[tuple[str, str, str]]:
    """(what, value, where it comes from)"""
    p = plan.parameters
    model = f"{plan.preset or 'own'}: estimated {_number(p.get('estimated'))} parameters"
    if p.get("deviation") is not None:
        model += f"; actual {_number(p['actual'])}, deviation {p['deviation']:.1%}"
    stage = f"ZeRO stage {plan.ds_config['zero_optimization'].get('stage', '?')}" if plan.ds_config else "not used"
    factors = (plan.micro_batch_size, plan.gradient_accumulation_steps, plan.world_size)
    batch = f"{_number(plan.global_batch_size)} = {' x '.join(map(_number, factors))}  (micro x accumulation x ranks)"
    rows = [
        ("model", model, "model_config"),
        ("processes", f"{_number(plan.num_processes)}, data-parallel {_number(plan.world_size)}", "world_size"),
        ("global batch", batch, "global_batch_size"),
        ("micro-batch", _number(plan.micro_batch_size), "micro_batch_size"),
        ("accumulation", _number(plan.gradient_accumulation_steps), "gradient_accumulation_steps"),
        ("tokens per step", f"{_number(plan.tokens_per_step)} in rows of {_number(plan.seq_len)}", "seq_len"),
        ("steps", f"{_number(plan.total_steps)}, {_number(plan.total_tokens)} tokens", "total_steps"),
        ("warm-up", f"{_number(plan.warmup_steps)} steps", "warmup_steps"),
        ("precision", plan.dtype, "dtype"),
        *([("scan", f"{plan.scan_backend} backend", "scan_backend")] if plan.scan_backend else []),
        ("DeepSpeed", stage, "ds_config.zero_optimization.stage"),
    ]
    return [(what, value, plan.provenance.get(key, "")) for what, value, key in rows]


def _findings(plan: Plan) -> list[tuple[str, str]]:
    """(label, text), in the order of the report; a text without a label continues the one before."""
    lines = [("changed", f"{m.old} -> {m.new}: {m.why}.") for m in plan.migrations]
    lines += [("note", note) for note in plan.notes]
    for number, problem in enumerate(plan.problems, 1):
        lines.append((f"problem {number}", f"{problem.key}: found {problem.found}"))
        lines += [("", f"    why: {problem.why}"), ("", f"    fix: {problem.fix}")]
    lines.append(("ready to start", "") if plan.ok else (f"not started: {len(plan.problems)} problem(s)", ""))
    return lines


def print_report(plan: Plan, file: IO[str] | None = None, provenance: bool = False) -> None:
    """Print the plan: a coloured table on a terminal, plain text in a pipe.

    Args:
        provenance: also list where every number comes from.
    """
    stream = file or sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"

    def printable(text: str) -> str:
        """The text with what the stream cannot show (a lone surrogate) as an escape."""
        return text.encode(encoding, "backslashreplace").decode(encoding)

    listed = [("", f"  {key}: {where}") for key, where in plan.provenance.items()] if provenance else []
    lines = [(label, printable(text)) for label, text in listed + _findings(plan)]
    if stream.isatty():
        _print_rich(plan, lines, stream)
        return
    for what, value, where in _rows(plan):
        print(printable(f"{what:<16} {value}" + (f"   [{where}]" if where else "")), file=stream)
    for label, text in lines:
        print(" ".join(part for part in (label, text) if part), file=stream)


def _print_rich(plan: Plan, lines: list[tuple[str, str]], stream: IO[str]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=stream, highlight=False)
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    for what, value, where in _rows(plan):
        table.add_row(what, Text(value), Text(where, style="dim"))
    console.print(table)
    for label, text in lines:
        styled = Text(label, style=_COLOURS.get(label.split()[0], "") if label else "")
        console.print(Text(" ").join(part for part in (styled, Text(text)) if part.plain))
