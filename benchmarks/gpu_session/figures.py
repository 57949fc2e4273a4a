"""What a session has measured: a line of JSON for each figure, appended as it is measured. Standard library only."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

FIGURES, STEPS = "figures.jsonl", "steps.jsonl"


@dataclass(frozen=True)
class Figure:
    """A measured number.

    Attributes:
        beside: what it is held against, in its unit: a tolerance, a floor, a prediction, another's figure.
        note: what it is, or why there is none.
    """

    step: str
    setting: str
    name: str
    value: float
    unit: str
    beside: float | None = None
    note: str = ""

    @property
    def key(self) -> str:
        return f"{self.step}/{self.setting}/{self.name}"

    @property
    def ratio(self) -> float:
        return self.value / self.beside if self.beside else math.nan


@dataclass(frozen=True)
class Done:
    """A step that was run; `why` it did not come to its end, or ""."""

    step: str
    seconds: float
    why: str


def append(folder: Path, row: Figure | Done) -> None:
    with (folder / (FIGURES if isinstance(row, Figure) else STEPS)).open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(row)) + "\n")


def read_figures(folder: Path) -> list[Figure]:
    """A later figure replaces an earlier one of its key."""
    return list({figure.key: figure for figure in (Figure(**row) for row in _rows(folder / FIGURES))}.values())


def read_steps(folder: Path) -> dict[str, Done]:
    return {row["step"]: Done(**row) for row in _rows(folder / STEPS)}


def _rows(path: Path) -> Iterable[dict]:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]  # one that was cut off is none
