"""Everything that is known before training starts: arguments, DeepSpeed and accelerate settings -> one frozen Plan.

    plan = resolve({"preset": "7b_mamba", "num_gpus": 4, "deepspeed": "ds_configs/zero3.json"})
    plan.require()  # a ValueError that lists every problem at once

Nothing here imports torch, transformers or deepspeed at import.
"""

from hf_mamba.findings import Migration, PlanError, Problem
from hf_mamba.plan import Plan
from hf_mamba.preflight.deepspeed.readback import check_readback
from hf_mamba.preflight.launch.machine import check_backend
from hf_mamba.preflight.parameters import check_parameters
from hf_mamba.preflight.rehearsal import check_arguments
from hf_mamba.preflight.resolve import resolve

__all__ = ["Migration", "Plan", "PlanError", "Problem", "check_backend", "resolve", "verify"]


def verify(plan: Plan) -> Plan:
    """The plan, held against the model on the meta device, this machine, Trainer and DeepSpeed's own configuration."""
    return check_readback(check_arguments(check_backend(check_parameters(plan))))
