"""Fair timing on a machine that is not quiet: contestants take turns, and ratios are taken within a round."""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from hf_mamba import segments


@dataclass
class Result:
    """One contestant in one setting."""

    suite: str
    setting: str  # such as "L=2048"
    name: str
    seconds: list[float] = field(default_factory=list)  # one per round
    peak_mb: float | None = None  # memory above what was in use before the call
    note: str = ""  # why there is no figure

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None


def alternate(
    suite: str,
    setting: str,
    contestants: dict[str, Callable[[], object]],
    rounds: int,
    once_above: float = 10.0,
    timer: Callable[[], float] = time.perf_counter,
) -> dict[str, Result]:
    """Every contestant once to warm up, then all in turn, `rounds` times.

    By `time.process_time` it counts what all threads computed, which another process delays but does not add to.
    A contestant whose warm-up took longer than `once_above` seconds is not run again: that time is its figure.
    """
    results = {name: Result(suite, setting, name) for name in contestants}
    for name, run in contestants.items():
        seconds = clock(run, timer)
        if seconds > once_above:
            results[name].seconds, results[name].note = [seconds], "one run, first call"
    for _ in range(rounds):
        for name, run in contestants.items():
            if not results[name].note:
                results[name].seconds.append(clock(run, timer))
    return results


def clock(run: Callable[[], object], timer: Callable[[], float] = time.perf_counter) -> float:
    start = timer()
    run()
    return timer() - start


def ratios(result: Result, base: Result) -> tuple[float, float, float]:
    """Median, least and greatest of result / base, round by round where both were run in the same rounds."""
    if len(result.seconds) == len(base.seconds):
        values = [a / b for a, b in zip(result.seconds, base.seconds, strict=True)]
    else:
        values = [a / statistics.median(base.seconds) for a in result.seconds]
    return statistics.median(values), min(values), max(values)


def peak_memory(run: Callable[[], object]) -> float | None:
    """MB that the resident memory rose to above its level before the call; None where Linux's /proc is missing."""
    try:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = _status("VmRSS")
        run()
        return (_status("VmHWM") - before) / 1024
    except (OSError, AttributeError):
        return None


def _status(key: str) -> int:
    """KiB"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])


@contextmanager
def triton_segments(count: int) -> Iterator[None]:
    """Splits every sequence of the Triton scan into about so many parts, whatever its rule says."""
    rule = segments.choose
    segments.choose = lambda *call: segments.of_length(call[3], count)
    try:
        yield
    finally:
        segments.choose = rule
