"""--push_to_hub through the recipe, against the Hub on loopback."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import TOKEN, Fault, Hub
from launching import ROOT, environment, write_corpus
from runs import Launcher, wait_for

FLAGS = "--vocab_size 300 --seq_len 32 --micro_batch_size 2 --max_steps 4 --save_steps 2 --use_cpu true"


LOOK = """
import gc, runpy, sys
from hf_mamba.interop.hub import Pusher
finish = Pusher.finish
def looked(self, *arguments):
    alive = [o for o in gc.get_objects() if type(o).__name__ in ("MambaForCausalLM", "AdamW", "AcceleratedOptimizer")]
    print("held while waiting:", len(alive), file=sys.stderr, flush=True)
    return finish(self, *arguments)
Pusher.finish = looked
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start(hub: Hub, tmp_path: Path, repo: str, *more: str) -> subprocess.Popen[str]:
    """The recipe on a small corpus, in a process of its own, pushing to the Hub."""
    corpus = write_corpus(tmp_path / "corpus.jsonl", 60)
    arguments = [*FLAGS.split(), "--eval_fraction", "0.05", "--dataset", str(corpus), "--sample_prompt", "", *more]
    arguments += ["--output_dir", str(tmp_path / "run"), "--push_to_hub", "true", "--hub_model_id", repo]
    online = environment(tmp_path) | {"HF_TOKEN": TOKEN, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", LOOK, str(ROOT / "recipes" / "pretrain.py"), *arguments]
    with open(tmp_path / "said.txt", "w") as said:
        return subprocess.Popen(command, env=os.environ | online, cwd=ROOT, stdout=said, stderr=said, text=True)


def test_the_recipe_publishes_its_checkpoints_and_model(hub: Hub, tmp_path: Path):
    process = start(hub, tmp_path, "tiny")  # a name without a user is the account's
    assert process.wait(300) == 0, (tmp_path / "said.txt").read_text()[-3000:]
    repo = "tester/tiny"
    titles = [title.split(" (")[0] for title in hub.titles(repo)]
    assert titles == ["initial commit", "Step 2", "Step 4", "Finished model"]
    assert hub.repositories[repo].private
    assert any("xet-write-token" in line for line in hub.log)
    for file in (tmp_path / "run").rglob("*"):
        if file.is_file():
            assert TOKEN.encode() not in file.read_bytes(), file


def test_a_finished_run_that_waits_for_its_uploads_holds_nothing_and_may_be_ended(hub: Hub, tmp_path: Path):
    hub.faults = [Fault("POST .*/commit/", "hang", 99)]
    process = start(hub, tmp_path, "someone/tiny")
    said = tmp_path / "said.txt"
    wait_for(lambda: "waiting for" in said.read_text() or process.poll() is not None, timeout=300)
    text = said.read_text()
    assert f"finished; waiting for 3 upload(s) to someone/tiny. Ctrl-C leaves them to `hf-mamba push {tmp_path}" in text
    assert f"model: {tmp_path / 'run' / 'model'}" in text  # all is said before the waiting
    wait_for(lambda: "held while waiting: 0" in said.read_text(), timeout=20)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert f"not everything was uploaded; run hf-mamba push {tmp_path / 'run'} someone/tiny" in said.read_text()
    assert "nothing to save" not in said.read_text()
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "finished"
    assert not list((tmp_path / "run").glob(".push*"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--push_to_hub", "true"], "--hub_model_id USER/NAME"),
        (["--push_to_hub", "true", "--hub_model_id", "a/b/c"], "Hub's own client refuses this name"),
        (["--push_to_hub", "true", "--hub_model_id", "a/b", "--hub_token", "hf_abcdefgh1234"], "hf auth login"),
        (["--hub_strategy", "end"], "Remove --hub_strategy"),
    ],
)
def test_publishing_flags_that_cannot_be_served(launcher: Launcher, more: list[str], message: str):
    said = launcher.recipe([*more, "--dry_run"], expect=2)
    assert message in said
    assert "hf_abcdefgh1234" not in said
