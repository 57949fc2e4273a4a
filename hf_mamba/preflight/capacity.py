"""The one door to the memory planner: a micro-batch where "auto" asks for it, the refusal of a run that cannot fit.

The planner is `hf_mamba.preflight.memory.plan_memory`. Without it, or with an unknown capacity, nothing is claimed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hf_mamba.preflight.batch import Batch
from hf_mamba.preflight.plan import Findings
from hf_mamba.preflight.settings import Settings
from hf_mamba.preflight.world import World


@dataclass(frozen=True)
class Request:
    """What the planner needs to know about a run."""

    settings: Settings
    model_config: dict[str, Any]
    world: World
    dtype: str
    ds_config: dict[str, Any] | None


def _planner() -> Callable[..., Any] | None:
    try:
        from hf_mamba.preflight.memory import plan_memory  # type: ignore[import-not-found]
    except ImportError:
        return None
    return plan_memory


def _ask(request: Request, micro_batch_size: int | None, ds_config: dict[str, Any] | None, out: Findings) -> Any:
    """The planner's answer, with `fits` (True, False or None), `largest_micro_batch_size`, `needed`, `advice`.

    None without a capacity, a model or a planner.
    """
    planner = _planner()
    capacity = request.settings.get("gpu_memory")
    if planner is None or capacity is None or not request.model_config or not request.world.data_parallel:
        return None
    try:
        return planner(
            request.model_config,
            seq_len=request.settings.get("seq_len"),
            micro_batch_size=micro_batch_size,
            world_size=request.world.data_parallel,
            dtype=request.dtype,
            ds_config=ds_config,
            gradient_checkpointing=bool(request.settings.get("gradient_checkpointing")),
            capacity=capacity,
        )
    except ValueError as error:  # a capacity without a unit, a size that is none
        out.problem("gpu_memory", str(capacity), f"{error}", "Write a size with its unit, for example 80GB.")
        return None


def default_micro_batch(request: Request, out: Findings) -> tuple[int, str]:
    """(micro-batch, where it comes from), for a run that does not give one."""
    value = request.settings.get("per_device_train_batch_size", 1)
    preset = request.settings.preset
    if value != "auto":
        return value, request.settings.source("per_device_train_batch_size")
    answer = _ask(request, None, request.ds_config, out)
    if answer is not None and answer.largest_micro_batch_size:
        return answer.largest_micro_batch_size, "the memory planner"
    if preset is not None:
        out.note(f'The micro-batch "auto" is preset {preset.name}\'s own: give --gpu_memory to have it planned.')
        return preset.micro_batch_size, f"preset {preset.name}"
    out.note('The micro-batch "auto" is 1: give --gpu_memory to have it planned.')
    return 1, "default"


def check_fits(request: Request, batch: Batch | None, ds_config: dict[str, Any] | None, out: Findings) -> None:
    """A problem where the planner is sure that the run does not fit, with what would make it fit."""
    answer = _ask(request, batch.micro, ds_config, out) if batch is not None else None
    if answer is not None and answer.fits is False:
        out.problem(
            request.settings.key("per_device_train_batch_size"),
            f"micro-batch {batch.micro if batch else None}, {answer.needed}",
            "The run does not fit into the GPU's memory.",
            answer.advice,
        )
