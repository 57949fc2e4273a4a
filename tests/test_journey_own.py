"""A user's own tokenizer, data and size, through the command line: trained, reported, used, continued on other data."""

import gzip
import json
import re
from pathlib import Path

import pytest
from runs import Launcher, log_lines, weights
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from hf_mamba import cli

SIZE = {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 304}
STORIES = [f"Story {i}. The {['red', 'blue', 'green'][i % 3]} fox counts to {i} and sleeps." for i in range(150)]
LETTERS = [f"Letter {i}. Dear {['Ada', 'Bea', 'Cay'][i % 3]}, the fox sleeps since {i} days." for i in range(150)]


@pytest.fixture(scope="module")
def journey(launcher: Launcher) -> tuple[Path, str]:
    """60 steps with a tokenizer.json, a config.json and packed JSON lines of the user's; the screen."""
    folder = launcher.folder / "own"
    folder.mkdir()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(STORIES + LETTERS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "size.json").write_text(json.dumps(SIZE))
    (folder / "stories.jsonl.gz").write_bytes(gzip.compress("\n".join(_rows("body", STORIES)).encode()))
    (folder / "letters.jsonl").write_text("\n".join(_rows("text", LETTERS)))
    flags = (
        f"--config_name {folder}/size.json --tokenizer_name {folder}/tokenizer.json --learning_rate 0.01 --max_steps 60"
    )
    return folder, _run(launcher, folder, "run", f"{flags} --dataset {folder}/stories.jsonl.gz@body")


def _rows(column: str, texts: list[str]) -> list[str]:
    return [json.dumps({column: text}) for text in texts]


def _run(launcher: Launcher, folder: Path, name: str, flags: str) -> str:
    common = f"--seq_len 64 --micro_batch_size 4 --logging_steps 1 --use_cpu --output_dir {folder}/{name}"
    return launcher.recipe([*f"{flags} {common}".split(), "--sample_prompt", "Story"])


def test_the_screen_says_what_the_run_is_and_what_it_read(journey: tuple[Path, str]) -> None:
    folder, screen = journey
    count = sum(tensor.size for tensor in weights(folder / "run" / "model").values())  # the head is tied
    assert f"own: estimated {count:,} parameters; actual {count:,}, deviation 0.0%" in screen
    assert "after Mamba's presets (tiny_mamba is the nearest)" in screen
    assert f"Documents end with </s> (a usual name in the vocabulary of {folder}/tokenizer.json)." in screen
    assert "150 records = 150 kept + 0 left out" in screen
    assert screen.index("Disk: ") < screen.index("ready to start") < screen.index("data: ")
    plan = json.loads((folder / "run" / "plan.json").read_text())
    assert {row["what"] for row in plan["disk"]} == {"tokens", "checkpoints", "model"}
    assert all(row["free"] > row["bytes"] for row in plan["disk"])
    losses = log_lines(folder / "run")
    assert losses[60] < losses[1] - 2
    perplexity = re.search(r"held-out loss \d+\.\d+  perplexity (\d+\.\d)", screen)
    assert perplexity
    assert 1 < float(perplexity[1]) < 60


def test_the_report_and_the_stock_pipeline_take_it(journey: tuple[Path, str]) -> None:
    from transformers import pipeline

    folder, screen = journey
    assert cli.main(["report", str(folder / "run")]) == 0
    page = (folder / "run" / "report.html").read_text()
    assert "60 of 60" in page
    assert "25,056" in page  # parameters
    write = pipeline("text-generation", model=str(folder / "run" / "model"), device="cpu")
    (made,) = write("Story", max_new_tokens=12, do_sample=False)
    assert made["generated_text"].startswith("Story")
    assert len(made["generated_text"]) > len("Story 1")
    assert "Story" in screen.rsplit("model:", 1)[1]


def test_it_is_continued_on_other_data(launcher: Launcher, journey: tuple[Path, str]) -> None:
    folder, _ = journey
    start = f"--model_name_or_path {folder}/run/model --dataset {folder}/letters.jsonl --max_steps 8"
    screen = _run(launcher, folder, "next", start)
    assert "The vocabulary" not in screen  # its own tokenizer comes with it
    assert "150 records = 150 kept + 0 left out" in screen
    losses, fresh = log_lines(folder / "next"), log_lines(folder / "run")[1]
    assert abs(losses[1] - fresh) > 0.5  # sure of its stories, it is more surprised than one that knows nothing
    assert losses[8] < losses[1] - 0.5
    same = weights(folder / "run" / "model").keys() == weights(folder / "next" / "model").keys()
    assert same
