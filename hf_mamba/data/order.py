"""The order of the data: arithmetic on (seed, sample number), nothing stored.

A stream is T tokens, read round and round and cut in rows of L: row r starts at token r·L of the endless stream. Epoch
e has the rows floor(e·T/L) … floor((e+1)·T/L) - 1: the tail of fewer than L tokens of a pass is carried into the next
epoch, so no token is dropped or padded. Within an epoch the rows are permuted by a keyed Feistel network; documents
keep the order of their files, so those that share a row are neighbours there.

Several streams are interleaved by a fixed table of 65,536 slots in which each has its share, so the number of rows
drawn from a stream before sample i is a sum, not a history.
"""

import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

ORDER_VERSION = 1  # raised when the same (seed, sample) would mean another row; part of the fingerprint
SLOTS = 1 << 16
_MASK = (1 << 64) - 1
_ROUNDS = 8


def mix64(*values: int) -> int:
    """A 64-bit hash of integers: splitmix64's finaliser (Steele et al. 2014) over a running sum."""
    state = 0
    for value in values:
        state = (state + (value & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def _mix64_each(state: int, values: np.ndarray) -> np.ndarray:
    """`mix64(..., value)` of each of some uint64 values, where `state` is the hash of what stands before them."""
    states = values + np.uint64((state + 0x9E3779B97F4A7C15) & _MASK)
    states = (states ^ (states >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    states = (states ^ (states >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return states ^ (states >> np.uint64(31))


def permute(index: int, size: int, key: int) -> int:
    """Where a keyed permutation of range(size) sends `index`.

    A Feistel network over Z_a × Z_b with a·b just above `size`, walked until it lands inside (Black & Rogaway 2002,
    "Ciphers with arbitrary finite domains").
    """
    a = math.isqrt(size - 1) + 1
    b = (size + a - 1) // a
    while True:
        high, low = divmod(index, a)
        for round_ in range(0, _ROUNDS, 2):
            low = (low + mix64(key, round_, high)) % a
            high = (high + mix64(key, round_ + 1, low)) % b
        index = high * a + low
        if index < size:
            return index


class Place(NamedTuple):
    """Where a sample is found: row `row` of the endless stream number `stream`."""

    stream: int
    row: int


class Mixture:
    """sample number -> stream, each stream having its share of any stretch of samples.

    Args:
        weights: shares before normalisation; kept to 1/65,536.
        seed: of the jitter in the interleaving.

    Raises:
        ValueError: weights that are not finite numbers above 0.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        if not all(math.isfinite(w) and w > 0 for w in weights):
            raise ValueError(f"the weights are {list(weights)}; each must be a finite number above 0")
        if len(weights) > SLOTS:
            raise ValueError(f"{len(weights):,} sources have weights; give at most {SLOTS:,}, or none of them a weight")
        self.shares = _quotas(weights)  # of SLOTS
        self._stream, self._rank = _interleave(self.shares, seed)

    def draw(self, sample: int) -> tuple[int, int]:
        """The stream of a sample, and how many samples before it come from the same stream."""
        if sample < 0:
            raise IndexError(f"sample number {sample} is negative")
        block, slot = divmod(sample, SLOTS)
        stream = int(self._stream[slot])
        return stream, block * self.shares[stream] + int(self._rank[slot])

    def counts(self, sample: int) -> list[int]:
        """How many of the samples before number `sample` come from each stream."""
        block, slot = divmod(sample, SLOTS)
        seen = np.bincount(self._stream[:slot], minlength=len(self.shares))
        return [block * share + int(n) for share, n in zip(self.shares, seen, strict=True)]


class RowOrder:
    """sample number -> (stream, row), for ever.

    Args:
        sizes: tokens per stream.
        seq_len: L, tokens per row.
        seed: any integer.
        weights: each stream's share of the samples; required when there are several.

    Raises:
        ValueError: a stream shorter than a row, or bad weights.
    """

    def __init__(self, sizes: Sequence[int], seq_len: int, seed: int, weights: Sequence[float] | None = None) -> None:
        if len(weights or [1.0]) != len(sizes):
            raise ValueError(f"found {len(weights or ())} weights for {len(sizes)} streams of data; give one for each")
        for size in sizes:
            if size < seq_len:
                raise ValueError(
                    f"the data has {size:,} tokens, fewer than one row of seq_len={seq_len:,}; "
                    "give more text or a smaller seq_len"
                )
        self.sizes, self.seq_len, self.seed = list(sizes), seq_len, seed
        self._mixture = Mixture(weights or [1.0], seed)

    def __getitem__(self, sample: int) -> Place:
        stream, draw = self._mixture.draw(sample)
        epoch = self._epoch_of(stream, draw)
        first = self._first_row(stream, epoch)
        size = self._first_row(stream, epoch + 1) - first
        return Place(stream, first + permute(draw - first, size, mix64(self.seed, stream, epoch)))

    def counts(self, sample: int) -> list[int]:
        """Rows drawn from each stream by the samples before number `sample`."""
        return self._mixture.counts(sample)

    def epoch_tokens(self) -> int:
        """Tokens after which every stream has been seen once: of all of them, or until the slowest is through."""
        return max(-(-size * SLOTS // share) for size, share in zip(self.sizes, self._mixture.shares, strict=True))

    def _first_row(self, stream: int, epoch: int) -> int:
        return epoch * self.sizes[stream] // self.seq_len

    def _epoch_of(self, stream: int, row: int) -> int:
        """The epoch e with first_row(e) <= row < first_row(e + 1): the largest e with e·T < (row + 1)·L."""
        return ((row + 1) * self.seq_len - 1) // self.sizes[stream]


def _quotas(weights: Sequence[float]) -> list[int]:
    """Slots per stream, summing to SLOTS, by largest remainder; at least one each."""
    total = math.fsum(weights)
    exact = [w / total * SLOTS for w in weights]
    quotas = [max(1, int(q)) for q in exact]
    # Integers from here on: ties go to the earlier stream.
    by_need = sorted(range(len(weights)), key=lambda s: (quotas[s] - exact[s], s))
    for s in by_need[: max(0, SLOTS - sum(quotas))]:
        quotas[s] += 1
    largest = [(-quota, s) for s, quota in enumerate(quotas)]
    heapq.heapify(largest)
    for _ in range(sum(quotas) - SLOTS):  # many small shares were raised to one slot each
        quota, s = largest[0]
        quotas[s] -= 1
        heapq.heapreplace(largest, (quota + 1, s))
    return quotas


def _interleave(shares: Sequence[int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """slot -> (stream, how many slots before it have that stream): evenly spread, with a seeded jitter."""
    if len(shares) == 1:
        return np.zeros(SLOTS, np.uint16), np.arange(SLOTS, dtype=np.int32)
    keys = []
    for s, share in enumerate(shares):
        places = np.arange(share, dtype=np.uint64)
        jitter = _mix64_each(mix64(seed, 1 << 32, s), places) >> np.uint64(24)  # 40 bits
        # (place + jitter) · SLOTS / share, divided before it is multiplied: else it would take 72 bits
        whole, rest = np.divmod((places << np.uint64(40)) + jitter, np.uint64(share))
        keys.append(whole * np.uint64(SLOTS) + rest * np.uint64(SLOTS) // np.uint64(share))
    order = np.argsort(np.concatenate(keys), kind="stable")  # of equal keys, the earlier stream's comes first
    stream = np.repeat(np.arange(len(shares), dtype=np.uint16), shares)[order]
    rank = np.concatenate([np.arange(share, dtype=np.int32) for share in shares])[order]
    return stream, rank
