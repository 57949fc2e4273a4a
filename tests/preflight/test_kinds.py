"""What each kind of value takes, what it makes of it, and in which words it refuses."""

import math
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Le, Lt

from hf_mamba.preflight.kinds import (
    Amount,
    Count,
    Dtype,
    Kind,
    KindError,
    Positive,
    Share,
    Whole,
    check,
    describe,
    read,
)

SOURCE = Literal["z1", "z3"]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (bool, "true or false"),
        (str, "a string"),
        (dict, "a block {...}"),
        (dict[str, Any], "a block {...}"),
        (int, "a whole number"),
        (Count, "a whole number > 0"),
        (Whole, "a whole number >= 0"),
        (Annotated[int, Ge(0), Le(3)], "a whole number from 0 to 3"),
        (float, "a finite number"),
        (Positive, "a finite number > 0"),
        (Amount, "a finite number >= 0"),
        (Share, "a finite number from 0 to 1"),
        (Annotated[float, Ge(0), Lt(1)], "a finite number from 0 to below 1"),
        (Dtype, "one of fp32, bf16, fp16"),
        (list[str], "a list of strings"),
        (list[SOURCE], "a list of z1, z3"),
        (Any, "a value"),
    ],
    ids=str,
)
def test_the_words_of_a_kind(kind: Kind, words: str) -> None:
    assert describe(kind) == words
    if kind is not Any:
        with pytest.raises(KindError, match="^" + words.replace("{...}", ".*") + "$"):
            check(kind, object())


@pytest.mark.parametrize(
    ("kind", "value", "canonical"),
    [
        (Count, 8.0, 8),
        (Count, 2**63 - 1, 2**63 - 1),
        (Whole, 0, 0),
        (Amount, 1, 1),
        (Amount, 5e8, 5e8),
        (Share, 1.0, 1.0),
        (Dtype, "bf16", "bf16"),
        (list[str], ("a",), ["a"]),
        (list[SOURCE], ["z3"], ["z3"]),
        (dict, {1: 2}, {1: 2}),
        (Any, None, None),
    ],
)
def test_a_value_is_put_into_its_canonical_form(kind: Kind, value: Any, canonical: Any) -> None:
    found = check(kind, value)
    assert (found, type(found)) == (canonical, type(canonical))


KIND, SMALL, LARGE = "It is of the wrong kind.", "It is too small.", "It is too large."
FINITE = "It is not a finite number."


@pytest.mark.parametrize(
    ("kind", "value", "why"),
    [
        (Count, True, KIND),
        (Count, "4", KIND),
        (Count, 0, SMALL),
        (Count, 1.5, "It is not a whole number."),
        (Count, 2**63, LARGE),
        (Count, -(10**400), LARGE),
        (Count, 1e300, LARGE),
        (Count, math.nan, FINITE),
        (Positive, 0.0, SMALL),
        (Amount, -math.inf, FINITE),
        (Amount, False, KIND),
        (Share, 1.01, LARGE),
        (bool, 1, KIND),
        (str, b"x", KIND),
        (Dtype, "fp8", KIND),
        (list[str], "ab", KIND),
        (list[SOURCE], ["z2"], KIND),
        (dict, [], KIND),
    ],
)
def test_what_is_wrong_with_a_value(kind: Kind, value: Any, why: str) -> None:
    with pytest.raises(KindError) as error:
        check(kind, value)
    assert (str(error.value), error.value.why) == (describe(kind), why)


@pytest.mark.parametrize(
    ("kind", "value", "meant"),
    [(Count, " 8.0 ", 8), (Amount, "1e-3", 1e-3), (bool, "True", True), (bool, 0, False), (bool, 1.0, True)],
)
def test_what_a_person_means_is_read(kind: Kind, value: Any, meant: Any) -> None:
    found = read(kind, value)
    assert (found, type(found)) == (meant, type(meant))


@pytest.mark.parametrize(
    ("kind", "value", "why"),
    [(Count, "many", '"many" is text.'), (Count, "", "It is empty."), (Dtype, "BF16", KIND), (bool, 2, KIND)],
)
def test_what_nobody_means_is_not_read(kind: Kind, value: Any, why: str) -> None:
    with pytest.raises(KindError) as error:
        read(kind, value)
    assert error.value.why == why
