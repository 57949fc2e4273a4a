"""Sums of losses by source, exact: every prediction counts the same, on all ranks together."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hf_mamba.run import ranks

SOURCE = "source_id"  # in a batch, (B,): the source of each row
SHOWN = 20  # sources that a line of the log names, where there are more


def short_names(sources: Sequence[str]) -> list[str]:
    """The ends of the sources' paths, as short as tells them apart: what the log and trackers call them."""
    for length in range(1, 1 + max(source.count("/") + 1 for source in sources)):
        names = ["/".join(source.rstrip("/").split("/")[-length:]) for source in sources]
        if len(set(names)) == len(names):
            return names
    return list(sources)


class Losses(NamedTuple):
    """Mean losses of a prediction: of all, of each source that had any, and what a line of the log has of these."""

    mean: float
    of_sources: dict[str, float]
    shown: dict[str, float]


class LossBySource:
    """Adds up losses on the device, without waiting for it, until they are read.

    Args:
        names: of the sources, in the order of their numbers.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self.names = list(names)
        exact = torch.float32 if device.type == "mps" else torch.float64
        self._sums = torch.zeros(2, len(self.names), dtype=exact, device=device)  # losses, predictions
        self._predictions = [0.0] * len(self.names)  # that earlier lines had, of all ranks

    def add(self, token_losses: Tensor, labels: Tensor, sources: Tensor) -> None:
        """Losses of the predictions of a batch (B, L), its labels (B, L) as the model takes them, its sources (B,)."""
        rows = torch.stack([token_losses.sum(1, dtype=self._sums.dtype), (labels[:, 1:] != -100).sum(1)])
        self._sums.index_add_(1, sources, rows.to(self._sums.dtype))

    def drain(self) -> Losses:
        """The losses since the last reading. Every rank calls it."""
        sums = self._sums.clone()
        self._sums.zero_()
        if ranks.world_size() > 1:
            dist.all_reduce(sums)
        losses, counts = sums.tolist()
        self._predictions = [before + c for before, c in zip(self._predictions, counts, strict=True)]
        mean = sum(losses) / sum(counts) if sum(counts) else float("nan")
        means = {n: loss / c for n, loss, c in zip(self.names, losses, counts, strict=True) if c}
        return Losses(mean, means, means if len(self.names) <= SHOWN else self._largest(losses, counts))

    def _largest(self, losses: list[float], counts: list[float]) -> dict[str, float]:
        """The sources with the most predictions so far, and all others as one."""
        order = sorted(range(len(self.names)), key=lambda number: -self._predictions[number])
        largest, rest = order[: SHOWN - 1], order[SHOWN - 1 :]
        out = {self.names[number]: losses[number] / counts[number] for number in largest if counts[number]}
        if count := sum(counts[number] for number in rest):
            out[f"the other {len(rest)} sources"] = sum(losses[number] for number in rest) / count
        return out

    def state_dict(self) -> dict[str, Any]:
        """What was added since the last reading, of all ranks. Every rank calls it."""
        return {"sums": ranks.gather(self._sums.tolist()), "predictions": self._predictions}

    def load_state_dict(self, state: Any) -> None:
        """Add what `state` has: each rank's own part, or, of another number of ranks, all of it on rank 0."""
        rank, parts = ranks.rank(), state["sums"] if isinstance(state, dict) else state  # a list before version 0.2
        mine = [parts[rank]] if len(parts) == ranks.world_size() else list(parts) if rank == 0 else []
        for part in mine:
            self._sums += torch.tensor(part, dtype=self._sums.dtype, device=self._sums.device)
        if isinstance(state, dict) and "predictions" in state:  # older checkpoints have none
            self._predictions = list(state["predictions"])
