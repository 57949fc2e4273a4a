"""Publishing with the real huggingface_hub client, against a small Hub on loopback: complete, patient, and discreet."""

import json
import logging
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import make_model, make_tokenizer, same_weights, write_original
from hub_server import READ_ONLY_TOKEN, TOKEN, Fault, Hub
from huggingface_hub import HfApi, ModelCard

from hf_mamba import MambaForCausalLM
from hf_mamba.cli import main
from hf_mamba.family import get_family
from hf_mamba.files import beside
from hf_mamba.interop import hub as hub_module
from hf_mamba.interop.hub import Pusher, Target, push
from hf_mamba.report.card import write_model_card

REPO = "tester/small-mamba"
SOON = Target(REPO, wait=0.01)
SECRET = "hf_" + "aTokenThatMustNotLeak42"
PLAN = {
    "preset": "130m_mamba",
    "model_config": {"hidden_size": 20, "num_hidden_layers": 2, "vocab_size": 64},
    "parameters": {"estimated": 12_345},
    "tokens_per_step": 1_000,
    "total_steps": 20,
    "total_tokens": 20_000,
    "dtype": "bf16",
    "training_arguments": {"learning_rate": 6e-4, "hub_token": SECRET, "run_name": f"with {SECRET} in it"},
    "data": {"sources": ["/home/somebody/texts/*.jsonl@text:0.5", "owner/name"]},
}


def add_checkpoint(run: Path, step: int, max_shard_size: str = "1GB") -> MambaForCausalLM:
    folder = run / f"checkpoint-{step}"
    model = make_model(seed=step)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    make_tokenizer(["the", "cat", "sat"]).save_pretrained(folder)
    history = [{"step": s, "loss": 4 - s / 10, "learning_rate": 1e-3} for s in range(1, step + 1)]
    history.append({"step": step, "eval_loss": 2.5})
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        (folder / name).write_bytes(b"\x80private")
    return model


def wait_until(true: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "plan.json").write_text(json.dumps(PLAN))
    (folder / "run.json").write_text(json.dumps({"data": {"fingerprint": "abc123"}}))
    return folder


def _load_from_hub(run_python, hub: Hub, folder: Path, revision: str = "main") -> bool:
    """In a fresh process, as a user: from_pretrained(repo_id) gives the weights of `folder`, bit for bit."""
    out = run_python(
        "import torch\nfrom hf_mamba import MambaForCausalLM\n"
        f"a = MambaForCausalLM.from_pretrained({REPO!r}, revision={revision!r}).state_dict()\n"
        f"b = MambaForCausalLM.from_pretrained({str(folder)!r}).state_dict()\n"
        "print(a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a))",
        HF_ENDPOINT=hub.url,
        HF_HUB_OFFLINE="0",
        HF_TOKEN=TOKEN,
    )
    return out.split()[-1] == "True"


def test_one_commit_a_checkpoint_and_the_model_comes_back_bit_for_bit(hub: Hub, run: Path, run_python, capsys):
    add_checkpoint(run, 10, max_shard_size="14KB")
    add_checkpoint(run, 20)
    assert main(["push", str(run), REPO]) == 0
    assert "Step 20 (20,000 tokens)" in capsys.readouterr().out
    assert hub.repositories[REPO].private
    assert hub.titles(REPO) == ["initial commit", "Step 10 (10,000 tokens)", "Step 20 (20,000 tokens)"]
    assert set(hub.files(REPO)) == {
        "README.md", "config.json", "generation_config.json", "loss_curve.png", "model.safetensors", "plan.json",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert _load_from_hub(run_python, hub, run / "checkpoint-20")
    earlier = hub.repositories[REPO].branches["main"][1]
    assert "model-00003-of-00003.safetensors" in earlier.files
    assert _load_from_hub(run_python, hub, run / "checkpoint-10", revision=earlier.sha)


_SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "vocab_size": 64}
_OTHERS = {
    "mamba2": {"num_heads": 6, "head_dim": 8, "state_size": 5, "n_groups": 1},
    "granitemoehybrid": {
        **{"layer_types": ["mamba", "attention"], "num_attention_heads": 3, "num_key_value_heads": 1},
        **{"shared_intermediate_size": 20, "mamba_n_heads": 6, "mamba_d_head": 8, "mamba_d_state": 5},
    },
}


