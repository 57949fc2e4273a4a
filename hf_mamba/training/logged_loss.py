"""The loss that a line of the log shows: the mean of the steps since the line before, of all ranks."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from hf_mamba.run import ranks


class LoggedLoss:
    """Adds up losses on the device, without waiting for it, until they are logged.

    Trainer's own sum is lost with the process, and stays NaN after one step that was.
    """

    def __init__(self, device: torch.device) -> None:
        self._sum = torch.zeros((), device=device)  # this rank's, since the last line
        self.begin(0)

    def begin(self, step: int) -> None:
        """A session starts, with `step` steps done."""
        self._sum.zero_()
        self._first = self._since = step  # of this session, of the next line
        self._total = 0.0  # of this session's lines that are finite

    def add(self, loss: torch.Tensor) -> None:
        """The loss of a micro-batch, its share of the step's."""
        self._sum += loss

    def drain(self, step: int) -> float:
        """The mean loss of a step since the last line. Every rank calls it."""
        parts = [self._sum]
        if ranks.world_size() > 1:
            parts = [torch.empty_like(self._sum) for _ in range(ranks.world_size())]
            dist.all_gather(parts, self._sum)
        total = torch.stack(parts).mean().item()
        self._sum.zero_()
        steps, self._since = step - self._since, step
        if math.isfinite(total):
            self._total += total
        return total / max(steps, 1)

    def of_session(self, step: int) -> float:
        """The mean loss of this session's steps."""
        rest = float(self._sum)
        return (self._total + (rest if math.isfinite(rest) else 0.0)) / max(step - self._first, 0.001)

    def state_dict(self) -> dict[str, Any]:
        """What the next line is to have of the steps so far. Every rank calls it."""
        return {"since": self._since, "losses": ranks.gather(float(self._sum))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        losses = state["losses"]
        mean = sum(losses) / len(losses)
        self._sum += losses[ranks.rank()] if len(losses) == ranks.world_size() else mean
        self._total -= mean  # in the next line, but not in the mean of this session
        self._since = state["since"]
