"""The optimizer block of a DeepSpeed file becomes arguments, or is a problem that says what to use instead."""

from typing import Any

import pytest
import torch
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

from hf_mamba.preflight import Plan, resolve
from hf_mamba.preflight.deepspeed.optimizer import GONE, NEAREST


def plan(block: dict[str, Any], *, config: dict[str, Any] | None = None, **arguments: Any) -> Plan:
    ds = {"zero_optimization": {"stage": 1}, **(config or {}), "optimizer": block}
    values = {"resume": "never", "preset": "130m_mamba", "max_steps": 10, **arguments, "deepspeed": ds}
    return resolve(values, world_size=1, environ={}, device="cpu")


AUTO = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}


@pytest.mark.parametrize("kind", ["Adam", "AdamW", "adamw"])
def test_auto_is_the_run_without_the_block(kind: str) -> None:
    found = plan({"type": kind, "params": {**AUTO, "torch_adam": True, "adam_w_mode": True}}).require()
    bare = resolve(
        {
            "resume": "never",
            "preset": "130m_mamba",
            "max_steps": 10,
            "deepspeed": {"zero_optimization": {"stage": 1}},
        },
        world_size=1,
        environ={},
        device="cpu",
    )
    assert found.training_arguments == bare.training_arguments
    assert found.ds_config == bare.ds_config


def test_the_files_numbers_win_over_the_presets_and_are_shown_with_their_source() -> None:
    block = {"type": "AdamW", "params": {"lr": "2e-5", "betas": [0.8, 0.99], "eps": 1e-6, "weight_decay": 0}}
    found = plan(block).require()
    wanted = {"learning_rate": 2e-5, "adam_beta1": 0.8, "adam_beta2": 0.99, "adam_epsilon": 1e-6, "weight_decay": 0.0}
    assert {name: found.training_arguments[name] for name in wanted} == wanted
    assert found.provenance["learning_rate"] == "optimizer.params.lr in the deepspeed dictionary"
    note = next(note for note in found.notes if "decay groups" in note)
    assert "learning_rate 2e-05" in note
    assert "preset's learning rate is 0.003" in note  # more than three times another


def test_what_the_block_leaves_out_stays_the_presets() -> None:
    found = plan({"type": "Adam", "params": {"lr": 1e-3}}).require()
    assert found.training_arguments["weight_decay"] == 0.1
    assert found.training_arguments["learning_rate"] == 1e-3


def test_max_grad_norm_of_the_block_is_the_clipping_norm() -> None:
    found = plan({"type": "Adam", "params": {"lr": 1e-3, "max_grad_norm": 0.7}}).require()
    assert found.training_arguments["max_grad_norm"] == 0.7


@pytest.mark.parametrize(
    ("block", "optim", "optim_args"),
    [
        (
            {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9, "nesterov": True}},
            "sgd",
            "momentum=0.9,nesterov=true",
        ),
        ({"type": "Adagrad", "params": {"lr": 0.1, "eps": 1e-9}}, "adagrad", "eps=1e-09"),
        ({"type": "RMSprop"}, "rmsprop", None),
    ],
)
def test_an_optimizer_that_trainer_has_is_taken_over(block: dict[str, Any], optim: str, optim_args: str | None) -> None:
    arguments = plan(block).require().training_arguments
    assert (arguments["optim"], arguments.get("optim_args")) == (optim, optim_args)


@pytest.mark.parametrize(
    ("block", "arguments", "id", "fix"),
    [
        ({"type": "AdamW", "params": {"lr": 1e-3}}, {"learning_rate": 2e-3}, "argument-written-twice", '"auto"'),
        ({"type": "AdamW", "params": {"betas": [0.9, 0.9]}}, {"adam_beta2": 0.95}, "argument-written-twice", "auto"),
        ({"type": "AdamW"}, {"optim": "adafactor"}, "two-optimizers", "--optim"),
        ({"type": "Lamb", "params": {}}, {}, "optimizer-without-equal", "--optim adamw_torch"),
        ({"type": "OneBitAdam"}, {}, "optimizer-without-equal", "--optim adamw_torch"),
        ({"type": "Lion"}, {}, "optimizer-without-equal", "lion_32bit"),
        ({"type": "AdmW"}, {}, "unknown-optimizer", '"AdamW"'),
        ({"params": {}}, {}, "unknown-optimizer", "AdamW"),
        ({"type": "Adam", "params": {"adam_w_mode": False, "weight_decay": 0.1}}, {}, "adam-with-l2", "AdamW"),
        ({"type": "AdamW", "params": {"amsgrad": True}}, {}, "optimizer-option", "false"),
        ({"type": "AdamW", "params": {"wieght_decay": 1}}, {}, "unknown-parameter", '"weight_decay"'),
        ({"type": "AdamW", "params": {"betas": 0.9}}, {}, "value-of-the-wrong-kind", "two numbers"),
        ({"type": "AdamW", "params": {"betas": [0.9, 1.0]}}, {}, "value-of-the-wrong-kind", "below 1"),
        ({"type": "AdamW", "params": {"lr": "fast"}}, {}, "value-of-the-wrong-kind", "number"),
        ({"type": "AdamW", "params": 7}, {}, "params-no-block", "block"),
    ],
)
def test_what_cannot_be_taken_over(block: dict[str, Any], arguments: dict[str, Any], id: str, fix: str) -> None:
    problems = plan(block, **arguments).problems
    assert [problem.id for problem in problems] == [id]
    assert fix in problems[0].fix


@pytest.mark.parametrize(
    "params", [{"adam_w_mode": False}, {"adam_w_mode": False, "weight_decay": 0}, {"adam_w_mode": True}]
)
def test_adam_without_decay_is_adamw(params: dict[str, Any]) -> None:
    assert plan({"type": "Adam", "params": params}).ok
    assert plan({"type": "AdamW", "params": {"adam_w_mode": False, "weight_decay": 0.1}}).ok  # DeepSpeed overrides it


def test_the_one_bit_optimizers_are_gone_from_deepspeed() -> None:
    """The configuration class still reads their names; the engine looks for them in torch.optim."""
    names = {name.lower() for name in dir(torch.optim)} | set(DEEPSPEED_OPTIMIZERS)
    assert not names & set(GONE)
    assert set(GONE) <= set(NEAREST)
