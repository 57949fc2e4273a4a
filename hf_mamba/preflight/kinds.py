"""Kinds of values, written the way a documentation table writes them, and one function that checks a value.

    bool | int | int>0 | int>=0 | int 0..3 | float | float>=0 | float 0..1 | str | choice a/b/c
    dict | list (of strings) | list a/b/c | any

JSON's own types are kept apart, although Python and pydantic mix them: True is no integer, "4" is no number. A whole
float (8.0, 5e8) is an integer, because JSON writers produce it.
"""

from __future__ import annotations

import math
import re
from typing import Any

_RANGE = re.compile(r"(int|float)(?:\s*(>=|>)\s*(\S+)|\s+(\S+)\.\.(\S+))?$")
_NAMES = {"bool": "true or false", "str": "a string", "list": "a list of strings", "dict": "a block {...}"}


class KindError(ValueError):
    """The value is not of this kind; the message says what would be."""


def show(value: Any, limit: int = 60) -> str:
    """A value as the user wrote it in JSON, shortened."""
    text = {True: "true", False: "false", None: "null"}.get(value) if isinstance(value, bool | None) else None
    if text is None:
        text = f'"{value}"' if isinstance(value, str) else repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def describe(kind: str) -> str:
    """The kind in words, for messages: 'a whole number > 0'."""
    if kind.startswith("choice "):
        return "one of " + ", ".join(kind[7:].split("/"))
    if kind.startswith("list "):
        return "a list of " + ", ".join(kind[5:].split("/"))
    if kind in _NAMES:
        return _NAMES[kind]
    match = _RANGE.match(kind)
    if match is None:
        return "a value"
    noun = "a whole number" if match[1] == "int" else "a finite number"
    if match[2]:
        return f"{noun} {match[2]} {match[3]}"
    return f"{noun} from {match[4]} to {match[5]}" if match[4] else noun


def _number(kind: str, match: re.Match[str], value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise KindError(describe(kind))
    if abs(value) >= 2**63 if isinstance(value, int) else not math.isfinite(value):
        raise KindError(describe(kind))
    if match[1] == "int":
        if value != int(value):
            raise KindError(describe(kind))
        value = int(value)
    low_ok = {
        ">": lambda: value > float(match[3]),
        ">=": lambda: value >= float(match[3]),
        None: lambda: not match[4] or float(match[4]) <= value <= float(match[5]),
    }
    if not low_ok[match[2]]():
        raise KindError(describe(kind))
    return value


def check(kind: str, value: Any) -> Any:
    """The value in its canonical form (8.0 -> 8), or KindError with a description of what is expected."""
    if kind == "any":
        return value
    if kind.startswith("choice "):
        choices = kind[7:].split("/")
        if not isinstance(value, str) or value not in choices:
            raise KindError(describe(kind))
        return value
    if match := _RANGE.match(kind):
        return _number(kind, match, value)
    if kind.startswith("list"):
        names = kind[5:].split("/") if kind != "list" else None
        if not isinstance(value, list | tuple):
            raise KindError(describe(kind))
        if not all(isinstance(item, str) and (names is None or item in names) for item in value):
            raise KindError(describe(kind))
        return list(value)
    python_type = {"bool": bool, "str": str, "dict": dict}[kind]
    if not isinstance(value, python_type):
        raise KindError(describe(kind))
    return value
