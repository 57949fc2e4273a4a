"""Values that a DeepSpeed file says and the run's arguments have names for: read, compared and taken over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_mamba.findings import Findings
from hf_mamba.preflight.deepspeed.inert import leave_out
from hf_mamba.preflight.kinds import Kind, KindError, near, read, show
from hf_mamba.preflight.settings import Settings


def number(kind: Kind, value: Any, path: str, out: Findings) -> Any:
    """The value in canonical form; None with a problem where it is of another kind."""
    try:
        canonical = read(kind, value)
    except KindError as expected:
        out.problem(path, show(value), expected.why, f"Write {expected}.", id="value-of-the-wrong-kind")
        return None
    if isinstance(value, str) and canonical != value:
        out.migrated(f"{path}: {show(value)}", show(canonical), "text in quotation marks", id="text-read-as-a-value")
    return canonical


def check_block(name: str, block: Mapping[str, Any], out: Findings) -> None:
    """Name misspelt keys beside `type` and `params`; DeepSpeed ignores all others."""
    for key, value in block.items():
        if key in ("type", "params"):
            continue
        if guess := near(key, ("type", "params")):
            why = f'DeepSpeed does not know it in "{name}", and ignores it without a word.'
            out.problem(f"{name}.{key}", show(value), why, f'Did you mean "{guess}"?', id="misspelt-key")
        else:
            leave_out(out, f"{name}.{key}", "DeepSpeed reads type and params only")


def take(settings: Settings, argument: str, value: Any, path: str, name: str, out: Findings) -> bool:
    """Make a file's value the argument's; where the user wrote another one, that is a problem. Whether it changed."""
    if not settings.given(argument):
        changed = settings.get(argument) != value
        settings.adopt(argument, value, f"{path} in {name}")
        return changed
    if settings.get(argument) != value:
        out.problem(
            path,
            f"{value} in {name} and {argument}={settings.get(argument)} ({settings.source(argument)})",
            "The same number is written in two places, with different values.",
            f'Write "auto" in {name} and decide by --{argument}, or remove --{argument}.',
            id="argument-written-twice",
        )
    return False
