"""One precision for the run, from the flags, the DeepSpeed blocks and accelerate's environment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_mamba.dotted import get
from hf_mamba.findings import Findings
from hf_mamba.preflight.launch.environment import Launcher
from hf_mamba.preflight.settings import Settings
from hf_mamba.preflight.world import World

HALF = ("bf16", "fp16")


def _votes(
    settings: Settings, launcher: Launcher, ds_config: Mapping[str, Any] | None, name: str
) -> dict[str, dict[bool, str]]:
    """dtype -> {True: who asks for it, False: who forbids it}."""
    votes: dict[str, dict[bool, str]] = {dtype: {} for dtype in HALF}
    for dtype in HALF:
        if settings.given(dtype):
            votes[dtype][settings.get(dtype)] = f"{dtype}={str(settings.get(dtype)).lower()} ({settings.source(dtype)})"
        block = get(ds_config or {}, f"{dtype}.enabled")
        if isinstance(block, bool):
            votes[dtype].setdefault(block, f"{dtype}.enabled: {str(block).lower()} in {name}")
    if launcher.mixed_precision in HALF:
        votes[launcher.mixed_precision].setdefault(True, f"mixed_precision={launcher.mixed_precision} (accelerate)")
    return votes


def decide_precision(
    settings: Settings,
    launcher: Launcher,
    ds_config: Mapping[str, Any] | None,
    ds_name: str,
    world: World,
    out: Findings,
) -> str:
    """ "bf16", "fp16" or "fp32". Contradictions are named with both places."""
    votes = _votes(settings, launcher, ds_config, ds_name)
    for dtype in HALF:
        if len(votes[dtype]) == 2:
            out.problem(
                f"{dtype}.enabled",
                f"{votes[dtype][True]} and {votes[dtype][False]}",
                "The two places contradict each other.",
                f'Write "{dtype}": {{"enabled": "auto"}} in the DeepSpeed file and decide by --{dtype}.',
                id="precision-contradicts",
            )
    wanted = [dtype for dtype in HALF if True in votes[dtype]]
    if len(wanted) == 2:
        out.problem(
            "bf16",
            f"{votes['bf16'][True]} and {votes['fp16'][True]}",
            "A run has one precision.",
            "Keep bf16, which needs no loss scaling.",
            id="two-precisions",
        )
    if wanted:
        dtype = wanted[0]
        out.provenance["dtype"] = votes[dtype][True]
        if dtype == "fp16" and world.device == "cpu":
            out.problem(
                "fp16",
                votes["fp16"][True],
                "fp16 does not train on a CPU.",
                "Use --bf16 true, or fp32.",
                id="fp16-on-a-cpu",
            )
        return dtype
    if world.device == "gpu" and False not in votes["bf16"]:
        out.provenance["dtype"] = "default on a GPU: bf16"
        if launcher.mixed_precision == "no" and (launcher.started or launcher.device):
            out.note("mixed_precision is no, accelerate's default: GPUs train in bf16 here; --bf16 false keeps fp32.")
        return "bf16"
    out.provenance["dtype"] = votes["bf16"].get(False, "default on a CPU: fp32")
    return "fp32"
