"""Into how many segments the Triton scan splits a sequence: the number for which a model of the device is fastest.

The sequences of a batch are independent and so are channels; few of them leave a GPU idle. Split sequences fill it, at
the price of a first pass that finds each segment's end state (kernels `scan_forward` as a summary, or
`adjoint_summary`) and of `pass_states`, which goes through the segments one after the other.

The model, in clock cycles. A multiprocessor issues ISSUE instructions a cycle. It holds R programs of a kernel, as its
registers and warps allow; the n = ⌈items / multiprocessors⌉ that it gets run in rounds of R. A step of all of a round's
programs takes their instructions over ISSUE, but no less than HIDING warps would take: fewer do not hide latency.

    cycles = steps of a segment · Σ over rounds of max(warps of the round, HIDING) · N · instructions a state / ISSUE

Registers and instructions of FORWARD at 16 states and of BACKWARD are counts out of the compiler
(benchmarks/results/triton_compile.csv); SUMMARY's, ADJOINT's and those of more states are estimates, as are HIDING,
PASSING and LAUNCHES, which no GPU has timed.
"""

from functools import lru_cache
from typing import NamedTuple

from hf_mamba.sizes import SCAN_CHUNK, TRITON_CHANNELS, ceil_div

REGISTERS = 65_536  # of a multiprocessor
ISSUE = 4  # warp instructions a cycle: one for each scheduler
HIDING = 12  # warps of a multiprocessor, three for each scheduler, that hide the latency of arithmetic and loads
PASSING = 600  # cycles that `pass_states` takes for a segment: a load from memory
LAUNCHES = 10_000  # cycles, about 6 µs, that two more launches take


class Device(NamedTuple):
    """What the model asks of a GPU."""

    processors: int  # multiprocessors
    warps: int = 64  # that a multiprocessor holds at most; half as many programs


H100 = Device(132)


class Kernel(NamedTuple):
    """A program's channels and warps, registers of a thread by the number of states, instructions for each state."""

    channels: int
    warps: int
    registers: dict[int, int]
    instructions: float

    def resident(self, states: int, device: Device) -> int:
        """How many programs a multiprocessor holds."""
        thread = next((count for most, count in self.registers.items() if states <= most), 255)
        room = REGISTERS // (32 * 8 * ceil_div(thread, 8))
        return max(1, min(device.warps // 2, min(room, device.warps) // self.warps))

    def cycles(self, channels: int, rows: int, steps: int, states: int, device: Device) -> float:
        """Of one pass over so many channels and rows (a row is a segment of a sequence) of so many steps."""
        resident = self.resident(states, device)
        full, rest = divmod(ceil_div(ceil_div(channels, self.channels) * rows, device.processors), resident)
        warps = full * max(resident * self.warps, HIDING) + (max(rest * self.warps, HIDING) if rest else 0)
        return steps * warps * states * self.instructions / ISSUE


FORWARD = Kernel(32, 1, {16: 104, 32: 168, 64: 255}, 8.3)
SUMMARY = Kernel(32, 1, {16: 80, 32: 128, 64: 255}, 6.3)
BACKWARD = Kernel(TRITON_CHANNELS, TRITON_CHANNELS // 32, {256: 168}, 29.1)
ADJOINT = Kernel(32, 1, {16: 80, 32: 128, 64: 255}, 7.0)


def cycles(backward: bool, batch: int, width: int, states: int, device: Device, steps: int, segments: int) -> float:
    """What the model says of a forward or a backward in segments of so many steps."""
    main, first = (BACKWARD, ADJOINT) if backward else (FORWARD, SUMMARY)
    rows = batch * segments
    total = main.cycles(width, rows, steps, states, device)
    if segments > 1:
        total += first.cycles(width, rows, steps, states, device) + PASSING * segments + LAUNCHES
    return total


def of_length(length: int, segments: int) -> tuple[int, int]:
    """(steps of a segment, segments) for about that many; the steps are a multiple of the scan's chunk."""
    chunk = SCAN_CHUNK["triton"]
    steps = chunk * ceil_div(ceil_div(length, max(segments, 1)), chunk)
    return steps, ceil_div(length, steps)


@lru_cache(maxsize=4096)
def choose(backward: bool, batch: int, width: int, length: int, states: int, device: Device) -> tuple[int, int]:
    """(steps of a segment, segments), the fewest cycles among all numbers up to 64 and a tenth apart above."""
    counts, count = [], 1
    while count * SCAN_CHUNK["triton"] < length + SCAN_CHUNK["triton"]:
        counts.append(count)
        count += max(1, count // 10 if count >= 64 else 1)
    options = sorted({of_length(length, count) for count in counts}, key=lambda option: option[1])
    return min(options, key=lambda option: cycles(backward, batch, width, states, device, *option))
