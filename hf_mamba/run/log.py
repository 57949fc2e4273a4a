"""Writes and reads a run's log.jsonl."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_mamba.names import LOG_FILE


class RunLog(TrainerCallback):
    """Appends every log line to log.jsonl, so that a run can be watched, and loses none when it is killed.

    A resumed run first appends {"resumed_at": step}: lines of later steps before that one belong to a part of the run
    that was done again.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOG_FILE

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self._append({"resumed_at": state.global_step, "time": time.time()}, before="\n")

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and logs:
            self._append({**logs, "step": state.global_step, "time": time.time()})

    def _append(self, row: Mapping[str, Any], before: str = "") -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(before + json.dumps({key: _plain(value) for key, value in row.items()}) + "\n")


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: their names, as text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log, without those that a resumed run did again, and without an unfinished last line."""
    rows: list[dict[str, Any]] = []
    path = folder / LOG_FILE
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # killed, or being written
        if "resumed_at" in row:
            rows = [earlier for earlier in rows if earlier["step"] <= row["resumed_at"]]
        elif "step" in row:
            rows.append({key: _number(value) for key, value in row.items()})
    return rows


def _number(value: Any) -> Any:
    return float(value) if value in ("nan", "inf", "-inf") else value
