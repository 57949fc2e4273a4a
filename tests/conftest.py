"""Shared settings: deterministic property tests, and marks that say why a test is skipped."""

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from runs import Launcher

# Before torch is imported: the tests' processes share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# DeepSpeed's CPU ops, built once for all tests and all sessions of this checkout
EXTENSIONS = Path(__file__).parents[1] / ".pytest_cache" / "d" / "torch_extensions"
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(EXTENSIONS))

settings.register_profile("ci", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("ci")


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Launcher"]:
    """One preloaded parent for all runs of the recipe, and a small corpus."""
    from runs import serving

    with serving(tmp_path_factory.mktemp("runs")) as launcher:
        yield launcher


@pytest.fixture
def namespaces() -> Iterator[list[tuple[str, str]]]:
    """Two network namespaces joined by a pair of virtual cables: two nodes, as far as a program can tell."""
    names = [f"hfm{os.getpid()}a", f"hfm{os.getpid()}b"]
    links = [f"v{os.getpid() % 100000}a", f"v{os.getpid() % 100000}b"]
    if shutil.which("ip") is None:
        pytest.skip("the command `ip` is not installed")
    commands = [["ip", "netns", "add", name] for name in names]
    commands.append(["ip", "link", "add", links[0], "type", "veth", "peer", "name", links[1]])
    for number, (name, link) in enumerate(zip(names, links, strict=True), 1):
        commands.append(["ip", "link", "set", link, "netns", name])
        inside = ["ip", "netns", "exec", name, "ip"]
        commands.append([*inside, "addr", "add", f"10.213.7.{number}/24", "dev", link])
        commands += [[*inside, "link", "set", device, "up"] for device in (link, "lo")]
    try:
        for command in commands:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                pytest.skip(f"network namespaces are not permitted here: {done.stderr.strip()}")
        yield list(zip(names, links, strict=True))
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are made here: a run in this checkout's own folder would be part of them."""
    monkeypatch.chdir(tmp_path)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="run the tests that take minutes or hours")


def pytest_configure(config: pytest.Config) -> None:
    # Before any worker starts: a build that was killed leaves its lock behind. A pytest that a test starts inherits the
    # worker's name, and the locks that it would find belong to builds of other workers.
    if "PYTEST_XDIST_WORKER" not in os.environ:
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
