"""Starts commands in processes of their own, side by side, each with a limit of time. Standard library only."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """A command.

    Attributes:
        limit: seconds after which it is ended, with all that it started.
        output: the file that its output goes to; None for this process's own.
    """

    name: str
    command: Sequence[str]
    limit: float
    output: Path | None = None
    environment: Mapping[str, str] | None = None


def run_together(jobs: Sequence[Job]) -> Iterator[tuple[Job, str, float]]:
    """Each job as it ends: with why it did not come to its end, "" if it did, and the seconds that it took."""
    begin = time.monotonic()
    running = {job.name: (job, start(job)) for job in jobs}
    try:
        while running:
            for job, process in list(running.values()):
                seconds = time.monotonic() - begin
                code = process.poll()
                if code is None and seconds < job.limit:
                    continue
                end(process)
                del running[job.name]
                why = f"not within {job.limit:.0f} s" if code is None else f"ended with {code}" if code else ""
                yield job, why, seconds
            time.sleep(0.05)
    finally:
        for _, process in running.values():
            end(process)


def start(job: Job) -> subprocess.Popen:
    with open(job.output, "wb") if job.output else nullcontext() as output:
        error = subprocess.STDOUT if output else None
        return subprocess.Popen(job.command, stdout=output, stderr=error, env=job.environment, process_group=0)


def end(process: subprocess.Popen) -> None:
    """Ends a process and what it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
