"""Checkpoints that are whole or absent.

A checkpoint is written in `<run>/.saving/`, every file is fsynced and its SHA-256 taken by the rank that wrote it, then
`manifest.json` is written with all of them, and one rename publishes the folder as `<run>/checkpoint-<step>`. So a
process killed at any instant leaves a published checkpoint, or something in `.saving` that nobody takes for one. A
folder in `.saving` with a manifest that holds is whole, too: only its rename is missing, and the next start does it.

Before anything is loaded, all ranks compare every file with the manifest, each reading its share.

The checksums guard against damage, not against malice. transformers reads optimizer.pt, scheduler.pt and rng_state*.pth
with `weights_only=True`, which executes nothing; DeepSpeed unpickles its shards (global_step*/*.pt) without it.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_mamba.data.cache import fsync_path

from . import ranks

MANIFEST = "manifest.json"
SAVING = ".saving"
DAMAGED = ".damaged"
FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d+)$")
# The rank in the names that transformers, DeepSpeed and FSDP give to files which are not rank 0's.
_OWNER = re.compile(r"(?:^|_)(?:rng_state|zero_pp_rank)_(\d+)[_.]|^__(\d+)_\d+\.distcp$")


class SaveError(OSError):
    """A checkpoint could not be written; those before it are whole."""

    origin: int  # the rank that could not


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


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


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


def verify(checkpoint: Path, share: int = 0, of: int = 1) -> Manifest:
    """Compare a checkpoint with its manifest: every name and size, and the content of every `of`-th file.

    Raises:
        DamagedError: naming the first file that differs.
    """
    manifest = read_manifest(checkpoint)
    for number, (name, expected) in enumerate(sorted(manifest.files.items())):
        path = checkpoint / name
        try:
            size = path.stat().st_size
            if size != expected["size"]:
                raise DamagedError(f"{name} has {size:,} bytes instead of {expected['size']:,}")
            if number % of == share and file_sha256(path) != expected["sha256"]:
                raise DamagedError(f"the content of {name} is not what was written")
        except OSError as error:
            raise DamagedError(f"{name} cannot be read: {error.strerror}") from None
    return manifest


def verify_together(checkpoint: Path) -> Manifest:
    """`verify`, with the files shared among the ranks; every rank gets the same answer."""
    return ranks.on_all(lambda: verify(checkpoint, ranks.rank(), ranks.world_size()))


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def published(folder: Path) -> list[tuple[Path, Manifest | None]]:
    """The run's checkpoints, newest first; without a manifest where it cannot be read. No content is compared."""
    found: list[tuple[Path, Manifest | None]] = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if _NAME.match(path.name):
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


def newest_whole(folder: Path) -> tuple[Path | None, Manifest | None, list[str]]:
    """The newest checkpoint that is what its manifest says, and why newer ones were passed over. All ranks call it.

    Damaged ones are renamed to `checkpoint-<step>.damaged`, so that rotation does not count them.
    """
    passed_over: list[str] = []
    for path in ranks.on_main(lambda: [entry[0] for entry in published(folder)]):
        try:
            manifest = verify_together(path)
        except DamagedError as error:
            passed_over.append(f"{path.name}: {error}")
            ranks.on_main(lambda path=path: _set_aside(path))  # type: ignore[misc]
            continue
        if not manifest.run.get("resumable", True):
            passed_over.append(f"{path.name}: it was saved with --save_only_model, so it has no optimizer state")
            continue
        return path, manifest, passed_over
    return None, None, passed_over


def _set_aside(path: Path) -> None:
    aside = path.with_name(path.name + DAMAGED)
    with contextlib.suppress(OSError):  # a read-only folder: it is passed over all the same
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)


def finish_interrupted(folder: Path) -> str | None:
    """On rank 0, before anything else: publish a whole checkpoint whose rename was interrupted, remove leftovers.

    Returns:
        The name of a checkpoint that was published, or None.
    """
    saving = folder / SAVING
    done = None
    for path in sorted(saving.iterdir()) if saving.is_dir() else ():
        final = folder / path.name
        if _NAME.match(path.name) and not final.exists():
            with contextlib.suppress(DamagedError, OSError):
                verify(path)
                path.rename(final)
                fsync_path(folder)
                done = path.name
    shutil.rmtree(saving, ignore_errors=True)
    return done


