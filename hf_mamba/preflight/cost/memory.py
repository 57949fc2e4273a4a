"""Will it fit, and how large a micro-batch: `plan_memory` for one run, `compare` for every ZeRO stage and offload.

Bytes come from formulas: the family's (what its layers keep), models/common/cost.py (batch, head, loss), states.py
(what DeepSpeed keeps), peaks.py (the largest moment of a step). benchmarks/results/memory_cpu.csv has them beside
measured peaks.
Nothing here imports torch. GB is 10^9 bytes, GiB 2^30.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from hf_mamba.family import Family, all_presets, family_of
from hf_mamba.models.common.cost import Bytes, Shape, total
from hf_mamba.preflight.cost.fsdp import Fsdp2, fsdp_states
from hf_mamba.preflight.cost.peaks import Peak, walk
from hf_mamba.preflight.cost.states import REDUCE_BUCKET, States, Zero, plain_states, states

WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
# Allowances for what no formula knows, on a GPU only; chosen, not measured here. What others saw:
# - the CUDA context with cuBLAS's workspace: about 300 MB since CUDA 11.7 loads kernels when they are needed, 700 MB to
#   more than 1 GB before (pytorch#107667, #37250, #28394);
# - NCCL's buffers: with the context 1.06 GB on 8 H100 with NVLink (nccl#1685), up to 1.6 GB for one communicator
#   (nccl#864); they grow with channels, not with ranks beyond two nodes (nccl#986);
# - the allocator's rounding and fragmentation, as a share of the peak: ZeRO's paper saw runs fail with over 30% free in
#   extreme cases (Rajbhandari et al. 2020, section 3.2); rows of one length, as here, are the mild case.
# To leave more room, state less memory than there is (--gpu_memory).
ASSUMED = "80GB"  # of a card that nobody names and nothing sees
CONTEXT, NCCL, FRAGMENTATION = 700 * 2**20, 400 * 2**20, 0.04
# On a CPU, measured (python -m benchmarks.resident): the process with torch, transformers, datasets and their threads,
# where it is not this one (host.libraries); DeepSpeed's engine; and what the C library cannot reuse, as a share of what
# comes and goes in a step. Checkpointing adds a layer: what is recomputed lies among gradients that stay.
LIBRARIES, DEEPSPEED, HEAP = 612 * 2**20, 65 * 2**20, 0.36
LARGEST_SEARCHED = 1 << 16


def parse_capacity(value: str | int) -> int:
    """Bytes of "80GB" (80·10^9) or "79.6GiB" (79.6·2^30); an int is bytes already.

    Raises:
        ValueError: without a number, without a unit, or not positive.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        found = value
    else:
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", str(value))
        if match is None:
            raise ValueError(f"gpu_memory is {value!r}, which is not a size: write 80GB (80·10^9) or 80GiB (80·2^30).")
        number, unit = match[1], match[2].lower()
        if not unit:
            raise ValueError(f"gpu_memory is {value!r}, without a unit: write {number}GB (10^9) or {number}GiB (2^30).")
        if unit not in UNITS:
            raise ValueError(f"gpu_memory is {value!r}: the unit {match[2]!r} is not known. Write GB, GiB, MB or MiB.")
        found = int(float(number) * UNITS[unit])
    if found <= 0:
        raise ValueError(f"gpu_memory is {value!r}: it must be more than nothing.")
    return found


def show(size: float) -> str:
    """A size for people, in GB of 10^9 bytes."""
    if size >= 99.95e9:
        return f"{size / 1e9:.0f} GB"
    return f"{size / 1e9:.1f} GB" if size >= 0.95e9 else f"{size / 1e9:.2f} GB"


