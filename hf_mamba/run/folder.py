"""A run's folder: whose it is, what to go on from, and what state the run is in. Never another run's.

run.json              what makes the run this one
plan.json             every number, with where it came from
checked.json          what the plan turned out to be where it runs
.lock                 held by the process that writes here
status.json           running, requeue, bad numbers or finished, with the exit code: for scripts that run it again
                      (requeue.py)
log.jsonl             what was logged, as it is logged
samples.jsonl         a text that the model wrote at each evaluation
checkpoint-<step>/    whole, see checkpoints.py
bad_steps.jsonl       updates that were not applied, with their samples
skipped_samples.json  samples that are left out after a rewind
model/                the result
"""

import contextlib
import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_mamba.data import DataError, check_fingerprint
from hf_mamba.dotted import get
from hf_mamba.files import disk_reason, remove_parts, write_json
from hf_mamba.findings import Findings
from hf_mamba.names import BRANCH_OF, LATEST_UNIVERSAL, LOCK_FILE, RUN_FILE, STATUS_FILE
from hf_mamba.plan import Plan
from hf_mamba.run import ranks
from hf_mamba.run.checkpoints import SaveError, finish_interrupted, newest_whole, verify_together
from hf_mamba.run.manifest import DamagedError, Manifest
from hf_mamba.run.owner import stranger, trained
from hf_mamba.run.resume import branch_of, branches, find_checkpoint, find_universal, inspect, other_shards
from hf_mamba.run.signals import EXIT_REQUEUE
from hf_mamba.run.skips import read_skips


@dataclass
class Run:
    """An open run folder, the same on every rank.

    Attributes:
        folder: where everything goes.
        plan: of the run.
        fingerprint: of the data; stored in every checkpoint.
        checkpoint: what to continue from, verified; None for a fresh start.
        manifest: of that checkpoint.
        skip: ranges of samples to leave out.
        rewound_to: the checkpoint that the last rewind went back to.
        lock: the open file that keeps the folder, on rank 0.
    """

    folder: Path
    plan: Plan
    fingerprint: dict[str, Any] = field(default_factory=dict)
    checkpoint: Path | None = None
    manifest: Manifest | None = None
    skip: list[tuple[int, int]] = field(default_factory=list)
    rewound_to: str | None = None
    lock: int | None = None

    def require_folder(self) -> None:
        """Before anything is written there: the folder is still the one that this run keeps. On rank 0.

        Raises:
            SaveError: it was renamed or removed, or is another's; nothing is written beside it.
        """
        if self.lock is None:
            return
        try:
            there = os.stat(self.folder / LOCK_FILE)
        except OSError:
            there = None
        if there is None or not os.path.samestat(there, os.fstat(self.lock)):
            raise SaveError(
                f"{self.folder} was renamed or removed while the run was writing there, so it ends. Where it was "
                "renamed, its checkpoints are whole: give the folder its name again, or write the new --output_dir, "
                "and run the same command."
            )

    @contextlib.contextmanager
    def failures_recorded(self) -> Iterator[None]:
        """An end by an exception or a signal is in status.json, too.

        Raises:
            SaveError: for any file that the disk does not take.
        """
        try:
            with self._disk():
                yield
        except Exception as error:
            self.write_status("failed", 2 if isinstance(error, SaveError | DataError) else 1)
            raise
        except SystemExit:  # by a signal in the export
            self.write_status("requeue", EXIT_REQUEUE)
            raise

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except SaveError:
            raise
        except OSError as error:  # of the log, samples, a state
            reason = disk_reason(error)
            if reason is None:
                raise
            raise SaveError(
                f"{error.filename or 'A file'} cannot be written in {self.folder}: {reason}. The checkpoints are "
                "whole. Make room, and run the same command again."
            ) from error

    def write_status(
        self, status: str, exit_code: int | None = None, step: int | None = None, rewound: bool = False
    ) -> None:
        """Say what state the run is in; on rank 0 only. A folder that cannot be written does not stop anything."""
        if ranks.rank() == 0:
            try:
                self.require_folder()
                row = {"status": status, "exit_code": exit_code, "step": step, "time": time.time()}
                row |= {"resumed_at": self.manifest.step if self.manifest else 0, "rewound": rewound}
                write_json(self.folder / STATUS_FILE, row)
            except OSError as error:
                print(f"warning: {self.folder / STATUS_FILE}: {error.strerror or error}", file=sys.stderr, flush=True)


def open_run(plan: Plan, fingerprint: Mapping[str, Any]) -> Run:
    """Claim the run's folder, and find the checkpoint to continue from. Every rank calls it, in the process group.

    Args:
        plan: gives the folder and what makes the run this one.
        fingerprint: of the data.

    Raises:
        ValueError: the folder is another run's, the checkpoint is not whole, or its data is not this run's.
        OSError: the folder cannot be written.
    """
    if len(chosen := set(ranks.gather(plan.dtype))) > 1:
        raise ValueError(
            f"The machines of this run chose different precisions by their processors: {' and '.join(sorted(chosen))}. "
            "Write --bf16 true or --bf16 false."
        )
    folder, resume = Path(plan.run.output_dir), plan.run.resume
    mine = identity(plan, fingerprint)
    lock = ranks.on_main(lambda: _claim(folder, mine, resume))
    if resume in ("auto", "never"):
        checkpoint, manifest, passed_over = newest_whole(folder)
        _tell(*(f"passed over {reason}" for reason in passed_over))
        if resume == "never" and checkpoint is not None:
            raise ValueError(f"{folder} holds {checkpoint.name}, and --resume never was written. Write --resume auto.")
    else:
        checkpoint = _named_checkpoint(folder, resume)
        try:
            manifest = verify_together(checkpoint)
        except DamagedError as error:
            raise ValueError(f"--resume {resume}: {error}. Write --resume auto for the newest whole one.") from None
        if not manifest.run.get("resumable", True):
            raise ValueError(f"--resume {resume}: it was saved with --save_only_model, without the optimizer's state.")
    skip, rewound_to = ranks.on_main(lambda: read_skips(folder))
    if checkpoint is not None and manifest is not None:
        check_fingerprint(manifest.run.get("fingerprint", {}), fingerprint)
        skip = [*skip, *(tuple(pair) for pair in manifest.run.get("skip", ()))]
        _check_batch(manifest, plan)
        _fit_shards(checkpoint, plan)
        _tell(f"resuming from {checkpoint}, step {manifest.step}")
    ranks.on_main(lambda: _record(folder, mine, plan))
    return Run(
        folder,
        plan,
        dict(fingerprint),
        checkpoint,
        manifest,
        sorted(set(skip)),
        rewound_to,
        lock if ranks.rank() == 0 else None,
    )


