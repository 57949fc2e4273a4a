"""What a person sees of a training: one aligned line for each logged step and, in a terminal, a bar beneath them.

Pipes and files get the same lines, without the bar and without control characters. Every number of a log line stays in
log.jsonl, trainer_state.json and the trackers; the screen shows what is read at a glance.
"""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length
from transformers.utils import logging

from hf_mamba.preflight.cost.disk import gigabytes
from hf_mamba.progress import bar, say

SOURCES = 3  # whose losses a person sees; log.jsonl has more
FELT = 0.05  # the share of its time that a training waits for data before the line says so
# In the log for programs; a person has seen them (memory), or has them in another form (epoch, seconds).
UNSEEN = {
    *("data_wait_seconds", "data_wait_share", "epoch", "memory_gb", "memory_predicted_gb", "num_input_tokens_seen"),
    *("save_seconds", "total_flos"),
}
SHOWN = {"loss", "learning_rate", "grad_norm", "tokens_per_second", "mfu", "bad_steps", "unusable_records"}
SOURCE_KEYS = ("loss/", "eval_loss/")
UNSEEN_OF_EVALUATION = UNSEEN | {"runtime", "samples_per_second", "steps_per_second", "model_preparation_time"}


class Screen(TrainerCallback):
    """Shows steps, evaluations and savings on the main process, in the place of Trainer's own progress callback."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._evaluation: Any = None
        self._began = time.perf_counter()
        self._first = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._began, self._first = time.perf_counter(), state.global_step
        if state.is_world_process_zero:
            self._bar = bar(
                bool(args.disable_tqdm) or not sys.stderr.isatty(),  # the lines of the log are a pipe's progress
                total=state.max_steps,
                initial=state.global_step,
                unit="step",
                desc="training",
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        if self._evaluation is None:
            loader: Any = kwargs.get("eval_dataloader")
            total = len(loader) if has_length(loader) else None
            self._evaluation = bar(bool(args.disable_tqdm), total=total, unit="batch", desc="evaluating")
        self._evaluation.update()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._end_of_evaluation()

    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any, **kwargs: Any
    ) -> None:
        self._end_of_evaluation()

    def _end_of_evaluation(self) -> None:
        if self._evaluation is not None:
            self._evaluation.close()
        self._evaluation = None

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if not (state.is_world_process_zero and logs):
            return
        done = state.global_step - self._first
        left = (time.perf_counter() - self._began) / done * (state.max_steps - state.global_step) if done else None
        say(line(logs, state.global_step, state.max_steps, left))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None


@contextmanager
def without_bars() -> Iterator[None]:
    """transformers draws no bar of its own: a line of ours says what is saved."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def line(logs: Mapping[str, Any], step: int, steps: int, left: float | None = None) -> str:
    """What a terminal shows of one line of the log; the losses of its sources stand on a line of their own.

    Args:
        logs: the numbers by their names in the log.
        step: of `steps`.
        left: seconds to the end of the run, where they can be estimated.
    """
    sources = {key.partition("loss/")[2]: value for key, value in logs.items() if key.startswith(SOURCE_KEYS)}
    logs = {key: value for key, value in logs.items() if not key.startswith(SOURCE_KEYS)}
    if "loss" in logs:
        parts = _of_steps(logs, left)
    elif "train_runtime" in logs:
        parts = [f"trained in {brief(logs['train_runtime'])}", f"mean loss {logs['train_loss']:.3f}"]
    else:
        parts = _of_evaluation(logs)
    below = f"\n{' ' * len(place(step, steps))}  {_of_sources(sources)}" if sources else ""
    return "  ".join([place(step, steps), *parts]) + below


def saved(name: str, size: int, seconds: float, step: int, steps: int) -> str:
    """What a terminal shows of a checkpoint of `size` bytes, once it is whole."""
    return f"{place(step, steps)}  saved {name}: {gigabytes(size)} in {seconds:.1f}s"


def place(step: int, steps: int) -> str:
    """The step of all steps, right-aligned."""
    return f"{step:>{len(str(steps))}}/{steps}"


def _of_steps(logs: Mapping[str, Any], left: float | None) -> list[str]:
    parts = [f"loss {logs['loss']:6.3f}"]
    if "learning_rate" in logs:
        parts.append(f"rate {logs['learning_rate']:.1e}")
    if logs.get("grad_norm") is not None:
        parts.append(f"grad {_short(float(logs['grad_norm'])):>5}")
    if "tokens_per_second" in logs:
        parts.append(f"{logs['tokens_per_second']:>9,.0f} tok/s")
    if "mfu" in logs:
        parts.append(f"mfu {logs['mfu']:5.1%}")
    if left is not None:
        parts.append(f"{brief(left):>6} left")
    if logs.get("data_wait_share", 0) >= FELT:
        parts.append(f"waiting for data {logs['data_wait_share']:.0%}")
    if logs.get("bad_steps"):
        parts.append(f"{logs['bad_steps']} updates withheld")
    if logs.get("unusable_records"):
        parts.append(f"{logs['unusable_records']} unusable records")
    return [*parts, *(_named(key, value) for key, value in logs.items() if key not in SHOWN | UNSEEN)]


def _of_evaluation(logs: Mapping[str, Any]) -> list[str]:
    """The numbers of an evaluation, or of whatever a caller logs."""
    values = {key.removeprefix("eval_"): value for key, value in logs.items()}
    parts = [f"held-out loss {values.pop('loss'):.3f}"] if "eval_loss" in logs else []
    if "perplexity" in values:
        parts.append(f"perplexity {values.pop('perplexity'):.1f}")
    if "bits_per_byte" in values:
        parts.append(f"{values.pop('bits_per_byte'):.3f} bits/byte")
    return [*parts, *(_named(key, value) for key, value in values.items() if key not in UNSEEN_OF_EVALUATION)]


def _of_sources(losses: Mapping[str, float]) -> str:
    shown = [f"{name if len(name) <= 24 else f'…{name[-23:]}'} {loss:.3f}" for name, loss in losses.items()]
    more = f"  and {len(shown) - SOURCES} more" if len(shown) > SOURCES else ""
    return "  ".join(shown[:SOURCES]) + more


def _named(key: str, value: Any) -> str:
    return f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"


def _short(value: float) -> str:
    """At most five characters."""
    return f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}" if abs(value) < 1e5 else f"{value:.0e}"


def brief(seconds: float) -> str:
    """Two units at most: 52s, 3m12s, 5h03m, 2d04h."""
    total = round(seconds)
    if total < 60:
        return f"{total}s"
    minutes, rest = divmod(total, 60)
    if minutes < 60:
        return f"{minutes}m{rest:02}s"
    hours, minutes = divmod(minutes, 60)
    days, rest = divmod(hours, 24)
    if not days:
        return f"{hours}h{minutes:02}m"
    return f"{days}d{rest:02}h" if days < 100 else f"{days}d"