@pytest.mark.parametrize("name", _OTHERS)
def test_other_families_come_back_in_transformers_alone(hub: Hub, run: Path, run_python, name: str):
    family, fields = get_family(name), _SIZES | _OTHERS[name]
    plan = PLAN | {"preset": None, "model_config": {"model_type": name, **fields}}
    (run / "plan.json").write_text(json.dumps(plan))
    add_checkpoint(run, 20)
    family.model_class(family.config_class(**fields)).save_pretrained(run / "checkpoint-20")
    assert main(["push", str(run), REPO]) == 0
    out = run_python(
        "import sys; sys.modules['hf_mamba'] = None\nimport torch\nfrom transformers import AutoModelForCausalLM as M\n"
        f"a, b = (M.from_pretrained(n, dtype=torch.float32) for n in ({REPO!r}, {str(run / 'checkpoint-20')!r}))\n"
        "weights = a.state_dict(), b.state_dict()\n"
        "print(a.config.model_type, all(torch.equal(w, weights[1][n]) for n, w in weights[0].items()))",
        HF_ENDPOINT=hub.url,
        HF_HUB_OFFLINE="0",
        HF_TOKEN=TOKEN,
    )
    assert out.split()[-2:] == [name, "True"]
    card = ModelCard(hub.files(REPO)["README.md"].decode())
    assert family.title in card.text
    assert set(family.tags) <= set(card.data.tags or ())


def test_files_of_others_are_not_written_over(hub: Hub, run: Path, capsys):
    api = HfApi()
    api.create_repo(REPO)
    api.upload_file(path_or_fileobj=b"their weights", path_in_repo="model.safetensors", repo_id=REPO)
    add_checkpoint(run, 10)
    before = hub.titles(REPO)
    assert main(["push", str(run), REPO]) == 2
    assert "model.safetensors" in (said := capsys.readouterr().err)
    assert "--overwrite" in said
    assert hub.titles(REPO) == before
    assert main(["push", str(run), REPO, "--overwrite"]) == 0
    add_checkpoint(run, 20)
    assert main(["push", str(run), REPO]) == 0  # it is the run's own now


def test_pushing_again_sends_only_what_is_new(hub: Hub, run: Path):
    add_checkpoint(run, 10)
    assert push(run, SOON)[1] == ["Step 10 (10,000 tokens)"]
    assert push(run, SOON)[1] == []
    add_checkpoint(run, 20)
    (run / "checkpoint-30").mkdir()  # being written: no trainer_state.json yet
    assert push(run, SOON)[1] == ["Step 20 (20,000 tokens)"]
    model = make_model(seed=5)
    model.save_pretrained(run / "model")
    assert push(run, SOON)[1] == ["Finished model"]
    assert push(run, SOON)[1] == []
    assert not list(run.glob(".push*"))


def test_the_card_is_valid_and_complete(hub: Hub, run: Path):
    add_checkpoint(run, 20)
    push(run, SOON)
    card = ModelCard(hub.files(REPO)["README.md"].decode())
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert [(r.metric_type, r.metric_value) for r in card.data.eval_results] == [("loss", 2.5), ("perplexity", 12.1825)]
    assert card.data.metrics == ["loss", "perplexity"]
    assert not {"license", "language", "datasets"} & set(card.data.to_dict())  # nobody said
    card.validate()  # by the Hub, here the tests' own
    parts = ["130m_mamba", "20,000 tokens", "12,345 parameters", "abc123", "loss_curve.png", "| 20 | 2.5000 | 12.18 |"]
    for part in [*parts, "torch", '"tokens_per_step": 1000', "0.0006"]:
        assert part in card.content, part
    assert "Launched with" not in card.content  # this process did not train it


def test_the_card_of_a_run_shows_its_command_without_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "some other secret")
    command = ["pretrain.py", "--preset", "tiny", "--hub_token", "abc", "--api-key=def", "--note", "some other secret"]
    write_model_card(tmp_path, PLAN, [], command)
    text = (tmp_path / "README.md").read_text()
    assert "--preset tiny --hub_token '<token>' '--api-key=<token>'" in text
    assert not re.search(r"\babc\b|\bdef\b|some other secret", text)


def test_no_token_leaves_the_machine_or_enters_a_log(hub: Hub, run: Path, caplog: pytest.LogCaptureFixture):
    add_checkpoint(run, 10)
    hub.faults = [Fault("POST .*/commit/", "drop", 2)]
    with caplog.at_level(logging.DEBUG):
        push(run, SOON)
    everything = b"".join(hub.files(REPO).values()) + caplog.text.encode()
    assert SECRET.encode() not in everything
    assert TOKEN.encode() not in everything
    plan = json.loads(hub.files(REPO)["plan.json"])
    assert plan["training_arguments"] == {"learning_rate": 6e-4, "hub_token": None, "run_name": "with <token> in it"}
    assert plan["data"]["sources"] == ["*.jsonl@text:0.5", "owner/name"]
    assert SECRET in (run / "plan.json").read_text()  # the run's own file is not ours to change