def identity(plan: Plan, fingerprint: Any) -> dict[str, Any]:
    """What makes two runs the same: model, data, batch and seed. The world and the number of steps may change."""
    same = {name: getattr(plan, name) for name in plan.run.identity} | {"data": fingerprint}
    return json.loads(json.dumps(same))  # as it will be read back


def _claim(folder: Path, mine: dict[str, Any], resume: str) -> int:
    """Refuse a folder that is not this run's; finish what an interrupted save left. Returns the open lock."""
    if why := stranger(folder, {key: value for key, value in mine.items() if key != "data"}):
        raise ValueError(f"{why} Write another --output_dir.")
    if (folder / RUN_FILE).is_file() and trained(folder):
        check_fingerprint(json.loads((folder / RUN_FILE).read_text()).get("data") or {}, mine["data"])
    with _writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = _hold(folder)
        remove_parts(folder)
    if finished := finish_interrupted(folder):
        _tell(f"{finished} was whole but not yet published; it is now")
    return lock


def _hold(folder: Path) -> int:
    """Keep the folder for this process until it ends, in whatever way: two would write into each other's files.

    Raises:
        ValueError: another process has it.
    """
    file = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)  # never closed: that would free it
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {os.uname().nodename}".encode(), 0)
    except (BlockingIOError, PermissionError):
        raise ValueError(
            f"{folder} is being written by {os.pread(file, 300, 0).decode() or 'another process'}. Wait for its end, "
            f"or write another --output_dir. Where its machine is gone, remove {folder / LOCK_FILE}."
        ) from None
    except OSError:
        pass  # a file system without locks, or a full one, of which the first write will tell
    return file


def _named_checkpoint(folder: Path, resume: str) -> Path:
    """The checkpoint that --resume names, or what its branch in this folder has come to since (run/resume.py)."""

    def choose() -> Path:
        out = Findings()
        checkpoint = find_checkpoint(resume, str(folder), out)
        if out.problems or checkpoint is None:
            raise ValueError("; ".join(map(str, out.problems)))
        if not checkpoint.is_dir():
            raise ValueError(f"--resume {resume}: there is no such folder. Write auto, never or a checkpoint's folder.")
        return checkpoint

    return ranks.on_main(choose)


def _record(folder: Path, mine: dict[str, Any], plan: Plan) -> None:
    resume = plan.run.resume
    began = os.path.realpath(resume) if branches(resume, folder) else branch_of(folder)
    with _writable(folder):
        write_json(folder / RUN_FILE, mine | ({BRANCH_OF: began} if began else {}))
        plan.save(folder)


@contextlib.contextmanager
def _writable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            f"--output_dir {folder} cannot be written: {error.strerror or error}. Write a folder that can."
        ) from None


def _check_batch(manifest: Manifest, plan: Plan) -> None:
    then, now = manifest.run.get("global_batch_size"), plan.global_batch_size
    if then is not None and then != now:
        raise ValueError(
            f"the checkpoint was trained with {then} rows a step and this run has {now}: its samples would be counted "
            f"wrongly. Write --global_batch_size {then}, or start a new run from its weights."
        )


def _fit_shards(checkpoint: Path, plan: Plan) -> None:
    """Make the copy of the checkpoint that this world and stage load, where there is no whole one.

    Raises:
        ValueError: it cannot be made; the checkpoint is as it was.
    """
    ds_config = plan.ds_config or {}
    if not get(ds_config, "checkpoint.load_universal"):
        stage = get(ds_config, "zero_optimization.stage", 0)
        if stage and (reason := ranks.on_main(lambda: other_shards(inspect(checkpoint), stage, plan.world_size))):
            # the pre-flight saw a newer one, which has turned out to be damaged
            raise ValueError(f"{reason}. Run the same command again: it converts this checkpoint.")
        return
    tag, why = ranks.on_main(lambda: find_universal(checkpoint))
    if tag is not None:
        try:
            verify_together(checkpoint / tag)
            return
        except DamagedError as error:
            why = f"{tag}: {error}"
            with contextlib.suppress(OSError):  # then nobody takes it for whole
                ranks.on_main(lambda: (checkpoint / LATEST_UNIVERSAL).unlink(missing_ok=True))
    if why:
        _tell(f"passed over the universal copy of {checkpoint}: {why}")
    from hf_mamba.run.universal import convert

    ranks.on_main_for_long(lambda: convert(checkpoint, _tell))


def _tell(*lines: str) -> None:
    if ranks.rank() == 0:
        for line in lines:
            print(line, file=sys.stderr, flush=True)
