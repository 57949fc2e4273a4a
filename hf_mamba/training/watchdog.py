"""Where each rank was when no step ended any more, written before the process group's own time limit ends the job."""

import faulthandler
import sys
import threading
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_mamba.files import open_whole
from hf_mamba.run import ranks


class Watchdog(TrainerCallback):
    """Writes every thread's stack to a file `stalled-...` when nothing has gone on for `seconds`, once a stall.

    A thread of its own waits; a step costs it one assignment.
    """

    def __init__(self, folder: Path, seconds: float) -> None:
        self._folder, self._seconds = folder, seconds
        self._moved, self._step = time.monotonic(), 0
        self._end = threading.Event()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._end.set()  # of a training that ended by an exception
        self._moved, self._step, self._end = time.monotonic(), state.global_step, threading.Event()
        threading.Thread(target=self._watch, args=(self._end,), name="watchdog", daemon=True).start()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._end.set()

    def _goes_on(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._moved, self._step = time.monotonic(), state.global_step

    on_substep_end = on_step_end = on_prediction_step = on_evaluate = on_save = _goes_on

    def _watch(self, end: threading.Event) -> None:
        told = 0.0
        while not end.wait(max(0.05, min(self._moved + self._seconds - time.monotonic(), self._seconds))):
            if time.monotonic() - self._moved >= self._seconds and told != self._moved:
                told = self._moved
                self._write()

    def _write(self) -> None:
        what = f"no step ended for {self._seconds:.0f} s; {self._step} steps are done"
        target = self._folder / f"stalled-rank-{ranks.rank()}-step-{self._step}.txt"
        try:
            with open_whole(target) as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S %z')}: {what}\n".encode())
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            print(f"warning: rank {ranks.rank()}: {what}. Its stacks are in {target}.", file=sys.stderr, flush=True)
        except OSError:
            pass  # the folder is gone or full; training says so itself