@dataclass(frozen=True)
class Job:
    """A run, as far as its memory depends on it."""

    family: Family
    model: Any  # the family's Geometry
    backend: str
    seq_len: int
    world_size: int
    dtype: str = "bf16"
    zero: Zero | None = None  # None: without DeepSpeed
    gradient_checkpointing: bool = False
    gradient_accumulation_steps: int = 1
    residual_in_fp32: bool = True
    device: str = "cuda"
    gpus_per_node: int = 8
    foreach: bool = False  # AdamW's way (--optim adamw_torch on a GPU); fused otherwise
    muon: bool = False  # in AdamW's place
    fsdp: Fsdp2 | None = None
    libraries: int = LIBRARIES  # bytes of a process on a CPU before it has a model

    def __post_init__(self) -> None:
        if self.dtype not in WEIGHT_BYTES:
            raise ValueError(f"dtype is {self.dtype!r}: write one of {', '.join(WEIGHT_BYTES)}.")
        if self.backend not in self.family.backends:
            raise ValueError(f"backend is {self.backend!r}: write one of {', '.join(self.family.backends)}.")
        for name in ("seq_len", "world_size", "gradient_accumulation_steps", "gpus_per_node"):
            _positive(name, getattr(self, name))
        for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
            _positive(name, getattr(self.model, name))
        for parameter in self.family.table(self.model):
            if parameter.size < 1:
                raise ValueError(f"{parameter.name} has the shape {parameter.shape}: every size must be at least 1.")

    @property
    def label(self) -> str:
        if self.fsdp is not None:
            return self.fsdp.label
        if self.zero is None:
            return "no DeepSpeed"
        offload = {"none": "", "optimizer": " + optimizer offload", "full": " + full offload"}[self.zero.offload]
        return f"ZeRO {self.zero.stage}{offload}"


@dataclass(frozen=True)
class Estimate:
    """A job's memory at a micro-batch: device bytes at the largest moment, host bytes of one rank and of a node."""

    job: Job
    micro_batch_size: int
    phases: dict[str, Peak]
    allowance: int
    host: Bytes
    capacity: int | None = None
    largest_micro_batch_size: int | None = None

    @property
    def peak(self) -> Peak:
        return max(self.phases.values(), key=lambda peak: peak.bytes)

    @property
    def phase(self) -> str:
        return max(self.phases, key=lambda name: self.phases[name].bytes)

    @property
    def device_bytes(self) -> int:
        """On a CPU, of the whole process: offloaded states are in the same memory."""
        return self.peak.bytes + self.allowance + (total(self.host) if self.job.device == "cpu" else 0)

    @property
    def host_bytes_per_node(self) -> int:
        return total(self.host) * min(self.job.gpus_per_node, self.job.world_size)

    @property
    def fits(self) -> bool | None:
        return None if self.capacity is None else self.device_bytes <= self.capacity

    @property
    def verdict(self) -> str:
        """ "fits", "tight" where the allowances twice over would not, "does not fit", "unknown"."""
        if self.capacity is None:
            return "unknown"
        if not self.fits:
            return "does not fit"
        return "fits" if self.device_bytes + self.allowance <= self.capacity else "tight"

    def to_dict(self) -> dict[str, Any]:
        return {
            "setting": self.job.label,
            "stage": self.job.zero.stage if self.job.zero else None,
            "offload": self.job.zero.offload if self.job.zero else "none",
            "gradient_checkpointing": self.job.gradient_checkpointing,
            "micro_batch_size": self.micro_batch_size,
            "device_bytes": self.device_bytes,
            "device_bytes_by_component": {**self.peak.parts, "allocator_and_context": self.allowance},
            "peak_phase": self.phase,
            "peak_at": self.peak.where,
            "phase_bytes": {name: peak.bytes for name, peak in self.phases.items()},
            "host_bytes": total(self.host),
            "host_bytes_by_component": self.host,
            "host_bytes_per_node": self.host_bytes_per_node,
            "fits": self.fits,
            "verdict": self.verdict,
            "largest_micro_batch_size": self.largest_micro_batch_size,
        }


@dataclass(frozen=True)
class MemoryReport:
    """The planner's answer: whether a run fits (None where the capacity is unknown) and what would make it fit."""

    estimate: Estimate
    fits: bool | None
    largest_micro_batch_size: int | None
    needed: str
    advice: str

    @property
    def predicted_bytes(self) -> int:
        """What is measured: on a GPU the allocator's peak, without the allowances; on a CPU the resident process."""
        return self.estimate.device_bytes if self.estimate.job.device == "cpu" else self.estimate.peak.bytes


def _positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}: it must be a whole number, at least 1.")


