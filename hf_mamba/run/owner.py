"""Whether the run's folder can be this run's, seen before anything is built; training/run_folder.py claims it."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_mamba.findings import Findings
from hf_mamba.names import LOCK_FILE, LOG_FILE, NAME, RUN_FILE


def trained(folder: Path) -> bool:
    """Whether a step was ever logged or saved in a run's folder; one without belongs to nobody."""
    return (folder / LOG_FILE).exists() or any(NAME.match(entry.name) for entry in folder.iterdir())


def stranger(folder: Path, mine: Mapping[str, Any]) -> str | None:
    """Why a folder is not this run's, in a sentence; None where it is, or is empty or absent.

    Args:
        mine: what must not have changed, by the names of run.json.
    """
    record = folder / RUN_FILE
    if record.is_file():
        try:
            theirs = dict(json.loads(record.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            return f"{record} cannot be read ({error}): restore it."
        differing = ", ".join(key for key in mine if theirs.get(key) != mine[key])
        if not differing or not trained(folder):
            return None
        return f"{folder} belongs to another run: its {differing} differ from this one's."
    if folder.is_dir() and any(entry.name != LOCK_FILE for entry in folder.iterdir()):
        return f"{folder} is not empty and holds no {RUN_FILE}: it is not a run's."
    return None


def check_output(output_dir: str, mine: Mapping[str, Any], continues: bool, out: Findings) -> None:
    """A folder that cannot be made or written, or is another's.

    Args:
        continues: the run goes on from a checkpoint in it, which has been looked at.
    """
    folder = Path(output_dir)
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    why = None if continues else stranger(folder, mine)
    if not there.is_dir():
        why = f"It cannot be written: {there} is not a folder."
    elif not os.access(there, os.W_OK | os.X_OK):
        reason = errno.EROFS if os.statvfs(there).f_flag & os.ST_RDONLY else errno.EACCES
        why = f"{there} cannot be written: {os.strerror(reason)}."
    if why:
        out.problem("output_dir", output_dir, why, "Write another --output_dir.", id="output-dir-not-usable")
