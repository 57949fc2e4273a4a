"""Speed and memory of a run, beside what was predicted: tokens/s and MFU in the log, the peak after the first steps."""

import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_mamba.family import family_of
from hf_mamba.plan import Plan
from hf_mamba.preflight.cost import duration
from hf_mamba.preflight.cost.capacity import kind_of, predict
from hf_mamba.preflight.cost.gpus import utilisation
from hf_mamba.preflight.cost.host import forget_peak, resident_peak
from hf_mamba.preflight.cost.memory import show
from hf_mamba.preflight.launch.machine import chosen_backend
from hf_mamba.progress import say

REPORT_AT = 3  # the step after which memory is reported: the optimizer's states exist from the first on
WARM_UP = 2  # steps that a recorded throughput leaves out: compilation, allocation


class Performance(TrainerCallback):
    """The run's cost before it starts, its speed at every log line (`drain`), its memory's peak against the plan's.

    The throughput of a run that went on for long enough is recorded for its device, where `hf-mamba memory --gpu`
    finds it. Measured memory is CUDA's allocator's on a GPU, and the process's resident memory on a CPU, libraries
    included: of the rank that has most, from the first step on.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.family = family_of(plan.model_config)
        self.model = self.family.geometry(plan.model_config)
        self.flops = self.family.token_flops(self.model, plan.seq_len).training
        self.device = duration.device_name()
        self._steps = self._all_steps = 0
        self._since = self._warm = time.perf_counter()
        self.backend = chosen_backend(plan.model_config, kind_of(plan), plan.dtype)
        self.report = predict(plan, self.backend)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._since = time.perf_counter()
        forecast = duration.of_plan(self.plan, self.device, self.backend)
        if state.is_world_process_zero:
            say("\n".join(forecast.lines()))
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            forget_peak()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._steps += 1
        self._all_steps += 1
        if self._all_steps == WARM_UP:
            self._warm = time.perf_counter()
        if self._all_steps == REPORT_AT:
            self._print_memory(state, f"after {REPORT_AT} steps")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._all_steps:
            return
        self._print_memory(state, "at the end")
        if state.is_world_process_zero and self._all_steps >= WARM_UP + REPORT_AT:
            plan, steps = self.plan, self._all_steps - WARM_UP
            rate = steps * self.plan.tokens_per_step / (time.perf_counter() - self._warm)
            how = (plan.seq_len, plan.dtype, plan.gradient_checkpointing, self.backend)
            duration.record(self.device, duration.run_key(self.family, self.model, *how), rate / plan.world_size)

    def leave_out(self, seconds: float) -> None:
        """Time that was not training: an evaluation, a checkpoint."""
        self._since += seconds
        self._warm += seconds

    def drain(self) -> dict[str, float]:
        """`tokens_per_second` of all devices, and `mfu` where the peak is known, since the last call."""
        now = time.perf_counter()
        steps, elapsed = self._steps, now - self._since
        self._steps, self._since = 0, now
        if not steps:
            return {}
        rate = steps * self.plan.tokens_per_step / elapsed
        out = {"tokens_per_second": round(rate, 1)}
        mfu = utilisation(self.flops, rate, self.plan.world_size, self.device, self.plan.dtype)
        return out if mfu is None else out | {"mfu": round(mfu, 4)}

    def _print_memory(self, state: TrainerState, when: str) -> None:
        measured = peak_memory()  # on every rank: it is a collective
        if not state.is_world_process_zero:
            return
        report = self.report
        predicted = f"predicted {show(report.predicted_bytes)} ({report.estimate.phase})" if report else "not predicted"
        what, size = next(iter(measured.items()))
        error = f" ({report.predicted_bytes / max(size, 1) - 1:+.1%})" if report else ""
        reserved = f", {show(measured['reserved'])} reserved" if "reserved" in measured else ", libraries included"
        say(f"Memory {when}: {predicted}, measured {show(size)} {what}{error}{reserved}.")


def peak_memory() -> dict[str, int]:
    """Bytes of the rank that has most: "allocated" and "reserved" on CUDA, "resident" on a CPU. All ranks call it."""
    if torch.cuda.is_available():
        found = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    else:
        found = {"resident": resident_peak()}
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        most = torch.tensor(list(found.values()), dtype=torch.int64, device=device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        found = dict(zip(found, most.tolist(), strict=True))
    return found