def estimate(job: Job, micro_batch_size: int, capacity: int | None = None) -> Estimate:
    """The memory of one rank at this micro-batch."""
    shape, kept = _shape(job, micro_batch_size), _states(job)
    phases = walk(shape, kept, job.family, job.backend, job.gradient_checkpointing)
    peak = max(phase.bytes for phase in phases.values())
    if job.device == "cpu":
        allowance = job.libraries + (DEEPSPEED if job.zero else 0) + int(HEAP * (peak - total(kept.device)))
        if job.gradient_checkpointing:
            blocks = {job.family.block(job.model, i) for i in range(job.model.num_hidden_layers)}
            allowance += max(total(block.saved(shape, job.family.backends[job.backend])) for block in blocks)
    else:
        allowance = CONTEXT + (NCCL if job.world_size > 1 else 0) + int(FRAGMENTATION * peak)
    return Estimate(job, micro_batch_size, phases, allowance, kept.host, capacity)


def saved_by_layers(job: Job, micro_batch_size: int) -> dict[str, int]:
    """Bytes that the layers of a micro-batch save without checkpointing, by what a layer, or a part of it, is."""
    shape, found = _shape(job, micro_batch_size), dict[str, int]()
    backend = job.family.backends[job.backend]
    for i in range(job.model.num_hidden_layers):
        block = job.family.block(job.model, i)
        parts = block.parts(shape, backend) if hasattr(block, "parts") else {"layers": block.saved(shape, backend)}
        for name, saved in parts.items():
            found[name] = found.get(name, 0) + total(saved)
    return found


def _shape(job: Job, micro_batch_size: int) -> Shape:
    _positive("micro_batch_size", micro_batch_size)
    w = WEIGHT_BYTES[job.dtype]
    autocast = job.zero is None and job.fsdp is None and w < 4
    residual = 4 if job.residual_in_fp32 or autocast else w
    return Shape(job.model, micro_batch_size, job.seq_len, w, residual, True, job.device, autocast)


def _states(job: Job) -> States:
    rest = (job.gradient_accumulation_steps, job.foreach)
    table = job.family.table(job.model)
    if job.fsdp is not None:
        return fsdp_states(table, job.fsdp, job.world_size, WEIGHT_BYTES[job.dtype], *rest, gloo=job.device == "cpu")
    if job.zero is None:
        return plain_states(table, job.world_size, *rest, muon=job.muon, gpu=job.device != "cpu")
    return states(table, job.zero, job.world_size, WEIGHT_BYTES[job.dtype], *rest)


def largest_fitting(job: Job, capacity: int) -> int:
    """The largest micro-batch whose peak stays within the capacity (bytes); 0 if not even one row does."""
    low, high = 0, 1
    while high <= LARGEST_SEARCHED and estimate(job, high).device_bytes <= capacity:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if estimate(job, middle).device_bytes <= capacity else (low, middle)
    return low


def zero_of(ds_config: Mapping[str, Any] | None, hidden_size: int) -> Zero | None:
    """The memory-deciding parts of a ds_config; "auto" is what transformers writes for it, absence DeepSpeed's default.

    Raises:
        ValueError: for a stage that is none or not written, or sizes that are not numbers.
    """
    if ds_config is None:
        return None
    block = ds_config.get("zero_optimization", {"stage": 0})
    if not isinstance(block, Mapping):
        raise ValueError(f"zero_optimization is {block!r}: it must be a block such as {{'stage': 2}}.")
    stage = block.get("stage")
    stage = 2 if stage == "auto" else stage
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise ValueError(f"zero_optimization.stage is {stage!r}: write 0, 1, 2 or 3.")

    def away(name: str) -> bool:
        part = block.get(name) or {}
        return isinstance(part, Mapping) and part.get("device") in ("cpu", "nvme")

    def size(name: str, default: int, auto: int) -> int:
        value = block.get(name, default)
        value = auto if value == "auto" else value
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise ValueError(f"zero_optimization.{name} is {value!r}: write a number of elements.")
        return int(value)

    offload = "full" if away("offload_param") and stage == 3 else "optimizer" if away("offload_optimizer") else "none"
    offload = offload if stage else "none"  # at stage 0 nothing is
    automatic = Zero.auto(stage, offload, hidden_size)
    overlap = block.get("overlap_comm")
    return Zero(
        stage,
        offload,
        size("reduce_bucket_size", REDUCE_BUCKET, automatic.reduce_bucket),
        None if overlap in (None, "auto") else bool(overlap),
        size("stage3_prefetch_bucket_size", 50_000_000, automatic.prefetch),
        size("stage3_param_persistence_threshold", 100_000, automatic.persistence),
        size("stage3_max_reuse_distance", 1_000_000_000, 1_000_000_000),
        size("stage3_max_live_parameters", 1_000_000_000, 1_000_000_000),
    )


