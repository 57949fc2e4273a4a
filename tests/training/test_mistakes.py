"""A mistake ends the recipe with one message, before anything is written; one rank says it."""

import re
from pathlib import Path
from typing import Any

import pytest
from runs import Launcher, log_lines


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"spike_sigma": -1, "max_bad_steps": 0}, ["spike_sigma: found -1", "max_bad_steps: found 0"]),
        ({"num_gpus": 4}, ["plan for 4 processes, and 1 was started", "hf-mamba launch"]),
        ({"dataset": "no/such/file.txt"}, ["no/such/file.txt"]),
        ({"text_column": "body"}, ["body", "text"]),
        ({"global_batch_size": 9, "micro_batch_size": 4}, ["global_batch_size", "9", "8"]),
        ({"vocab_size": 100}, ["vocab_size", "100", "257"]),
    ],
    ids=["guard", "processes", "data", "column", "batch", "vocabulary"],
)
def test_a_mistake_is_one_message(launcher: Launcher, settings: dict[str, Any], expected: list[str]):
    refused = launcher.run("mistake", expect=2, **settings).text()
    assert "Traceback" not in refused
    assert not [text for text in expected if text not in refused]
    assert not Path(launcher.folder / "mistake").exists()


def test_what_an_earlier_run_left_is_respected(launcher: Launcher):
    launcher.run("before", max_steps=3, save_strategy="no")
    folder = Path(launcher.folder / "before")
    identity = (folder / "run.json").read_bytes()
    refused = launcher.run("before", expect=2, max_steps=3, save_strategy="no", seed=7).text()
    assert re.search(r"belongs to another run.*seed", refused), refused
    assert (folder / "run.json").read_bytes() == identity
    refused = launcher.run("smaller", expect=2, tokenizer_name=str(folder / "model"), vocab_size=300).text()
    assert re.search(r"300 rows of the embedding and 3\d\d tokens(.|\n)*Write --vocab_size 320", refused)


def test_label_smoothing_reads_the_logits(launcher: Launcher):
    """Trainer makes the smoothed loss from them: near the plain one of a fresh model, and not the same."""
    short = {"max_steps": 1, "save_strategy": "no", "eval_fraction": 0}
    launcher.run("plain-loss", **short)
    launcher.run("smoothed", label_smoothing_factor=0.1, **short)
    plain, smoothed = (log_lines(launcher.folder / name)[1] for name in ("plain-loss", "smoothed"))
    assert smoothed != plain
    assert smoothed == pytest.approx(plain, rel=0.05)
