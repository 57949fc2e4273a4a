"""Values that pass are accepted by who reads them: the tables against the installed transformers, then one by one."""

import inspect
import os
from typing import Any

import pytest
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.training_args import OptimizerNames

from hf_mamba.family import get_preset
from hf_mamba.preflight import Plan, resolve, verify
from hf_mamba.preflight.consumers import ACCELERATOR, OPTIMIZERS, SCHEDULES


def plan(**arguments: Any) -> Plan:
    return resolve({"resume": "never", "max_steps": 10, **arguments}, world_size=1, environ={}, device="cpu")


def test_the_tables_are_the_installed_transformers() -> None:
    assert set(OPTIMIZERS) == {name.value for name in OptimizerNames}
    assert set(ACCELERATOR) == set(AcceleratorConfig.__dataclass_fields__)
    decided = {"optimizer", "last_epoch", "num_warmup_steps", "num_training_steps"}
    taken = {
        kind.value: set(inspect.signature(function).parameters) - decided
        for kind, function in TYPE_TO_SCHEDULER_FUNCTION.items()
    }
    assert {kind: set(takes or ("kwargs",)) if takes != () else set() for kind, takes in SCHEDULES.items()} == taken


@pytest.mark.parametrize(
    "arguments",
    [
        {"seed": 2**32},
        {"adam_beta1": 1.0},
        {"adam_beta2": 1},
        {"optim": "nonsense"},
        {"optim_args": "x"},
        {"lr_scheduler_type": "nonsense"},
        {"lr_scheduler_kwargs": {"a": 1}},
        {"lr_scheduler_kwargs": "{"},
        {"lr_scheduler_kwargs": "5"},
        {"accelerator_config": "{"},
        {"accelerator_config": 5},
        {"accelerator_config": {"a": 1}},
        {"output_dir": "a\0b"},
        {"output_dir": {"a": 1}},
        {"output_dir": "x" * 5000},
        {"save_steps": float("inf")},
        {"logging_steps": [1]},
    ],
    ids=lambda arguments: str(arguments)[:40],
)
def test_what_its_reader_would_refuse_is_one_problem(arguments: dict[str, Any]) -> None:
    problems = plan(**arguments).problems
    assert [(problem.id, problem.key) for problem in problems] == [("refused-by-its-reader", next(iter(arguments)))]


@pytest.mark.parametrize("name", [name for name, package in OPTIMIZERS.items() if package])
def test_an_optimizer_whose_package_is_missing(name: str) -> None:
    if not plan(optim=name).problems:
        pytest.skip(f"{OPTIMIZERS[name]} is installed")
    assert OPTIMIZERS[name] in plan(optim=name).problems[0].why
    there = resolve({"resume": "never", "num_gpus": 4, "optim": name}, environ={})
    assert there.ok
    assert any(OPTIMIZERS[name] in note for note in there.notes)


def test_a_flags_json_is_read_as_a_files_block() -> None:
    for written in ('{"min_lr": 1e-5}', {"min_lr": 1e-5}):
        found = plan(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs=written).require()
        assert found.training_arguments["lr_scheduler_kwargs"] == {"min_lr": 1e-5}


def test_a_schedule_gets_the_floor_that_it_requires() -> None:
    found = plan(lr_scheduler_type="cosine_warmup_with_min_lr", learning_rate=1e-3, min_lr=1e-4).require()
    assert found.training_arguments["lr_scheduler_kwargs"] == {"min_lr_rate": pytest.approx(0.1)}


@pytest.mark.parametrize(
    ("schedule", "own", "expected"),
    [
        ("cosine_with_min_lr", {"num_cycles": 0.4}, {"num_cycles": 0.4, "min_lr_rate": 0.25}),
        ("cosine_with_min_lr", {"min_lr": 1e-6}, {"min_lr": 1e-6}),
        ("cosine_with_min_lr", {"min_lr_rate": 0.5}, {"min_lr_rate": 0.5}),
        (
            "warmup_stable_decay",
            {"decay_type": "1-sqrt"},
            {"decay_type": "1-sqrt", "num_decay_steps": 10, "min_lr_ratio": 0.25},
        ),
        ("warmup_stable_decay", {"num_decay_steps": 7}, {"num_decay_steps": 7, "min_lr_ratio": 0.25}),
        ("polynomial", {"power": 2.0}, {"power": 2.0}),
    ],
)
def test_a_schedules_own_arguments_are_completed(schedule: str, own: dict[str, Any], expected: dict[str, Any]) -> None:
    """The user's keys win; the preset's floor and the default decay complete them."""
    rate = 4 * get_preset("tiny_mamba").min_lr
    found = plan(
        preset="tiny_mamba", lr_scheduler_type=schedule, learning_rate=rate, max_steps=100, lr_scheduler_kwargs=own
    )
    assert found.require().training_arguments["lr_scheduler_kwargs"] == expected
    assert not verify(found).problems  # transformers builds it


@pytest.mark.parametrize(
    ("argument", "arguments"),
    [
        ("lr_scheduler_kwargs", {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": "x"}}),
        ("optim_args", {"optim": "sgd", "optim_args": "momentum=x"}),
        ("logging_strategy", {"logging_strategy": "sometimes"}),
        ("dataloader_num_workers", {"dataloader_num_workers": -1}),
        ("no_such_argument", {"no_such_argument": 1}),
    ],
)
def test_what_no_table_knows_is_refused_when_the_arguments_are_built(argument: str, arguments: dict[str, Any]) -> None:
    found = plan(**arguments)
    assert found.ok
    before = dict(os.environ)
    (problem,) = verify(found).problems
    assert (problem.id, problem.key) == ("refused-by-transformers", argument)
    assert dict(os.environ) == before


def test_the_arguments_of_every_preset_and_schedule_are_built() -> None:
    for kind in ("linear", "cosine", "warmup_stable_decay", "cosine_with_min_lr", "inverse_sqrt"):
        assert not verify(plan(lr_scheduler_type=kind)).problems
    for name in ("adamw_torch", "adafactor", "sgd", "rmsprop", "adagrad"):
        assert not verify(plan(optim=name)).problems
    elsewhere = resolve({"resume": "never", "preset": "130m_mamba", "num_gpus": 8, "tf32": True}, environ={})
    assert not verify(elsewhere).problems
