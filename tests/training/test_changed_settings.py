"""Settings changed at a resume hold from the first new step on, read from the optimizer that steps."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import ROOT, SETTINGS, Launcher, curve, log_lines
from transformers import get_scheduler

from hf_mamba.preflight import resolve
from hf_mamba.preflight.consumers import SCHEDULES
from hf_mamba.run.changes import HISTORIC
from hf_mamba.training.optimizers import restore_rates

# Notes what every group of the innermost optimizer holds, and the norm at which its engine clips, as it steps.
NOTED = """
import json
from hf_mamba.training.trainer import MambaTrainer
from hf_mamba.training.updates import inner_optimizer
begin = MambaTrainer.begin
def noting(self):
    begin(self)
    if self.args.process_index:
        return
    optimizer, engine = inner_optimizer(self.optimizer), self.model_wrapped
    def note(*_):
        keys = ("lr", "weight_decay", "betas", "eps")
        row = dict(step=self.state.global_step + 1, groups=[{k: g[k] for k in keys} for g in optimizer.param_groups])
        row["clip"] = getattr(getattr(engine, "optimizer", None), "clip_grad", self.args.max_grad_norm)
        with open(str(self.run.folder) + ".noted", "a") as file:
            file.write(json.dumps(row) + chr(10))
    optimizer.register_step_pre_hook(note)
