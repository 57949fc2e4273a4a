"""Everything that is known before training starts: arguments, DeepSpeed and accelerate settings -> one frozen Plan.

    plan = resolve({"preset": "7b_mamba", "num_gpus": 4, "deepspeed": "ds_configs/zero3.json"})
    plan = plan.require()  # a ValueError that lists every problem at once
    checked = verify(plan)  # the model, this machine and DeepSpeed agree with it

Nothing here imports torch, transformers or deepspeed at import.
"""

from typing import Any

from hf_mamba.findings import Findings, Migration, PlanError, Problem
from hf_mamba.plan import Checked, Plan, Refused
from hf_mamba.preflight.contents import check_contents
from hf_mamba.preflight.cost.capacity import check_memory
from hf_mamba.preflight.cost.disk import check_room
from hf_mamba.preflight.deepspeed.readback import check_readback
from hf_mamba.preflight.launch.extensions import check_extensions
from hf_mamba.preflight.launch.machine import check_backend, check_temporary_folder
from hf_mamba.preflight.parameters import check_parameters, count, count_on_meta
from hf_mamba.preflight.rehearsal import check_arguments, note_jump
from hf_mamba.preflight.resolve import resolve
from hf_mamba.preflight.world import runs_elsewhere
from hf_mamba.run.processes import cpu_threads

__all__ = ["Checked", "Migration", "Plan", "PlanError", "Problem", "Refused", "check_backend", "resolve", "verify"]


def verify(plan: Plan, model: Any = None, *, unused: bool = True) -> Checked:
    """The plan held against the model, this machine, Trainer and DeepSpeed's own configuration; it stays as it is.

    Args:
        model: as built for training; by default one is built on the meta device, and what the run reads and the
            disk's room are looked at.
        unused: also read back what DeepSpeed would make of a plan that does not use it.
    """
    out = Findings()
    parameters = count_on_meta(plan.model_config) if model is None else count(model)
    check_parameters(plan, parameters, out)
    backend, memory, disk = None, None, tuple[dict[str, Any], ...]()
    try:
        backend = check_backend(plan)
    except PlanError as error:
        out.problems += error.problems
    if model is None:
        check_arguments(plan, out)
        note_jump(plan, out)
        check_contents(plan, out)
        disk = check_room(plan, out)
        if not runs_elsewhere(plan):
            check_temporary_folder(plan, out)
            check_extensions(plan, out)
            memory = check_memory(plan, backend, out) if plan.device == "cpu" else None
    deepspeed = check_readback(plan, out) if plan.ds_config or (unused and model is None) else None
    return Checked(
        parameters=parameters,
        backend=backend,
        threads=cpu_threads() if plan.device == "cpu" and not runs_elsewhere(plan) else None,
        memory=memory,
        deepspeed=deepspeed,
        disk=disk,
        problems=tuple(out.problems),
        notes=tuple(out.notes),
    )
