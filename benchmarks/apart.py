"""Cases that are measured in a process of their own each, with a limit of time; a suite names its cases.

One that takes too long, or too much memory, costs that case alone. What has been measured is in {suite}.partial.jsonl
beside the results until all is there: a start that was interrupted, or that ran out of its --minutes, is gone on with
by the same command.
"""

import argparse
import json
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .measure import Result, clock, peak_memory
from .peers import Step
from .processes import Job, run_together

OURS, TORCH, STOCK, COMPILED = "hf_mamba", "hf_mamba torch", "transformers", "transformers compiled"
ONCE = 10  # seconds of a first call after which there is no second


@dataclass(frozen=True)
class Case:
    """What one process measures.

    Attributes:
        make: (this case, sizes) -> its contestants, a function that makes each.
        limit: seconds for all of them, with what it takes to start and to compile.
    """

    setting: str
    make: Callable[["Case", Any], dict[str, Callable[[], Step]]]
    contestants: tuple[str, ...]
    limit: float
    length: int = 0
    dtype: torch.dtype = torch.float32
    tokens: int = 1  # that a call decodes

    def memory(self, sizes: Any) -> float:
        """GB that transformers needs: some ten tensors of each pair of a chunk of 256 and head in fp32."""
        return 10 * 4 * self.length * 256 * sizes.heads / 2**30


def run_all(suite: str, cases: Sequence[Case], options: Namespace) -> list[Result]:
    """Run the cases that are not measured yet, each in a process of benchmarks/{suite}.py."""
    partial = options.out / f"{suite}.partial.jsonl"
    end = time.monotonic() + 60 * options.minutes
    for number, case in enumerate(cases):
        missing = [name for name in case.contestants if name not in measured(partial, case)]
        start = time.monotonic()
        left = end - start
        if not missing:
            continue
        if left < 30:
            print(f"  left for another start: {case.setting}", flush=True)
            continue
        command = [sys.executable, "-m", f"benchmarks.{suite}", str(number), str(partial)]
        command += ["--threads", str(options.threads), "--rounds", str(options.rounds)]
        command += ["--memory-limit", str(options.memory_limit)] + ["--small"] * options.small
        limit = min(case.limit, left)
        ((_, why, _),) = run_together([Job(case.setting, command, limit)])
        print(f"  {case.setting}: {time.monotonic() - start:.0f} s{', ' * bool(why)}{why}", flush=True)
        if why and limit == case.limit:
            for name in case.contestants:
                if name not in measured(partial, case):
                    append(partial, Result(suite, case.setting, name, note=why))
    found = [(case, measured(partial, case)) for case in cases]
    if all(name in rows for case, rows in found for name in case.contestants):
        partial.unlink()
    return [rows[name] for case, rows in found for name in case.contestants if name in rows]


def measured(partial: Path, case: Case) -> dict[str, Result]:
    """What is known of a case; a later line of a contestant replaces an earlier one."""
    lines = partial.read_text().splitlines() if partial.exists() else []
    found = [Result(**json.loads(line)) for line in lines]
    return {result.name: result for result in found if result.setting == case.setting}


def append(partial: Path, result: Result) -> None:
    partial.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("a") as file:
        file.write(json.dumps(asdict(result)) + "\n")


def measure(suite: str, case: Case, sizes: Any, options: Namespace) -> Iterator[Result]:
    """Each contestant's first call, with the memory that it took; then all of them in turn.

    One whose first call took long is not called again. Where compiling is part of it, that is a call before.
    """
    made: dict[str, tuple[Step, Result]] = {}
    makers = case.make(case, sizes)
    for name in case.contestants:
        result = Result(suite, case.setting, name)
        if name in (STOCK, COMPILED) and case.memory(sizes) > options.memory_limit:
            yield replace(result, note=f"needs about {case.memory(sizes):.0f} GB, above --memory-limit")
            continue
        try:
            step = makers[name]()
            if name == COMPILED:
                result.note = f"compiled in {clock(step):.0f} s"
        except Exception as error:  # such as what a peer refuses
            yield replace(result, note=f"{type(error).__name__}: {str(error).splitlines()[0][:150]}")
            continue
        first: list[float] = []
        result.peak_mb = peak_memory(lambda step=step, first=first: first.append(clock(step)))
        if first[0] / case.tokens > ONCE:
            yield replace(result, seconds=[first[0] / case.tokens], note=result.note or "one run, first call")
        else:
            if name != COMPILED:
                result.peak_mb = peak_memory(step)  # without what a first call sets up
            yield replace(result, seconds=[first[0] / case.tokens])
            made[name] = step, result
    for _ in range(options.rounds):
        for step, result in made.values():
            result.seconds.append(clock(step) / case.tokens)
    yield from (result for _, result in made.values())


def run_one(suite: str, cases: Sequence[Case], whole: Any, small: Any) -> None:
    """Measure one case in this process, as `run_all` asks for it.

    Args:
        whole, small: the sizes that are measured, and those of a rehearsal.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("case", type=int)
    parser.add_argument("partial", type=Path)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--memory-limit", type=float)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for result in measure(suite, cases[options.case], small if options.small else whole, options):
        append(options.partial, result)
