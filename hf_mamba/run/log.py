"""Writes and reads a run's log.jsonl."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_mamba.names import LOG_FILE


def append(folder: Path, row: Mapping[str, Any], before: str = "") -> None:
    """Append a line to a run's log, after `before`."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOG_FILE, "a", encoding="utf-8") as file:
        file.write(before + json.dumps({key: _plain(value) for key, value in row.items()}) + "\n")


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: their names, as text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log, without those that a resumed run did again, and without an unfinished last line."""
    rows: list[dict[str, Any]] = []
    path = folder / LOG_FILE
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # killed, or being written
        if "resumed_at" in row:
            rows = [earlier for earlier in rows if earlier["step"] <= row["resumed_at"]]
        elif "step" in row:
            rows.append({key: _number(value) for key, value in row.items()})
    return rows


def _number(value: Any) -> Any:
    return float(value) if value in ("nan", "inf", "-inf") else value
