"""Everything that a GPU has to settle, the worthiest first: for somebody who has one for a quarter of an hour.

    python -m benchmarks.gpu_session --minutes 8 --out DIR [--only a,b-scan] [--rehearse]

First all imports are tried, at once and for at most 20 s; what is missing is listed and nothing else begun. Then each
step runs in a process of its own with its own limit of time (steps.py); one that fails, hangs or is ended costs itself
alone. DIR keeps figures.jsonl and steps.jsonl, appended as they are measured, each step's output in log.txt, and in the
end report.md: which statements of README, TRITON.md and the dispatcher the figures confirm or refute.

The same command again goes on: steps that came to their end are skipped, those that did not come last.
`--rehearse` runs every step on a CPU, tiny and in Triton's interpreter; the figures of a rehearsal mean nothing.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from benchmarks.gpu_session.figures import Done, append, read_figures, read_steps
from benchmarks.gpu_session.steps import IMPORT_LIMITS, IMPORTS, STEPS, Step
from benchmarks.gpu_session.verdicts import report
from benchmarks.processes import Job, run_together

ROOT = Path(__file__).parents[2]
LEAST = 10  # seconds that must be left for another step
SLOWER = 10  # a rehearsal's limits are so many times those of a GPU
LOG = 20_000  # characters of a step's output that are kept


def main(arguments: list[str] | None = None, steps: Sequence[Step] = STEPS, imports: Sequence[str] = IMPORTS) -> int:
    """Run a session. steps, imports: another table of each, for the tests."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_session", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--minutes", type=float, default=8, help="no step goes on after these")
    parser.add_argument("--only", default="", help="steps or their letters, by commas: " + ", ".join(names(steps)))
    parser.add_argument("--out", type=Path, required=True, help="a folder of few and small files")
    parser.add_argument("--rehearse", action="store_true", help="all of it on a CPU, tiny")
    options = parser.parse_args(arguments)
    only = [name for name in options.only.split(",") if name]
    if unknown := [name for name in only if not any(asked(step, [name]) for step in steps)]:
        parser.error(f"there is no step {', '.join(unknown)}: choose from {', '.join(names(steps))}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is ended, too
    options.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    slower = SLOWER if options.rehearse else 1
    environment = environment_of(options.rehearse)
    if missing := faults(imports[options.rehearse :], [slower * limit for limit in IMPORT_LIMITS], environment):
        print("These cannot be imported here, and nothing was begun:", *missing, sep="\n  ", file=sys.stderr)
        return 1
    done = read_steps(options.out)
    todo = [step for step in steps if asked(step, only) and (step.name not in done or done[step.name].why)]
    todo.sort(key=lambda step: step.name in done)  # what failed comes last
    for batch in batches(todo):
        left = end - time.monotonic()
        if left < LEAST:
            print(f"left for another start: {', '.join(names(todo[todo.index(batch[0]) :]))}", flush=True)
            break
        for step, why, seconds in run(batch, options, left, slower, environment):
            cut = why and left < step.limit * slower and seconds >= left
            print(f"{step.name}: {seconds:.0f} s{', ' * bool(why)}{why}", flush=True)
            if not cut:  # by the session's end: it is no fault of the step's
                append(options.out, Done(step.name, round(seconds, 1), why))
    text, summary = report(read_figures(options.out), read_steps(options.out), names(steps))
    (options.out / "report.md").write_text(text, encoding="utf-8")
    print(summary, options.out / "report.md", sep="\n")
    return 0


def names(steps: Sequence[Step]) -> list[str]:
    return [step.name for step in steps]


def asked(step: Step, only: Sequence[str]) -> bool:
    return not only or any(name in (step.name, step.name.partition("-")[0]) for name in only)


def batches(steps: Sequence[Step]) -> Iterator[list[Step]]:
    """Neighbours that may run together, and each other step alone."""
    for together, group in groupby(steps, key=lambda step: step.together):
        found = list(group)
        yield from [found] if together else [[step] for step in found]


def run(
    batch: Sequence[Step], options: argparse.Namespace, left: float, slower: int, environment: dict[str, str]
) -> Iterator[tuple[Step, str, float]]:
    """The steps as they end, their output put into the log."""
    by_name = {step.name: step for step in batch}
    command = [sys.executable, "-m", "benchmarks.gpu_session.step"]
    rest = [str(options.out.resolve()), *["--rehearse"] * options.rehearse]
    with tempfile.TemporaryDirectory() as folder:
        jobs = [
            Job(
                step.name,
                [*command, step.name, step.function, *rest, *step.arguments],
                min(step.limit * slower, left),
                Path(folder) / step.name,
                environment,
            )
            for step in batch
        ]
        for job, why, seconds in run_together(jobs):
            assert job.output is not None
            said = job.output.read_text(errors="replace")
            with (options.out / "log.txt").open("a", encoding="utf-8") as log:
                log.write(f"== {job.name}: {seconds:.1f} s {why}\n{said[-LOG:]}\n")
            yield by_name[job.name], why and f"{why}: {last_line(said)}", seconds


def faults(imports: Sequence[str], limits: Sequence[float], environment: dict[str, str]) -> list[str]:
    """What cannot be imported, and why; what is late is tried again, for as long as the next limit."""
    found, late = [], []
    with tempfile.TemporaryDirectory() as folder:
        jobs = [
            Job(line, [sys.executable, "-c", line], limits[0], Path(folder) / str(number), environment)
            for number, line in enumerate(imports)
        ]
        for job, why, _ in run_together(jobs):
            if why.startswith("not within") and limits[1:]:
                late.append(job.name)
            elif why and job.output:
                found.append(f"{job.name}: {why}: {last_line(job.output.read_text(errors='replace'))}")
    return found + faults(late, limits[1:], environment) if late else found


def last_line(text: str) -> str:
    return next((line[:200] for line in reversed(text.splitlines()) if line.strip()), "")


def environment_of(rehearse: bool) -> dict[str, str]:
    """The processes' environment: nothing is fetched, and all sums of the matrix products have one order."""
    found = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "true",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
    return found | ({"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} if rehearse else {})
