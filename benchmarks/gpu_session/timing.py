"""Times on a GPU: contestants in turn, the device's own time by events and the host's beside it.

Before the first event the GPU is kept waiting until the host has sent everything (more than WAIT ms of sending would
show). A call costs the greater of the two times. In a rehearsal both are the processor's.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_mamba import ops

WAIT = 3  # ms
Step = Callable[[], object]


@dataclass
class Times:
    """A contestant's: ms of the device and of the host, one of each turn, and MB at most above what was in use."""

    device: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    peak: float = 0

    @property
    def ms(self) -> float:
        return statistics.median(self.device)

    def __str__(self) -> str:
        spread = f"{min(self.device):.3f} to {max(self.device):.3f}"
        return f"{spread}, host {statistics.median(self.host):.3f} ms, {self.peak:.0f} MB"


def served(backend: str, op: str, *arguments: Any, **options: Any) -> Any:
    """One of the public operations by one of the backends."""
    with ops.backend(backend):
        return getattr(ops, op)(*arguments, **options)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(run: Step) -> float:
    """Until the device is done."""
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def alternate(steps: dict[str, Step], repeats: int) -> dict[str, Times]:
    """Every contestant once to compile, once for its memory, then all in turn; one that raises is left out."""
    found: dict[str, Times] = {}
    for name, run in steps.items():
        try:
            run()
        except Exception as error:  # a peer's fault must not cost the others their time on the device
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
            continue
        found[name] = Times(peak=peak_mb(run))
    for _ in range(repeats):
        for name, times in found.items():
            device, host = once(steps[name])
            times.device.append(device)
            times.host.append(host)
    return found


def peak_mb(run: Step) -> float:
    if not torch.cuda.is_available():
        return 0
    synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def once(run: Step) -> tuple[float, float]:
    """ms of the device and of the host."""
    if not torch.cuda.is_available():
        return (1e3 * seconds(run),) * 2
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(WAIT * 2e6))  # at most 2 GHz
    begin.record()
    start = time.perf_counter()
    run()
    host = time.perf_counter() - start
    end.record()
    end.synchronize()
    return begin.elapsed_time(end), 1e3 * host


def captured(step: Step) -> Step:
    """The step as a CUDA graph, which its first call captures. In a rehearsal the step itself."""
    graphs: list[torch.cuda.CUDAGraph] = []

    def replay() -> None:
        graphs[:] = graphs or [capture(step)]
        graphs[0].replay()

    return replay if torch.cuda.is_available() else step


def capture(step: Step) -> torch.cuda.CUDAGraph:
    """Its first calls, outside, compile what it needs."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph
