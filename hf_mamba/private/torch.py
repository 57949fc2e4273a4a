"""torch: an update that the fused kernel leaves out, marks of wrappers on modules and names, a group's time limit."""

import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch.autograd import forward_ad

from hf_mamba.private import Used

USED = (
    Used("torch.optim.adam:Adam", "_step_supports_amp_scaling", "whether the kernel takes `found_inf`: GradScaler's"),
    Used("torch.optim.adam", "found_inf", "a flag on the device, read by the fused kernel: no public argument has it"),
    Used("torch.distributed.fsdp._common_utils", "_fsdp_wrapped_module", "FSDP1 puts it into parameters' names"),
    Used("torch._dynamo.eval_frame", "_orig_mod", "torch.compile puts it into parameters' names"),
    Used(
        "torch.distributed.distributed_c10d", "_set_pg_timeout", "accelerate makes a CPU's group without --ddp_timeout"
    ),
    Used("torch.nn.modules.module:Module", "_is_replica", "DataParallel marks its copies; it gathers tensors only"),
    Used("torch._C", "_are_functorch_transforms_active", "vmap, grad and jvp of torch.func; none of it is announced"),
    Used("torch.autograd.forward_ad", "_current_level", "forward-mode derivatives, which nothing announces either"),
)


def takes_a_flag(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `step_unless` works: a fused kernel of torch's own, over plain tensors.

    DeepSpeed's optimizers take over torch's options, "fused" too, and know no flag; torch's kernel takes no plain flag
    beside FSDP's distributed tensors.
    """
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    return getattr(optimizer, "_step_supports_amp_scaling", False) and not any(
        hasattr(p, "full_tensor") for p in parameters
    )


def step_unless(skip: torch.Tensor, optimizer: Any, step: Callable[[], Any]) -> Any:
    """Call `step`, whose kernel changes nothing where `skip`, a 0-d bool tensor, is true. The host does not wait."""
    optimizer.found_inf = skip.float()
    try:
        return step()
    finally:
        del optimizer.found_inf


def plain_name(name: str) -> str:
    """A parameter's name without what FSDP and torch.compile put in between."""
    return re.sub(r"_fsdp_wrapped_module\.|_orig_mod\.", "", name)


def is_transformed() -> bool:
    """Tell whether torch.func's vmap, grad or jvp, or forward-mode autograd, runs what comes next."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_replica(module: torch.nn.Module) -> bool:
    """Tell whether DataParallel made this copy of a module, whose output it then gathers from tensors."""
    return getattr(module, "_is_replica", False)


def limit_group(seconds: float) -> None:
    """Give the default process group this time limit for its operations; it may have been made without one."""
    from torch.distributed import distributed_c10d as c10d

    if c10d.is_initialized():
        c10d._set_pg_timeout(timedelta(seconds=seconds))
