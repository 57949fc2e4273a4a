"""Shared settings: deterministic property tests, and marks that say why a test is skipped."""

import importlib.util
import os
from pathlib import Path

import pytest
from hypothesis import settings

# Before torch is imported: the tests' processes share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# DeepSpeed's CPU ops, built once for all tests and all sessions of this checkout
EXTENSIONS = Path(__file__).parents[1] / ".pytest_cache" / "d" / "torch_extensions"
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(EXTENSIONS))

settings.register_profile("ci", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("ci")


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are made here: a run in this checkout's own folder would be part of them."""
    monkeypatch.chdir(tmp_path)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="run the tests that take minutes or hours")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # before any worker starts: a build that was killed leaves its lock behind
        for lock in EXTENSIONS.rglob("lock"):
            lock.unlink()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    import torch

    reasons = {}
    if not torch.cuda.is_available():
        reasons["gpu"] = reasons["mamba_ssm"] = "no CUDA device"
    elif importlib.util.find_spec("mamba_ssm") is None:
        reasons["mamba_ssm"] = "mamba-ssm is not installed"
    if not config.getoption("--run-slow"):
        reasons["slow"] = "takes minutes or hours: pass --run-slow"
    for item in items:
        for mark, reason in reasons.items():
            if mark in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))
