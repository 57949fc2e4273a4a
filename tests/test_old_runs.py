"""What an older version left goes on today: its run folders, its cache, its models (old_runs/make.py made them).

On the machine that made them everything is the same to the last bit. The kernels are compiled for the machine they run
on, so on others, and with another torch, it is the same up to rounding.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import ROOT, logged
from runs import Launcher
from safetensors.torch import load_file

from hf_mamba import MambaForCausalLM
from hf_mamba.data import prepare_data

OLD = ROOT / "tests" / "old_runs"
RECORDED: dict[str, Any] = json.loads((OLD / "recorded.json").read_text())
sys.path.insert(0, str(OLD))
from make import machine  # noqa: E402

EXACT = RECORDED["machine"] == machine()


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy that may be written, with the cache where HF_HOME would have it."""
    folder = tmp_path_factory.mktemp("old") / "runs"
    shutil.copytree(OLD, folder)
    shutil.move(folder / "cache", folder / "hf" / "hf_mamba")
    return folder


def made(old: Path) -> dict[str, tuple[int, int]]:
    """Everything in the cache that is made from text; a file that is made again has another inode."""
    cache = old / "hf" / "hf_mamba"
    paths = [path for part in ("tokenizers", "tokens") for path in (cache / part).rglob("*")]
    return {str(path.relative_to(cache)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def same(found: Any, expected: Any, rounding: float = 2e-5) -> None:
    if EXACT:
        assert found == expected
    else:
        assert found == pytest.approx(expected, rel=rounding, abs=rounding)


@pytest.mark.parametrize(("name", "world"), [("plain", 1), ("zero2", 2)])
def test_an_old_run_goes_on_to_the_same_end(launcher: Launcher, old: Path, name: str, world: int):
    """From the checkpoint where a signal ended it, against the run of the old version that was never stopped."""
    cached = made(old)
    flags = RECORDED["flags"] + (RECORDED["zero2_flags"] if name == "zero2" else ["--micro_batch_size", "4"])
    flags = [str(old / word) if (old / word).exists() else word for word in flags]
    said = launcher.recipe([*flags, "--output_dir", str(old / name)], world, home=old / "hf")
    assert "checkpoint-4, step 4" in said
    for key, values in RECORDED[name]["log"].items():
        same(logged(old / name, key), values)
    assert len(RECORDED[name]["log"]["loss"]) == 8
    found, expected = (load_file(path / "model.safetensors") for path in (old / name / "model", old / f"{name}-model"))
    assert found.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=0 if EXACT else 2e-5)
    assert made(old) == cached, "the old cache was not used"
    record = json.loads((old / name / "run.json").read_text())
    record["data"]["sources"][0]["name"] = "corpus.jsonl"  # where the data lies is the machine's
    assert record == RECORDED[name]["run.json"]
    assert json.loads((old / name / "status.json").read_text())["status"] == "finished"
    assert sorted(path.name for path in (old / name).glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-8"]


def test_an_old_cache_is_used(old: Path):
    """Its tokenizer is not trained again, and its corpus is not tokenised again."""
    cached = made(old)
    corpus = [str(old / "corpus.jsonl")]
    data = prepare_data(corpus, seq_len=48, vocab_size=320, eval_fraction=0.05, cache_dir=old / "hf" / "hf_mamba")
    assert made(old) == cached
    then = RECORDED["plain"]["run.json"]["data"]
    assert data.fingerprint["tokenizer"] == then["tokenizer"]
    assert data.fingerprint["held_out"] == then["held_out"]
    for key in ("content", "tokens"):
        assert data.fingerprint["sources"][0][key] == then["sources"][0][key]


@pytest.mark.parametrize("name", ["plain", "zero2"])
@pytest.mark.parametrize(("place", "key"), [("{}-model", "logits"), ("{}/checkpoint-4", "checkpoint_logits")])
def test_an_old_model_loads(name: str, place: str, key: str):
    model = MambaForCausalLM.from_pretrained(OLD / place.format(name)).eval()
    with torch.no_grad():
        logits = model(torch.arange(24).view(1, 24) * 13 % 320).logits
    same(logits[0, -1].tolist(), RECORDED[name][key])
