"""The pre-flight against today's stack, over thousands of drawn runs: what starts here must start there, and mean it.

    python -m benchmarks.run fuzz [--cases 10000] [--seed 0] [--folder REAL_FILES] [--jobs 2]

Draws DeepSpeed files, flags and worlds (fuzz_cases.py), asks both sides (fuzz_verdict.py), makes each disagreement as
small as it gets, and prints how many of each kind there are, with times. The exit code is 1 where there is one of the
kinds that must not be. Writes benchmarks/results/fuzz.csv. Nothing is started.
"""

from __future__ import annotations

import argparse
import copy
import csv
import multiprocessing
import os
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .fuzz_cases import Case, draw, real_files
from .fuzz_verdict import BAD, STRICTER, Verdict, judge

RESULTS = Path(__file__).parent / "results" / "fuzz.csv"
SHOWN = 25  # causes of a kind that are listed


@dataclass
class Outcome:
    """What a series of cases has shown."""

    kinds: Counter[str] = field(default_factory=Counter)
    causes: dict[Verdict, list[Case]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)  # of resolve and its report, CPU time

    @property
    def bad(self) -> list[Verdict]:
        return [verdict for verdict in self.causes if verdict.kind in BAD]

    def add(self, other: Outcome) -> None:
        self.kinds += other.kinds
        self.seconds += other.seconds
        for verdict, cases in other.causes.items():
            self.causes.setdefault(verdict, []).extend(cases)


def run(cases: int, seed: int, folder: Path | None = None, jobs: int = 1) -> Outcome:
    """Draw and judge so many cases; each is a function of the seed and its number, and of no other.

    Args:
        folder: of real files, which become a part of the cases.
        jobs: processes that share the cases.
    """
    if jobs == 1:
        return _run(range(cases), seed, folder)
    outcome = Outcome()
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        shares = [(range(cases)[start::jobs], seed, folder) for start in range(jobs)]
        for share in pool.starmap(_run, shares):
            outcome.add(share)
    return outcome


def _run(numbers: Iterable[int], seed: int, folder: Path | None) -> Outcome:
    outcome, bases = Outcome(), real_files(folder)
    for number in numbers:
        case = draw(random.Random(f"{seed} {number}"), bases)
        verdict = judge(case, outcome.seconds)
        outcome.kinds[verdict.kind] += 1
        if verdict.kind in (*BAD, STRICTER):
            outcome.causes.setdefault(verdict, []).append(case)
    return outcome


def smaller(case: Case) -> Iterator[Case]:
    """The case with one thing less, the largest parts first."""
    for path in _paths(case.config):
        config = copy.deepcopy(case.config)
        block: Any = config
        for key in path[:-1]:
            block = block[key]
        del block[path[-1]]
        yield replace(case, config=config)
    for name in case.arguments:
        if name != "resume":
            yield replace(case, arguments={key: value for key, value in case.arguments.items() if key != name})
    if case.world != 1:
        yield replace(case, world=1)
    if case.device != "cpu":
        yield replace(case, device="cpu")


def _paths(block: dict[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in block.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from _paths(value, (*prefix, key))


def minimise(case: Case, verdict: Verdict) -> Case:
    """The smallest case within reach that has the same verdict."""
    again = True
    while again:
        again = False
        for candidate in smaller(case):
            if judge(candidate) == verdict:
                case, again = candidate, True
                break
    return case


def report(outcome: Outcome, out: Any = None) -> list[tuple[str, str, int, str]]:
    """Print the kinds and the causes; returns rows (kind, cause, cases, smallest case)."""
    rows = []
    total = sum(outcome.kinds.values())
    for kind, count in outcome.kinds.most_common():
        print(f"{count:7d}  {count / total:6.1%}  {kind}", file=out)
        rows.append((kind, "", count, ""))
    for kind in (*BAD, STRICTER):
        causes = sorted((v for v in outcome.causes if v.kind == kind), key=lambda v: -len(outcome.causes[v]))
        for verdict in causes[:SHOWN]:
            cases = outcome.causes[verdict]
            first = min(cases, key=lambda case: len(case.text()))
            example = minimise(first, verdict).text()
            if kind in BAD:
                print(f"\n{kind}: {verdict.detail}  ({len(cases)} cases)\n    {example}", file=out)
            rows.append((kind, verdict.detail, len(cases), example))
    return rows


def times(outcome: Outcome, wall: float) -> str:
    """What the cases took, as a sentence."""
    ordered = sorted(1e3 * seconds for seconds in outcome.seconds)
    median, most, longest = statistics.median(ordered), ordered[int(0.99 * len(ordered))], ordered[-1]
    own = f"median {median:.1f} ms, 99% {most:.1f} ms, longest {longest:.1f} ms of CPU"
    return f"resolve and report: {own}; {len(ordered)} cases in {wall:.0f} s"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run fuzz", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the cases")
    parser.add_argument("--folder", type=Path, default=os.environ.get("HF_MAMBA_REAL_FILES"), help="of real files")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    start = time.monotonic()
    outcome = run(options.cases, options.seed, options.folder and Path(options.folder), options.jobs)
    rows = report(outcome)
    took = times(outcome, time.monotonic() - start)
    print(took, flush=True)
    command = f"python -m benchmarks.run fuzz --cases {options.cases} --seed {options.seed}"
    with options.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            ("kind", "cause", "cases", "smallest case", command + (" --folder ..." if options.folder else ""))
        )
        writer.writerows([*rows, (took, "", "", "")])
    return 1 if outcome.bad else 0