def test_a_file_with_a_token_in_it_is_not_uploaded(hub: Hub, run: Path):
    add_checkpoint(run, 10)
    config = run / "checkpoint-10" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"note": SECRET}))
    with pytest.raises(ValueError, match=r"tokenizer_config\.json holds an access token") as caught:
        push(run, SOON)
    assert SECRET not in str(caught.value)
    assert hub.titles(REPO) == ["initial commit"]


@pytest.mark.parametrize(
    "faults",
    [
        [Fault("PUT /lfs", "drop", 2)],
        [Fault("PUT /lfs", 503, 1), Fault("objects/batch", 500, 1)],
        [Fault("POST .*/commit/", 502, 2)],
        [Fault("preupload", "drop", 1), Fault("repos/create", 503, 1)],
    ],
    ids=["dropped in a shard", "5xx on shards", "5xx on the commit", "at the start"],
)
def test_network_failures_are_retried_and_shards_sent_once(old_hub: Hub, run: Path, run_python, faults, monkeypatch):
    from huggingface_hub import lfs
    from huggingface_hub.utils import _http

    # the client's own patience is in whole seconds; here it is ours that is tested
    defaults = _http._http_backoff_base.__kwdefaults__
    for name in [name for name in ("base_wait_time", "max_wait_time", "max_retries") if name in defaults]:
        monkeypatch.setitem(defaults, name, 0)
    for function in (_http.http_backoff, _http.http_stream_backoff, lfs.http_backoff):
        inner = getattr(function, "__wrapped__", function)
        for name in ("base_wait_time", "max_wait_time", "max_retries"):
            monkeypatch.setitem(inner.__kwdefaults__, name, 0)
    add_checkpoint(run, 10, max_shard_size="14KB")
    old_hub.faults = faults
    assert push(run, SOON)[1] == ["Step 10 (10,000 tokens)"]
    assert all(fault.times == 0 for fault in faults)
    assert old_hub.titles(REPO) == ["initial commit", "Step 10 (10,000 tokens)"]
    uploads = [line for line in old_hub.log if line.startswith("PUT /lfs")]
    failed = sum(f.pattern == "PUT /lfs" for f in faults for _ in range(2 if f.action == "drop" else 1))
    assert len(uploads) == len(set(uploads)) + failed  # what arrived is not sent again


def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch):
    add_checkpoint(run, 10)
    lost = threading.Event()
    handler = hub.server.RequestHandlerClass
    answer = handler.answer

    def lose_first_commit(self, status, content=None, headers=None):
        if "/commit/" in self.path and not lost.is_set():
            lost.set()
            self.close_connection = True
            self.connection.close()
        else:
            answer(self, status, content, headers)

    monkeypatch.setattr(handler, "answer", lose_first_commit)
    assert push(run, SOON)[1] == ["Step 10 (10,000 tokens)"]
    assert hub.titles(REPO) == ["initial commit", "Step 10 (10,000 tokens)"]


