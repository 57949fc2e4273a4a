"""What a checkpoint consists of, and which of a run's checkpoints is the newest whole one.

The one answer to that question, for the pre-flight, which compares names and sizes, and for the trainer, which then
compares every byte (training/checkpoints.py). Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from hf_mamba.files import write_whole
from hf_mamba.names import LATEST_UNIVERSAL, MANIFEST, NAME, SAVING, UNIVERSAL

FORMAT = 1


class DamagedError(ValueError):
    """A folder is not the checkpoint that its manifest describes, or has no manifest."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of.

    Attributes:
        step: optimizer steps done.
        serial: publications in this run, counted; the newest checkpoint is the one with the largest, since a run that
            went back to step 100 has older checkpoints with larger steps.
        world_size: ranks that wrote it.
        files: path in the folder -> {"size", "sha256"}.
        run: what resuming needs besides the files: the data's fingerprint, skipped samples, and the guard's memory.
    """

    step: int
    serial: int
    world_size: int
    files: dict[str, dict[str, Any]]
    run: dict[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        """As it is stored: with a checksum of itself, for it can be damaged as well as any file."""
        body = {"format": FORMAT, **vars(self)}
        return json.dumps({**body, "sha256": _digest(body)}, indent=1)

    def write(self, folder: Path) -> None:
        """Put it into the folder that it describes, durably."""
        write_whole(folder / MANIFEST, self.text())


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(path: Path) -> dict[str, Any]:
    """A file's entry in a manifest."""
    return {"size": path.stat().st_size, "sha256": file_sha256(path)}


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        DamagedError: it is missing, unreadable or not what was written.
    """
    try:
        stored = json.loads((checkpoint / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise DamagedError(f"it has no {MANIFEST}, so it was never finished") from None
    except NotADirectoryError:
        raise DamagedError("it is not a folder") from None
    except (OSError, ValueError) as error:
        raise DamagedError(f"its {MANIFEST} cannot be read: {error}") from None
    if not isinstance(stored, dict) or stored.pop("sha256", None) != _digest(stored):
        raise DamagedError(f"its {MANIFEST} is not what was written")
    if stored.pop("format") != FORMAT:
        raise DamagedError(f"its {MANIFEST} is of another version of this package")
    return Manifest(**stored)


def check_sizes(checkpoint: Path) -> Manifest:
    """Compare the names and sizes of a checkpoint's files with its manifest, without reading them.

    Raises:
        DamagedError: naming the first file that differs.
    """
    manifest = read_manifest(checkpoint)
    for name, expected in sorted(manifest.files.items()):
        try:
            size = (checkpoint / name).stat().st_size
        except OSError as error:
            raise DamagedError(f"{name} cannot be read: {error.strerror}") from None
        if size != expected["size"]:
            raise DamagedError(f"{name} has {size:,} bytes instead of {expected['size']:,}")
    for name in _names(checkpoint):
        if name not in manifest.files:  # DeepSpeed reads whatever has a shard's name
            raise DamagedError(f"{name} is not one of its files")
    return manifest


def _names(checkpoint: Path) -> Iterator[str]:
    """The files of a checkpoint, but for hidden ones and a universal copy, which has a manifest of its own."""
    for folder, inside, files in os.walk(checkpoint):
        inside[:] = [name for name in inside if not name.startswith(".") and not name.endswith(UNIVERSAL)]
        for name in files:
            if not name.startswith(".") and name not in (MANIFEST, LATEST_UNIVERSAL):
                yield str(Path(folder, name).relative_to(checkpoint))


def verify(checkpoint: Path, share: int = 0, of: int = 1) -> Manifest:
    """Compare a checkpoint with its manifest: the content of every `of`-th file, and in share 0 all names and sizes.

    Raises:
        DamagedError: naming the first file that differs.
    """
    manifest = check_sizes(checkpoint) if share == 0 else read_manifest(checkpoint)
    for name in sorted(manifest.files)[share::of]:
        try:
            if file_sha256(checkpoint / name) != manifest.files[name]["sha256"]:
                raise DamagedError(f"the content of {name} is not what was written")
        except OSError as error:
            raise DamagedError(f"{name} cannot be read: {error.strerror}") from None
    return manifest


def published(folder: Path) -> list[tuple[Path, Manifest | None]]:
    """The run's checkpoints, newest first; without a manifest where it cannot be read. No content is compared."""
    return _newest_first(_inside(folder))


def _newest_first(paths: Iterable[Path]) -> list[tuple[Path, Manifest | None]]:
    found: list[tuple[Path, Manifest | None]] = []
    for path in paths:
        if NAME.match(path.name):
            try:
                found.append((path, read_manifest(path)))
            except DamagedError:
                found.append((path, None))
    return sorted(found, key=_age, reverse=True)


def _age(entry: tuple[Path, Manifest | None]) -> tuple[int, int, int]:
    path, manifest = entry
    step = int(path.name.rsplit("-", 1)[1])
    # one without a readable manifest has no serial: it is tried first, and passed over with the reason
    return (1, 0, step) if manifest is None else (0, manifest.serial, step)


class Candidate(NamedTuple):
    """A checkpoint that a run could continue from, or why not."""

    path: Path
    manifest: Manifest | None  # None where it is damaged
    passed_over: str = ""  # the reason


def candidates(folder: Path) -> Iterator[Candidate]:
    """The run's checkpoints from the newest on: the first that is not passed over is the one to continue from.

    "Newest" is by publication, not by step. One whose rename was interrupted counts, since the next start makes it up.
    """
    staged = [path for path in _inside(folder / SAVING) if not (folder / path.name).exists()]
    staged = [path for path, manifest in _newest_first(staged) if manifest is not None]
    for path, manifest in _newest_first([*_inside(folder), *staged]):
        try:
            manifest = check_sizes(path)
        except DamagedError as error:
            yield Candidate(path, None, str(error))
            continue
        resumable = manifest.run.get("resumable", True)
        reason = "" if resumable else "it was saved with --save_only_model, so it has no optimizer state"
        yield Candidate(path, manifest, reason)


def _inside(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []
