"""What DeepSpeed compiles as a run starts, said before it does, and what keeps it from being compiled or kept."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from hf_mamba.dotted import get
from hf_mamba.findings import Findings
from hf_mamba.plan import Plan
from hf_mamba.preflight.launch.machine import extensions_folder

NAMES = {"cpu_adam": "its CPU Adam", "deepspeed_shm_comm": "its exchange between processes on CPUs"}


def needed_extensions(plan: Plan) -> list[str]:
    """The extensions that DeepSpeed loads in this run."""
    config, found = plan.ds_config or {}, []
    offloaded = get(config, "zero_optimization.offload_optimizer.device", "none") != "none"
    if offloaded and get(config, "zero_force_ds_cpu_optimizer", True):
        found.append("cpu_adam")
    if config and plan.device == "cpu" and sys.platform == "linux":
        found.append("deepspeed_shm_comm")
    return found


def check_extensions(plan: Plan, out: Findings) -> None:
    """A note for what will be compiled, how long that takes and where it stays; a problem where it cannot be."""
    if not (missing := _missing_extensions(plan)):
        return
    folder, what = extensions_folder(), _named(missing)
    instead = "start without DeepSpeed (--deepspeed none)"
    if missing == ["cpu_adam"]:
        instead = "start without offloading"
    compiler = os.environ.get("CXX", "c++")
    absent = [name for name in ("ninja", compiler) if shutil.which(name) is None]
    if absent:
        out.problem(
            "deepspeed",
            f"no {' and no '.join(absent)} on PATH",
            f"DeepSpeed compiles {what} as the run starts.",
            f"Install {' and '.join(_package(name) for name in absent)}, or {instead}.",
            id="compiler-missing",
        )
    if fault := _unusable(folder):
        out.problem(
            "TORCH_EXTENSIONS_DIR",
            f"{folder}, which {fault}",
            f"DeepSpeed compiles {what} into it as the run starts, and loads it from there.",
            f"Set TORCH_EXTENSIONS_DIR to a folder of yours, or {instead}.",
            id="extensions-folder-unusable",
        )
    if not absent and not fault:
        out.note(f"DeepSpeed compiles {what} as the run starts: about a minute each, once, kept in {folder}.")


def compiling(plan: Plan) -> str | None:
    """What is to be said while DeepSpeed compiles, which writes nothing meanwhile; None where it compiles nothing."""
    missing = _missing_extensions(plan)
    return f"DeepSpeed is compiling {_named(missing)}, about a minute each, once." if missing else None


def _missing_extensions(plan: Plan) -> list[str]:
    needed = needed_extensions(plan)
    folder = extensions_folder() if needed else Path()
    return [name for name in needed if not _built(name, folder)]


def _named(extensions: list[str]) -> str:
    return " and ".join(NAMES[name] for name in extensions)


def _package(program: str) -> str:
    return "ninja (pip install ninja; it must be on PATH)" if program == "ninja" else f"a C++ compiler ({program})"


def _built(name: str, folder: Path) -> bool:
    """Whether DeepSpeed was installed with it, or has compiled it before."""
    try:
        from deepspeed.git_version_info import installed_ops

        if installed_ops.get(name):
            return True
    except ImportError:
        pass  # not installed: named elsewhere
    found = (f"{name}/{name}.so", f"*/{name}/{name}.so")  # torch puts a folder of its version between
    return any(path for pattern in found for path in folder.glob(pattern))


def _unusable(folder: Path) -> str | None:
    """Why nothing can be compiled into a folder and loaded from it."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return "cannot be written"
    if hasattr(os, "ST_NOEXEC") and os.statvfs(there).f_flag & os.ST_NOEXEC:
        return "is on a disk mounted noexec"
    return None
