"""The one door to the memory planner: a micro-batch where "auto" asks for it, the refusal of a run that cannot fit.

The planner is `hf_mamba.preflight.cost.memory.plan_memory`. With an unknown capacity nothing is claimed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_mamba.dotted import get
from hf_mamba.family import count_parameters
from hf_mamba.findings import Findings
from hf_mamba.plan import FsdpPlan, Plan
from hf_mamba.preflight.batch import Batch
from hf_mamba.preflight.cost.fsdp import Fsdp2
from hf_mamba.preflight.cost.fsdp import without_formula as fsdp_without_formula
from hf_mamba.preflight.cost.gpus import memory_of
from hf_mamba.preflight.cost.host import libraries, most_memory, ranks_here, usable_memory
from hf_mamba.preflight.cost.memory import WEIGHT_BYTES, MemoryReport, plan_memory, show
from hf_mamba.preflight.deepspeed.rules import HALF_NAMES
from hf_mamba.preflight.optimizers import ADAMW, MUON
from hf_mamba.preflight.settings import Settings
from hf_mamba.preflight.world import World

# keys of a DeepSpeed file that change what is kept, and the values with which they do not
ORDINARY: dict[str, tuple[Any, ...]] = {
    "bf16.bf16_master_weights_and_grads": (False,),
    "bf16.bf16_optimizer_states": (False,),
    "fp16.fp16_master_weights_and_grads": (False,),
    "torch_autocast.enabled": (False,),
    "zero_optimization.mics_shard_size": (-1,),
    "zero_optimization.offload_optimizer.ratio": (1, 1.0),
    "zero_optimization.zero_hpz_partition_size": (1,),
    "zero_optimization.zero_quantized_gradients": (False,),
    "zero_optimization.zero_quantized_weights": (False,),
}


def without_formula(ds_config: dict[str, Any] | None, dtype: str) -> list[str]:
    """The keys of a DeepSpeed configuration that change memory in a way that was neither derived nor measured."""
    ordinary = ORDINARY | {"data_types.grad_accum_dtype": HALF_NAMES.get(dtype, ())}
    found = {key: get(ds_config or {}, key) for key in ordinary}
    return [key for key, value in found.items() if value not in (None, "auto", *ordinary[key])]


def unpredictable(optimizer: Any, fsdp: FsdpPlan | None, ds_config: dict[str, Any] | None, dtype: str) -> str | None:
    """What keeps the planner from knowing a run's memory; it has formulas for DeepSpeed, DDP, FSDP2, AdamW, Muon."""
    if fsdp is not None and (missing := fsdp_without_formula(fsdp)):
        return missing
    if optimizer == MUON and fsdp is not None:
        return "--optim muon under FSDP"
    if optimizer not in (*ADAMW, MUON):
        return f"--optim {optimizer}"
    return ", ".join(without_formula(ds_config, dtype)) or None


@dataclass(frozen=True)
class Request:
    """What the planner needs to know about a run."""

    settings: Settings
    model_config: dict[str, Any] | None
    world: World
    dtype: str
    ds_config: dict[str, Any] | None
    fsdp: FsdpPlan | None
    before: Mapping[str, Any]  # the plan of the run that is gone on with

    @property
    def unknown(self) -> str | None:
        return unpredictable(self.settings.get("optim"), self.fsdp, self.ds_config, self.dtype)


def known_capacity(request: Request) -> str | int | None:
    """--gpu_memory, or that of --gpu in bytes, or of the GPU that this process has; None where none is known."""
    stated, card = request.settings.get("gpu_memory"), request.settings.get("gpu")
    stated = memory_of(card) if stated is None and card is not None else stated
    torch = sys.modules.get("torch")  # the recipe has imported it; the command line has not, and knows no device
    if stated is not None or request.world.device != "gpu" or torch is None or not torch.cuda.is_available():
        return stated
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)


def _of_this_machine(request: Request) -> int | None:
    """Nine tenths of what a run on this machine's CPUs may use; of several ranks, which must all find the same, a share
    of the whole machine.
    """
    world = request.world
    if world.device == "gpu" or not world.processes:
        return None
    if world.processes == 1:
        found = usable_memory()
    elif "WORLD_SIZE" in os.environ:
        found = most_memory(ranks_here(world.processes, world.nodes))
    else:  # they will be started elsewhere
        return None
    return None if found is None else found * 9 // 10


def _ask(
    request: Request,
    micro_batch_size: int | None,
    ds_config: dict[str, Any] | None,
    out: Findings,
    accumulation: int | None = None,
) -> MemoryReport | None:
    """The planner's answer; None without a capacity, a model, or a number that it needs."""
    capacity = known_capacity(request)
    return None if capacity is None else _plan(request, micro_batch_size, ds_config, out, accumulation, capacity)


def _plan(
    request: Request,
    micro_batch_size: int | None,
    ds_config: dict[str, Any] | None,
    out: Findings,
    accumulation: int | None,
    capacity: str | int | None,
) -> MemoryReport | None:
    """The planner's answer for a card of this capacity."""
    settings, fsdp = request.settings, request.fsdp
    seq_len, world = settings.get("seq_len"), request.world.data_parallel
    if request.unknown or request.model_config is None or not world or not seq_len:
        return None
    try:
        return plan_memory(
            request.model_config,
            seq_len=seq_len,
            micro_batch_size=micro_batch_size,
            world_size=world,
            dtype=request.dtype,
            ds_config=ds_config,
            gradient_checkpointing=bool(
                settings.get("gradient_checkpointing") or (fsdp and fsdp.activation_checkpointing)
            ),
            gradient_accumulation_steps=accumulation or settings.get("gradient_accumulation_steps") or 1,
            device="cuda" if request.world.device == "gpu" else "cpu",
            foreach=settings.get("optim") == "adamw_torch" and request.world.device == "gpu",
            muon=settings.get("optim") == MUON,
            fsdp=Fsdp2.of(fsdp),
            capacity=capacity,
        )
    except (TypeError, ValueError) as error:  # everything else that is wrong is named where it is read
        if "gpu_memory" in str(error):
            out.problem(
                "gpu_memory",
                str(capacity),
                f"{error}",
                "Write a size with its unit, for example 80GB.",
                id="gpu-memory-unreadable",
            )
        return None


