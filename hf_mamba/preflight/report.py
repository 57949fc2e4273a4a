"""A plan for people: its arithmetic, what was changed, and every problem with what to write instead."""

from __future__ import annotations

import sys
from typing import IO

from hf_mamba.preflight.plan import Plan


def _number(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def _rows(plan: Plan) -> list[tuple[str, str, str]]:
    """(what, value, where it comes from)"""
    p, source = plan.parameters, plan.provenance.get
    deviation = "" if p.get("deviation") is None else f"; actual {_number(p['actual'])}, deviation {p['deviation']:.1%}"
    stage = f"ZeRO stage {plan.ds_config['zero_optimization'].get('stage', '?')}" if plan.ds_config else "not used"
    return [
        (
            "model",
            f"{plan.preset or 'own'}: estimated {_number(p.get('estimated'))} parameters{deviation}",
            source("model_config", ""),
        ),
        (
            "processes",
            f"{_number(plan.num_processes)}, data-parallel {_number(plan.world_size)}",
            source("world_size", ""),
        ),
        (
            "global batch",
            f"{_number(plan.global_batch_size)} = {_number(plan.micro_batch_size)} x "
            f"{_number(plan.gradient_accumulation_steps)} x {_number(plan.world_size)}  (micro x accumulation x ranks)",
            source("global_batch_size", ""),
        ),
        ("micro-batch", _number(plan.micro_batch_size), source("micro_batch_size", "")),
        ("accumulation", _number(plan.gradient_accumulation_steps), source("gradient_accumulation_steps", "")),
        (
            "tokens per step",
            f"{_number(plan.tokens_per_step)} in rows of {_number(plan.seq_len)}",
            source("seq_len", ""),
        ),
        ("steps", f"{_number(plan.total_steps)}, {_number(plan.total_tokens)} tokens", source("total_steps", "")),
        ("warm-up", f"{_number(plan.warmup_steps)} steps", source("warmup_steps", "")),
        ("precision", plan.dtype, source("dtype", "")),
        ("DeepSpeed", stage, source("ds_config.zero_optimization.stage", "")),
    ]


def print_report(plan: Plan, file: IO[str] | None = None, provenance: bool = False) -> None:
    """Print the plan: a coloured table on a terminal, plain text in a pipe.

    Args:
        provenance: also list where every number comes from.
    """
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    stream = file or sys.stdout
    console = Console(file=stream, highlight=False, soft_wrap=not stream.isatty())
    table = Table(box=box.SIMPLE if console.is_terminal else None, show_header=False, pad_edge=False)
    for _ in range(3):
        table.add_column(overflow="fold")
    for what, value, where in _rows(plan):
        table.add_row(escape(what), escape(value), f"[dim]{escape(where)}[/dim]")
    if console.is_terminal:
        console.print(table)
    else:
        for what, value, where in _rows(plan):
            console.print(escape(f"{what:<16} {value}" + (f"   [{where}]" if where else "")))
    if provenance:
        for key, where in plan.provenance.items():
            console.print(escape(f"  {key}: {where}"))
    for migration in plan.migrations:
        console.print(f"[yellow]changed[/yellow] {escape(f'{migration.old} -> {migration.new}: {migration.why}.')}")
    for note in plan.notes:
        console.print(f"[cyan]note[/cyan] {escape(note)}")
    for number, problem in enumerate(plan.problems, 1):
        console.print(f"[red]problem {number}[/red] {escape(f'{problem.key}: found {problem.found}')}")
        console.print(escape(f"    why: {problem.why}"))
        console.print(escape(f"    fix: {problem.fix}"))
    verdict = "[green]ready to start[/green]" if plan.ok else f"[red]not started: {len(plan.problems)} problem(s)[/red]"
    console.print(verdict)
