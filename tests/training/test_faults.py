"""Faults of the machine through real starts: one plain line, what was whole is kept, and the next start goes on."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from runs import ROOT, Launch, Launcher, at, curve, log_lines, same_bytes, stop_in, wait_for

from hf_mamba.run.manifest import published

ZERO2 = {"deepspeed": str(ROOT / "ds_configs" / "zero2.json")}
OFTEN = {"save_steps": 2, "eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 1}


def plain_line(launch: Launch) -> str:
    """The one line that the user is told."""
    text = launch.text()
    assert "Traceback" not in text, text[-3000:]
    lines = re.findall("(?:error|why): .*", text)  # a progress bar may be before it
    assert lines, text[-3000:]
    return lines[-1]


# ---- a bit of a checkpoint ----


@pytest.fixture(scope="module")
def references(launcher: Launcher) -> dict[str, Path]:
    for name, world, settings in (("plain", 1, {}), ("zero2", 2, ZERO2)):
        launcher.run(f"whole-{name}", world, **OFTEN, **settings)
        launcher.run(f"begun-{name}", world, expect=85, patch=stop_in(7), **OFTEN, **settings)
    return {path.name: path for path in launcher.folder.glob("*-*") if path.is_dir()}


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "world"), [("plain", 1), ("zero2", 2)])
def test_a_flipped_bit_in_any_file_of_a_checkpoint_is_noticed_at_the_start(
    launcher: Launcher, references: dict[str, Path], tmp_path: Path, engine: str, world: int
):
    """Each file of the newest checkpoint in turn, and those of the run's folder: noticed, or without effect."""
    whole, begun = references[f"whole-{engine}"], references[f"begun-{engine}"]
    settings = OFTEN | (ZERO2 if world > 1 else {})
    names = sorted(str(path.relative_to(begun)) for path in begun.rglob("*") if path.is_file())
    names = [name for name in names if name.startswith("checkpoint-7/") or "/" not in name]
    for number, name in enumerate(names):
        run = tmp_path / str(number)
        subprocess.run(["cp", "-r", str(begun), str(run)], check=True)
        content = bytearray((run / name).read_bytes())
        if not content:
            continue
        content[len(content) // 2] ^= 1 << (number % 8)
        (run / name).write_bytes(content)
        launch = launcher.start(run, world, **settings)
        codes = launch.wait(300)
        print(
            name, codes, [line for line in launch.text().splitlines() if "passed over" in line or "error" in line][:2]
        )
        if name.startswith("checkpoint-7/"):
            assert codes == [0] * world, launch.text()[-3000:]
            assert "checkpoint-7 is passed over" in launch.text() or "passed over checkpoint-7: " in launch.text()
        elif codes != [0] * world:
            plain_line(launch)
            continue
        assert not same_bytes(whole / "checkpoint-12", run / "checkpoint-12"), name
        assert not same_bytes(whole / "model", run / "model"), name


# ---- a full disk ----

FILL = """
def fill(event, marker, target):
    import os, sys
    changes, seen = ("os.rename", "os.mkdir"), 0
    def count(name, arguments):
        nonlocal seen
        opened = name == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (opened or name in changes) and seen >= 0 and marker in os.path.abspath(str(arguments[0])):
            seen += 1
            if seen == event:
                seen = -1
                file = os.open(target, os.O_CREAT | os.O_WRONLY)
                try:
                    while True:
                        os.write(file, bytes(4096))
                except OSError:
                    os.close(file)
    sys.addaudithook(count)
fill({event}, {marker!r}, {target!r})
"""


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("event", [*range(1, 24), *range(24, 150, 6)])
def test_a_disk_that_is_full_at_any_write_is_one_line(launcher: Launcher, tmp_path: Path, event: int, references: Any):
    """Full from the n-th change of the disk on: tokenising, saving and exporting; when there is room, it goes on."""
    disk = tmp_path / "disk"
    with small_disk(disk, 300_000_000):
        full, run = disk / "full", disk / "run"
        patch = FILL.format(event=event, marker=str(disk), target=str(full))
        launch = launcher.start(run, patch=patch, home=disk / "home", **OFTEN)
        code = launch.wait()[0]
        if not full.exists():
            assert code == 0
            return
        full.unlink()
        if code:
            print(event, plain_line(launch))
            assert code == 2, launch.text()[-3000:]
            assert re.search("the disk is full|No space left", plain_line(launch)), launch.text()[-2000:]
        if run.exists():
            assert all(manifest for _, manifest in published(run))
        launcher.run(run, home=disk / "home", **OFTEN)
        assert curve(run) == curve(references["whole-plain"])
        assert not same_bytes(references["whole-plain"] / "model", run / "model")
        left = [str(path) for path in disk.rglob("*") if ".partial" in path.name or ".saving" in path.name]
        assert not left


# ---- a process that stands still ----


@pytest.mark.slow
def test_a_rank_that_is_stopped_for_a_minute_costs_a_minute(launcher: Launcher, references: dict[str, Path]):
    folder = launcher.folder / "stopped"
    launch = launcher.start(folder, 2, **OFTEN, **ZERO2)
    wait_for(lambda: 2 in log_lines(folder), timeout=200)
    launch.ranks[1].signal(signal.SIGSTOP)
    time.sleep(60)
    assert 12 not in log_lines(folder)
    launch.ranks[1].signal(signal.SIGCONT)
    launch.ended(0)
    assert curve(folder) == curve(references["whole-zero2"])
    assert not same_bytes(references["whole-zero2"] / "model", folder / "model")


def test_where_each_rank_stands_is_in_the_folder_before_the_job_ends(launcher: Launcher):
    """One rank hangs: after --ddp_timeout the other ends; both have written their stacks and the step."""
    folder = launcher.folder / "hanging"
    patch = at("training_step", 3, "time.sleep(600)", rank=1)
    launch = launcher.start(folder, 2, patch=patch, ddp_timeout=6, save_steps=2)
    assert launch.ranks[0].wait(120) != 0
    launch.ranks[1].signal(signal.SIGKILL)
    launch.ranks[1].wait()
    for rank in (0, 1):
        text = (folder / f"stalled-rank-{rank}-step-3.txt").read_text()
        assert "3 steps are done" in text
        assert "_run_epoch" in text
    assert "stalled-rank-0-step-3.txt" in launch.ranks[0].text()
    launcher.run(folder, 2, save_steps=2)
    assert log_lines(folder).keys() == set(range(1, 13))


# ---- the folder, and the user's home ----


@pytest.mark.parametrize("how", ["renamed", "removed"])
def test_a_folder_that_goes_away_while_it_is_written_ends_the_run(launcher: Launcher, how: str):
    folder = launcher.folder / how
    away = folder.with_name(f"{how}-away")
    action = (
        f"os.rename({str(folder)!r}, {str(away)!r})"
        if how == "renamed"
        else f"__import__('shutil').rmtree({str(folder)!r})"
    )
    launch = launcher.run(folder, expect=2, patch=at("training_step", 5, action), **OFTEN)
    assert "was renamed or removed" in plain_line(launch)
    assert not folder.exists()
    if how == "renamed":
        launcher.run(away, **OFTEN)
        assert log_lines(away).keys() == set(range(1, 13))


def test_a_user_without_a_home_is_told_what_to_set(launcher: Launcher, tmp_path: Path):
    patch = "import os\nfor name in ('HOME', 'HF_HOME', 'XDG_CACHE_HOME'): os.environ.pop(name, None)\n"
    patch += "import pwd\ndef nobody(*_): raise KeyError\npwd.getpwuid = nobody\n"
    launch = launcher.run(tmp_path / "run", expect=2, patch=patch)
    assert "Set HF_HOME and XDG_CACHE_HOME" in launch.text()
    assert "Traceback" not in launch.text()


def test_two_runs_that_prepare_the_same_data_at_once_build_it_once(launcher: Launcher, tmp_path: Path):
    home = tmp_path / "home"
    launches = [launcher.start(tmp_path / name, home=home, **OFTEN) for name in "ab"]
    for launch in launches:
        launch.ended(0)
    assert curve(tmp_path / "a") == curve(tmp_path / "b")
    assert not same_bytes(tmp_path / "a" / "model", tmp_path / "b" / "model")
    assert os.listdir(home / "hf_mamba" / "parts") == []
