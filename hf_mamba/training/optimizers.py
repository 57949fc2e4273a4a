"""What has to be put right in an optimizer after an engine has had it in hand."""

from typing import Any

import torch


def mend_universal(optimizer: torch.optim.Optimizer, options: list[dict[str, Any]]) -> None:
    """Undo what ZeRO-3 does in loading a universal checkpoint (deepspeed 0.19.8, runtime/zero/stage3.py).

    It gives every group the first one's options, so that what must not decay does, and all parameters one step counter,
    which then counts each of them.
    """
    for group, own in zip(optimizer.param_groups, options, strict=False):
        group.update({key: value for key, value in own.items() if key not in ("lr", "initial_lr")})
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()
