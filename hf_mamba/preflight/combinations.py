"""Settings that are each valid and do not go together: what fails later, or is ignored without a word."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hf_mamba.preflight.kinds import show
from hf_mamba.preflight.launcher import Launcher
from hf_mamba.preflight.migrations import get
from hf_mamba.preflight.plan import Findings
from hf_mamba.preflight.schedule import Steps
from hf_mamba.preflight.settings import Settings
from hf_mamba.preflight.world import World

ZERO = "zero_optimization"


@dataclass(frozen=True)
class Run:
    """Everything a rule may look at."""

    settings: Settings
    launcher: Launcher
    ds: Mapping[str, Any]
    world: World
    dtype: str
    steps: Steps
    deepspeed: bool

    def key(self, path: str, default: Any = None) -> Any:
        return get(self.ds, path, default)

    def zero(self, name: str, default: Any = None) -> Any:
        return get(self.ds, f"{ZERO}.{name}", default)

    @property
    def stage(self) -> int:
        return self.zero("stage", 0)

    def offloads(self, what: str) -> str:
        return self.zero(f"offload_{what}.device", "none")


@dataclass(frozen=True)
class Rule:
    """A combination: `when` it is met, the problem is (key, why, fix). `deepspeed` rules need a ds_config."""

    key: str
    when: Callable[[Run], Any]
    why: str
    fix: str
    deepspeed: bool = True


_CPU_ADAM = ("adamw_torch", "adamw_torch_fused", "adagrad")

RULES: tuple[Rule, ...] = (
    Rule(
        f"{ZERO}.offload_param",
        lambda r: r.offloads("param") != "none" and r.stage < 3,
        "Parameters are offloaded at stage 3 only; below, DeepSpeed ignores the block.",
        'Write "stage": 3, or remove offload_param.',
    ),
    Rule(
        f"{ZERO}.offload_optimizer",
        lambda r: r.offloads("optimizer") != "none" and r.stage == 0,
        "Nothing is partitioned at stage 0, and nothing is offloaded.",
        'Write "stage": 1, 2 or 3, or remove offload_optimizer.',
    ),
)


def check(
    settings: Settings,
    launcher: Launcher,
    ds_config: dict[str, Any] | None,
    world: World,
    dtype: str,
    steps: Steps,
    out: Findings,
) -> None:
    """Name every rule that the run meets."""
    run = Run(settings, launcher, ds_config or {}, world, dtype, steps, ds_config is not None)
    for rule in RULES:
        if (run.deepspeed or not rule.deepspeed) and rule.when(run):
            found = run.key(rule.key, settings.get(rule.key)) if rule.deepspeed else settings.get(rule.key)
            out.problem(rule.key, show(found), rule.why, rule.fix)
