"""Whether a run that has ended should be started again: what a requeue script asks.

Launchers replace the exit code of their processes by 1, so the answer is read from the run's folder. A run that has
made no progress since its last start is not started again, whatever it says: it would go in circles.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from hf_mamba.names import STATUS_FILE
from hf_mamba.run.manifest import candidates


def read_status(folder: Path) -> dict[str, Any]:
    """The run's status.json (see run_folder.py); empty where there is none.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        status = json.loads((folder / STATUS_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / STATUS_FILE} cannot be read: {error}.") from None
    if not isinstance(status, dict):
        raise ValueError(f"{folder / STATUS_FILE} is not a run's status.")
    return status


def should_run_again(folder: Path, since: float) -> tuple[bool, str]:
    """(whether the same command should run again, why).

    Args:
        folder: of the run.
        since: when the command was started, in seconds since 1970.
    """
    status = read_status(folder)
    state, began = status.get("status"), status.get("resumed_at") or 0
    if float(status.get("time") or 0) < since:
        return False, "it did not come to its first step"
    if state not in ("requeue", "running"):
        return False, f"its status is {state}"
    if state == "requeue" and status.get("rewound"):
        return True, "it goes back to its last checkpoint, without the samples that spoilt it"
    newest = next((found.manifest for found in candidates(folder) if found.manifest and not found.passed_over), None)
    if newest is None or newest.step <= began:
        return False, f"it has saved nothing beyond step {began}, where it began"
    why = "it was stopped" if state == "requeue" else "it was lost"
    return True, f"{why} and has come from step {began} to {newest.step}"


def main(argv: list[str]) -> int:
    """`hf-mamba requeue RUN --since SECONDS`: exit code 0 where the same command should run again, else 1."""
    parser = argparse.ArgumentParser(
        prog="hf-mamba requeue",
        allow_abbrev=False,
        description="Whether a run that has ended should be started again: exit code 0, or 1, and the reason.",
    )
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--since", type=float, required=True, help="when it was started: $(date +%%s) before that")
    own = parser.parse_args(argv)
    again, why = should_run_again(own.run, own.since)
    print(f"{own.run}: {'run again' if again else 'not run again'}: {why}", file=sys.stderr)
    return 0 if again else 1
