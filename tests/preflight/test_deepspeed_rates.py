"""The learning rates of a file's scheduler block, against DeepSpeed's own classes, over whole runs."""

import os
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest
import torch
from deepspeed.runtime import lr_schedules
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import LambdaLR

from hf_mamba.preflight import Plan, resolve
from hf_mamba.preflight.deepspeed.rates import factor


def plan(scheduler: dict[str, Any], **arguments: Any) -> Plan:
    config = {"zero_optimization": {"stage": 1}, "scheduler": scheduler}
    return resolve({"resume": "never", "deepspeed": config, **arguments}, world_size=1, environ={}, device="cpu")


def optimizer(rate: float) -> torch.optim.SGD:
    return torch.optim.SGD([{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)]}], lr=rate)


def stepped(schedule: Any, stepping: torch.optim.SGD, steps: int) -> list[float]:
    """The rate of each update, as an engine makes it: update, then step the schedule."""
    rates = []
    for _ in range(steps):
        rates.append(float(stepping.param_groups[1]["lr"]))
        stepping.step()
        schedule.step()
    return rates


def check(kind: str, params: dict[str, Any], rate: float, total: int) -> None:
    """The rates of DeepSpeed's class and of one LambdaLR over `factor` are equal at every step."""
    theirs, ours = optimizer(rate), optimizer(rate)
    reference = getattr(lr_schedules, kind)(theirs, **params)
    rates = {"type": kind, "params": params}
    expected = stepped(reference, theirs, total)
    found = stepped(LambdaLR(ours, lambda step: factor(rates, step)), ours, total)
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-18)


@given(
    kind=st.sampled_from(["WarmupLR", "WarmupDecayLR", "WarmupCosineLR"]),
    curve=st.sampled_from(["log", "linear"]),
    warmup=st.integers(1, 60),
    total=st.integers(1, 80),
    low=st.sampled_from([0.0, 1e-5, 3e-4, 1e-3]),
    share=st.sampled_from([0.0, 0.1, 1.0]),
)
def test_every_step_has_deepspeeds_rate(
    kind: str, curve: str, warmup: int, total: int, low: float, share: float
) -> None:
    params: dict[str, Any] = {"warmup_num_steps": warmup, "warmup_type": curve}
    if kind == "WarmupCosineLR":
        params |= {"warmup_min_ratio": share, "cos_min_ratio": share / 2, "total_num_steps": total}
    else:
        params |= {"warmup_min_lr": low, "warmup_max_lr": 3e-4}
        params |= {"total_num_steps": total} if kind == "WarmupDecayLR" else {}
    check(kind, params, 3e-4, total)


AUTO = {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}


@pytest.mark.parametrize(
    ("scheduler", "arguments", "params"),
    [
        (
            {"type": "WarmupDecayLR", "params": {**AUTO, "total_num_steps": "auto"}},
            {"max_steps": 100, "learning_rate": 3e-4, "warmup_steps": 10},
            {"warmup_min_lr": 0.0, "warmup_max_lr": 3e-4, "warmup_num_steps": 10, "total_num_steps": 100},
        ),
        (
            {"type": "WarmupLR", "params": {"warmup_max_lr": "2e-4", "warmup_num_steps": 7}},
            {"max_steps": 50},
            {"warmup_min_lr": 0.0, "warmup_max_lr": 2e-4, "warmup_num_steps": 7},
        ),
        (  # the length of the run is the file's
            {"type": "WarmupCosineLR", "params": {"total_num_steps": 60, "warmup_num_steps": 0}},
            {"learning_rate": 1e-3},
            {"warmup_min_ratio": 0.0, "cos_min_ratio": 0.0001, "warmup_num_steps": 1, "total_num_steps": 60},
        ),
        (  # DeepSpeed's defaults, where nobody says anything
            {"type": "WarmupDecayLR"},
            {"max_steps": 2000},
            {"warmup_min_lr": 0.0, "warmup_max_lr": 1e-3, "warmup_num_steps": 1000, "total_num_steps": 2000},
        ),
    ],
)
def test_a_block_becomes_the_plans_schedule(
    scheduler: dict[str, Any], arguments: dict[str, Any], params: dict[str, Any]
) -> None:
    found = plan(scheduler, **arguments).require()
    assert found.rates == {"type": scheduler["type"], "params": {**params, "warmup_type": "log"}}
    assert found.ds_config is not None
    assert "scheduler" not in found.ds_config
    assert found.warmup_steps == params["warmup_num_steps"]
    assert found.total_steps == params.get("total_num_steps", 50)
    if "warmup_max_lr" in params:
        assert found.training_arguments["learning_rate"] == params["warmup_max_lr"]
    check(scheduler["type"], found.rates["params"], found.training_arguments["learning_rate"], found.total_steps)


@pytest.mark.parametrize(
    ("params", "arguments", "id"),
    [
        ({"warmup_max_lr": 1e-4}, {"learning_rate": 3e-4}, "argument-written-twice"),
        ({"total_num_steps": 20}, {"max_steps": 30}, "schedule-of-another-length"),
        ({"warmup_num_steps": 20}, {"warmup_steps": 10}, "schedule-of-another-length"),
        ({"warmup_steps": 20}, {}, "unknown-parameter"),
        ({"warmup_min_lr": -1}, {}, "value-of-the-wrong-kind"),
        ({}, {"lr_scheduler_type": "cosine"}, "schedule-written-twice"),
        ({}, {"min_lr": 1e-5}, "schedule-written-twice"),
    ],
)
def test_a_block_that_contradicts_a_flag_is_a_problem(
    params: dict[str, Any], arguments: dict[str, Any], id: str
) -> None:
    found = plan({"type": "WarmupDecayLR", "params": params}, **{"max_steps": 30, **arguments})
    assert [problem.id for problem in found.problems] == [id]
