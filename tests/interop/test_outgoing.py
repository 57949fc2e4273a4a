"""What is copied or leaves this machine: known names, nothing behind a link to elsewhere, no secret in any file."""

import json
import os
from pathlib import Path

import pytest
from checkpoints import make_model, make_tokenizer

from hf_mamba.interop.convert import convert
from hf_mamba.interop.hub import stage
from hf_mamba.interop.outgoing import TOKENIZER_FILES, files_of, is_weights
from hf_mamba.redaction import command_line, is_secret, redact, without_secrets

TOKEN = "hf_" + "aTokenThatMustNotLeak42"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    make_model(seed=1).save_pretrained(folder)
    make_tokenizer(["the", "cat", "sat"]).save_pretrained(folder)
    return folder


@pytest.fixture
def private(tmp_path: Path) -> Path:
    file = tmp_path / "id_rsa"
    file.write_text("a private key")
    return file


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.txt", "README.md", "model.safetensors", "config.json"])
def test_a_link_to_elsewhere_stays_here(name: str, model: Path, private: Path, tmp_path: Path):
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(private)
    staging = tmp_path / "staging"
    staging.mkdir()
    with pytest.raises(ValueError, match=f"{name} is a link to .*id_rsa, outside the folder; nothing was copied"):
        stage(model, model, staging, command=())
    if name not in ("model.safetensors", "config.json"):  # these are read, not copied
        with pytest.raises(ValueError, match="outside the folder; nothing was copied"):
            convert(model, tmp_path / "converted", "transformers")
        assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize("name", ["tokenizer_v", "tokenizer.bak", "vocab.sh", "model-secret.safetensors", "tokenizers"])
def test_only_known_names_are_taken(name: str, model: Path, private: Path, tmp_path: Path):
    (model / name).symlink_to(private)
    staging = tmp_path / "staging"
    staging.mkdir()
    stage(model, model, staging, command=())
    convert(model, tmp_path / "converted", "transformers")
    assert name not in os.listdir(staging)
    assert name not in os.listdir(tmp_path / "converted")
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(os.listdir(staging))


def test_a_cache_of_the_hub_is_made_of_links(model: Path, tmp_path: Path):
    repository = tmp_path / "models--someone--small"
    snapshot, blobs = repository / "snapshots" / "0123abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    model.rename(blobs)
    for name in os.listdir(blobs):
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    found = files_of(snapshot, ("config.json", *TOKENIZER_FILES), weights=True)
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= set(found)
    assert all(file.parent == blobs for file in found.values())


def test_a_link_to_itself_is_no_file(model: Path, tmp_path: Path):
    (model / "vocab.txt").symlink_to("vocab.txt")
    with pytest.raises(ValueError, match="vocab.txt is not a file; nothing was copied"):
        convert(model, tmp_path / "converted", "transformers")


def test_a_pipe_is_no_file(model: Path, tmp_path: Path):
    os.mkfifo(model / "merges.txt")
    with pytest.raises(ValueError, match=r"merges\.txt is not a file"):
        convert(model, tmp_path / "converted", "transformers")


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.txt", "chat_template.jinja", "generation_config.json"])
def test_every_file_is_searched_for_tokens(name: str, model: Path, tmp_path: Path):
    (model / name).write_bytes(b"\xff\x00 " + TOKEN.encode())
    staging = tmp_path / "staging"
    staging.mkdir()
    with pytest.raises(ValueError, match="holds an access token") as refused:
        stage(model, model, staging, command=())
    assert TOKEN not in str(refused.value)


def test_names_of_weights():
    assert all(
        map(is_weights, ("model.safetensors", "model.safetensors.index.json", "model-00001-of-00012.safetensors"))
    )
    assert not any(map(is_weights, ("model-x.safetensors", "optimizer.safetensors", "model.safetensors.bak")))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"see {TOKEN}.", "see <token>."),
        ("s3://KEY:SECRET@bucket/x", "s3://<secret>@bucket/x"),
        ("https://u:pw@host/a https://host/b", "https://<secret>@host/a https://host/b"),
        ("ssh://git@host/a", "ssh://git@host/a"),
        ("WANDB_API_KEY=abc123 run", "WANDB_API_KEY=<token> run"),
        ("eos_token=</s>", "eos_token=</s>"),
        ("learning_rate=0.1", "learning_rate=0.1"),
    ],
)
def test_what_is_redacted(text: str, shown: str):
    assert redact(text) == shown


def test_secrets_of_the_environment_are_redacted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    assert redact("key 0123456789abcdef!") == "key <token>!"
    assert command_line(["x.py", "--hub_token", "abc", "--hub_token=abc", "--eos_token", "</s>"]) == (
        "x.py --hub_token '<token>' '--hub_token=<token>' --eos_token '</s>'"
    )
    kept = without_secrets({"api_key": "x", "pad_token": "<pad>", "inner": [{"password": "y", "path": "s3://a:b@c"}]})
    assert json.dumps(kept) == (
        '{"api_key": null, "pad_token": "<pad>", "inner": [{"password": null, "path": "s3://<secret>@c"}]}'
    )
    assert is_secret("aws_secret_access_key")
    assert not is_secret("max_tokens")
