"""A run's log as curves and last figures, read once, in memory that does not grow with the log."""

import math
from collections import deque
from collections.abc import Collection
from pathlib import Path
from typing import Any

from hf_mamba.report.html import POINTS
from hf_mamba.run.log import Thinned, read_entries

MAX_SHOWN = 1e30  # of a number in a plot
TAIL = 1000  # lines behind the last, to which a resumed run may go back
SOURCES = 100  # that a plot of the loss by source shows


class Curves:
    """What the page shows of a log.

    Args:
        folder: the run's.
        drawn: the keys that become curves, with those that begin with one of `starts`, of each at most SOURCES.
        shown: the keys of which the last value is shown.

    Attributes:
        resumed: the steps at which the run went on.
    """

    def __init__(self, folder: Path, drawn: Collection[str], starts: Collection[str], shown: Collection[str]) -> None:
        self._curves = {key: Thinned[tuple[int, float]](POINTS) for key in drawn}
        self._by_start: dict[str, list[str]] = {start: [] for start in starts}
        self._tails: dict[str, deque[tuple[int, Any]]] = {key: deque(maxlen=TAIL) for key in (*shown, "pace")}
        self.resumed: list[int] = []
        for entry in read_entries(folder):
            if isinstance(entry, dict):
                self._add(entry)
            else:
                self._go_back(entry)

    def points(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of a curve, thinned where it is long."""
        return self._curves[key].items()

    def keys(self, start: str) -> list[str]:
        """The curves whose key begins with one of `starts`."""
        return sorted(self._by_start[start])

    def last(self, key: str) -> Any:
        """The last value; None where there is none."""
        tail = self._tails[key]
        return tail[-1][1] if tail else None

    def pace(self) -> list[tuple[int, float]]:
        """(step, time) of the last lines with a loss."""
        return list(self._tails["pace"])[-20:]

    def _add(self, row: dict[str, Any]) -> None:
        step = row["step"]
        for key, value in row.items():
            if (tail := self._tails.get(key)) is not None:
                tail.append((step, value))
            if not isinstance(value, (int, float)) or not math.isfinite(value) or abs(value) >= MAX_SHOWN:
                continue
            if (curve := self._curves.get(key) or self._new(key)) is not None:
                curve.add(step, value, (step, float(value)))
        if "loss" in row and "time" in row:
            self._tails["pace"].append((step, row["time"]))

    def _new(self, key: str) -> Thinned[tuple[int, float]] | None:
        for start, keys in self._by_start.items():
            if key.startswith(start) and len(keys) < SOURCES:
                keys.append(key)
                return self._curves.setdefault(key, Thinned(POINTS))
        return None

    def _go_back(self, step: int) -> None:
        if step:
            self.resumed.append(step)
        for curve in self._curves.values():
            curve.cut(step)
        for tail in self._tails.values():
            while tail and tail[-1][0] > step:
                tail.pop()
