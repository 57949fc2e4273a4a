"""Judges updates: one whose loss or gradient is not finite, or a spike, is not applied; several in a row end the run.

The decision is taken on the device. With a fused optimizer it is handed to the kernel (`found_inf`, GradScaler's way),
which then changes neither weights nor moments nor its step count; the host learns of it one step later on a GPU, from a
copy that has long arrived. Other optimizers are asked to step only after the host has read the flag.

Where in a step it judges, and what an engine decides itself, is the engine's own: updates.py.

A spike is a step whose loss or gradient norm is more than `sigma` standard deviations above the mean of the last 128
accepted steps (as in OLMo-core's SkipStepOptimizer), looked for from 64 accepted steps on.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hf_mamba.names import BAD_STEPS_FILE
from hf_mamba.private.torch import step_unless, takes_a_flag

WINDOW = 128


def poison(loss: torch.Tensor) -> torch.Tensor:
    """The same loss, whose gradient is NaN everywhere if the loss is not finite, even where the loss' own would not be.

    The reduction of gradients so carries one rank's bad loss to all ranks, without a collective of its own.
    """
    return loss * (1.0 + 0.0 * loss.detach())  # inf * 0 is NaN; 1.0 changes no bit


@dataclass(frozen=True)
class BadStep:
    """A step whose update was not applied."""

    step: int
    kind: str  # "not finite" | "spike"
    loss: float
    grad_norm: float


class Spikes:
    """Mean and spread of the accepted steps' loss and gradient norm, on the device."""

    def __init__(self, sigma: float, device: torch.device) -> None:
        self.sigma = sigma
        self.history = torch.zeros(2, WINDOW, dtype=torch.float64, device=device)  # a ring
        self.accepted = torch.zeros((), dtype=torch.int64, device=device)

    def judge(self, values: torch.Tensor) -> torch.Tensor:
        """Whether (loss, norm), (2,) float64, is a spike; accepted values are remembered. A 0-d bool tensor."""
        count = self.accepted.clamp(max=WINDOW)
        inside = torch.arange(WINDOW, device=values.device) < count
        size = count.clamp(min=1)
        mean = (self.history * inside).sum(1) / size
        spread = (((self.history - mean[:, None]) ** 2 * inside).sum(1) / size).sqrt()
        spike = (values > mean + self.sigma * spread).any() & (count >= WINDOW // 2)
        good = torch.isfinite(values).all() & ~spike
        slot = (self.accepted % WINDOW)[None]
        kept = torch.where(good, values[:, None], self.history.index_select(1, slot))
        self.history.index_copy_(1, slot, kept)
        self.accepted += good
        return spike

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history.tolist(), "accepted": int(self.accepted)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.history.copy_(torch.tensor(state["history"], dtype=torch.float64))
        self.accepted.fill_(state["accepted"])


class LateCopy:
    """A small device tensor on the host one step later, so that nobody waits; at once on a CPU."""

    def __init__(self) -> None:
        self._waiting: tuple[int, torch.Tensor, torch.cuda.Event] | None = None

    def push(self, step: int, values: torch.Tensor) -> tuple[int, list[float]] | None:
        if values.device.type != "cuda":
            return step, values.tolist()
        arrived = self.flush()
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._waiting = (step, host, event)
        return arrived

    def flush(self) -> tuple[int, list[float]] | None:
        """What is still on its way."""
        if self._waiting is None:
            return None
        step, host, event = self._waiting
        self._waiting = None
        event.synchronize()
        return step, host.tolist()


class Guard:
    """Watches the steps of a run.

    Args:
        device: where the model is.
        world_size: ranks; the loss is averaged over them for the search of spikes.
        sigma: what counts as a spike; None looks for none.
        norm_decides: whether an infinite gradient norm is bad; under fp16's loss scaling it is an everyday event.
        on_bad: called with each BadStep, on every rank, as soon as the host knows.
    """

    def __init__(
        self,
        device: torch.device,
        world_size: int,
        sigma: float | None,
        norm_decides: bool,
        on_bad: Callable[[BadStep], None],
    ) -> None:
        self.world_size, self.norm_decides, self.on_bad = world_size, norm_decides, on_bad
        self.spikes = Spikes(sigma, device) if sigma else None
        self.consecutive = 0
        self.total = 0
        self._late = LateCopy()

    def judge(self, step: int, loss: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        """Whether this step's update must not be applied: a 0-d bool tensor on the device. No host sync on a GPU.

        Args:
            step: its number, from 1.
            loss: 0-d, this rank's.
            norm: 0-d, of the gradient over all ranks.
        """
        loss, norm = loss.detach().double().clone(), norm.detach().double()
        if self.spikes is not None and self.world_size > 1:
            dist.all_reduce(loss)
            loss /= self.world_size
        values = torch.stack([loss, norm if self.norm_decides else loss])
        bad = ~torch.isfinite(values[1])
        spike = self.spikes.judge(values) if self.spikes is not None else torch.zeros_like(bad)
        skip = bad | spike
        seen = self._late.push(step, torch.stack([bad.double(), spike.double(), loss, norm]))
        self._note(seen)
        return skip

    def accept_engine_verdict(self, step: int, bad: bool, loss: torch.Tensor, norm: float) -> None:
        """Count what an engine has decided itself."""
        self.flush()
        if bad or self.consecutive:
            self._note((step, [float(bad), 0.0, float(loss), norm]))

    def flush(self) -> None:
        """Learn what is still on its way from the device: before a save, and at the end."""
        self._note(self._late.flush())

    def _note(self, seen: tuple[int, list[float]] | None) -> None:
        if seen is None:
            return
        step, (bad, spike, loss, norm) = seen
        if not bad and not spike:
            self.consecutive = 0
            return
        self.consecutive += 1
        self.total += 1
        self.on_bad(BadStep(step, "not finite" if bad else "spike", loss, norm))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to decide as this one would."""
        self.flush()
        spikes = self.spikes.state_dict() if self.spikes is not None else None
        return {"consecutive": self.consecutive, "total": self.total, "spikes": spikes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.consecutive, self.total = state.get("consecutive", 0), state.get("total", 0)
        if self.spikes is not None and state.get("spikes"):
            self.spikes.load_state_dict(state["spikes"])


def withhold(optimizer: torch.optim.Optimizer, decide: Callable[[], torch.Tensor | None]) -> None:
    """Make `optimizer.step()` do nothing where `decide()` is true: by the fused kernel, or else by reading the flag.

    Args:
        decide: the last judgement, a 0-d bool tensor; None before the first.
    """
    step = optimizer.step
    fused = takes_a_flag(optimizer)

    def guarded(*args: Any, **kwargs: Any) -> Any:
        skip = decide()
        if skip is None:
            return step(*args, **kwargs)
        if fused:
            return step_unless(skip, optimizer, lambda: step(*args, **kwargs))
        return None if bool(skip) else step(*args, **kwargs)

    optimizer.step = guarded  # type: ignore[method-assign]


def record_bad_step(folder: Path, bad: BadStep, samples: Sequence[int], sources: dict[str, int]) -> None:
    """Append a bad step, with the numbers of its samples, to the run's list."""
    row = {**vars(bad), "samples": list(samples), "sources": sources}
    row = {key: repr(v) if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
    with open(folder / BAD_STEPS_FILE, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def as_ranges(numbers: list[int]) -> list[tuple[int, int]]:
    """Sorted numbers as ranges (first, one past the last)."""
    ranges: list[tuple[int, int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number:
            ranges[-1] = (ranges[-1][0], number + 1)
        else:
            ranges.append((number, number + 1))
    return ranges
