"""The comparison of families and optimizers: its texts are apart, all pairs learn, and its words fit its figures."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import learning
from benchmarks.learning import CUT, FAMILIES, PAIRS, REPORTED, SMALL, TRIAL_SEED, Done, Run

COSTS = {f"{family} {optimizer}": 0.1 for family, optimizer in PAIRS} | {"hybrid muon": 0.2}


def test_what_chooses_is_neither_trained_on_nor_reported():
    source = learning.parse_sources([learning.EMBEDDED])[0]
    tokenizer = learning.train_tokenizer([source], SMALL.vocabulary)
    encoding = learning.Encoding.of(tokenizer, template=True, split_special_tokens=None)
    shards = learning.tokenize_source(source, encoding, progress=False)
    parts = (
        shards.runs(CUT, held_out=False),
        learning.between(shards, REPORTED, CUT),
        shards.runs(REPORTED, held_out=True),
    )
    assert all(len(runs) for runs in parts)
    times = [np.zeros(unit["tokens"], int) for unit in shards.units]
    for runs in parts:
        for unit, begin, end, _ in runs.tolist():
            times[unit][begin:end] += 1
    assert all((of_unit == 1).all() for of_unit in times)


def test_every_pair_learns_and_what_was_run_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(learning, "POINTS", 2)
    texts, done = learning.read_texts(SMALL), Done(tmp_path / "partial.jsonl", SMALL)
    for pair in PAIRS:
        run = Run("tokens", *pair, 6e-3, 0, 12)
        curve = learning.train(texts, SMALL, run)
        assert [step for step, _ in curve] == [6, 12]
        assert curve[-1][1] < curve[0][1] - 0.1
        done.add(run=run, points=curve)
        assert done.runs()[run] == curve
    assert learning.train(texts, SMALL, run) == curve
    assert not Done(done.path, learning.Size()).runs()  # of another size
    learning.in_processes(done, [list(done.runs())], 1, small=True)  # would take seconds


def made_up(bits: dict[str, float]) -> dict[Run, list[tuple[int, float]]]:
    """Runs of two seeds, 0.02 apart, of a mean for each family; Muon's is 10% less, the trials' best rates differ."""
    runs: dict[Run, list[tuple[int, float]]] = {}
    for family, optimizer in PAIRS:
        mean, rate = bits[family] * (0.9 if optimizer == "muon" else 1), 6e-3 if optimizer == "muon" else 3e-3
        for tried in learning.RATES:
            runs[Run("trial", family, optimizer, tried, TRIAL_SEED, 500)] = [(500, abs(tried - rate) + mean)]
        for kind in learning.KINDS:
            for seed, other in enumerate((-0.01, 0.01)):
                runs[Run(kind, family, optimizer, rate, seed, 500)] = [(500, mean + other)]
    return runs


def test_words_and_figures_say_the_same():
    text = learning.summary(learning.Size(), COSTS, made_up({"mamba": 2.0, "mamba2": 2.01, "hybrid": 1.5}))
    assert "| mamba | adamw | 0.003 | 500 | 50 | 2.000 [1.990 .. 2.010] |" in text
    assert "| hybrid | muon | 0.006 | 500 | 100 | 1.350 [1.340 .. 1.360] |" in text
    for family in FAMILIES:
        assert text.count(f"- {family}: Muon needs 10.0% fewer bits than AdamW.") == 2
    assert "hybrid needs 25.0% fewer bits than mamba; it needs 25.4% fewer bits than mamba2." in text
    assert "At the edge of the rates that were tried: mamba with adamw, mamba2 with adamw, hybrid with adamw." in text
    assert learning.compare([1.0, 1.2], [1.1, 1.3]) == "is within the seeds' range (-8.3%) of"


@pytest.mark.parametrize(("pair", "steps"), [(("mamba", "muon"), 500), (("hybrid", "muon"), 250)])
def test_equal_time_is_fewer_steps_of_what_costs_more(pair: tuple[str, str], steps: int):
    assert learning.steps_of(COSTS, pair, 500) == steps
