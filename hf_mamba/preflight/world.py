"""How many processes the run has, how many of them are data-parallel, and on what kind of device."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_mamba.dotted import get
from hf_mamba.findings import Findings
from hf_mamba.plan import Plan
from hf_mamba.preflight.launch.environment import Launcher
from hf_mamba.preflight.settings import Settings


@dataclass(frozen=True)
class World:
    """`processes` = `data_parallel` x `model_parallel`; `device` is "gpu" or "cpu"."""

    processes: int | None
    data_parallel: int | None
    model_parallel: int
    nodes: int
    device: str
    source: str


def gpu_here() -> bool:
    """Whether this machine shows an NVIDIA or AMD device; looks at device files, without a driver call."""
    return bool(glob.glob("/dev/nvidia[0-9]*") or glob.glob("/dev/kfd") or glob.glob("/dev/dxg"))


def runs_elsewhere(plan: Plan) -> bool:
    """Whether a plan's processes are not the ones that are here."""
    return (plan.device == "gpu" and not gpu_here()) or (plan.num_processes > 1 and "WORLD_SIZE" not in os.environ)


def _processes(settings: Settings, launcher: Launcher, world_size: int | None, out: Findings) -> tuple[int | None, str]:
    nodes, gpus = settings.get("num_nodes"), settings.get("num_gpus")
    asked = gpus * nodes if gpus else None
    how = f"{gpus} per node x {nodes} nodes" if nodes > 1 else settings.source("num_gpus")
    if world_size is not None:
        return world_size, "argument world_size"
    if launcher.world_size is not None:
        if asked is not None and asked != launcher.world_size:
            out.problem(
                "num_gpus",
                f"{asked} ({how}) and WORLD_SIZE={launcher.world_size} from the launcher",
                "The launcher has started another number of processes.",
                f"Leave --num_gpus and --num_nodes out, or launch {asked} processes.",
                id="world-size-contradicts",
            )
            return None, ""
        if launcher.started:
            return launcher.world_size, "the launcher's WORLD_SIZE"
        return launcher.world_size, how if asked else settings.source("accelerate_config")
    if asked is not None:
        return asked, how
    if nodes > 1:
        out.problem(
            "num_nodes",
            nodes,
            "The number of processes is not known without the GPUs per node.",
            "Give --num_gpus too.",
            id="nodes-without-gpus",
        )
        return None, ""
    return 1, "default"


# Where a run can ask for model-parallel ranks: (dotted DeepSpeed key, what it is).
_MODEL_PARALLEL = (
    ("sequence_parallel_size", "sequence parallelism"),
    ("tensor_parallel.autotp_size", "tensor parallelism"),
)


def _model_parallel(ds_config: Mapping[str, Any] | None, launcher: Launcher) -> dict[str, int]:
    """Every kind of model parallelism that was asked for, with its size: none of these ranks see data of their own."""
    sizes = dict(launcher.model_parallel)
    for key, _ in _MODEL_PARALLEL:
        size = get(ds_config or {}, key)
        if isinstance(size, int) and size > 1:
            sizes[key] = size
    return sizes


def decide_world(
    settings: Settings,
    launcher: Launcher,
    ds_config: Mapping[str, Any] | None,
    world_size: int | None,
    device: str | None,
    out: Findings,
) -> World:
    """The processes and their split; problems where they do not divide."""
    processes, source = _processes(settings, launcher, world_size, out)
    sizes = _model_parallel(ds_config, launcher)
    parts = 1
    for key, size in sizes.items():
        parts *= size
        out.problem(
            key,
            size,
            "A Mamba layer carries a state along the sequence and packs streams into one projection: it cannot be "
            "split over ranks in this way, and accelerate refuses it or the result would be wrong.",
            f"Remove {key}; {'FSDP' if launcher.fsdp is not None else 'ZeRO'} shards the model without it.",
            id="model-parallel",
        )
    data_parallel = processes
    if processes is not None and parts > 1:
        if processes % parts:
            what = " x ".join(f"{key}={size}" for key, size in sizes.items())
            out.problem(
                "num_gpus",
                processes,
                f"It is not a multiple of {what}.",
                "Change one of them.",
                id="world-does-not-divide",
            )
            data_parallel = None
        else:
            data_parallel = processes // parts
    nodes = settings.get("num_nodes") if settings.given("num_nodes") else launcher.nodes
    return World(processes, data_parallel, parts, nodes, _device(settings, launcher, device), source)


def planned_elsewhere(settings: Settings, launcher: Launcher, device: str | None) -> bool:
    """Whether the run is being planned here for another machine: one with GPUs, or of that number of them."""
    if launcher.started or device is not None:
        return False
    return settings.given("num_gpus") or ((settings.given("gpu") or launcher.device == "gpu") and not gpu_here())


def _device(settings: Settings, launcher: Launcher, device: str | None) -> str:
    if settings.get("use_cpu") or (launcher.use_cpu and not launcher.use_deepspeed):
        return "cpu"
    if device is not None:
        return device
    return "gpu" if gpu_here() or planned_elsewhere(settings, launcher, device) else "cpu"
