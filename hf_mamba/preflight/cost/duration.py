"""How long a run takes: steps, tokens, GPU-hours and the end, from a throughput that somebody has seen.

The throughput is stated, or recorded on the same device by an earlier run. Without either the duration is unknown; it
is never guessed from a data sheet.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_mamba.family import Family, family_of
from hf_mamba.files import cache_folder, write_json
from hf_mamba.preflight.cost.gpus import find_gpu, utilisation

if TYPE_CHECKING:
    from hf_mamba.plan import Plan

CHINCHILLA = 20  # tokens a parameter (Hoffmann et al. 2022, table 3)
PAPER_TOKENS = 300_000_000_000  # the released Mamba models (Gu & Dao 2023, section 4.2.2)

_CPU = "CPU "  # how `device_name` begins that of a CPU


@dataclass(frozen=True)
class Forecast:
    """The cost of a run; what depends on an unknown throughput is None."""

    parameters: int
    steps: int
    total_tokens: int
    tokens_per_step: int
    flops_per_token: int
    executed_flops_per_token: int
    world_size: int
    tokens_per_second: float | None
    source: str
    device: str | None
    mfu: float | None

    @property
    def seconds(self) -> float | None:
        return None if self.tokens_per_second is None else self.total_tokens / self.tokens_per_second

    @property
    def gpu_hours(self) -> float | None:
        return None if self.seconds is None else self.seconds * self.world_size / 3600

    def end(self, start: datetime | None = None) -> datetime | None:
        """When a run that starts now would finish, without its interruptions."""
        if self.seconds is None:
            return None
        try:
            return (start or datetime.now().astimezone()) + timedelta(seconds=self.seconds)
        except OverflowError:
            return None

    def to_dict(self) -> dict[str, Any]:
        end = self.end()
        return {
            "steps": self.steps,
            "total_tokens": self.total_tokens,
            "tokens_per_step": self.tokens_per_step,
            "flops_per_token": self.flops_per_token,
            "executed_flops_per_token": self.executed_flops_per_token,
            "total_flops": self.flops_per_token * self.total_tokens,
            "tokens_per_second": self.tokens_per_second,
            "throughput_source": self.source,
            "device": self.device,
            "mfu": self.mfu,
            "seconds": self.seconds,
            "gpu_hours": self.gpu_hours,
            "end": None if end is None else end.isoformat(timespec="minutes"),
            "chinchilla_tokens": CHINCHILLA * self.parameters,
            "paper_tokens": PAPER_TOKENS,
        }

    def lines(self) -> list[str]:
        """For people."""
        again = "" if self.executed_flops_per_token == self.flops_per_token else " (and recomputation)"
        out = [
            f"\nTime: {self.steps:,} steps of {self.tokens_per_step:,} tokens, {_tokens(self.total_tokens)} in all, "
            f"{self.flops_per_token * self.total_tokens:.3g} FLOPs{again}.",
            f"Context: {_tokens(CHINCHILLA * self.parameters)} are {CHINCHILLA} a parameter (Chinchilla), the released "
            f"Mamba models saw {_tokens(PAPER_TOKENS)}; this budget is "
            f"{self.total_tokens / self.parameters:.1f} a parameter.",
        ]
        if self.tokens_per_second is None or self.seconds is None or self.gpu_hours is None:
            out.append(f"Duration: unknown ({self.source}).")
            return out
        end = self.end()
        mfu = f", MFU {self.mfu:.1%} of {self.device}" if self.mfu is not None else ""
        on_cpu = (self.device or "").startswith(_CPU)
        if self.mfu is None and self.device and not on_cpu:
            mfu = f", MFU unknown: no table here has the peak of {self.device} in this precision"
        when = "after the year 9999" if end is None else f"around {end:%Y-%m-%d %H:%M}"
        hours = "" if on_cpu else f"{self.gpu_hours:,.1f} GPU-hours; "
        out.append(
            f"Duration: {_duration(self.seconds)} at {self.tokens_per_second:,.0f} tokens/s ({self.source}){mfu}; "
            f"{hours}started now, it ends {when}."
        )
        return out


def _tokens(count: int) -> str:
    return f"{count / 1e9:,.1f}B tokens" if count >= 10**9 else f"{count / 1e6:,.1f}M tokens"


def _duration(seconds: float) -> str:
    hours = seconds / 3600
    if hours >= 48:
        return f"{hours / 24:,.1f} days"
    return f"{hours:.1f} hours" if hours >= 1 else f"{seconds / 60:.1f} minutes"


def forecast(
    family: Family,
    model: Any,
    *,
    seq_len: int,
    world_size: int,
    tokens_per_step: int,
    total_tokens: int,
    gradient_checkpointing: bool = False,
    dtype: str = "bf16",
    tokens_per_second: float | None = None,
    device: str | None = None,
    backend: str | None = None,
) -> Forecast:
    """The cost of a run of `total_tokens` on `world_size` devices.

    Args:
        model: the family's sizes.
        tokens_per_second: of all devices together, if the user knows it.
        device: a GPU's name: the MFU is given for it, and what was recorded on it is used.
        backend: computes the model's operation, and what was recorded with another says nothing; the device's first
            one by default.

    Raises:
        ValueError: for a stated throughput that is not positive, not finite or above the device's peak.
    """
    if tokens_per_second is not None and not 0 < tokens_per_second < float("inf"):
        raise ValueError(f"tokens_per_second is {tokens_per_second}: it must be a finite number above 0.")
    source = "stated"
    backend = backend or family.backends_on("cpu" if device and device.startswith(_CPU) else "cuda")[0]
    key = run_key(family, model, seq_len, dtype, gradient_checkpointing, backend)
    if tokens_per_second is None and device is not None and (found := recorded(device, key)) is not None:
        tokens_per_second, source = found * world_size, f"recorded on {device}, {backend} backend"
    if source != "stated" and world_size > 1 and tokens_per_second is not None:
        source += f", {world_size} times one device: communication is not in it"
    if tokens_per_second is None:
        source = (
            f"nothing was recorded on {device} for this model with the {backend} backend"
            if device
            else "the device's throughput is not known"
        )
        source += "; `hf-mamba memory` takes --tokens_per_second, and a run records its own"
    flops = family.token_flops(model, seq_len)
    known = find_gpu(device) if device else None
    mfu = None
    if tokens_per_second is not None and known is not None:
        mfu = utilisation(flops.training, tokens_per_second, world_size, device, dtype)
    if mfu is not None and mfu > 1 and source == "stated":
        raise ValueError(
            f"tokens_per_second is {tokens_per_second:g}: {mfu:.3g} times the peak of {world_size} x {device} in "
            f"{dtype}. Write the tokens of all GPUs together, a second, or another --gpu."
        )
    return Forecast(
        sum(row.size for row in family.table(model)),
        -(-total_tokens // tokens_per_step),
        total_tokens,
        tokens_per_step,
        flops.training,
        flops.executed(gradient_checkpointing),
        world_size,
        tokens_per_second,
        source,
        known.name if known else device,
        mfu,
    )


def of_plan(plan: Plan, device: str, backend: str) -> Forecast:
    """The cost of a resolved run on such a device, its operation computed by this backend."""
    family = family_of(plan.model_config)
    return forecast(
        family,
        family.geometry(plan.model_config),
        seq_len=plan.seq_len,
        world_size=plan.world_size,
        tokens_per_step=plan.tokens_per_step,
        total_tokens=plan.total_tokens,
        gradient_checkpointing=plan.gradient_checkpointing,
        dtype=plan.dtype,
        device=device,
        backend=backend,
    )


def cache_file() -> Path:
    """Where throughputs are recorded: HF_MAMBA_CACHE, or the user's cache folder."""
    return cache_folder("throughput") / "throughput.json"


