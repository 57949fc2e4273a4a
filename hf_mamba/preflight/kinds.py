"""Kinds of values, which are Python types that pydantic validates, and the words in which a message names a kind.

JSON's own types are kept apart, although Python and pydantic mix them: True is no integer, "4" is no number. A whole
float (8.0, 5e8) is an integer, because JSON writers produce it.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable
from functools import cache
from typing import Annotated, Any, Literal, TypeAlias, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt

Kind: TypeAlias = Any  # bool, int, float, str, dict, list[str], a Literal, a list of one, or a number with bounds

Count = Annotated[int, Gt(0)]
Whole = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0)]
Amount = Annotated[float, Ge(0)]
Share = Annotated[float, Ge(0), Le(1)]
Dtype = Literal["fp32", "bf16", "fp16"]

_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "a string",
    dict: "a block {...}",
}
_WRONG = "It is of the wrong kind."
_WHY = {  # pydantic's name of an error -> what is wrong with the value
    "finite_number": "It is not a finite number.",
    "int_from_float": "It is not a whole number.",
    "greater_than": "It is too small.",
    "greater_than_equal": "It is too small.",
    "less_than": "It is too large.",
    "less_than_equal": "It is too large.",
}


class KindError(ValueError):
    """The value is not of this kind; the message says what would be, `why` what is wrong with it."""

    def __init__(self, expected: str, why: str = _WRONG) -> None:
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


def _base(kind: Kind) -> Any:
    """The type without its bounds and without what is in it: int, list, Literal."""
    plain = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    return get_origin(plain) or plain


def describe(kind: Kind) -> str:
    """The kind in words, for messages: 'a whole number > 0'."""
    base = _base(kind)
    if base is Literal:
        return "one of " + ", ".join(get_args(kind))
    if base is list:
        return "a list of " + (", ".join(get_args(get_args(kind)[0])) or "strings")
    noun = _WORDS.get(base, "a value")
    match getattr(kind, "__metadata__", ()):
        case (Gt(gt=low),):
            return f"{noun} > {low}"
        case (Ge(ge=low),):
            return f"{noun} >= {low}"
        case (Ge(ge=low), Lt(lt=high)):
            return f"{noun} from {low} to below {high}"
        case (Ge(ge=low), Le(le=high)):
            return f"{noun} from {low} to {high}"
    return noun


@cache
def _adapter(kind: Kind) -> Any:
    from pydantic import ConfigDict, TypeAdapter  # with the first value: the tables alone do not need it

    # strict, but for numbers: strict integers would refuse 8.0
    return TypeAdapter(kind, config=ConfigDict(strict=_base(kind) not in (int, float), allow_inf_nan=False))


def check(kind: Kind, value: Any) -> Any:
    """The value in its canonical form (8.0 -> 8), or KindError with a description of what is expected."""
    from pydantic import ValidationError

    base = _base(kind)
    if base in (int, float):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise KindError(describe(kind))
        if 2**63 <= abs(value) < math.inf:  # more than a 64-bit integer holds
            raise KindError(describe(kind), "It is too large.")
    elif base is list and isinstance(value, tuple):
        value = list(value)
    try:
        canonical = _adapter(kind).validate_python(value)
    except ValidationError as error:
        raise KindError(describe(kind), _WHY.get(error.errors()[0]["type"], _WRONG)) from None
    return canonical if base is int else value


def read(kind: Kind, value: Any) -> Any:
    """`check`, but of what a person means: 8 and true in quotation marks, 0 and 1 for false and true."""
    try:
        return check(kind, value)
    except KindError as error:
        base = _base(kind)
        if base is bool and value in (0, 1) and not isinstance(value, str):
            return bool(value)
        if not isinstance(value, str) or base not in (bool, int, float):
            raise
        try:
            return check(kind, json.loads(value.strip().lower()))
        except (ValueError, RecursionError):
            text = f"{show(value)} is text." if value else "It is empty."
            raise KindError(str(error), text) from None
