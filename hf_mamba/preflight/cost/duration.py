"""How long a run takes: steps, tokens, GPU-hours and the end, from a throughput that somebody has seen.

The throughput is stated, measured here (`--calibrate`), or recorded on the same device by an earlier run or
calibration. Without any of these the duration is unknown; it is never guessed from a data sheet.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_mamba.family import count_parameters
from hf_mamba.files import cache_folder, write_json
from hf_mamba.models.mamba.table import Geometry, token_flops
from hf_mamba.preflight.cost.gpus import find_gpu, utilisation

if TYPE_CHECKING:
    from hf_mamba.plan import Plan
    from hf_mamba.preflight.cost.memory import Job

CHINCHILLA = 20  # tokens a parameter (Hoffmann et al. 2022, table 3)
PAPER_TOKENS = 300_000_000_000  # the released Mamba models (Gu & Dao 2023, section 4.2.2)


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
        if self.mfu is None and self.device:
            mfu = f", MFU unknown: no table here has the peak of {self.device} in this precision"
        when = "after the year 9999" if end is None else f"around {end:%Y-%m-%d %H:%M}"
        out.append(
            f"Duration: {_duration(self.seconds)} at {self.tokens_per_second:,.0f} tokens/s ({self.source}){mfu}; "
            f"{self.gpu_hours:,.1f} GPU-hours; started now, it ends {when}."
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
    model: Geometry,
    *,
    seq_len: int,
    world_size: int,
    tokens_per_step: int,
    total_tokens: int,
    gradient_checkpointing: bool = False,
    dtype: str = "bf16",
    tokens_per_second: float | None = None,
    device: str | None = None,
    calibrate: tuple[str, Job, int] | None = None,
) -> Forecast:
    """The cost of a run of `total_tokens` on `world_size` devices.

    Args:
        tokens_per_second: of all devices together, if the user knows it.
        device: a GPU's name: the MFU is given for it, and what was recorded on it is used.
        calibrate: (preset, Job, micro-batch) to measure on this machine, and to record.

    Raises:
        ValueError: for a stated throughput that is not positive, not finite or above the device's peak.
    """
    if tokens_per_second is not None and not 0 < tokens_per_second < float("inf"):
        raise ValueError(f"tokens_per_second is {tokens_per_second}: it must be a finite number above 0.")
    source = "stated"
    key = run_key(model, seq_len, dtype, gradient_checkpointing)
    if tokens_per_second is None and calibrate is not None:
        device, per_device = measure_here(*calibrate)
        record(device, key, per_device)
        tokens_per_second, source = per_device * world_size, f"measured here on {device}"
    elif tokens_per_second is None and device is not None and (found := recorded(device, key)) is not None:
        tokens_per_second, source = found * world_size, f"recorded on {device}"
    if source != "stated" and world_size > 1 and tokens_per_second is not None:
        source += f", {world_size} times one device: communication is not in it"
    if tokens_per_second is None:
        source = (
            f"nothing was recorded on {device} for this model" if device else "the device's throughput is not known"
        )
        source += "; `hf-mamba memory` takes --tokens_per_second, or measures it on the device with --calibrate"
    flops = token_flops(model)
    known = find_gpu(device) if device else None
    mfu = None
    if tokens_per_second is not None and known is not None:
        mfu = utilisation(model, tokens_per_second, world_size, device, dtype)
    if mfu is not None and mfu > 1 and source == "stated":
        raise ValueError(
            f"tokens_per_second is {tokens_per_second:g}: {mfu:.3g} times the peak of {world_size} x {device} in "
            f"{dtype}. Write the tokens of all GPUs together, a second, or another --device."
        )
    return Forecast(
        sum(count_parameters(vars(model)).values()),
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


def of_plan(plan: Plan, device: str | None = None, tokens_per_second: float | None = None) -> Forecast | None:
    """The cost of a resolved run; None where a problem kept its numbers from being known."""
    numbers = (plan.seq_len, plan.world_size, plan.tokens_per_step, plan.total_tokens)
    if not plan.model_config or not all(numbers):
        return None
    return forecast(
        Geometry.of(plan.model_config),
        seq_len=plan.seq_len or 1,
        world_size=plan.world_size or 1,
        tokens_per_step=plan.tokens_per_step or 1,
        total_tokens=plan.total_tokens or 1,
        gradient_checkpointing=bool(plan.training_arguments.get("gradient_checkpointing")),
        dtype=plan.dtype,
        tokens_per_second=tokens_per_second,
        device=device,
    )


def cache_file() -> Path:
    """Where throughputs are recorded: HF_MAMBA_CACHE, or the user's cache folder."""
    return cache_folder("throughput") / "throughput.json"


def run_key(model: Geometry, seq_len: int, dtype: str, gradient_checkpointing: bool) -> str:
    """What a recorded throughput holds for."""
    shape = f"{model.hidden_size}x{model.num_hidden_layers}, E={model.intermediate_size}, N={model.state_size}"
    again = ", checkpointing" if gradient_checkpointing else ""
    return f"{shape}, R={model.time_step_rank}, V={model.vocab_size}, L={seq_len}, {dtype}{again}"


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
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


def measure_here(preset: str, job: Job, micro_batch_size: int, steps: int = 2) -> tuple[str, float]:
    """(device, tokens a second): optimizer steps of the real model on random tokens, after one to warm up.

    Raises:
        ValueError: where the device has not enough memory.
    """
    import time

    import torch

    from hf_mamba import PRESETS, MambaConfig, MambaForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        _must_fit(preset, job, micro_batch_size)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[job.dtype]
    try:
        model = MambaForCausalLM(MambaConfig(**PRESETS[preset].config)).to(device, dtype).train()
        if job.gradient_checkpointing:
            new = getattr(model, "activation_checkpointing_enable", None)  # the name since transformers 5.23
            (new or model.gradient_checkpointing_enable)()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        shape = (micro_batch_size, job.seq_len)
        start = 0.0
        for step in range(steps + 1):
            if step == 1:
                _wait(device)
                start = time.perf_counter()
            ids = torch.randint(0, model.config.vocab_size, shape, device=device)
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        _wait(device)
    except torch.OutOfMemoryError:
        raise _too_large(preset, micro_batch_size) from None
    return device_name(), steps * shape[0] * shape[1] / (time.perf_counter() - start)


def _too_large(preset: str, micro_batch_size: int) -> ValueError:
    return ValueError(
        f"{preset} with a micro-batch of {micro_batch_size} does not fit on one {device_name()}: calibrate with a "
        "smaller --micro_batch_size, or give --tokens_per_second."
    )


def _must_fit(preset: str, job: Job, micro_batch_size: int) -> None:
    """Before a CPU begins: where its memory runs out it raises nothing, the system ends a process.

    The weights and moments of these steps are in the run's precision, without masters.
    """
    from hf_mamba.preflight.cost.memory import estimate
    from hf_mamba.preflight.cost.states import Zero
    from hf_mamba.preflight.launch.machine import devices

    alone = replace(job, zero=Zero(0), world_size=1, gradient_accumulation_steps=1, device="cpu", backend="cpu")
    parts = estimate(alone, micro_batch_size).phases["forward"].parts
    needs = sum((parts | {"master_weights": 0, "moments": 2 * parts["weights"]}).values())
    if needs > (devices()[0]["memory"] or float("inf")):
        raise _too_large(preset, micro_batch_size)


def _wait(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()
