"""Kinds of values, written the way a documentation table writes them, and one function that checks a value.

    bool | int | int>0 | int>=0 | int 0..3 | float | float>=0 | float 0..1 | str | choice a/b/c
    dict | list (of strings) | list a/b/c | any

JSON's own types are kept apart, although Python and pydantic mix them: True is no integer, "4" is no number. A whole
float (8.0, 5e8) is an integer, because JSON writers produce it.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable
from typing import Any

_RANGE = re.compile(r"(int|float)(?:\s*(>=|>)\s*(\S+)|\s+(\S+)\.\.(<?)(\S+))?$")
_NAMES = {"bool": "true or false", "str": "a string", "list": "a list of strings", "dict": "a block {...}"}


class KindError(ValueError):
    """The value is not of this kind; the message says what would be, `why` what is wrong with it."""

    def __init__(self, expected: str, why: str = "It is of the wrong kind.") -> None:
        super().__init__(expected)
        self.why = why


def show(value: Any, limit: int = 60) -> str:
    """A value as the user wrote it in JSON, shortened."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 1000:
        return f"a number of about {int(value.bit_length() * math.log10(2))} digits"
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def near(name: str, names: Iterable[str]) -> str:
    """The name that this one is most likely a misspelling of, whatever its case; "" where none is close."""
    lower = {known.lower(): known for known in names}
    found = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.78)
    return lower[found[0]] if found else ""


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
    if match[5]:
        return f"{noun} from {match[4]} to below {match[6]}"
    return f"{noun} from {match[4]} to {match[6]}" if match[4] else noun


def _number(kind: str, match: re.Match[str], value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise KindError(describe(kind))
    if isinstance(value, float) and not math.isfinite(value):
        raise KindError(describe(kind), "It is not a finite number.")
    if abs(value) >= 2**63:
        raise KindError(describe(kind), "It is too large.")
    if match[1] == "int":
        if value != int(value):
            raise KindError(describe(kind), "It is not a whole number.")
        value = int(value)
    low = float(match[3] or match[4] or "-inf")
    if value < low or (match[2] == ">" and value == low):
        raise KindError(describe(kind), "It is too small.")
    high = float(match[6] or "inf")
    if value > high or (match[5] and value == high):
        raise KindError(describe(kind), "It is too large.")
    return value


def read(kind: str, value: Any) -> Any:
    """`check`, but of what a person means: 8 and true in quotation marks, 0 and 1 for false and true."""
    try:
        return check(kind, value)
    except KindError as error:
        if kind == "bool" and value in (0, 1) and not isinstance(value, str):
            return bool(value)
        if not isinstance(value, str) or kind.startswith(("choice", "list", "str", "dict")):
            raise
        try:
            meant = check(kind, json.loads(value.strip().lower()))
        except (ValueError, RecursionError):
            text = f"{show(value)} is text." if value else "It is empty."
            raise KindError(str(error), text) from None
        return meant


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