def run_key(family: Family, model: Any, seq_len: int, dtype: str, gradient_checkpointing: bool, backend: str) -> str:
    """What a recorded throughput holds for: the model's sizes, the row's length and how it is computed."""
    sizes = ", ".join(f"{name}={value}" for name, value in asdict(model).items())
    again = ", checkpointing" if gradient_checkpointing else ""
    return f"{family.model_type}: {sizes}, {seq_len} tokens, {dtype}{again}, {backend} backend"


def _read() -> dict[str, dict[str, float]]:
    try:
        data = json.loads(cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _device_key(device: str) -> str:
    gpu = find_gpu(device)
    return gpu.name if gpu else device


def recorded(device: str, key: str) -> float | None:
    """Tokens a second of one such device, as last recorded; None where nothing was."""
    value = _read().get(_device_key(device), {}).get(key)
    return float(value) if isinstance(value, int | float) and value > 0 else None


def record(device: str, key: str, tokens_per_second: float) -> None:
    """Keep the throughput of one device; a cache that cannot be written is passed over."""
    data = _read()
    data.setdefault(_device_key(device), {})[key] = round(tokens_per_second, 1)
    try:
        write_json(cache_file(), data, sort_keys=True)
    except (OSError, ValueError):
        return


def device_name() -> str:
    """The accelerator's name as its driver reports it, or the CPU with its number of threads. Imports torch."""
    import platform

    import torch

    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return f"{_CPU}{platform.machine()}, {torch.get_num_threads()} threads"
