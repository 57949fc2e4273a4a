"""One preloaded parent for all runs of these tests, and a small corpus."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import write_corpus
from runs import Launcher


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    folder = tmp_path_factory.mktemp("runs")
    corpus = write_corpus(folder / "corpus.jsonl")
    environment = os.environ | {
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "1",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    environment.setdefault("TORCH_EXTENSIONS_DIR", str(folder / "extensions"))
    address = str(folder / "fork.socket")
    with open(folder / "server.txt", "w") as output:
        server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fork_server.py")), address],
            env=environment,
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
        )
    try:
        end = time.monotonic() + 180
        while not os.path.exists(address):
            assert server.poll() is None, (folder / "server.txt").read_text()
            assert time.monotonic() < end
            time.sleep(0.05)
        yield Launcher(address, folder, corpus)
    finally:
        server.terminate()
        server.wait(30)
