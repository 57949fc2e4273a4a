"""The fuzzer finds nothing in a few hundred cases, and finds what is put there."""

import random
from typing import Any

import pytest

from benchmarks import fuzz_verdict
from benchmarks.fuzz import minimise, run
from benchmarks.fuzz_cases import Case, draw
from benchmarks.fuzz_verdict import LATE, SAME, UNSAID, judge
from hf_mamba.dotted import put

CASES = 300


def test_what_starts_here_starts_there_and_means_the_same() -> None:
    outcome = run(CASES, seed=0)
    assert not {verdict: cases[0].text() for verdict, cases in outcome.causes.items() if verdict in outcome.bad}
    assert sum(outcome.kinds.values()) == len(outcome.seconds) == CASES
    assert outcome.kinds[SAME] > CASES / 10, "nearly all cases are refused: they show nothing"


def test_a_case_is_a_function_of_its_number() -> None:
    assert draw(random.Random("0 1"), []).text() == draw(random.Random("0 1"), []).text()
    assert len({draw(random.Random(f"0 {n}"), []).text() for n in range(100)}) == 100


def changed(key: str, value: Any) -> Any:
    """The resolver, with one more key in what it writes."""

    def resolve(*arguments: Any, **options: Any) -> Any:
        plan = real(*arguments, **options)
        if plan.ok:
            put(plan.ds_config, key, value)
        return plan

    real = fuzz_verdict.resolve
    return resolve


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [("zero_optimization.no_such", 1, LATE), ("wall_clock_breakdown", False, UNSAID)],
)
def test_a_defect_is_found_and_made_small(key: str, value: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"zero_optimization": {"stage": 2, "overlap_comm": True}, "wall_clock_breakdown": True, "bf16": {}}
    case = Case(config, {"resume": "never", "max_steps": 10, "seed": 1}, 4, "gpu")
    assert judge(case).kind != kind
    monkeypatch.setattr(fuzz_verdict, "resolve", changed(key, value))
    verdict = judge(case)
    assert verdict.kind == kind
    small = minimise(case, verdict)
    assert len(small.config) == 1
    assert (small.arguments, small.world, small.device) == ({"resume": "never"}, 1, "cpu")
