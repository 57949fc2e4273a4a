"""The papers' tasks: their examples against a reading of each task token by token, and the recipe from end to end."""

import json
import sys
from pathlib import Path

import pytest
import torch
from launching import ROOT

sys.path.insert(0, str(ROOT / "recipes" / "synthetic"))
import tasks
import train

FAMILIES = ("mamba", "mamba2", "granitemoehybrid")


def read(task: str, ids: list[int], options: dict[str, int]) -> list[int]:
    """The targets of one example, by going through its tokens."""
    out = [tasks.UNASKED] * len(ids)
    if task == "parity":
        return [sum(ids[: t + 1]) % 2 for t in range(len(ids))]
    if task == "induction_heads":
        special = options["symbols"]
        first = ids.index(special)
        assert ids.count(special) == 2
        assert ids[-1] == special
        out[-1] = ids[first + 1]
        return out
    seen = [token for token in ids if token < options["symbols"]]
    assert len(seen) == options["data"]
    for t, token in enumerate(ids):
        if token == options["symbols"] + 1:
            out[t] = seen.pop(0)
    assert not seen
    return out


@pytest.mark.parametrize("size", ["small", "paper"])
@pytest.mark.parametrize("task", tasks.SETTINGS)
def test_the_targets_are_what_the_task_asks_for(task: str, size: str):
    setting = tasks.SETTINGS[task][size]
    generator = torch.Generator().manual_seed(0)
    ids, targets = setting.draw(6, setting.length, generator, **setting.options)
    assert int(ids.max()) < setting.vocabulary
    assert int(targets.max()) < setting.vocabulary
    for row, target in zip(ids.tolist(), targets.tolist(), strict=True):
        assert target == read(task, row, setting.options)
    again, _ = setting.draw(6, setting.length, generator, **setting.options)
    assert not torch.equal(ids, again)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_recipe_trains_every_family(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    line = f"train.py induction_heads --family {family} --optim muon --max_steps 2 --output {tmp_path / 'found.jsonl'}"
    monkeypatch.setattr(sys, "argv", line.split())
    assert train.main() == 0
    found = json.loads((tmp_path / "found.jsonl").read_text())
    assert set(found["accuracy"]) == {"1x", "2x", "4x", "8x", "16x"}
    assert all(0 <= value <= 1 for value in found["accuracy"].values())
