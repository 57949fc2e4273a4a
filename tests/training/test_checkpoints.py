"""Checkpoints are whole or absent: kills, full disks, folders that cannot be written, damaged files."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import Launcher, at, curve, log_lines, same_bytes, stop_in, wait_for
from transformers import TrainerState

from benchmarks import kills
from hf_mamba.run import checkpoints
from hf_mamba.run.checkpoints import SaveError
from hf_mamba.run.folder import Run, _hold
from hf_mamba.run.manifest import DamagedError, candidates, published, verify
from hf_mamba.run.resume import inspect
from hf_mamba.training.watchdog import Watchdog


def write(folder: Path, step: int, content: bytes = b"weights", **run: object) -> Path:
    """A small checkpoint, written as the trainer writes one."""
    with checkpoints.saving(folder, step, run) as staging:
        (staging / f"checkpoint-{step}" / "global_step1").mkdir(parents=True)
        (staging / f"checkpoint-{step}" / "model.safetensors").write_bytes(content)
        (staging / f"checkpoint-{step}" / "global_step1" / "shard.pt").write_bytes(bytes(range(256)))
    return folder / f"checkpoint-{step}"


def test_what_is_written_is_what_is_read(tmp_path: Path):
    manifest = verify(write(tmp_path, 3, fingerprint={"seed": 1}))
    assert manifest.step == 3
    assert manifest.run == {"fingerprint": {"seed": 1}}
    assert set(manifest.files) == {"model.safetensors", "global_step1/shard.pt"}
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-3"]


@given(data=st.data())
def test_any_change_of_any_file_is_seen(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    """One bit flipped, or the end cut off, anywhere; the manifest itself included."""
    folder = tmp_path_factory.mktemp("damage")
    checkpoint = write(folder, 1, b"x" * 300, guard={"consecutive": 0})
    file = data.draw(st.sampled_from(sorted(p for p in checkpoint.rglob("*") if p.is_file())))
    content = bytearray(file.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[position] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[position:]
    file.write_bytes(content)
    with pytest.raises(DamagedError):
        verify(checkpoint)


@pytest.mark.parametrize("name", ["global_step1/mp_rank_01_model_states.pt", "extra.bin", "other/file"])
def test_a_file_that_nobody_listed_is_damage(tmp_path: Path, name: str):
    """DeepSpeed counts the files that have a shard's name."""
    checkpoint = write(tmp_path, 1)
    for allowed in (".note", "latest_universal", "global_step1_universal/zero/fp32.pt"):
        (checkpoint / allowed).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / allowed).touch()
    verify(checkpoint)
    (checkpoint / name).parent.mkdir(exist_ok=True)
    (checkpoint / name).touch()
    with pytest.raises(DamagedError, match=f"{name} is not one of its files"):
        verify(checkpoint)


