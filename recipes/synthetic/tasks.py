"""The tasks on which the state-space papers show what their models can learn; examples are drawn afresh at each step.

A task is a function (rows, length, generator) -> (ids, targets), both (B, L) int64: what follows position t is
`targets[:, t]`, and -100 where nothing is asked.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

UNASKED = -100
Examples = tuple[Tensor, Tensor]


def selective_copying(rows: int, length: int, generator: torch.Generator, data: int, symbols: int) -> Examples:
    """Repeat `data` symbols, in their order, that stand anywhere among `length` blanks (Gu & Dao 2023, section 4.1.1).

    A blank is `symbols`, and `symbols + 1` asks for the next one: L is length + data.
    """
    values = torch.randint(symbols, (rows, data), generator=generator)
    places = torch.rand(rows, length, generator=generator).argsort(1)[:, :data].sort(1).values
    ids = torch.full((rows, length + data), symbols)
    ids[:, length:] = symbols + 1
    ids.scatter_(1, places, values)
    targets = torch.full_like(ids, UNASKED)
    targets[:, length:] = values
    return ids, targets


def induction_heads(rows: int, length: int, generator: torch.Generator, symbols: int) -> Examples:
    """Recall what followed the special token when it stood here before (Gu & Dao 2023, section 4.1.2).

    It is `symbols`; it stands once among the others, and at the end of the `length` tokens.
    """
    ids = torch.randint(symbols, (rows, length), generator=generator)
    place = torch.randint(length - 2, (rows, 1), generator=generator)
    ids.scatter_(1, place, symbols)
    ids[:, -1] = symbols
    targets = torch.full_like(ids, UNASKED)
    targets[:, -1:] = ids.gather(1, place + 1)
    return ids, targets


def parity(rows: int, length: int, generator: torch.Generator) -> Examples:
    """Say after each bit whether the ones so far are odd (Grazzi et al. 2025, section 5.1)."""
    ids = torch.randint(2, (rows, length), generator=generator)
    return ids, ids.cumsum(1) % 2


@dataclass(frozen=True)
class Setting:
    """A size of a task.

    Attributes:
        draw: the task. options: its own. vocabulary: of ids and targets.
        length: the longest that is trained, the shortest is `shortest`; `tested` are its multiples that are evaluated.
        rows, steps, rate: of the training; hidden_size, layers: of the model.
    """

    draw: Callable[..., Examples]
    vocabulary: int
    length: int
    rows: int
    steps: int
    rate: float
    options: dict[str, Any]
    tested: tuple[int, ...]
    shortest: int = 0
    hidden_size: int = 64
    layers: int = 2


FAR = (1, 2, 4, 8, 16)
# "paper": the papers' sizes, for a GPU; "small": two CPU cores, minutes
SETTINGS: dict[str, dict[str, Setting]] = {
    "selective_copying": {
        "small": Setting(selective_copying, 10, 64, 32, 4_000, 2e-3, {"data": 8, "symbols": 8}, (1,)),
        "paper": Setting(selective_copying, 18, 4096, 64, 400_000, 1e-4, {"data": 16, "symbols": 16}, (1,)),
    },
    "induction_heads": {
        "small": Setting(induction_heads, 17, 64, 32, 4_000, 2e-3, {"symbols": 16}, FAR),
        "paper": Setting(induction_heads, 17, 256, 8, 25 * 8192, 1e-3, {"symbols": 16}, (*FAR, 64, 256, 1024, 4096)),
    },
    "parity": {
        "small": Setting(parity, 2, 40, 32, 4_000, 2e-3, {}, FAR, shortest=3),
        "paper": Setting(parity, 2, 40, 1024, 20_000, 1e-3, {}, (1, 2, 4, 6), shortest=3),
    },
}
