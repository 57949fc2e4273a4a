"""Trackers of --report_to: transformers' own callbacks, none of which can end a run, and each with one run for ours.

A tracker that raises, at its start or later, is said in one line and asked no more. What a tracker calls the run is
kept in the run's folder, so that a resumed run goes on in the same one, not in a second.
"""

from __future__ import annotations

import importlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK

from hf_mamba.files import json_or_none, write_json
from hf_mamba.findings import first_line
from hf_mamba.names import TRACKERS_FILE
from hf_mamba.progress import say
from hf_mamba.redaction import redact


class Tracker(TrainerCallback):
    """One of transformers' trackers, guarded."""

    def __init__(self, name: str, inner: TrainerCallback, folder: Path) -> None:
        self.name, self.inner, self._folder = name, inner, folder
        self._failed = False
        self._over = False  # training
        self._known: str | None = None  # what the tracker calls this run

    def tell(
        self, event: str, args: TrainingArguments, state: TrainerState, control: TrainerControl, data: dict[str, Any]
    ) -> None:
        """Pass an event on; whatever comes of it, training goes on."""
        if self._failed or not state.is_world_process_zero:
            return
        try:
            if event == "on_train_begin":
                self._known = (json_or_none(self._folder / TRACKERS_FILE) or {}).get(self.name)
            with self._same_run(args, state, event):
                getattr(self.inner, event)(args, state, control, **data)
            if event == "on_train_begin":
                self._keep()
        except Exception as error:  # whatever a tracker's package raises
            self._failed = True
            reason = redact(first_line(error))
            say(
                f"warning: {self.name} failed, training goes on without it: {type(error).__name__}: {reason}",
                error=True,
            )

    @contextmanager
    def _same_run(self, args: TrainingArguments, state: TrainerState, event: str) -> Iterator[None]:
        """Tell the tracker which of its runs this is, in its own way; the user's own words win."""
        if self.name == "tensorboard" and event == "on_train_begin":
            self._write_events(state)
        elif self.name == "wandb":
            self._known = self._known or uuid.uuid4().hex[:8]
            os.environ.setdefault("WANDB_RUN_ID", self._known)
            os.environ.setdefault("WANDB_RESUME", "allow")
        elif self.name == "mlflow" and self._known:
            os.environ.setdefault("MLFLOW_RUN_ID", self._known)  # mlflow takes it out when it begins
        name = args.run_name
        if self.name == "trackio" and name is None:  # it goes by names
            args.run_name = self._known = self._known or f"{self._folder.name}-{uuid.uuid4().hex[:6]}"
        try:
            yield
        finally:
            args.run_name = name
        self._over = event == "on_train_end" or (self._over and event != "on_train_begin")
        if self._over and event == "on_log":
            self._end_again()

    def _end_again(self) -> None:
        """End what an evaluation after training has begun once more."""
        if self.name == "mlflow":
            importlib.import_module("mlflow").end_run()
        elif self.name == "trackio":
            importlib.import_module("trackio").finish()
            self.inner = type(self.inner)()  # a finished one takes no more

    def _write_events(self, state: TrainerState) -> None:
        """Have TensorBoard go on in its folder; what it has of steps that are done again is hidden by it."""
        inner: Any = self.inner
        if inner.logging_dir is None and self._known:
            inner.logging_dir = str(self._folder / self._known)
        if inner.logging_dir is not None and inner.tb_writer is None:
            package = "torch.utils.tensorboard" if find_spec("tensorboard") else "tensorboardX"
            writer = importlib.import_module(package).SummaryWriter
            inner.tb_writer = writer(log_dir=inner.logging_dir, purge_step=state.global_step + 1)

    def _keep(self) -> None:
        """Write down what the tracker calls this run."""
        inner: Any = self.inner
        if self.name == "tensorboard" and Path(inner.logging_dir).is_relative_to(self._folder):
            self._known = str(Path(inner.logging_dir).relative_to(self._folder))
        elif self.name == "wandb":
            self._known = os.environ["WANDB_RUN_ID"]
        elif self.name == "mlflow":
            import mlflow

            run = mlflow.active_run()
            self._known = run.info.run_id if run else None
        if self._known:
            file = self._folder / TRACKERS_FILE
            write_json(file, (json_or_none(file) or {}) | {self.name: self._known})


def _event(name: str) -> Any:
    def tell(self: Tracker, args: TrainingArguments, state: TrainerState, control: TrainerControl, **data: Any) -> None:
        self.tell(name, args, state, control, data)

    return tell


for _name in [name for name in dir(TrainerCallback) if name.startswith("on_")]:
    setattr(Tracker, _name, _event(_name))


def guard_trackers(callbacks: list[TrainerCallback], folder: Path) -> list[TrainerCallback]:
    """The callbacks, each tracker among them guarded, with its run's name kept in `folder`."""
    names = {kind: name for name, kind in INTEGRATION_TO_CALLBACK.items()}
    return [
        Tracker(names[type(callback)], callback, folder) if type(callback) in names else callback
        for callback in callbacks
    ]