@contextlib.contextmanager
def saving(folder: Path, step: int, run: Mapping[str, Any]) -> Iterator[Path]:
    """Write a checkpoint: `with saving(...) as staging:` every rank writes to `staging/checkpoint-<step>`.

    At the end of the block it is made durable and published. Every rank enters; nothing is published if any fails.

    Raises:
        SaveError: what could not be written, and why; what was written is removed again.
    """
    staging = folder / SAVING
    name = f"checkpoint-{step}"
    try:
        ranks.on_main(lambda: _fresh(staging))
        yield staging
        (staging / name / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads; plan.json says it
        ranks.barrier()
        files = _settle(staging / name)
        ranks.on_main(lambda: _publish(folder, step, files, run))
    except Exception as error:  # the writers raise what they like: OSError, RuntimeError, SafetensorError
        reason = _why(staging, error)
        if ranks.rank() == 0:
            shutil.rmtree(staging, ignore_errors=True)
        if reason is None:
            raise
        failure = SaveError(
            f"{name} cannot be written to {folder}: {reason}. The checkpoints before it are whole; what was written of "
            "this one is removed. Make room (a save needs space for one checkpoint more than --save_total_limit keeps) "
            "or correct the folder, and run the same command again."
        )
        failure.origin = getattr(error, "origin", ranks.rank())
        raise failure from error


def _fresh(staging: Path) -> None:
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)


def _settle(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """Make every file durable and take its size and checksum, each rank those that it wrote itself."""
    mine: dict[str, dict[str, Any]] = {}
    seen = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file():
            name = str(path.relative_to(checkpoint))
            seen[name] = path.stat().st_size
            if _owner(name) == ranks.rank():
                fsync_path(path)
                mine[name] = {"size": seen[name], "sha256": file_sha256(path)}
    files = {name: entry for part in ranks.gather(mine) for name, entry in part.items()}
    for name, entry in files.items():
        if seen.get(name) != entry["size"]:
            raise SaveError(
                f"rank {ranks.rank()} on {os.uname().nodename} does not see {name}, which another rank wrote; "
                "all nodes must share the file system of --output_dir"
            )
    return files


def _owner(name: str) -> int:
    """The rank that wrote a file; rank 0 unless the name says another."""
    match = _OWNER.search(Path(name).name)
    owner = int(match[1] or match[2]) if match else 0
    return owner if owner < ranks.world_size() else 0


def _publish(folder: Path, step: int, files: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    staged = folder / SAVING / f"checkpoint-{step}"
    final = folder / staged.name
    serial = 1 + max((manifest.serial for _, manifest in published(folder) if manifest), default=0)
    manifest = Manifest(step, serial, ranks.world_size(), dict(files), dict(run))
    with open(staged / MANIFEST, "w", encoding="utf-8") as file:
        file.write(manifest.text())
        file.flush()
        os.fsync(file.fileno())
    for path in [*(p for p in staged.rglob("*") if p.is_dir()), staged]:
        fsync_path(path)
    if final.exists():  # the run went back to before this step; killed here, `finish_interrupted` has the new one
        final.rename(folder / SAVING / "replaced")
    staged.rename(final)
    fsync_path(folder)
    shutil.rmtree(folder / SAVING, ignore_errors=True)


def rotate(folder: Path, keep: int | None, best: str | None = None) -> list[str]:
    """Remove the oldest checkpoints beyond `keep`, never the newest, the best one or one that is not ours to count.

    On rank 0, after a checkpoint was published, which therefore is the newest and whole.

    Returns:
        The names of those removed.
    """
    if not keep or keep < 1:
        return []
    ours = [path for path, manifest in published(folder) if manifest is not None]
    doomed = [path for path in ours[1:] if best is None or path.name != Path(best).name]
    kept = len(ours) - len(doomed)
    doomed = doomed[max(keep - kept, 0) :]
    for path in doomed:
        # renamed first: a removal that is interrupted leaves nothing that looks like a checkpoint
        (folder / SAVING).mkdir(exist_ok=True)
        gone = folder / SAVING / f"removed-{path.name}"
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
    shutil.rmtree(folder / SAVING, ignore_errors=True)
    return [path.name for path in doomed]


def _why(staging: Path, error: BaseException) -> str | None:
    """The disk's reason for a failure, found in the error, its causes, or by trying; None when it is not the disk's."""
    from hf_mamba.data.cache import disk_reason

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, SaveError):
            return str(cause)
        if isinstance(cause, OSError) and (reason := disk_reason(cause)):
            return reason
        cause = cause.__cause__ or cause.__context__
    try:  # torch and safetensors raise errors of their own, without the number
        staging.mkdir(parents=True, exist_ok=True)
        probe = staging / "probe"
        with open(probe, "wb") as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
        probe.unlink()
    except OSError as found:
        return disk_reason(found) or str(found)
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    where = frame.tb_frame.f_code.co_filename if frame is not None else ""
    if type(error).__name__ == "SafetensorError" or where.endswith("torch/serialization.py"):
        return f"writing failed ({error}), with {shutil.disk_usage(staging.parent).free / 1e9:.1f} GB free"
    return None