def test_a_repository_without_rights_is_refused_at_once(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    add_checkpoint(run, 10)
    monkeypatch.setenv("HF_TOKEN", READ_ONLY_TOKEN)
    before = sorted(file.name for file in run.rglob("*"))
    assert main(["push", str(run), REPO]) == 2
    error = capsys.readouterr().err
    assert REPO in error
    assert "may not write" in error
    assert READ_ONLY_TOKEN not in error
    assert not any("preupload" in line or "lfs" in line for line in hub.log)
    assert sorted(file.name for file in run.rglob("*")) == before


def test_training_goes_on_whatever_the_network_does(hub: Hub, run: Path, caplog: pytest.LogCaptureFixture):
    import shutil

    add_checkpoint(run, 10)
    add_checkpoint(run, 20)
    pusher = Pusher(run, Target(REPO, retries=1, wait=0.01))
    hub.faults = [Fault("POST .*/commit/", 400, 1)]
    pusher.checkpoint(run / "checkpoint-10")
    pusher.checkpoint(run / "checkpoint-20")
    pusher.checkpoint(run / "checkpoint-99")  # not there
    shutil.rmtree(run / "checkpoint-20")  # the trainer may rotate it away meanwhile
    assert pusher.finish(timeout=60) is False
    assert hub.titles(REPO) == ["initial commit", "Step 20 (20,000 tokens)"]
    assert "'Step 10 (10,000 tokens)' was not pushed" in caplog.text
    assert "checkpoint-99 was not pushed" in caplog.text
    assert not list(run.glob(".push*"))
    assert push(run, SOON)[1] == ["Step 10 (10,000 tokens)"]  # the command makes up for it


def test_a_hub_out_of_reach_is_an_error_for_the_command_and_a_warning_for_training(run: Path, monkeypatch, caplog):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    add_checkpoint(run, 10)
    target = Target(REPO, retries=1, wait=0.01)
    with pytest.raises(ValueError, match="run hf-mamba push again"):
        push(run, target)
    pusher = Pusher(run, target)
    pusher.checkpoint(run / "checkpoint-10")
    assert pusher.finish() is False
    assert "training goes on" in caplog.text


@pytest.mark.parametrize("reason", ["Private repository storage limit reached", "out of reach"])
def test_what_one_checkpoint_could_not_send_goes_with_the_next(hub: Hub, run: Path, reason: str, caplog):
    """In order, also after a start that ended before its uploads."""
    add_checkpoint(run, 5)  # of an earlier start
    add_checkpoint(run, 10)
    pusher = Pusher(run, Target(REPO, retries=0, wait=0.01))
    hub.faults = [Fault("POST .*/commit/", 403 if " " in reason[:8] else "drop", 6, says=reason)]
    pusher.checkpoint(run / "checkpoint-10")
    wait_until(lambda: "tried again with the next" in caplog.text)
    assert hub.titles(REPO) == ["initial commit"]
    assert reason in caplog.text or "disconnected" in caplog.text
    hub.faults = []
    add_checkpoint(run, 20)
    pusher.checkpoint(run / "checkpoint-20")
    assert pusher.finish(timeout=60)
    assert hub.titles(REPO)[1:] == ["Step 5 (5,000 tokens)", "Step 10 (10,000 tokens)", "Step 20 (20,000 tokens)"]
    assert not list(run.glob(".push*"))


def test_an_older_checkpoint_that_comes_late_is_not_the_branchs_last(hub: Hub, run: Path):
    add_checkpoint(run, 20)
    push(run, SOON)
    weights = hub.files(REPO)["model.safetensors"]
    add_checkpoint(run, 10)
    assert push(run, SOON)[1] == ["Step 10 (10,000 tokens)", "Step 20 (20,000 tokens)"]
    assert hub.files(REPO)["model.safetensors"] == weights


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 8.0),
        ({"RateLimit": '"api";r=0;t=284', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}, 285.0),
        ({"RateLimit": '"api";r=12;t=284', "Retry-After": "3"}, 4.0),  # not the limit's reason
        ({"Retry-After": "999999999"}, 3600.0),
        ({"Retry-After": "soon"}, 0.01),
        ({}, 0.01),
    ],
)
def test_the_hub_says_when_to_come_back(hub: Hub, run: Path, headers: dict, seconds: float, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(hub_module.time, "sleep", waits.append)
    hub.faults = [Fault("POST /api/repos/create", 429, 1, headers)]
    _, made = push(add_checkpoint(run, 10) and run, SOON)
    assert made
    assert waits == [seconds]


def test_patience_covers_the_hubs_window_of_five_minutes(run: Path, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    waits: list[float] = []
    monkeypatch.setattr(hub_module.time, "sleep", waits.append)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    add_checkpoint(run, 10)
    with pytest.raises(ValueError, match="11 times"):
        push(run, Target(REPO))
    assert sum(waits) > 300


def test_the_hubs_own_reason_comes_first(hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]):
    add_checkpoint(run, 10)
    hub.faults = [Fault("POST .*/commit/", 403, 9, says="Private repository storage limit reached")]
    assert main(["push", str(run), REPO]) == 2
    said = capsys.readouterr().err
    assert f"'Step 10 (10,000 tokens)' to {REPO}: Private repository storage limit reached (HTTP 403)" in said
    assert "no such repository" not in said
    assert said.count("storage limit") == 1


def test_a_name_without_a_user_is_the_accounts(hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]):
    add_checkpoint(run, 10)
    assert main(["push", str(run), "small-mamba"]) == 0
    assert "pushed to tester/small-mamba: Step 10" in capsys.readouterr().out
    pusher = Pusher(run, Target("other", wait=0.01))
    pusher.checkpoint(run / "checkpoint-10")
    assert pusher.finish(60)
    assert pusher.target.repo_id == "tester/other"
    assert hub.titles("tester/other") == ["initial commit", "Step 10 (10,000 tokens)"]


