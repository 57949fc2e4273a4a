"""One precision for the run, from the flags, the DeepSpeed blocks and accelerate's environment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_mamba.dotted import get
from hf_mamba.findings import Findings
from hf_mamba.preflight.launch.environment import Launcher
from hf_mamba.preflight.settings import Settings
from hf_mamba.preflight.world import World
from hf_mamba.processor import bf16_slowdown, bf16_unit

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
    begun_in: str | None = None,
) -> str:
    """ "bf16", "fp16" or "fp32". Contradictions are named with both places.

    Args:
        begun_in: the precision of the run that is gone on with, which it keeps.
    """
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
        dtype, source = wanted[0], votes[wanted[0]][True]
    elif begun_in in (*HALF, "fp32") and False not in votes.get(begun_in, {}):
        dtype, source = begun_in, "the plan of the run that is gone on with"
    else:
        dtype, source = _default(votes["bf16"].get(False), launcher, world.device, out)
    out.provenance["dtype"] = source
    if dtype == "fp16" and world.device == "cpu":
        out.problem("fp16", source, "fp16 does not train on a CPU.", "Use --bf16 true, or fp32.", id="fp16-on-a-cpu")
    if dtype == "bf16" and world.device == "cpu" and bf16_unit() is None:
        out.note(
            f"bf16 on this CPU: its products take {bf16_slowdown()} as long as those of fp32, for want of amx_bf16 or "
            "AMD's avx512_bf16. --bf16 false trains in fp32."
        )
    return dtype


def _default(forbidden: str | None, launcher: Launcher, device: str, out: Findings) -> tuple[str, str]:
    """(bf16 where the device is made for it, else fp32; why). `forbidden` is who says bf16=false."""
    if forbidden is not None:
        return "fp32", forbidden
    if device == "gpu":
        if launcher.mixed_precision == "no" and (launcher.started or launcher.device):
            out.note("mixed_precision is no, accelerate's default: GPUs train in bf16 here; --bf16 false keeps fp32.")
        return "bf16", "default on a GPU: bf16"
    if unit := bf16_unit():
        return "bf16", f"default on a CPU with {unit}: bf16"
    return "fp32", "default on a CPU without units for bf16: fp32"
