"""--push_to_hub through the recipe, against the Hub on loopback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import TOKEN, Hub
from launching import ROOT, environment, write_corpus
from runs import Launcher

FLAGS = "--vocab_size 300 --seq_len 32 --micro_batch_size 2 --max_steps 4 --save_steps 2 --use_cpu true"


def test_the_recipe_publishes_its_checkpoints_and_model(hub: Hub, tmp_path: Path):
    corpus = write_corpus(tmp_path / "corpus.jsonl", 60)
    arguments = [
        *FLAGS.split(),
        "--eval_fraction",
        "0.05",
        "--dataset",
        str(corpus),
        "--output_dir",
        str(tmp_path / "run"),
    ]
    arguments += ["--push_to_hub", "true", "--hub_model_id", "someone/tiny"]
    command = [sys.executable, str(ROOT / "recipes" / "pretrain.py"), *arguments]
    online = environment(tmp_path) | {"HF_TOKEN": TOKEN, "HF_ENDPOINT": hub.url}
    online |= {
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
    }
    done = subprocess.run(command, env=os.environ | online, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    titles = [title.split(" (")[0] for title in hub.titles("someone/tiny")]
    assert [title for title in titles if title in ("Step 2", "Step 4", "Finished model")] == titles[-3:]
    assert len(titles) >= 3
    assert hub.repositories["someone/tiny"].private
    for file in (tmp_path / "run").rglob("*"):
        if file.is_file():
            assert TOKEN.encode() not in file.read_bytes(), file


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--push_to_hub", "true"], "--hub_model_id USER/NAME"),
        (["--push_to_hub", "true", "--hub_model_id", "a/b", "--hub_token", "hf_abcdefgh1234"], "hf auth login"),
        (["--hub_strategy", "end"], "Remove --hub_strategy"),
    ],
)
def test_publishing_flags_that_cannot_be_served(launcher: Launcher, more: list[str], message: str):
    said = launcher.recipe([*more, "--dry_run"], expect=2)
    assert message in said
    assert "hf_abcdefgh1234" not in said
