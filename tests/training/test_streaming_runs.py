"""--streaming through the recipe: killed and resumed, it is bitwise the undisturbed run; another world is refused."""

import re
from pathlib import Path

import pytest
from runs import Launcher, curve, held, kill, log_lines, same_bytes, wait_for

from hf_mamba.data import parse_sources, train_tokenizer

SETTINGS = {"streaming": True, "save_steps": 3, "max_steps": 10, "eval_strategy": "steps", "eval_steps": 5}


@pytest.fixture(scope="module")
def streamed(launcher: Launcher) -> dict:
    """The corpus in three files of different lengths, a broken line in one, and a tokenizer."""
    lines = launcher.corpus.read_text().splitlines()
    folder = launcher.folder / "stream"
    folder.mkdir()
    for name, part in (("a", lines[:70]), ("b", [*lines[70:72], "broken", *lines[72:99]]), ("c", lines[99:])):
        (folder / f"{name}.jsonl").write_text("\n".join(part))
    tokenizer = train_tokenizer(parse_sources([str(launcher.corpus)]), 320, cache_dir=launcher.folder / "cache")
    tokenizer.save_pretrained(folder / "tokenizer")
    return {**SETTINGS, "dataset": str(folder / "*.jsonl"), "tokenizer_name": str(folder / "tokenizer")}


@pytest.mark.parametrize("world", [1, 2])
def test_killed_and_resumed_is_bitwise_the_undisturbed_run(launcher: Launcher, streamed: dict, world: int):
    """Killed twice, each time somewhere behind a checkpoint."""
    whole, parts = launcher.folder / f"stream-{world}-whole", launcher.folder / f"stream-{world}-parts"
    launcher.run(whole, world, **streamed)
    for step in (4, 8):
        launch = launcher.start(parts, world, patch=held("training_step", step), **streamed)
        wait_for(lambda step=step: step in log_lines(parts))
        kill(launch)
    launch = launcher.run(parts, world, **streamed)
    assert "A resume is exact with the same number of processes" in " ".join(launch.ranks[0].text().split())
    assert curve(parts) == curve(whole)
    assert log_lines(parts, "eval_loss") == log_lines(whole, "eval_loss")
    assert len(log_lines(whole, "eval_loss")) == 2
    assert not same_bytes(whole / "checkpoint-10", parts / "checkpoint-10")
    assert not same_bytes(whole / "model", parts / "model")
    assert log_lines(whole, "unusable_records")[10] >= 1
    assert re.search(r"records read = \d+ kept \+ \d+ held out \+ \d+ left out( \(.*\))?; [\d,]+ tokens", launch.text())


def test_another_number_of_processes_is_refused(launcher: Launcher, streamed: dict):
    folder = launcher.folder / "stream-world"
    launcher.run(folder, 1, **{**streamed, "max_steps": 3})
    refused = launcher.run(folder, 2, expect=2, **streamed)
    assert "1 processes wrote" in " ".join(refused.ranks[0].text().split())
    assert "Traceback" not in refused.text()


def test_changed_data_is_refused(launcher: Launcher, streamed: dict):
    """The documents of the second process only: the first one must not wait for it."""
    folder, copy = launcher.folder / "stream-changed", launcher.folder / "copy.jsonl"
    lines = launcher.corpus.read_text().splitlines()
    copy.write_text("\n".join(lines))
    settings = {**streamed, "dataset": str(copy), "eval_fraction": 0, "eval_strategy": "no"}
    launcher.run(folder, 2, **{**settings, "max_steps": 3})
    copy.write_text("\n".join(line.replace("the", "a") if i % 2 else line for i, line in enumerate(lines)))
    refused = launcher.run(folder, 2, expect=2, **settings)
    assert refused.text().count("does not go on with the document at which the checkpoint was taken") == 1
    assert "Traceback" not in refused.text()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"tokenizer_name": None}, "Write --tokenizer_name"),
        ({"dataset": ["x.jsonl", "y.jsonl"]}, "no known size by which they could be mixed"),
        ({"dataloader_num_workers": 2}, "by one thread of each process"),
        ({"eval_fraction": 1.5}, "eval_fraction: found 1.5"),
        ({"text_column": "txt"}, "did you mean 'text'"),
        ({"max_tokens": 5, "max_steps": None}, "One step already takes"),
    ],
    ids=["tokenizer", "weights", "workers", "fraction", "column", "budget"],
)
def test_what_a_stream_cannot_do_is_one_message(launcher: Launcher, streamed: dict, settings: dict, expected: str):
    folder = Path(launcher.folder / "stream-wrong")
    refused = launcher.run(folder, expect=2, **{**streamed, **settings})
    assert expected in " ".join(refused.text().split())
    assert "Traceback" not in refused.text()
    assert not folder.exists()
