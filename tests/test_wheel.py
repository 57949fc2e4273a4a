"""The wheel, installed without the checkout, trains, and carries the recipes and templates."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT, environment, logged, write_corpus

FOLDERS = ("recipes", "ds_configs")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """(An empty folder to work in, the environment of somebody who has installed the wheel.)"""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a build leaves files beside what it builds
    source.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "hf_mamba", *FOLDERS):
        (source / name).symlink_to(ROOT / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-index"]
    done = subprocess.run(
        [*pip, "wheel", *options, "--no-build-isolation", "-w", str(folder), str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (wheel,) = folder.glob("*.whl")
    subprocess.run(
        [*pip, "install", "-q", "--ignore-installed", *options, "--prefix", str(folder / "prefix"), str(wheel)],
        check=True,
    )
    (packages,) = folder.glob("prefix/lib/python*/site-packages")
    work = folder / "work"
    work.mkdir()
    return work, environment(folder) | {"PYTHONPATH": str(packages)}


def hf_mamba(installed: tuple[Path, dict[str, str]], *words: str) -> subprocess.CompletedProcess[str]:
    folder, env = installed
    command = [sys.executable, "-m", "hf_mamba.cli", *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=400, check=False)


def test_recipes_and_templates_can_be_copied(installed: tuple[Path, dict[str, str]]) -> None:
    done = hf_mamba(installed, "recipes", "--copy", "mine")
    assert done.returncode == 0, done.stderr
    mine = installed[0] / "mine"
    for name in FOLDERS:
        expected = [path for path in (ROOT / name).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        assert len(expected) >= 5
        for path in expected:
            assert (mine / path.relative_to(ROOT)).read_bytes() == path.read_bytes()
    again = hf_mamba(installed, "recipes", "--copy", "mine")
    assert again.returncode == 2
    assert "nothing is written over" in again.stderr


def test_the_main_job_runs(installed: tuple[Path, dict[str, str]]) -> None:
    folder = installed[0]
    write_corpus(folder / "corpus.jsonl")
    flags = "--vocab_size 320 --seq_len 48 --max_steps 2 --logging_steps 1 --use_cpu true --output_dir run"
    done = hf_mamba(installed, "launch", "--preset", "tiny_mamba", *flags.split(), "--dataset", "corpus.jsonl")
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"prefix{os.sep}share" in done.stdout, "the recipe of the wheel was not the one that ran"
    assert len(logged(folder / "run")) == 2
    assert (folder / "run" / "model" / "model.safetensors").is_file()
