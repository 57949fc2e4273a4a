"""Values that pass are accepted by who reads them: the tables against the installed transformers, then one by one."""

import dataclasses
import inspect
import os
from typing import Any

import pytest
from transformers import TrainingArguments
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.training_args import OptimizerNames

from hf_mamba.family import get_preset
from hf_mamba.preflight import Plan, resolve, verify
from hf_mamba.preflight.catalogue import pages
from hf_mamba.preflight.combinations import RUN_RULES
from hf_mamba.preflight.consumers import ACCELERATOR, OPTIMIZERS, SCHEDULES
from hf_mamba.preflight.fields import FIELDS, IDLE, PASSED, REFUSED
from hf_mamba.preflight.training import DECIDED


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


def test_every_field_of_training_arguments_has_a_row() -> None:
    """A field of a new version fails this, until somebody decides what becomes of it (preflight/fields.py)."""
    installed = {field.name: field for field in dataclasses.fields(TrainingArguments)}
    renamed = {"activation_checkpointing", "activation_checkpointing_kwargs"}  # of 5.23 and later
    assert FIELDS.keys() - installed.keys() <= renamed
    assert installed.keys() - FIELDS.keys() == set()
    for name, row in FIELDS.items():
        assert bool(row.why) == (row.how in (IDLE, REFUSED)), name
        assert not row.needs or row.needs.split("=")[0] in FIELDS, name
        if row.how == REFUSED:
            assert installed[name].default == row.usual, name


def test_a_fields_row_names_all_the_rules_about_it() -> None:
    known = pages()
    assert not [rule for row in FIELDS.values() for rule in row.rules if rule not in known]
    about = {(rule.key, rule.id) for rule in RUN_RULES if rule.key in FIELDS}
    assert not [(name, rule) for name, rule in about if rule not in FIELDS[name].rules]


OTHER = {
    "do_predict": True, "ignore_data_skip": True, "data_seed": 7, "save_on_each_node": True,
    "enable_jit_checkpoint": True, "dataloader_multiprocessing_context": "spawn", "dataloader_in_order": False,
    "label_names": ["y"], "parallelism_config": "x",
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name, row in FIELDS.items() if row.how == REFUSED])
def test_a_field_that_cannot_be_served_is_refused_in_words(name: str) -> None:
    (problem,) = plan(**{name: OTHER[name]}).problems
    assert (problem.id, problem.key, problem.why) == ("field-not-served", name, FIELDS[name].why)
    if FIELDS[name].usual is not None:
        assert plan(**{name: FIELDS[name].usual}).ok


@pytest.mark.parametrize("name", [name for name, row in FIELDS.items() if row.how == IDLE])
def test_a_field_without_effect_is_noted_and_goes_no_further(name: str) -> None:
    found = plan(**{name: True})
    assert any(note.startswith(f"--{name} has no effect here") for note in found.notes)
    assert found.known["training_arguments"].get(name) in (None, False)  # False: a default of ours


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        ({"eval_steps": 2}, "--eval_steps has no effect without --eval_strategy."),
        ({"eval_steps": 2, "eval_strategy": "steps"}, ""),
        ({"trackio_space_id": "a/b"}, "--trackio_space_id has no effect without --report_to trackio."),
        ({"trackio_space_id": "a/b", "report_to": ["trackio"]}, ""),
        ({"hub_revision": "dev"}, "--hub_revision has no effect without --push_to_hub."),
    ],
)
def test_a_field_without_its_other_half_is_noted(arguments: dict[str, Any], missing: str) -> None:
    said = [note for note in plan(**arguments).notes if "has no effect without" in note]
    assert said == ([missing] if missing else [])


def test_what_is_passed_reaches_trainer() -> None:
    """Every field that the table hands on is one that the plan does not take out."""
    assert not [name for name, row in FIELDS.items() if row.how == PASSED and name in DECIDED]


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
