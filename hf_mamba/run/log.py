"""Writes and reads a run's log.jsonl."""

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeGuard, TypeVar

from hf_mamba.names import LOG_FILE

HISTORY = 1000  # of a run's lines that are kept in memory, and stretches of its loss curve

_MAX_STEP = 1 << 62
T = TypeVar("T")
_Point: TypeAlias = tuple[float, int, T]  # value, step


def append(folder: Path, row: Mapping[str, Any], before: str = "") -> None:
    """Append a line to a run's log, after `before`."""
    with open(folder / LOG_FILE, "a", encoding="utf-8") as file:
        file.write(before + json.dumps({key: _plain(value) for key, value in row.items()}) + "\n")


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: their names, as text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log, without those that a resumed run did again, and without an unfinished last line."""
    rows: list[dict[str, Any]] = []
    for entry in read_entries(folder):
        if isinstance(entry, dict):
            rows.append(entry)
        else:
            while rows and rows[-1]["step"] > entry:
                rows.pop()
    return rows


def read_entries(folder: Path) -> Iterator[dict[str, Any] | int]:
    """What a run's log says in order: a line, or the step that the run went on at, behind which all lines are void."""
    for row in read_lines(folder / LOG_FILE):
        if is_step(resumed := row.get("resumed_at")):
            yield resumed
        elif is_step(row.get("step")):
            yield {key: _number(value) for key, value in row.items()}


def read_history(
    folder: Path, until: int | None = None, earlier: Iterable[Mapping[str, Any]] = ()
) -> list[Mapping[str, Any]]:
    """The lines of a run's log that its loss curve is drawn of, and the last: all of them, or a choice of very many.

    Args:
        until: the last step that counts.
        earlier: lines kept elsewhere (in trainer_state.json); those before the log's first step count.
    """
    before = list(earlier)
    entries = read_entries(folder)
    first = next((entry for entry in entries if isinstance(entry, dict)), None)
    if first is not None:
        before = [row for row in before if row.get("step", 0) < first["step"]]
        entries = itertools.chain([first], entries)
    curves = {key: Thinned[Mapping[str, Any]](HISTORY) for key in ("loss", "eval_loss")}
    last: Mapping[str, Any] | None = None
    for entry in itertools.chain(before, entries):
        if isinstance(entry, int):
            last = last if last is not None and last["step"] <= entry else None
            for curve in curves.values():
                curve.cut(entry)
        elif until is None or entry.get("step", 0) <= until:
            last = entry
            for key, curve in curves.items():
                if isinstance(entry.get(key), (int, float)):
                    curve.add(entry.get("step", 0), entry[key], entry)
    rows = sorted((row for curve in curves.values() for row in curve.items()), key=lambda row: row.get("step", 0))
    return rows if last is None or any(row is last for row in rows) else [*rows, last]


class Thinned(Generic[T]):
    """Some points of a curve that grows: all, until it is long; then of each stretch the lowest and the highest.

    The stretches are equal in steps, and double in width as the curve grows.

    Args:
        limit: of the number of stretches.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._width = limit, 1
        self._stretches: list[tuple[int, _Point[T], _Point[T]]] = []  # number, the lowest, the highest

    def add(self, step: int, value: float, item: T) -> None:
        """Go on with a point; NaN counts as higher than all numbers."""
        point = (math.inf if math.isnan(value) else value, step, item)
        self._join(self._stretches, (step // self._width, point, point))
        while len(self._stretches) > self._limit:
            self._width *= 2
            merged: list[tuple[int, _Point[T], _Point[T]]] = []
            for number, lowest, highest in self._stretches:
                self._join(merged, (number // 2, lowest, highest))
            self._stretches = merged

    def cut(self, step: int) -> None:
        """Forget what comes after a step; of the stretch that it falls into, more may be lost."""
        while self._stretches:
            number, *ends = self._stretches[-1]
            kept = [point for point in ends if point[1] <= step]
            if len(kept) == 2:
                break
            self._stretches.pop()
            if kept:
                self._stretches.append((number, kept[0], kept[0]))
                break

    def items(self) -> list[T]:
        """The points, in their order."""
        found = []
        for _, lowest, highest in self._stretches:
            ends = [lowest] if lowest is highest else sorted((lowest, highest), key=lambda point: point[1])
            found += [item for _, _, item in ends]
        return found

    @staticmethod
    def _join(stretches: "list[tuple[int, _Point[T], _Point[T]]]", new: "tuple[int, _Point[T], _Point[T]]") -> None:
        """Append a stretch, or widen the last one where it has the same number."""
        if stretches and stretches[-1][0] == new[0]:
            number, lowest, highest = stretches[-1]
            lowest = new[1] if new[1][0] < lowest[0] else lowest
            highest = new[2] if new[2][0] > highest[0] else highest
            stretches[-1] = (number, lowest, highest)
        else:
            stretches.append(new)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a .jsonl file; lines that hold none, and bytes that are no text, are passed over."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue  # killed, or being written
            if isinstance(row, dict):
                yield row


def is_step(value: Any) -> TypeGuard[int]:
    """Whether a value of a log is a step's number."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MAX_STEP


def _number(value: Any) -> Any:
    if isinstance(value, str) and value in ("nan", "inf", "-inf"):
        return float(value)
    return math.nan if isinstance(value, int) and abs(value) > _MAX_STEP else value
