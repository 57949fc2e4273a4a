"""Batch arithmetic: global batch = micro-batch x accumulation x data-parallel ranks, in whole numbers, from any subset.

DeepSpeed divides and drops the remainder, and then reports `30 != 4 * 3 * 2` with numbers nobody wrote
(deepspeed/runtime/config.py, `_set_batch_related_parameters`). Here the remainder is the message.
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_mamba.findings import Findings


@dataclass(frozen=True)
class Given:
    """A number the user gave (or a preset's), and where: `Given(4, "flag --micro_batch_size")`."""

    value: int
    source: str
    key: str

    def __str__(self) -> str:
        return f"{self.value} ({self.source})"


@dataclass(frozen=True)
class Batch:
    """In sequences: `micro` per rank and micro-step, `accumulation` micro-steps, `total` per optimizer step."""

    micro: int
    accumulation: int
    world: int

    @property
    def total(self) -> int:
        return self.micro * self.accumulation * self.world


def nearest_multiples(value: int, unit: int) -> str:
    """The multiples of `unit` around `value`, for a message: '24 or 32'."""
    below = value // unit * unit
    return " or ".join(str(n) for n in (below, below + unit) if n > 0)


def largest_divisor(value: int, cap: int) -> int:
    """The largest divisor of `value` that is at most `cap`; 1 at least."""
    for candidate in range(min(cap, value), 0, -1):
        if value % candidate == 0:
            return candidate
    return 1


MOST_GPUS = 4096


def _fits(total: int, per_gpu: int, exactly: bool = False) -> str:
    """The numbers of GPUs for which a batch is right as it is written, as a sentence; "" where there is none."""
    worlds = [world for world in range(1, min(total, MOST_GPUS) + 1) if total % (per_gpu * world) == 0]
    worlds = [world for world in worlds if total == per_gpu * world] if exactly else worlds
    if not worlds:
        return ""
    listed = worlds if len(worlds) <= 8 else [*worlds[:4], *worlds[-4:]]
    noun = "GPU" if worlds == [1] else "GPUs"
    return f" As it is, it fits {', '.join(map(str, listed))} {noun}."


def _divides(total: Given, per_gpu: int, world: int, what: str, out: Findings) -> bool:
    """Whether the ranks share the batch evenly; a problem where they do not."""
    unit = per_gpu * world
    if total.value % unit == 0:
        return True
    ranks = f"{world} GPU" if world == 1 else f"{world} GPUs"
    why = f"{total.value} rows cannot be shared evenly by {ranks}{what}."
    if total.value < unit:
        why = f"{total.value} rows are too few for {ranks}{what}."
    fix = f"Write {nearest_multiples(total.value, unit)}.{_fits(total.value, per_gpu)}"
    out.problem(total.key, str(total), why, fix, id="batch-does-not-divide")
    return False


def solve(
    total: Given | None,
    micro: Given | None,
    accumulation: Given | None,
    world: int,
    default_micro: int,
    default_accumulation: int,
    out: Findings,
) -> Batch | None:
    """The batch for this world.

    Args:
        total, micro, accumulation: what was asked for; any of them None.
        world: number of data-parallel ranks.
        default_micro: the micro-batch where none was asked for; under a given total, its upper bound.
        default_accumulation: the accumulation where neither it nor a total was asked for.

    Returns:
        None where the numbers contradict each other; the problem offers the nearest that work.
    """
    if total is None:
        return Batch(
            micro.value if micro else default_micro, accumulation.value if accumulation else default_accumulation, world
        )
    if micro and accumulation:
        wanted = Batch(micro.value, accumulation.value, world)
        if wanted.total != total.value:
            out.problem(
                total.key,
                f"{total}, micro-batch {micro}, accumulation {accumulation}, {world} data-parallel ranks",
                f"It must be {micro.value} (micro-batch) x {accumulation.value} (accumulation) x {world} (GPUs) = "
                f"{wanted.total}; {total.value} is written.",
                f"Write {wanted.total}, or leave one of the three out: it is computed."
                + _fits(total.value, micro.value * accumulation.value, exactly=True),
                id="batch-product-differs",
            )
            return None
        return wanted
    if micro:
        if not _divides(total, micro.value, world, f" in micro-batches of {micro.value}", out):
            return None
        return Batch(micro.value, total.value // (micro.value * world), world)
    if accumulation:
        if not _divides(total, accumulation.value, world, f" in {accumulation.value} accumulated steps", out):
            return None
        return Batch(total.value // (accumulation.value * world), accumulation.value, world)
    if not _divides(total, 1, world, "", out):
        return None
    per_rank = total.value // world
    size = largest_divisor(per_rank, default_micro)
    return Batch(size, per_rank // size, world)