@pytest.mark.parametrize("name", ["a/b/c", "a/b--c", "a/.b", "a/b.git", "ü/b", "a/" + "b" * 97])
def test_a_name_that_the_client_refuses_is_refused_before_anything(hub: Hub, run: Path, name: str, capsys):
    add_checkpoint(run, 10)
    assert main(["push", str(run), name]) == 2
    assert "is no name of a repository" in capsys.readouterr().err
    assert hub.log == []


@pytest.mark.parametrize("wanted", ["private", "public"])
def test_a_public_repository_is_remarked_where_public_was_not_asked(hub: Hub, run: Path, wanted: str, caplog):
    HfApi().create_repo(REPO, private=False)
    add_checkpoint(run, 10)
    push(run, Target(REPO, wait=0.01, private=wanted == "private"))
    assert ("everybody can read" in caplog.text) == (wanted == "private")


def test_a_hub_without_xet_gets_its_files_by_lfs(old_hub: Hub, run: Path, caplog: pytest.LogCaptureFixture):
    add_checkpoint(run, 10)
    assert push(run, SOON)[1] == ["Step 10 (10,000 tokens)"]
    assert caplog.text.count("no Xet storage") == 1
    assert sum("xet-write-token" in line for line in old_hub.log) == 1
    assert any(line.startswith("PUT /lfs") for line in old_hub.log)


@pytest.mark.parametrize("status", [401, 403])
def test_a_token_that_xet_does_not_take_is_refused_at_once(hub: Hub, run: Path, status: int):
    add_checkpoint(run, 10)
    hub.faults = [Fault("xet-write-token", status, 9)]
    with pytest.raises(ValueError, match=f"HTTP {status}.*hf auth whoami"):
        push(run, SOON)
    assert sum("xet-write-token" in line for line in hub.log) == 1


def test_what_a_killed_push_left_is_removed_and_a_living_ones_is_not(hub: Hub, run: Path):
    add_checkpoint(run, 10)
    (run / ".push.killed.partial").mkdir()
    (run / ".push.killed.partial" / "model.safetensors").write_bytes(b"x")
    with beside(run / "push") as living:
        push(run, SOON)
        assert list(run.glob(".push.*")) == [living]


def test_training_folders_and_branches(hub: Hub, zero_folder: Path, run: Path):
    import shutil

    shutil.copytree(zero_folder / "zero3", run / "checkpoint-2")
    (run / "checkpoint-2" / "trainer_state.json").write_text("{}")
    push(run, Target(REPO, wait=0.01, revision="exp/1", private=False))
    files = hub.files(REPO, "exp/1")
    assert not any("optim_states" in name or name.endswith(".py") for name in files)
    assert hub.titles(REPO) == ["initial commit"]
    assert not hub.repositories[REPO].private
    (run / "got.safetensors").write_bytes(files["model.safetensors"])
    from safetensors.torch import load_file

    expected = load_file(zero_folder / "zero3.safetensors")
    got = load_file(run / "got.safetensors")
    assert all(torch.equal(got[name], expected[name]) for name in got)


def test_remote_original_folders_load_and_bad_indexes_do_not(hub: Hub, tmp_path: Path, run_python):
    from huggingface_hub import HfApi

    model = make_model()
    write_original(model, tmp_path / "original")
    HfApi().create_repo(REPO)
    HfApi().upload_folder(repo_id=REPO, folder_path=tmp_path / "original")
    bad = tmp_path / "bad"
    model.config.save_pretrained(bad)
    index = {"metadata": {}, "weight_map": {"backbone.norm_f.weight": "../../x"}}
    (bad / "model.safetensors.index.json").write_text(json.dumps(index))
    HfApi().create_repo("tester/bad")
    HfApi().upload_folder(repo_id="tester/bad", folder_path=bad)
    out = run_python(
        "from hf_mamba import MambaForCausalLM\n"
        f"MambaForCausalLM.from_pretrained({REPO!r}).save_pretrained({str(tmp_path / 'got')!r})\n"
        "try:\n    MambaForCausalLM.from_pretrained('tester/bad')\n"
        "except (ValueError, OSError) as error:\n    print('refused')",
        HF_ENDPOINT=hub.url,
        HF_HUB_OFFLINE="0",
        HF_TOKEN=TOKEN,
    )
    assert out.split()[-1] == "refused"
    assert same_weights(MambaForCausalLM.from_pretrained(tmp_path / "got"), model)
