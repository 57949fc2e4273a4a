"""Writes and reads a run's log.jsonl."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hf_mamba.names import LOG_FILE

_MAX_STEP = 1 << 62


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
    for row in read_lines(folder / LOG_FILE):
        resumed, step = row.get("resumed_at"), row.get("step")
        if isinstance(resumed, int):
            rows = [earlier for earlier in rows if earlier["step"] <= resumed]
        elif isinstance(step, int) and 0 <= step < _MAX_STEP:
            rows.append({key: _number(value) for key, value in row.items()})
    return rows


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


def _number(value: Any) -> Any:
    if isinstance(value, str) and value in ("nan", "inf", "-inf"):
        return float(value)
    return math.nan if isinstance(value, int) and abs(value) > _MAX_STEP else value
