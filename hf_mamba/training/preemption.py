"""Stopping on request: a signal on any rank, agreed by all of them, ends the run with a checkpoint and an exit code.

A signal raises a flag (run/signals.py). Once a step the ranks take the maximum of their flags over a gloo group of
their own, on the CPU: started before the optimizer's step and read after it, so the device is never waited for and the
latency is hidden. All ranks read the same value at the same step, save, and exit with EXIT_REQUEUE. In evaluation the
flags are exchanged once per batch, and the evaluation is given up; the resumed run begins with it.
"""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_mamba.progress import say
from hf_mamba.run.signals import EXIT_REQUEUE, SignalFlag

EXIT_BAD_NUMBERS = 86  # running again would end the same way: a person has to look

KEEP_RUNNING, SAVE_AND_STOP, STOP_AND_REQUEUE, STOP_FOR_GOOD = range(4)  # a larger one wins
EXIT_CODES = {SAVE_AND_STOP: EXIT_REQUEUE, STOP_AND_REQUEUE: EXIT_REQUEUE, STOP_FOR_GOOD: EXIT_BAD_NUMBERS}


class StopInEvaluation(Exception):
    """Leaves an evaluation that the ranks agreed to give up."""


class AgreedStop(TrainerCallback):
    """Makes all ranks stop at the same step.

    Attributes:
        decision: KEEP_RUNNING, or what was agreed.
        during_evaluation: whether an evaluation was due or under way, which the resumed run begins with.
    """

    def __init__(self, signals: SignalFlag | None) -> None:
        self.decision = KEEP_RUNNING
        self.during_evaluation = False
        self._signals = signals
        self._wish = KEEP_RUNNING
        self._group: Any = None
        self._pending: tuple[torch.Tensor, Any] | None = None
        self._announced = False

    def request(self, wish: int) -> None:
        """Ask all ranks to stop, for this rank's own reason."""
        self._wish = max(self._wish, wish)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.world_size > 1 and self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=args.ddp_timeout))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._ask()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self._ask()
        if self._answer() != KEEP_RUNNING:
            self._announce(f"stopping after step {state.global_step}")
            control.should_training_stop = True
            self.during_evaluation = self.during_evaluation or control.should_evaluate
            control.should_save = self.decision == SAVE_AND_STOP or control.should_save
            control.should_evaluate = False
        return control

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._group is None and args.world_size > 1:
            return  # an evaluation without training
        self._ask()
        if self._answer() != KEEP_RUNNING:
            self.during_evaluation = True
            self._announce(f"leaving the evaluation at step {state.global_step}")
            raise StopInEvaluation

    def _ask(self) -> None:
        if self._pending is not None:
            return
        if self._signals is not None and self._signals.received:
            self.request(SAVE_AND_STOP)
        wish = torch.tensor(self._wish)
        work = dist.all_reduce(wish, dist.ReduceOp.MAX, group=self._group, async_op=True) if self._group else None
        self._pending = (wish, work)

    def _answer(self) -> int:
        assert self._pending is not None
        wish, work = self._pending
        self._pending = None
        if work is not None:
            work.wait()
        self.decision = int(wish)
        return self.decision

    def _announce(self, what: str) -> None:
        if not self._announced and self._signals is not None and self._signals.received:
            say(f"{self._signals.received}: {what}", error=True)
        self._announced = True


def exit_code(decision: int) -> int:
    """The process's exit code for an agreed decision; 0 for a run that reached its end."""
    return EXIT_CODES.get(decision, 0)
