"""After an end of any kind, nothing of a run is left: no process, no shared memory, no temporary file."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import Launcher, at, wait_for

TEMPORARY = """
import os, signal, tempfile
os.environ["TMPDIR"] = tempfile.tempdir = {folder!r}
"""
WHILE_TOKENISING = """
from hf_mamba.data.tokenize import _Worker
do = _Worker.do
def patched(self, unit):
    os.kill(os.getpid(), signal.{name})
    return do(self, unit)
_Worker.do = patched
"""
WHILE_EXPORTING = """
import hf_mamba.training.export as export
export.plot_loss = lambda *arguments: os.kill(os.getpid(), signal.{name})
"""


def alive(session: int) -> list[str]:
    """The processes that a rank started, and itself."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            state, _, _, theirs = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:4]
            if int(theirs) == session and state != "Z":
                found.append((entry / "cmdline").read_text())
    return found


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder of a short name: a socket's path in it has at most 107 characters."""
    with tempfile.TemporaryDirectory(prefix="t") as folder:
        yield Path(folder)


@pytest.mark.parametrize(
    ("end", "world", "code"),
    [
        ("normal", 1, 0),
        ("SIGINT while tokenising", 1, 85),
        ("SIGTERM while tokenising", 1, 85),
        ("SIGTERM while training", 2, 85),
        ("SIGINT while training", 1, 85),
        ("SIGTERM while exporting", 1, 85),
    ],
)
def test_nothing_is_left_behind(launcher: Launcher, tmp_path: Path, temporary: Path, end: str, world: int, code: int):
    """In training the signal reaches every process of the rank, workers included, as a launcher's does."""
    home, run = tmp_path / "home", launcher.folder / f"left-{end}"
    patch, name = TEMPORARY.format(folder=str(temporary)), end.split()[0]
    if end.endswith("tokenising"):
        patch += WHILE_TOKENISING.format(name=name)
    elif end.endswith("training"):
        patch += at("training_step", 3, f"os.killpg(0, signal.{name})", rank=0)
    elif end.endswith("exporting"):
        patch += WHILE_EXPORTING.format(name=name)
    launch = launcher.start(run, world, patch=patch, home=home, dataloader_num_workers=1, save_steps=6)
    pids = [rank.pid for rank in launch.ranks]
    launch.ended(code)
    wait_for(lambda: not any(alive(pid) for pid in pids), timeout=20)
    assert [name for name in os.listdir("/dev/shm") if any(f"_{pid}_" in name for pid in pids)] == []
    assert [name for name in os.listdir(temporary) if not name.startswith("torchinductor_")] == []  # torch's own cache
    assert os.listdir(home / "hf_mamba" / "parts") == []
    hidden = [path.name for path in run.rglob(".*")] if run.exists() else []
    assert hidden in ([], [".lock"])
    assert not (run / "model.partial").exists()
    if end.endswith("training"):
        assert (run / "checkpoint-4").is_dir()
