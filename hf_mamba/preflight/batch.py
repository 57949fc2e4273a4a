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


def _too_small(total: Given, unit: int, what: str, out: Findings) -> bool:
    if total.value % unit == 0:
        return False
    if total.value < unit:
        why = f"It is smaller than {what} = {unit}, so that a rank would have less than one sequence."
    else:
        why = f"It is not a multiple of {what} = {unit}: {total.value} / {unit} leaves {total.value % unit}."
    out.problem(
        total.key, str(total), why, f"Write {nearest_multiples(total.value, unit)}.", id="batch-does-not-divide"
    )
    return True


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
                f"{total.value} is not {micro.value} x {accumulation.value} x {world} = {wanted.total}.",
                f"Write {wanted.total}, or leave one of the three out.",
                id="batch-product-differs",
            )
            return None
        return wanted
    if micro:
        if _too_small(total, micro.value * world, f"micro-batch {micro.value} x {world} ranks", out):
            return None
        return Batch(micro.value, total.value // (micro.value * world), world)
    if accumulation:
        if _too_small(total, accumulation.value * world, f"accumulation {accumulation.value} x {world} ranks", out):
            return None
        return Batch(total.value // (accumulation.value * world), accumulation.value, world)
    if _too_small(total, world, f"{world} data-parallel ranks", out):
        return None
    per_rank = total.value // world
    size = largest_divisor(per_rank, default_micro)
    return Batch(size, per_rank // size, world)
