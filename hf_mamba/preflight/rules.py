"""What a rule about settings that do not go together looks at, and says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hf_mamba.dotted import get
from hf_mamba.plan import FsdpPlan
from hf_mamba.preflight.launch.environment import Launcher
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
    fsdp: FsdpPlan | None = None
    elsewhere: bool = False  # planned here, for another machine

    def key(self, path: str, default: Any = None) -> Any:
        return get(self.ds, path, default)

    def zero(self, name: str, default: Any = None) -> Any:
        return get(self.ds, f"{ZERO}.{name}", default)

    @property
    def stage(self) -> int:
        return self.zero("stage", 0)

    def offloads(self, what: str) -> str:
        return self.zero(f"offload_{what}.device", "none")

    @property
    def resumes(self) -> bool:
        return bool(self.settings.get("resume_from_checkpoint")) or self.settings.get("resume", "never") not in (
            "never",
            "auto",
        )


def zero(stage: int, **keys: Any) -> dict[str, Any]:
    """The arguments of an example: a DeepSpeed file with this zero_optimization block."""
    return {"deepspeed": {ZERO: {"stage": stage, **keys}}}


def ds(**keys: Any) -> dict[str, Any]:
    """The arguments of an example: a DeepSpeed file at stage 1 with these keys."""
    return {"deepspeed": {ZERO: {"stage": 1}, **keys}}


@dataclass(frozen=True)
class Rule:
    """A combination: `when` it is met, the problem is (key, why, fix).

    `example` and `mended` hold arguments of `resolve`, and of the run's surroundings: `environ`, `device`,
    `world_size`. The first meets the rule and the second does not; a test resolves both.
    """

    id: str
    key: str
    when: Callable[[Run], Any]
    why: str
    fix: str
    example: Mapping[str, Any]
    mended: Mapping[str, Any]
    found: Callable[[Run], str] | None = None  # what the problem shows; by default the value of the key
