"""peft: which modules of a model it refuses to adapt."""

from collections.abc import Callable
from typing import Any

from hf_mamba.private import Used

USED = (
    Used(
        "peft.tuners.tuners_utils:BaseTuner",
        "_check_target_module_compatiblity",  # (sic)
        "peft refuses projections by model_type alone, and has no list that a model could change",
    ),
)


def allow_targets(allowed: Callable[[Any, str], bool]) -> Callable[[], None]:
    """Let peft adapt the modules of a model for which `allowed(model, name)` is true; the result takes it back."""
    from peft.tuners.tuners_utils import BaseTuner

    check = BaseTuner._check_target_module_compatiblity

    def check_others(self: Any, peft_config: Any, model: Any, target_name: str) -> None:
        if not allowed(model, target_name):
            check(self, peft_config, model, target_name)

    def restore() -> None:
        BaseTuner._check_target_module_compatiblity = check  # type: ignore[method-assign]

    BaseTuner._check_target_module_compatiblity = check_others  # type: ignore[method-assign]
    return restore
