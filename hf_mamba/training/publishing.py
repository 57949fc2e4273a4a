"""--push_to_hub: every checkpoint and the finished model to the Hub, behind training's back (interop/hub.py)."""

import sys
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_mamba.interop.hub import Pusher, Target
from hf_mamba.plan import HubPlan


class Publisher(TrainerCallback):
    """Queues each whole checkpoint for upload; nothing that the network does reaches training. On rank 0 only."""

    def __init__(self, folder: Path, hub: HubPlan):
        self.folder, self.hub = folder, hub
        self.pusher = Pusher(folder, Target(hub.repo_id, hub.private, hub.revision))

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
            command = f"hf-mamba push {self.folder} {self.hub.repo_id}"
            print(f"not everything was uploaded; run {command}", file=sys.stderr, flush=True)
        return complete
