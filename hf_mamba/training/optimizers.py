"""What has to be put right in an optimizer and its schedule once a checkpoint has been loaded into them.

The files hold the settings of the run that wrote them; an update's are the plan's, a function of its step.
"""

from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR


def restore_options(optimizer: torch.optim.Optimizer, options: list[dict[str, Any]]) -> None:
    """Give every group the options that the plan's optimizer was built with; the rate is the schedule's.

    Also undoes what ZeRO-3 does in loading a universal checkpoint (deepspeed 0.19.8, runtime/zero/stage3.py): every
    group gets the first one's options, so that what must not decay does.
    """
    for group, own in zip(optimizer.param_groups, options, strict=True):
        group.update({key: value for key, value in own.items() if key in group and key != "lr"})


def restore_rates(schedule: Any, optimizer: torch.optim.Optimizer, peaks: list[float], step: int) -> None:
    """Set the rate of update `step` (from 0), and the peaks of those after it.

    A schedule that follows the losses, not the step, is left as it was loaded: the pre-flight lets no such one change.
    """
    schedule = getattr(schedule, "scheduler", schedule)  # within accelerate's wrapper
    if not isinstance(schedule, LambdaLR):
        return
    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
        group["initial_lr"] = peak
    schedule.base_lrs, schedule.last_epoch = list(peaks), step - 1
    schedule.step()


def separate_counters(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter a step counter of its own: ZeRO-3's universal checkpoint has all of them share one."""
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()
