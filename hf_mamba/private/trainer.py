"""transformers' Trainer, with the three places in public that it has no callback for."""

from typing import Any

from torch import nn
from transformers import Trainer

from hf_mamba.private import Used

_TRAINER = "transformers.trainer:Trainer"
USED = (
    Used(_TRAINER, "_get_grad_norm", "on_pre_optimizer_step comes with no gradient norm", hook=True),
    Used(_TRAINER, "_save_checkpoint", "on_save comes after the files lie under their final name", hook=True),
    Used(_TRAINER, "_issue_warnings_after_load", "a tied head is missed at every resume, with a warning", hook=True),
)


class OpenTrainer(Trainer):
    """A Trainer whose subclasses override `before_update` and `save_checkpoint`."""

    def before_update(self, norm: Any) -> Any:
        """Called after the gradients were clipped, with their norm before that; returns the norm that is logged.

        The optimizer's step comes next.
        """
        return norm

    def save_checkpoint(self) -> None:
        """Write `args.output_dir`/checkpoint-<step>."""
        super()._save_checkpoint(self.model_wrapped, None)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return self.before_update(super()._get_grad_norm(model, grad_norm))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.save_checkpoint()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Warns of missing tensors, those left out that are another name of one that was loaded."""
        missing = set(load_result.missing_keys)
        model: Any = self.model
        named = dict(model.named_parameters(remove_duplicate=False))
        loaded = {id(parameter) for name, parameter in named.items() if name not in missing}
        kept = [name for name in load_result.missing_keys if id(named.get(name)) not in loaded]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=kept))