MambaTrainer.begin = noting
"""
ENGINES = {"plain": {}, "zero2": {"deepspeed": str(ROOT / "ds_configs" / "zero2.json")}}
BEFORE = {"save_steps": 4, "max_steps": 4, "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.1}
AFTER: dict[str, Any] = {
    "max_steps": 10,
    "learning_rate": 1e-3,
    "weight_decay": 0.3,
    "adam_beta1": 0.8,
    "adam_beta2": 0.5,
    "adam_epsilon": 1e-6,
    "max_grad_norm": 0.25,
    "lr_scheduler_type": "cosine",
    "min_lr": 1e-4,
    "warmup_steps": 2,
    "z_loss": 1e-4,
}


def expected_rate(update: int) -> float:
    """Of update `update` (from 0) after the change."""
    return 1e-4 + 9e-4 * 0.5 * (1 + math.cos(math.pi * (update - 2) / 8))


@pytest.fixture(scope="module", params=ENGINES)
def changed(launcher: Launcher, request: pytest.FixtureRequest) -> tuple[Path, list[dict[str, Any]], str]:
    """A run of four steps, gone on with in a branch whose every setting is another: folder, steps, screen."""
    engine, common = request.param, ENGINES[request.param] | {"eval_fraction": 0, "save_strategy": "steps"}
    old, new = (launcher.folder / f"changed-{engine}-{name}" for name in ("before", "after"))
    launcher.run(old, **common, **BEFORE)
    before = {path: path.stat().st_mtime_ns for path in old.rglob("*")}
    again = {"resume": str(old / "checkpoint-4"), "save_steps": 6}
    launch = launcher.run(new, patch=NOTED, **common, **(BEFORE | AFTER | again))
    assert {path: path.stat().st_mtime_ns for path in old.rglob("*")} == before
    steps: dict[int, dict[str, Any]] = {}
    for row in map(json.loads, Path(f"{new}.noted").read_text().splitlines()):
        if row["step"] in steps:  # ZeRO steps one group after the other
            steps[row["step"]]["groups"] += row["groups"]
        else:
            steps[row["step"]] = row
    return new, list(steps.values()), launch.text()


def test_every_setting_of_the_optimizer_is_the_new_plan_s(changed: Any):
    _, steps, _ = changed
    assert [row["step"] for row in steps] == [5, 6, 7, 8, 9, 10]
    for row in steps:
        assert [group["weight_decay"] for group in row["groups"]] == [0.3, 0.0]
        assert row["clip"] == 0.25
        for group in row["groups"]:
            assert (group["betas"], group["eps"]) == ([0.8, 0.5], 1e-6)
            assert group["lr"] == pytest.approx(expected_rate(row["step"] - 1), rel=1e-9)


def test_the_log_agrees_with_the_optimizer(changed: Any):
    folder, steps, _ = changed
    assert log_lines(folder, "learning_rate") == {row["step"]: row["groups"][0]["lr"] for row in steps}


def test_the_screen_lists_what_changed_and_where_the_rate_goes(changed: Any):
    _, _, text = changed
    for line in (
        "changed learning_rate 0.004 -> 0.001: from step 5 on.",
        "changed weight_decay 0.1 -> 0.3: from step 5 on.",
        "changed adam_beta1 0.9 -> 0.8: from step 5 on.",
        "changed adam_beta2 0.95 -> 0.5: from step 5 on.",
        "changed adam_epsilon 1e-08 -> 1e-06: from step 5 on.",
        "changed max_grad_norm 1 -> 0.25: from step 5 on.",
        "changed lr_scheduler_type constant -> cosine_with_min_lr: from step 5 on.",
        "changed warmup_steps 0 -> 2: from step 5 on.",
        "changed max_steps 4 -> 10: from step 5 on.",
        "changed z_loss 0 -> 0.0001: from step 5 on.",
        f"note The learning rate goes from 0.004 at step 4 to {expected_rate(4):g} at step 5, which was planned at",
    ):
        assert line in text, line


def test_a_branch_is_started_again_and_an_optimizer_cannot_change(launcher: Launcher, changed: Any):
    """The command of a branch, run again, as a cluster does; with another optimizer; from another checkpoint."""
    folder, _, _ = changed
    if "zero2" in folder.name:
        pytest.skip("nothing in it depends on the engine")
    old = folder.with_name("changed-plain-before")
    command = BEFORE | AFTER | {"eval_fraction": 0, "resume": str(old / "checkpoint-4"), "save_steps": 6}
    before = curve(folder)
    again = launcher.run(folder, **command)
    assert f"is a branch of {old}/checkpoint-4 and goes on from its own checkpoint-10" in again.text()
    assert curve(folder) == before

    def problems(**other: Any) -> list[str]:
        settings = {**SETTINGS, "dataset": [str(launcher.corpus)], "output_dir": str(folder), **command, **other}
        return [f"{problem.key}: {problem.found}" for problem in resolve(settings, environ={}).problems]

    elsewhere = str(folder.with_name("elsewhere"))
    assert problems(output_dir=elsewhere) == []
    found = problems(output_dir=elsewhere, optim="sgd")
    assert found == [f"optim: sgd, and adamw_torch_fused in {old}/checkpoint-4"]
    found = problems(output_dir=elsewhere, lr_scheduler_type="greedy", min_lr=None)
    assert f"lr_scheduler_type: greedy at 0.001, and constant at 0.004 in {old}/checkpoint-4" in found
    third = folder / "checkpoint-10"
    assert f"resume: {third}, and {old}/checkpoint-4" in problems(output_dir=str(old), resume=str(third))


@pytest.mark.parametrize("kind", [kind for kind in SCHEDULES if kind not in HISTORIC])
def test_the_rate_is_the_plan_s_under_every_schedule(kind: str):
    """An optimizer and a schedule of another run, put right at step 7, against an undisturbed run of the plan."""

    def build(peak: float, total: int) -> tuple[torch.optim.Optimizer, Any]:
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=peak)
        more = {"num_decay_steps": 5} if kind == "warmup_stable_decay" else None
        more = {"min_lr_rate": 0.1} if "min_lr" in kind else more
        return optimizer, get_scheduler(kind, optimizer, 3, total, more)

    def rates(optimizer: torch.optim.Optimizer, schedule: Any, steps: int) -> list[float]:
        out = []
        for _ in range(steps):
            out.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return out

    undisturbed = rates(*build(0.5, 20), 20)
    old = build(0.1, 12)
    rates(*old, 7)
    optimizer, schedule = build(0.5, 20)
    optimizer.load_state_dict(old[0].state_dict())
    schedule.load_state_dict(old[1].state_dict())
    restore_rates(schedule, optimizer, [0.5], 7)
    assert schedule.get_last_lr() == undisturbed[7:8]
    assert rates(optimizer, schedule, 13) == undisturbed[7:]