def needed_bytes(request: Request) -> int | None:
    """What a GPU needs with the wanted micro-batch, allowances included; None where it is not predicted."""
    micro = request.settings.get("per_device_train_batch_size", 1)
    answer = _plan(request, 1 if micro == "auto" else micro, request.ds_config, Findings(), None, None)
    return None if answer is None else answer.estimate.device_bytes


def kind_of(plan: Plan) -> str:
    """torch's name of the device that a plan is for."""
    return "cuda" if plan.device == "gpu" else "cpu"


def predict(plan: Plan, backend: str | None, capacity: int | None = None) -> MemoryReport | None:
    """The memory of a whole plan, its model's operation computed by this backend; None where it is not predicted."""
    if unpredictable(plan.optim, plan.fsdp, plan.ds_config, plan.dtype):
        return None
    kind = kind_of(plan)
    return plan_memory(
        plan.model_config,
        seq_len=plan.seq_len,
        micro_batch_size=plan.micro_batch_size,
        world_size=plan.world_size,
        dtype=plan.dtype,
        ds_config=plan.ds_config,
        gradient_checkpointing=plan.gradient_checkpointing or bool(plan.fsdp and plan.fsdp.activation_checkpointing),
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
        device=kind,
        backend="torch" if backend == "reference" else backend,
        foreach=kind == "cuda" and plan.optim == "adamw_torch",
        muon=plan.optim == MUON,
        fsdp=Fsdp2.of(plan.fsdp),
        libraries=libraries() if kind == "cpu" else None,
        capacity=capacity,
    )


def check_memory(plan: Plan, backend: str | None, out: Findings) -> dict[str, int] | None:
    """A problem where this machine's memory is too small for a run on its CPUs; the bytes predicted and usable."""
    ranks = ranks_here(plan.num_processes, plan.num_nodes)
    usable = usable_memory(ranks)
    report = None if usable is None else predict(plan, backend, usable)
    if report is None or usable is None:
        return None
    if not report.fits:
        each = f", for each of {ranks} ranks here" if ranks > 1 else ""
        out.problem(
            "per_device_train_batch_size",
            f"micro-batch {plan.micro_batch_size}, {report.needed}{each}",
            "The run does not fit into what this process may use of the machine's memory: it would be killed.",
            report.advice,
            id="does-not-fit",
        )
    return {"predicted_bytes": report.predicted_bytes, "usable_bytes": usable}


def default_micro_batch(request: Request, out: Findings) -> tuple[int, str]:
    """(micro-batch, where it comes from), for a run that does not give one."""
    value = request.settings.get("per_device_train_batch_size", 1)
    preset = request.settings.preset
    if value != "auto":
        return value, request.settings.source("per_device_train_batch_size")
    kept = request.before.get("micro_batch_size")
    if isinstance(kept, int):
        return kept, "the plan of the run that is gone on with"
    capacity = known_capacity(request) or _of_this_machine(request)
    answer = None if capacity is None else _plan(request, None, request.ds_config, out, None, capacity)
    if answer is not None and answer.largest_micro_batch_size:
        return answer.largest_micro_batch_size, "the memory planner"
    if preset is not None:
        out.note(f'The micro-batch "auto" is preset {preset.name}\'s own: give --gpu_memory to have it planned.')
        return preset.micro_batch_size, f"preset {preset.name}"
    out.note('The micro-batch "auto" is 1: give --gpu_memory to have it planned.')
    return 1, "default"


def check_fits(request: Request, batch: Batch | None, ds_config: dict[str, Any] | None, out: Findings) -> None:
    """A problem where the planner is sure that the run does not fit, with what would make it fit."""
    card, stated = request.settings.get("gpu"), request.settings.get("gpu_memory")
    if card is not None and stated is None and memory_of(card) is None:
        out.note(f"The memory of --gpu {card} is in no table here: give --gpu_memory.")
    if request.unknown and (stated is not None or card is not None):
        out.note(f"The memory of a run with {request.unknown} is not predicted: whether it fits is unknown.")
    accelerator = request.settings.get("accelerator_config")
    synced = isinstance(accelerator, dict) and get(accelerator, "gradient_accumulation_kwargs.sync_each_batch")
    whole = request.fsdp is not None and batch is not None and batch.accumulation > 1 and not synced
    if whole and request.model_config:
        size = WEIGHT_BYTES[request.dtype] * sum(count_parameters(request.model_config).values())
        out.note(
            f"FSDP keeps every gradient whole from one micro-step to the next, {show(size)}: --accelerator_config "
            """'{"gradient_accumulation_kwargs": {"sync_each_batch": true}}' reduces them at each instead."""
        )
    answer = None if batch is None else _ask(request, batch.micro, ds_config, out, batch.accumulation)
    if answer is not None and answer.fits is False:
        out.problem(
            request.settings.key("per_device_train_batch_size"),
            f"micro-batch {batch.micro if batch else None}, {answer.needed}",
            "The run does not fit into the device's memory.",
            answer.advice,
            id="does-not-fit",
        )