def job_of(
    model_config: Mapping[str, Any],
    *,
    seq_len: int,
    world_size: int,
    dtype: str,
    ds_config: Mapping[str, Any] | None = None,
    gradient_checkpointing: bool = False,
    gradient_accumulation_steps: int = 1,
    device: str = "cuda",
    backend: str | None = None,
    zero: Zero | None = None,
    foreach: bool = False,
    muon: bool = False,
    fsdp: Fsdp2 | None = None,
    libraries: int | None = None,
) -> Job:
    """A Job from a model's configuration and a ds_config; `libraries` as `host.libraries` finds them."""
    family = family_of(model_config)
    geometry = family.geometry(model_config)
    return Job(
        family,
        geometry,
        backend or family.backends_on(device)[0],
        seq_len,
        world_size,
        dtype,
        zero or zero_of(ds_config, geometry.hidden_size),
        gradient_checkpointing,
        gradient_accumulation_steps,
        bool(model_config.get("residual_in_fp32", True)),
        device,
        foreach=foreach,
        muon=muon,
        fsdp=fsdp,
        libraries=libraries or LIBRARIES,
    )


def largest_micro_batch(model_config: Mapping[str, Any], *, capacity: str | int, **job: Any) -> int:
    """The largest micro-batch that fits into `capacity`; 0 if none does. Other arguments as `job_of`."""
    return largest_fitting(job_of(model_config, **job), parse_capacity(capacity))


def plan_memory(
    model_config: Mapping[str, Any],
    *,
    micro_batch_size: int | None,
    capacity: str | int | None = None,
    **job: Any,
) -> MemoryReport:
    """Whether a run fits, the largest micro-batch, and what would make it fit.

    Args:
        model_config: the configuration's fields.
        micro_batch_size: rows per device and micro-step; None asks for the largest that fits.
        capacity: the device's memory, "80GB", "80GiB" or bytes; None where it is unknown: then nothing is claimed.
        job: as in `job_of`.

    Raises:
        ValueError: for sizes that are not positive, or a capacity without a unit.
    """
    wanted = job_of(model_config, **job)
    if capacity is None:
        one = estimate(wanted, micro_batch_size or 1)
        return MemoryReport(one, None, None, f"needs {show(one.device_bytes)} per device", "")
    limit = parse_capacity(capacity)
    largest = largest_fitting(wanted, limit)
    found = replace(estimate(wanted, micro_batch_size or max(largest, 1), limit), largest_micro_batch_size=largest)
    needed = f"{show(found.device_bytes)} of {show(limit)}, at its largest in the {found.phase} ({found.peak.where})"
    return MemoryReport(found, found.fits, largest, needed, "" if found.fits else advice(found, limit))


def advice(found: Estimate, limit: int) -> str:
    """What would make a run fit that does not: each single change that is enough, smallest first."""
    ways = []
    if found.largest_micro_batch_size:
        ways.append(f"--per_device_train_batch_size {found.largest_micro_batch_size}")
    if not found.job.gradient_checkpointing:
        checkpointed = replace(found.job, gradient_checkpointing=True)
        if estimate(checkpointed, found.micro_batch_size).device_bytes <= limit:
            ways.append("--gradient_checkpointing")
    own = found.job.gradient_checkpointing
    again = (own,) if "--gradient_checkpointing" in ways else (own, True)
    for job in _settings(found.job, again):
        other = (job.zero, job.fsdp) != (found.job.zero, found.job.fsdp)
        if _cost(job) > _cost(found.job) and other and len(ways) < 4:
            if estimate(job, found.micro_batch_size).device_bytes > limit:
                continue
            ways.append(job.label + " with --gradient_checkpointing" * (job.gradient_checkpointing and not own))
    if ways:
        return f"Any of these is enough: {'; '.join(dict.fromkeys(ways))}."
    smaller = _smaller_preset(found.job, limit)
    more = "free memory, use a larger machine" if found.job.device == "cpu" else "use more or larger devices"
    more += f", or a smaller model (--preset {smaller} fits)" if smaller else ""
    return f"Neither a micro-batch of 1, checkpointing, ZeRO-3 nor full offload is enough: {more}."