def test_a_run_writes_nowhere_but_in_the_folder_that_it_keeps(tmp_path: Path):
    """Renamed or replaced while it is written: one sentence, and no second folder."""
    folder = tmp_path / "run"
    folder.mkdir()
    run = Run(folder, plan=None, lock=_hold(folder))  # type: ignore[arg-type]
    run.require_folder()
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(SaveError, match="was renamed or removed"):
        run.require_folder()
    run.write_status("running")
    assert os.listdir(tmp_path) == ["elsewhere"]
    folder.mkdir()
    (folder / ".lock").touch()
    with pytest.raises(SaveError, match="was renamed or removed"):
        run.require_folder()
    assert os.listdir(folder) == [".lock"]


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_a_rank_ends_with_its_launcher():
    """Killed at once, the launcher can tell nobody: its ranks would train on, or wait for it for ever."""
    rank = "from hf_mamba.run.processes import *; end_with_launcher(); print(os.getpid(), flush=True); signal.pause()"
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}])"
    started = subprocess.Popen(
        [sys.executable, "-c", launcher], stdout=subprocess.PIPE, env=os.environ | {"TORCHELASTIC_RUN_ID": "x"}
    )
    assert started.stdout is not None
    pid = int(started.stdout.readline())
    started.kill()
    started.wait()
    wait_for(lambda: not Path(f"/proc/{pid}").exists() or Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z")


def test_where_every_thread_stands_is_written_when_no_step_ends(tmp_path: Path):
    watchdog = Watchdog(tmp_path, 0.2)
    state = TrainerState(global_step=7)
    watchdog.on_train_begin(None, state, None)
    file = tmp_path / "stalled-rank-0-step-7.txt"
    wait_for(lambda: file.exists() and "test_where_every_thread_stands" in file.read_text())
    time.sleep(0.3)  # until the last thread is written
    text = file.read_text()
    assert "no step ended for 0 s; 7 steps are done" in text
    time.sleep(0.3)
    assert (os.listdir(tmp_path), file.read_text()) == ([file.name], text)  # once a stall
    watchdog.on_step_end(None, TrainerState(global_step=8), None)
    wait_for((tmp_path / "stalled-rank-0-step-8.txt").exists)
    watchdog.on_train_end()


def test_the_newest_whole_one_is_taken_and_the_others_are_named(tmp_path: Path):
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    (tmp_path / "checkpoint-4" / "manifest.json").unlink()
    (tmp_path / "checkpoint-3" / "model.safetensors").write_bytes(b"weighty")
    path, manifest, passed_over = checkpoints.newest_whole(tmp_path)
    assert path == tmp_path / "checkpoint-2"
    assert manifest is not None
    assert [line.split(":")[0] for line in passed_over] == ["checkpoint-4", "checkpoint-3"]
    assert "never finished" in passed_over[0]
    assert "content of model.safetensors" in passed_over[1]
    assert {p.name for p in tmp_path.iterdir()} == {
        *("checkpoint-1", "checkpoint-2"),
        *("checkpoint-3.damaged", "checkpoint-4.damaged"),
    }


@pytest.mark.parametrize("content", ["{", "[]", '{"global_step": "4"}', ""])
def test_a_state_that_says_no_step_is_damage(tmp_path: Path, content: str):
    """Of the size that the manifest says, so that only its content shows it: an earlier checkpoint is taken."""
    for step in (2, 4):
        for name, text in (("trainer_state.json", content if step == 4 else '{"global_step": 2}'), ("latest", "tag")):
            folder = tmp_path / f"checkpoint-{step}"
            (folder / "tag").mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
            (folder / "tag" / "mp_rank_00_model_states.pt").touch()
    assert inspect(tmp_path / "checkpoint-4").damage[0] == "trainer_state.json: no global_step in it"
    assert not any("global_step" in line for line in inspect(tmp_path / "checkpoint-2").damage)


def test_newest_is_by_time_of_writing_not_by_step(tmp_path: Path):
    """A run that went back to step 2 and came to step 3 continues from there, not from its abandoned step 9."""
    for step in (2, 9, 3):
        write(tmp_path, step)
    assert checkpoints.newest_whole(tmp_path)[0] == tmp_path / "checkpoint-3"
    assert checkpoints.rotate(tmp_path, keep=1) == ["checkpoint-9", "checkpoint-2"]
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-3"]


@pytest.mark.parametrize("then", ["nothing", "truncated", "no manifest", "weights alone", "killed before its rename"])
def test_the_preflight_and_the_trainer_find_the_same_one(tmp_path: Path, then: str):
    """After a rewind, and where the newest is not whole: the larger step 9 is the older one."""
    for step in (2, 9, 3):
        write(tmp_path, step)
    newest = write(tmp_path, 4, resumable=then != "weights alone")
    if then == "truncated":
        (newest / "model.safetensors").write_bytes(b"weigh")
    elif then == "no manifest":
        (newest / "manifest.json").unlink()
    elif then == "killed before its rename":
        (tmp_path / ".saving").mkdir()
        newest.rename(tmp_path / ".saving" / newest.name)
    early = next(path for path, _, reason in candidates(tmp_path) if not reason)
    checkpoints.finish_interrupted(tmp_path)
    path, _, passed_over = checkpoints.newest_whole(tmp_path)
    assert path is not None
    assert early.name == path.name
    assert path.name == ("checkpoint-4" if then in ("nothing", "killed before its rename") else "checkpoint-3")
    assert bool(passed_over) == (path.name == "checkpoint-3")


def killed_at(event: int, work: Callable[[], object]) -> bool:
    """Do `work` in a fork that is killed just before its n-th change of the disk; whether it came that far."""
    child = os.fork()
    if child == 0:
        seen = 0

        def count(name: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            if name in ("os.rename", "os.remove", "os.rmdir", "os.mkdir") or (name == "open" and arguments[1] != "r"):
                seen += 1
                if seen == event:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("step", [2, 1], ids=["a new one", "the same step again"])
def test_killed_before_any_change_of_the_disk_one_whole_checkpoint_is_there(tmp_path: Path, step: int):
    """Every single moment of a save and of the rotation that follows; the last kill comes after the end."""

    def save_and_rotate() -> None:
        write(folder, step, b"new")
        checkpoints.rotate(folder, keep=1)

    event, seen = 0, set()
    while True:
        event += 1
        folder = tmp_path / str(event)
        write(folder, 1, b"old")
        killed = killed_at(event, save_and_rotate)
        checkpoints.finish_interrupted(folder)
        path, _, passed_over = checkpoints.newest_whole(folder)
        assert path is not None, event
        assert not passed_over
        seen.add((path.name, (path / "model.safetensors").read_bytes()))
        write(folder, 3)  # and the next save finds nothing in its way
        checkpoints.rotate(folder, keep=1)
        assert [p.name for p in folder.iterdir()] == ["checkpoint-3"]
        if not killed:
            break
    assert event > 20
    assert seen == {("checkpoint-1", b"old"), (f"checkpoint-{step}", b"new")}


def test_rotation_keeps_the_best_and_does_not_count_damaged_ones(tmp_path: Path):
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    (tmp_path / "checkpoint-4").rename(tmp_path / "checkpoint-4.damaged")
    assert checkpoints.rotate(tmp_path, keep=2, best=str(tmp_path / "checkpoint-1")) == ["checkpoint-2"]
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-1", "checkpoint-3", "checkpoint-4.damaged"}
    assert checkpoints.rotate(tmp_path, keep=None) == []


def test_saving_a_step_again_replaces_it_whole(tmp_path: Path):
    write(tmp_path, 1, b"old")
    write(tmp_path, 1, b"new")
    assert (tmp_path / "checkpoint-1" / "model.safetensors").read_bytes() == b"new"
    assert verify(tmp_path / "checkpoint-1").serial == 2


def test_a_rename_that_was_interrupted_is_made_up(tmp_path: Path):
    whole = write(tmp_path, 1)
    (tmp_path / ".saving").mkdir()
    whole.rename(tmp_path / ".saving" / "checkpoint-1")
    unfinished = tmp_path / ".saving" / "checkpoint-2"
    unfinished.mkdir()
    (unfinished / "model.safetensors").write_bytes(b"half")
    assert checkpoints.finish_interrupted(tmp_path) == "checkpoint-1"
    verify(whole)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


def test_an_error_while_saving_leaves_nothing_behind(tmp_path: Path):
    write(tmp_path, 1)

    def failing(error: Exception) -> None:
        with checkpoints.saving(tmp_path, 2, {}) as staging:
            (staging / "checkpoint-2").mkdir()
            raise error

    with pytest.raises(ZeroDivisionError):  # not the disk's: a bug is shown as one
        failing(ZeroDivisionError())
    with pytest.raises(SaveError, match="the disk is full"):
        failing(OSError(errno.ENOSPC, "No space left on device"))
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


# ---- real runs, real kills ----


EVALUATING = {"eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 1}


@pytest.fixture(scope="module")
def undisturbed(launcher: Launcher) -> Path:
    launcher.run("undisturbed", save_steps=2, **EVALUATING)
    return launcher.folder / "undisturbed"


COUNT_WRITES = """
import hf_mamba.training.trainer as trainer
from transformers import TrainerState
trainer.HISTORY = 3
write = TrainerState.save_to_json
def counted(self, path):
    with open({!r}, "a") as file:
        file.write(path + chr(10))
    write(self, path)
TrainerState.save_to_json = counted
draw = trainer.StepSampler.micro_batch
def drawn(self, step, micro):
    with open({!r}, "a") as file:
        file.write(f"step {{step}}" + chr(10))
    return draw(self, step, micro)
trainer.StepSampler.micro_batch = drawn
"""


@pytest.mark.parametrize("best", [False, True])
def test_the_state_of_a_late_checkpoint_is_written_once_and_no_larger_than_an_early_ones(
    launcher: Launcher, tmp_path: Path, best: bool
):
    """log.jsonl has every line; a checkpoint keeps the last. A new best one is named by Trainer as it is staged."""
    run, writes = tmp_path / "run", tmp_path / "writes"
    settings = {**EVALUATING, "eval_steps": 2, "save_steps": 2}
    settings |= {"load_best_model_at_end": True, "save_total_limit": 9} if best else {}
    counted = COUNT_WRITES.format(str(writes), str(writes))
    launcher.run(run, expect=85, patch=counted + stop_in(6), **settings)
    before = len(writes.read_text().splitlines())
    launcher.run(run, patch=counted, **settings)
    drawn = [line for line in writes.read_text().splitlines()[before:] if line.startswith("step")]
    assert drawn[0] == "step 6"  # no batch of a step before
    steps = [2, 4, 6, 8, 10, 12]
    states = [json.loads((run / f"checkpoint-{step}" / "trainer_state.json").read_text()) for step in steps]
    assert [len(state["log_history"]) for state in states] == [3] * 6
    assert [state["log_history"][-1]["step"] for state in states] == steps
    times = [writes.read_text().count(f"/checkpoint-{step}/") for step in steps]
    named = [state["best_global_step"] for state in states]
    new = [best and step == name for step, name in zip(steps, named, strict=True)]
    assert times == [1 + is_new for is_new in new]
    assert (any(new), named[-1] is not None) == (best, best)
    for state, name in zip(states, named, strict=True):
        assert state["best_model_checkpoint"] == (str(run / f"checkpoint-{name}") if best else None)
    assert list(log_lines(run)) == list(range(1, 13))
    card = (run / "model" / "README.md").read_text()
    assert all(f"\n| {step} |" in card for step in steps)  # every evaluation
    assert "Trained for 12 of 12 steps" in card


def test_killed_in_every_phase_the_run_ends_as_if_nothing_had_happened(launcher: Launcher):
    """Five kills of the hundred of `python -m benchmarks.run kills`."""
    tally, rng = kills.Tally(), random.Random(2)
    blows = [kills.Blow.draw(phase, rng) for phase in ("tokenising", "tokenising", "saving", "rotating", "exporting")]
    kills.chain(launcher, tally, kills.undisturbed(launcher, "for-kills"), "killed", blows)
    assert not tally.faults
    assert tally.kills.total() == 5


@pytest.fixture
def started(launcher: Launcher, undisturbed: Path, tmp_path: Path) -> Path:
    """A run at step 12 of 14, with six whole checkpoints."""
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    shutil.rmtree(folder / "model")
    return folder


def test_damaged_ones_are_passed_over_and_never_loaded(launcher: Launcher, undisturbed: Path, started: Path):
    flip(started / "checkpoint-12" / "optimizer.pt", 5000)
    (started / "checkpoint-10" / "model.safetensors").write_bytes(b"")
    (started / "checkpoint-8" / "manifest.json").write_text("{")
    done = launcher.run(started, save_steps=2, save_total_limit=2)
    for expected in ("checkpoint-12: the content of optimizer.pt", "checkpoint-8: its manifest", "step 6"):
        assert expected in done.text()
    assert curve(started) == curve(undisturbed)
    assert not same_bytes(undisturbed / "model", started / "model")
    left = {p.name for p in started.glob("checkpoint-*")}
    assert {"checkpoint-10", "checkpoint-12"} <= left
    assert not left & {"checkpoint-2", "checkpoint-4", "checkpoint-6", "checkpoint-8"}


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 4
    file.write_bytes(content)


def test_one_that_is_named_must_be_whole(launcher: Launcher, started: Path):
    flip(started / "checkpoint-4" / "optimizer.pt", 4_000_000)
    done = launcher.run(started, expect=2, resume=str(started / "checkpoint-4"))
    assert "the content of optimizer.pt is not what was written" in done.text()
    assert "Traceback" not in done.text()


def test_a_full_disk_is_one_message_and_nothing_is_lost(launcher: Launcher, undisturbed: Path, tmp_path: Path):
    """A real file system that somebody else fills while the run writes there, once it has been found large enough."""
    folder = tmp_path / "small"
    folder.mkdir()
    size = sum(f.stat().st_size for f in (undisturbed / "checkpoint-2").iterdir())
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size * 12}", "none", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted: {mounted.stderr.decode().strip()}")
    fill = folder / "fill"
    action = f"open({str(fill)!r}, 'wb').write(bytes(os.statvfs({str(folder)!r}).f_bavail * 4096 - 20480))"
    try:
        run = folder / "run"
        done = launcher.run(run, expect=2, save_steps=2, patch=at("training_step", 5, action))
        assert "error: checkpoint-6 cannot be written" in done.text()
        assert "the disk is full" in done.text()
        assert "Traceback" not in done.text()
        assert {p.name for p, _ in published(run)} == {"checkpoint-2", "checkpoint-4"}
        assert not (run / ".saving").exists()
        assert json.loads((run / "status.json").read_text())["status"] == "failed"
        fill.unlink()
        done = launcher.run(run, expect=2, save_steps=2, patch=at("save_state", 12, action))
        assert f"error: The model cannot be written to {run / 'model'}: " in done.text()
        assert "Traceback" not in done.text()
        assert json.loads((run / "status.json").read_text())["exit_code"] == 2
        assert not (run / "model.partial").exists()
        fill.unlink()
        launcher.run(run, save_steps=2)
        assert curve(run) == curve(undisturbed)
        assert (run / "model" / "model.safetensors").is_file()
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_limit_on_file_sizes_is_one_message(launcher: Launcher, undisturbed: Path):
    """What a quota does, without a mount: optimizer.pt is larger than this process may write."""
    limit = (undisturbed / "checkpoint-2" / "optimizer.pt").stat().st_size - 1
    done = launcher.run("limited", expect=2, limit=limit, save_steps=2)
    assert "error: checkpoint-2 cannot be written" in done.text()
    assert "Traceback" not in done.text()
    launcher.run("limited", save_steps=2)
    assert curve(launcher.folder / "limited") == curve(undisturbed)


def test_a_folder_that_cannot_be_written(launcher: Launcher, tmp_path: Path):
    (tmp_path / "file").write_text("")
    done = launcher.run(tmp_path / "file" / "run", expect=2)
    assert "cannot be written: " in done.text()
    assert "file is not a folder" in done.text()
    assert "Traceback" not in done.text()


@pytest.mark.parametrize("begun", [False, True], ids=["empty", "with checkpoints"])
def test_a_folder_that_is_read_only(launcher: Launcher, undisturbed: Path, tmp_path: Path, begun: bool):
    """Mounted so, which stops root, too: one message, nothing changed; when it can be written, the run goes on."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "none", str(folder)], capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a file system")
    run, settings = folder / "run", {"save_steps": 2, **EVALUATING}
    try:
        if begun:
            launcher.run(run, expect=85, patch=stop_in(5), **settings)
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        done = launcher.run(run, expect=2, **settings)
        assert "cannot be written: Read-only file system" in done.text()
        assert "Traceback" not in done.text()
        subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
        launcher.run(run, **settings)
        assert curve(run) == curve(undisturbed)
        assert not same_bytes(undisturbed / "checkpoint-12", run / "checkpoint-12")
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_weights_alone_cannot_be_resumed_from(launcher: Launcher, tmp_path: Path):
    launcher.run(tmp_path / "run", save_only_model=True, max_steps=4)
    manifest = json.loads((tmp_path / "run" / "checkpoint-4" / "manifest.json").read_text())
    assert manifest["run"]["resumable"] is False
    assert not [name for name in manifest["files"] if name.endswith((".pt", ".pth", ".bin"))]
