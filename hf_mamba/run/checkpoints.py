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
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hf_mamba.files import fsync_path, settle, usual_mode
from hf_mamba.names import NAME, SAVING
from hf_mamba.run import ranks
from hf_mamba.run.manifest import DamagedError, Manifest, candidates, describe, published, verify

DAMAGED = ".damaged"
# The rank in the names that transformers, DeepSpeed and FSDP give to files which are not rank 0's.
_OWNER = re.compile(r"(?:^|_)(?:rng_state|zero_pp_rank)_(\d+)[_.]|^__(\d+)_\d+\.distcp$")


class SaveError(OSError):
    """A checkpoint could not be written; those before it are whole."""

    origin: int  # the rank that could not


def verify_together(checkpoint: Path) -> Manifest:
    """`verify`, with the files shared among the ranks; every rank gets the same answer."""
    return ranks.on_all(lambda: verify(checkpoint, ranks.rank(), ranks.world_size()))


def newest_whole(folder: Path) -> tuple[Path | None, Manifest | None, list[str]]:
    """The newest checkpoint that is what its manifest says, and why newer ones were passed over. All ranks call it.

    Damaged ones are renamed to `checkpoint-<step>.damaged`, so that rotation does not count them.
    """
    passed_over: list[str] = []
    for path, manifest, reason in ranks.on_main(lambda: list(candidates(folder))):
        if not reason:
            try:
                return path, verify_together(path), passed_over
            except DamagedError as error:
                manifest, reason = None, str(error)
        passed_over.append(f"{path.name}: {reason}")
        if manifest is None:
            ranks.on_main(lambda path=path: _set_aside(path))  # type: ignore[misc]
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
        if NAME.match(path.name) and not final.exists():
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
        reason = why_not_written(staging, error)
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
    mode = usual_mode(checkpoint.parent)
    for name in sorted(_names(checkpoint)):
        if _owner(name) == ranks.rank():
            settle(checkpoint / name, mode)
            mine[name] = describe(checkpoint / name)
    files = {name: entry for part in ranks.gather(mine) for name, entry in part.items()}
    ranks.on_main(lambda: _check_seen(checkpoint, files))
    return files


def _names(checkpoint: Path) -> Iterator[str]:
    """The files below a folder, of which none is looked at: with many ranks, each has many."""
    for folder, _, names in os.walk(checkpoint):
        yield from (os.path.relpath(os.path.join(folder, name), checkpoint) for name in names)


def _check_seen(checkpoint: Path, files: Mapping[str, Any]) -> None:
    """Rank 0 sees what the others wrote."""
    for name, entry in files.items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != entry["size"]:
            raise SaveError(
                f"rank {ranks.rank()} on {os.uname().nodename} does not see {name}, which another rank wrote; "
                "all nodes must share the file system of --output_dir"
            )


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
    manifest.write(staged)
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


def why_not_written(staging: Path, error: BaseException) -> str | None:
    """The disk's reason for a failure, found in the error, its causes, or by trying; None when it is not the disk's."""
    from hf_mamba.files import disk_reason

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
