"""What all processes of a run decide together, outside the step. One process alone needs no process group."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def barrier() -> None:
    gather(None)  # of objects: NCCL's own barrier guesses a device


def gather(value: T) -> list[T]:
    """Every rank's value, in the order of ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def _portable(error: Exception) -> Exception:
    """An error as other ranks can raise it, with the rank that it comes from."""
    told = error if world_size() == 1 else type(error)(str(error))
    told.origin = rank()  # type: ignore[attr-defined]
    return told


def on_main(function: Callable[[], T]) -> T:
    """Call `function` on rank 0; every rank gets its result, or its ValueError or OSError."""
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = function()
        except (ValueError, OSError) as error:
            outcome[1] = _portable(error)
    if world_size() > 1:
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def on_all(function: Callable[[], T]) -> T:
    """Call `function` on every rank; where it fails on one, every rank gets the first ValueError or OSError."""
    result, failure = None, None
    try:
        result = function()
    except (ValueError, OSError) as error:
        failure = _portable(error)
    failures = [error for error in gather(failure) if error is not None]
    if failures:
        raise failures[0]
    return result  # type: ignore[return-value]


def on_main_for_long(function: Callable[[], T]) -> T:
    """`on_main` for what may take longer than a collective waits: the ranks ask each other again and again."""
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(function) if rank() == 0 else None
        while not on_main(lambda: _ended(work)):
            pass
        return on_main(lambda: work.result())  # type: ignore[union-attr]


def _ended(work: Future[Any] | None, seconds: float = 5.0) -> bool:
    return work is None or bool(wait([work], seconds).done)
