"""Small checkpoints of every kind, a tokenizer, and a Hub on loopback."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from checkpoints import WORDS, make_model, make_tokenizer
from hub_server import TOKEN, Hub
from transformers import PreTrainedTokenizerFast

from hf_mamba import MambaForCausalLM


@pytest.fixture(scope="session")
def model() -> MambaForCausalLM:
    return make_model()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(WORDS)


@pytest.fixture(scope="session")
def stock_folder(model, tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers folder with tokenizer; not to be changed."""
    folder = tmp_path_factory.mktemp("stock") / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def zero_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """zero2/ and zero3/, written by two real DeepSpeed ranks; see zero_run.py."""
    out = tmp_path_factory.mktemp("zero")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).with_name("zero_run.py")
    done = subprocess.run(
        [sys.executable, str(script), str(out), str(port)], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A running Hub that the huggingface_hub of this process talks to, with a token that may write."""
    yield from _served(Hub(tmp_path_factory.mktemp("xet")), monkeypatch)


@pytest.fixture
def old_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The same, of before Xet."""
    yield from _served(Hub(), monkeypatch)


def _served(server: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    with server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        close_session()
        yield server
        close_session()


@pytest.fixture
def run_python(tmp_path: Path) -> Callable[..., str]:
    """run_python(code, **environment) -> its output; a fresh process, as a user's."""

    def run(code: str, **environment: str) -> str:
        env = os.environ | {"HF_HOME": str(tmp_path / "hf_home")}
        env |= {"DISABLE_SAFETENSORS_CONVERSION": "1"} | environment  # that would ask a service of the real Hub
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run
