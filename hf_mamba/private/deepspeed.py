"""DeepSpeed: the norm and the verdict of an update while `backward` takes it, and a world without a process group."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from hf_mamba.private import Used

if TYPE_CHECKING:
    import torch

_STAGE_1_2 = "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer"
_STAGE_3 = "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3"
_IN_STEP = "the engine's get_global_grad_norm() has it only after the step, which is too late to withhold it"
_VERDICT = "the engine says only that a step was skipped, and under fp16 alone"
USED = (
    Used(_STAGE_1_2, "_global_grad_norm", _IN_STEP),
    Used(_STAGE_3, "_global_grad_norm", _IN_STEP),
    Used(_STAGE_1_2, "overflow", _VERDICT),
    Used(_STAGE_3, "overflow", _VERDICT),
    Used(_STAGE_1_2, "check_grad_overflow", "whether it looks for bad gradients: its own reading of the file"),
    Used(_STAGE_3, "backup_optimizer", "updates what a partial offload leaves on the GPU; no list has it"),
    Used("deepspeed.runtime.config", "dist", "asked for the number of ranks; there is no argument for it"),
)


def overflow(engine: Any) -> bool | None:
    """Whether the last update was not applied; None where a bare optimizer (stage 0 in fp32) does not look."""
    found = getattr(engine.optimizer, "overflow", None)
    return None if found is None else bool(found)


def looks_for_overflow(engine: Any) -> bool:
    """Whether the engine looks at every update itself; `overflow` says what it found."""
    return hasattr(engine.optimizer, "overflow")


def applies_everything(engine: Any) -> bool:
    """Whether the file has "check_grad_overflow": false."""
    return not getattr(engine.optimizer, "check_grad_overflow", True)


def norm_in_step(engine: Any, device: torch.device) -> torch.Tensor:
    """The gradient's norm over all ranks, 0-d, while ZeRO takes its step."""
    import torch

    return torch.as_tensor(engine.optimizer._global_grad_norm, device=device)


def restore_clipping(engine: Any) -> None:
    """Clip at the norm that the configuration says: ZeRO-1, ZeRO-2 and fp16 take over the checkpoint's."""
    if hasattr(engine.optimizer, "clip_grad"):
        engine.optimizer.clip_grad = engine.gradient_clipping()


def second_optimizer(engine: Any) -> torch.optim.Optimizer | None:
    """The optimizer of what a partial offload leaves on the GPU."""
    return getattr(engine.optimizer, "backup_optimizer", None)


@contextlib.contextmanager
def world_of(size: int) -> Iterator[None]:
    """Let DeepSpeedConfig see `size` ranks, where no process group exists yet (it would fall back to 1)."""
    from deepspeed.runtime import config as module

    real = module.dist
    module.dist = SimpleNamespace(get_rank=lambda *_: 0, get_world_size=lambda *_: size)
    try:
        yield
    finally:
        module.dist = real
