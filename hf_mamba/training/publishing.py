"""--push_to_hub: every checkpoint and the finished model to the Hub, behind training's back (interop/hub.py)."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_mamba.interop.hub import Pusher, Target


class Publisher(TrainerCallback):
    """Queues each whole checkpoint for upload; nothing that the network does reaches training. On rank 0 only."""

    def __init__(self, folder: Path, target: Target):
        self.folder, self.target = folder, target
        self.pusher = Pusher(folder, target)

    @classmethod
    def wanted(cls, folder: Path, arguments: Mapping[str, Any]) -> "Publisher | None":
        """The publisher that push_to_hub, hub_model_id, hub_private_repo and hub_revision ask for, if they do."""
        if not arguments.get("push_to_hub"):
            return None
        private = arguments.get("hub_private_repo") is not False  # private unless public was written
        return cls(folder, Target(arguments["hub_model_id"], private, arguments.get("hub_revision")))

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self.pusher.checkpoint(self.folder / f"checkpoint-{state.global_step}")
        return control

    def finish(self, model: Path, timeout: float = 600.0) -> bool:
        """Upload the finished model and wait; says what to do when not everything arrived."""
        self.pusher.checkpoint(model)
        complete = self.pusher.finish(timeout)
        if not complete:
            command = f"hf-mamba push {self.folder} {self.target.repo_id}"
            print(f"not everything was uploaded; run {command}", file=sys.stderr, flush=True)
        return complete
