"""The order: permutations, epochs, mixtures."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_mamba.data.order import SLOTS, Mixture, RowOrder, mix64, permute


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size, key):
    assert sorted(permute(i, size, key) for i in range(size)) == list(range(size))


def test_permute_works_on_sizes_no_array_could_hold():
    size = 10**15 + 7
    images = [permute(i, size, 5) for i in (*range(1000), size - 1)]
    assert len(set(images)) == 1001
    assert all(0 <= image < size for image in images)
    assert np.mean(images) == pytest.approx(size / 2, rel=0.1)  # sd of the mean is 0.02 of this


@pytest.mark.parametrize("size", [3, 4, 7])
def test_small_permutations_are_nearly_uniform(size):
    """Every item lands everywhere equally often over 7,000 keys (4.5 sigma)."""
    trials = 7000
    table = np.zeros((size, size))
    for key in range(trials):
        for i in range(size):
            table[i, permute(i, size, key * 0x9E3779B97F4A7C15)] += 1
    p = 1 / size
    assert np.abs(table - trials * p).max() < 4.5 * np.sqrt(trials * p * (1 - p))


FROZEN = [(0, 48), (1, 132), (0, 340), (0, 313), (0, 190), (0, 3480), (0, 49160), (0, 699997467)]


def test_order_is_frozen():
    """Recorded once: another order under the same version would break every resume."""
    order = RowOrder([10_000, 3_000], 16, seed=7, weights=[0.7, 0.3])
    assert [tuple(order[i]) for i in (0, 1, 2, 3, 100, 5000, 70_000, 10**9)] == FROZEN


def quotas_one_by_one(weights):
    """Slots for each stream, by largest remainder, at least one: each slot given and taken in a turn of its own."""
    total = math.fsum(weights)
    exact = [w / total * SLOTS for w in weights]
    quotas = [max(1, int(q)) for q in exact]
    by_need = sorted(range(len(weights)), key=lambda s: (quotas[s] - exact[s], s))
    for s in by_need[: max(0, SLOTS - sum(quotas))]:
        quotas[s] += 1
    while sum(quotas) > SLOTS:
        quotas[quotas.index(max(quotas))] -= 1
    return quotas


def slots_one_by_one(shares, seed):
    """(stream, samples of it before) of each slot in Python's integers, which have no end: the order's definition."""
    keys = []
    for s, share in enumerate(shares):
        jitter = [mix64(seed, 1 << 32, s, q) >> 24 for q in range(share)]
        keys += [(((q << 40) + u) * SLOTS // share, s) for q, u in enumerate(jitter)]
    seen = [0] * len(shares)
    for _, s in sorted(keys):
        yield s, seen[s]
        seen[s] += 1


@pytest.mark.parametrize(
    ("weights", "seed"),
    [
        ([0.7, 0.3], 7),
        ([1, 1], 0),  # many equal keys
        ([1e-9, 1, 1e9], -3),
        ([3, 1, 4, 1, 5, 9, 2, 6], 2**64 + 5),
        ([1.0] * 1000, 1),
        ([1e6, *[1e-6] * 3000], 2),  # shares that are raised to a slot
        ([1.0] * 65_536, 3),
    ],
)
def test_the_order_of_every_slot_is_what_it_always_was(weights, seed):
    mixture = Mixture(weights, seed)
    assert mixture.shares == quotas_one_by_one(weights)
    assert [mixture.draw(n) for n in range(SLOTS)] == list(slots_one_by_one(mixture.shares, seed))


def test_more_weighted_sources_than_slots_are_refused():
    with pytest.raises(ValueError, match="65,537 sources have weights"):
        Mixture([1.0] * (SLOTS + 1), 0)


@given(tokens=st.integers(8, 2000), seq_len=st.integers(2, 64), seed=st.integers(-5, 2**70))
def test_every_token_once_per_epoch_and_only_the_tail_is_carried(tokens, seq_len, seed):
    """After the rows of e epochs each token was seen e times, but for fewer than L at the end of the stream."""
    seq_len = min(seq_len, tokens)
    order = RowOrder([tokens], seq_len, seed)
    seen = np.zeros(tokens, int)
    sample = 0
    for epoch in range(1, 5):
        while sample < epoch * tokens // seq_len:
            row = order[sample].row
            np.add.at(seen, np.arange(row * seq_len, (row + 1) * seq_len) % tokens, 1)
            sample += 1
        tail = epoch * tokens % seq_len
        assert (seen[: tokens - tail] == epoch).all()
        assert (seen[tokens - tail :] == epoch - 1).all()


def test_epochs_differ_and_seeds_differ():
    order, other = RowOrder([6400], 64, 1), RowOrder([6400], 64, 2)
    first = [order[i].row for i in range(100)]
    assert first != [order[100 + i].row - 100 for i in range(100)]
    assert first != [other[i].row for i in range(100)]
    assert first != sorted(first)


@settings(max_examples=10)
@given(weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6), seed=st.integers(0, 2**32))
def test_mixture_gives_each_stream_its_share_of_any_stretch(weights, seed):
    mixture = Mixture(weights, seed)
    share = np.array(weights) / sum(weights)
    for sample in (100, 5000, SLOTS, 3 * SLOTS + 12_345):
        counts = np.array(mixture.counts(sample))
        assert counts.sum() == sample
        # Quantised to 1/SLOTS (at least one slot), and never more than a few draws from its share.
        assert np.all(np.abs(counts - sample * share) <= 3 + sample * len(weights) / SLOTS)


@settings(max_examples=5)
@given(weights=st.lists(st.floats(0.1, 10), min_size=1, max_size=4), seed=st.integers(0, 9))
def test_draws_count_up_within_each_stream(weights, seed):
    mixture, seen = Mixture(weights, seed), Counter()
    for sample in range(SLOTS - 300, SLOTS + 300):
        stream, draw = mixture.draw(sample)
        assert draw == mixture.counts(sample)[stream]
        seen[stream] += 1
    assert sum(seen.values()) == 600


@pytest.mark.parametrize("weights", [[0.0, 1.0], [-1.0, 1.0], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_bad_weights_are_named(weights):
    with pytest.raises(ValueError, match="finite number above 0"):
        RowOrder([100, 100], 10, 0, weights)


def test_too_little_data_is_named():
    with pytest.raises(ValueError, match=r"9 tokens, fewer than one row of seq_len=10"):
        RowOrder([9], 10, 0)


def test_an_epoch_of_weighted_streams_ends_with_the_slowest():
    """The samples of an epoch hold every token of each stream, and one sample less does not."""
    order = RowOrder([1000, 300], 10, 0, [0.5, 0.5])
    rows = -(-order.epoch_tokens() // 10)
    assert min(n * 10 / size for n, size in zip(order.counts(rows), order.sizes, strict=True)) == pytest.approx(
        1, abs=0.02
    )
    assert RowOrder([1000], 10, 0).epoch_tokens() == 1000