def _smaller_preset(job: Job, limit: int) -> str | None:
    """The largest preset of the job's family that fits with a micro-batch of one row; None where none does."""
    found = None
    for name, preset in all_presets().items():
        if family_of(preset.config) is job.family:
            geometry = job.family.geometry(preset.config)
            size = sum(p.size for p in job.family.table(geometry))
            if (found is None or size > found[0]) and estimate(replace(job, model=geometry), 1).device_bytes <= limit:
                found = (size, name)
    return found[1] if found else None


def _settings(job: Job, checkpointing: Iterable[bool] = (False, True)) -> list[Job]:
    """Every ZeRO stage and offload and FSDP2, with and without checkpointing, in the order of their cost.

    Of a job without DeepSpeed, that too; of one with Muon, that alone: the others' optimizers hold pieces of matrices.
    """
    d = job.model.hidden_size
    choices = [(0, "none"), (1, "none"), (2, "none"), (3, "none"), (2, "optimizer"), (3, "optimizer"), (3, "full")]
    same = job.zero or Zero.auto(0, "none", d)
    choices += [own] if (own := (same.stage, same.offload)) not in choices else []
    engines = [] if job.zero else [replace(job, fsdp=None)]
    if job.muon:
        choices = []
    engines += [replace(job, zero=replace(same, stage=z, offload=offload), fsdp=None) for z, offload in choices]
    if job.world_size > 1 and not job.muon and job.device != "cpu":  # there accelerate leaves FSDP out
        engines += [replace(job, zero=None, fsdp=fsdp) for fsdp in dict.fromkeys([Fsdp2(), job.fsdp or Fsdp2()])]
    rows = [replace(each, gradient_checkpointing=again) for each in engines for again in dict.fromkeys(checkpointing)]
    return sorted(rows, key=_cost)


def _cost(job: Job) -> tuple[int, bool, int]:
    """Offload waits for the host, checkpointing computes a third more, a higher stage communicates more."""
    zero = job.zero or Zero(-1 if job.fsdp is None else 4)
    return (("none", "optimizer", "full").index(zero.offload), job.gradient_checkpointing, zero.stage)


def compare(job: Job, micro_batch_size: int, capacity: int | None, largest: bool = True) -> list[Estimate]:
    """Every setting at this micro-batch, each with the largest that fits where that is wanted."""
    rows = []
    for setting in _settings(job):
        row = estimate(setting, micro_batch_size, capacity)
        most = largest_fitting(setting, capacity) if capacity is not None and largest else None
        rows.append(replace(row, largest_micro_batch_size=most))
    return rows


def recommend(rows: list[Estimate]) -> tuple[Estimate | None, str]:
    """The cheapest setting that fits, and why."""
    if not rows or rows[0].capacity is None:
        return None, "Give the device's memory (--gpu_memory 80GB) to have a setting recommended."
    order = "the first that fits in the order of cost: no offload, no recomputation, then the lower stage"
    for row in rows:
        if row.fits:
            again = " with gradient checkpointing" if row.job.gradient_checkpointing else ""
            spare = row.capacity - row.device_bytes if row.capacity else 0
            tight = ", which is tight: the allowance for allocator and context is no measurement"
            return row, f"{row.job.label}{again}: {order}; {show(spare)} stay free{tight * (row.verdict == 'tight')}."
    smaller = [row for row in rows if row.largest_micro_batch_size]
    if smaller:
        row = smaller[0]
        again = " with gradient checkpointing" if row.job.gradient_checkpointing else ""
        return row, (
            f"{row.job.label}{again} with a micro-batch of {row.largest_micro_batch_size}: nothing fits "
            f"{row.micro_batch_size}, and this is {order}."
        )
    return None, "Nothing fits, not even a micro-batch of 1 with everything offloaded: use more or larger devices."
