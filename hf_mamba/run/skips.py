"""Reads and writes the ranges of samples that a rewind leaves out."""

import json
from collections.abc import Sequence
from pathlib import Path

from hf_mamba.files import write_whole
from hf_mamba.names import SKIP_FILE


def read_skips(folder: Path) -> tuple[list[tuple[int, int]], str | None]:
    """Ranges of samples that this run leaves out, and the checkpoint that the last rewind went back to."""
    try:
        stored = json.loads((folder / SKIP_FILE).read_text())
    except FileNotFoundError:
        return [], None
    except ValueError as error:
        raise ValueError(f"{folder / SKIP_FILE} cannot be read ({error}); write it again, or remove it") from None
    return [(begin, end) for begin, end in stored["samples"]], stored["rewound_to"]


def write_skips(folder: Path, samples: Sequence[tuple[int, int]], rewound_to: str) -> None:
    """Store the ranges of samples to leave out; whole or absent."""
    write_whole(folder / SKIP_FILE, json.dumps({"samples": list(samples), "rewound_to": rewound_to}))
