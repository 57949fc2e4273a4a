"""--push_to_hub: every checkpoint and the finished model to the Hub, behind training's back (interop/hub.py)."""

import sys
from collections.abc import Callable
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

    def finish(self, model: Path, stop: Callable[[], Any], timeout: float = 600.0) -> bool:
        """Upload the finished model and wait, until `stop` says otherwise; tell what to do when not all arrived."""
        self.pusher.checkpoint(model)
        again = f"hf-mamba push {self.folder} {self.pusher.target.repo_id}"
        if waiting := self.pusher.waiting:
            where = f"{waiting} upload(s) to {self.pusher.target.repo_id}"
            print(f"\nfinished; waiting for {where}. Ctrl-C leaves them to `{again}`.", file=sys.stderr, flush=True)
        complete = self.pusher.finish(timeout, stop)
        if not complete:
            print(f"not everything was uploaded; run {again}", file=sys.stderr, flush=True)
        return complete
