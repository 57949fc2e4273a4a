"""What this machine can do, for `hf-mamba env`: devices, precisions, speed, scan backends, compilers, build locks."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_mamba import processor
from hf_mamba.family import family_of
from hf_mamba.findings import Findings, PlanError, Problem
from hf_mamba.plan import Plan
from hf_mamba.preflight.launch.speed import measured
from hf_mamba.processor import bf16_unit
from hf_mamba.run.processes import cpu_threads

PACKAGES = ("hf_mamba", "torch", "transformers", "accelerate", "deepspeed", "datasets", "triton", "mamba-ssm")
SOCKET_PATH = 107  # characters of the path of a socket, sockaddr_un of Linux
STALE_AFTER_S = 600  # a build takes minutes; an older lock has lost its builder


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def devices() -> list[dict[str, Any]]:
    """Every GPU with its memory and precisions; the CPU where there is none."""
    import torch

    if not torch.cuda.is_available():
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
        unit = bf16_unit()
        words = [processor.model() or platform.machine(), f"{os.cpu_count()} cores", *([unit] if unit else [])]
        dtypes = ["bf16", "fp32"] if unit else ["fp32", f"bf16 (products take {processor.bf16_slowdown()} as long)"]
        return [{"name": f"CPU ({', '.join(words)})", "memory": memory, "dtypes": dtypes}]
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        dtypes = ["fp32", "fp16"] + (["bf16"] if properties.major >= 8 or torch.version.hip else [])
        found.append({"name": properties.name, "memory": properties.total_memory, "dtypes": dtypes})
    return found


def backends() -> dict[str, str]:
    """Scan backend -> why it can or cannot run here."""
    from hf_mamba import ops

    return {name: str(reason) for name, reason in ops.available_backends().items()}


def scan_backend() -> str:
    """The backend that a training step's scan takes here: "cpu for packed rows on cpu"."""
    import torch

    device, dtype = ("cuda", "bf16") if torch.cuda.is_available() else ("cpu", "fp32")
    try:
        return f"{chosen_backend({}, device, dtype)} for packed rows on {device}"
    except ValueError as error:  # HF_MAMBA_BACKEND names one that cannot
        return str(error)


def check_backend(plan: Plan) -> str | None:
    """The backend of the model's operation, where the plan's devices are here.

    Raises:
        PlanError: (a ValueError) where HF_MAMBA_BACKEND names one that cannot serve.
    """
    import torch

    device = "cuda" if plan.device == "gpu" else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        return None
    try:
        return chosen_backend(plan.model_config, device, plan.dtype)
    except ValueError as error:
        forced, fix = str(os.environ.get("HF_MAMBA_BACKEND")), "Or run where it can serve."
        problem = Problem("HF_MAMBA_BACKEND", forced, str(error), fix, id="backend-cannot-serve")
        raise PlanError((problem,)) from None


def check_temporary_folder(plan: Plan, out: Findings) -> None:
    """Name a TMPDIR too long for the sockets by which loader workers hand rows over: both sides would wait for ever."""
    folder = tempfile.gettempdir()
    longest = len(os.fsencode(folder)) + len("/pymp-12345678/listener-12345678")
    if plan.training_arguments.get("dataloader_num_workers") and longest > SOCKET_PATH:
        why = f"Loader workers open sockets below it, and the path of one has at most {SOCKET_PATH} characters."
        fix = "Set TMPDIR to a shorter path, or leave --dataloader_num_workers out."
        out.problem("TMPDIR", folder, why, fix, id="temporary-folder-too-long")


def chosen_backend(model_config: Mapping[str, Any], device: str, dtype: str) -> str:
    """The backend of a model's operation for packed rows; plain torch where it has none of ours.

    Raises:
        ValueError: where HF_MAMBA_BACKEND names one that cannot serve.
    """
    import torch

    from hf_mamba import ops

    family = family_of(model_config)
    if family.operation is None:
        return "torch"
    name, needs = family.operation(family.geometry(model_config))
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return ops.which(name, device, dtypes[dtype], packed=True, **needs)


def extensions_folder() -> Path:
    """Where torch builds DeepSpeed's extensions (torch/utils/cpp_extension.py, _get_build_directory)."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR", cache / "torch_extensions"))


def build_locks(folder: Path | None = None) -> list[dict[str, Any]]:
    """Lock files of extension builds: while one lies there, every later build waits, for ever if its owner is gone."""
    folder = folder or extensions_folder()
    if not folder.is_dir():
        return []
    locks = [*folder.glob("*/lock"), *folder.glob("*/*/lock")]
    age = [(str(lock), time.time() - lock.stat().st_mtime) for lock in locks]
    return [{"path": path, "age_s": round(seconds), "stale": seconds > STALE_AFTER_S} for path, seconds in age]


def tools() -> dict[str, str]:
    """The programs that DeepSpeed's just-in-time builds need, and where they are."""
    beside = Path(sys.executable).parent
    found = {}
    for name in ("ninja", "g++", "nvcc", "accelerate"):
        found[name] = shutil.which(name) or (str(beside / name) if (beside / name).is_file() else "not found")
    return found


def describe() -> dict[str, Any]:
    """Everything, JSON-ready."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions(),
        "devices": devices(),
        "threads": cpu_threads(),
        "speed": measured(),
        "backends": backends(),
        "scan": scan_backend(),
        "tools": tools(),
        "extensions_folder": str(extensions_folder()),
        "build_locks": build_locks(),
        "advice": advice(),
    }


def advice() -> list[str]:
    """What would stop or slow a run here, and what to do."""
    found, lines = tools(), []
    if versions()["deepspeed"] != "not installed":
        if found["ninja"] == "not found":
            lines.append("DeepSpeed builds an extension at every start: pip install ninja.")
        elif shutil.which("ninja") is None:
            lines.append(
                f"ninja is not on PATH, and DeepSpeed looks there only: add {Path(found['ninja']).parent} to PATH."
            )
        if found["g++"] == "not found":
            lines.append("DeepSpeed's CPU optimizer is compiled on first use: install g++.")
    stale = [lock["path"] for lock in build_locks() if lock["stale"]]
    return lines + [f"A build was killed and left a lock, on which later builds wait for ever: rm {p}" for p in stale]
