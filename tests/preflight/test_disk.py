"""Whether the disk has room for a run: counted, compared with files that were written, and with what is free."""

import contextlib
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from hf_mamba.data.sources import parse_sources
from hf_mamba.data.tokenize import tokenize_source
from hf_mamba.family import get_preset
from hf_mamba.findings import Findings
from hf_mamba.plan import Checked
from hf_mamba.preflight import Plan, resolve, verify
from hf_mamba.preflight.cost.disk import Disk, check_room, checkpoint_bytes, checkpoints_to_come, token_bytes
from hf_mamba.preflight.cost.table import main

N = 129_135_360
OLD_RUNS = Path(__file__).parents[1] / "old_runs"


def plan(folder: Path, **arguments: Any) -> Plan:
    given = {"preset": "130m_mamba", "max_steps": 1000, "output_dir": str(folder / "run"), **arguments}
    return resolve(given, environ={}, device="cpu", world_size=1).require()


def found(plan: Plan, free: int) -> Findings:
    out = Findings()
    check_room(plan, out, lambda folder: Disk("one", free))
    return out


@pytest.mark.parametrize(
    ("arguments", "per_parameter"),
    [
        ({}, 4 + 8),
        ({"save_only_model": True}, 4),
        ({"optim": "adafactor"}, 4),
        ({"deepspeed": {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}}, 2 + 2 + 12),
        ({"deepspeed": {"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}}}, 2 + 2 + 12),
        ({"deepspeed": {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}}, 2 + 12),
    ],
    ids=["plain", "model-only", "adafactor", "zero2", "zero0", "zero3"],
)
def test_bytes_of_a_checkpoint(arguments: dict[str, Any], per_parameter: int, tmp_path: Path) -> None:
    assert checkpoint_bytes(plan(tmp_path, **arguments)) == per_parameter * N


@pytest.mark.parametrize(("run", "per_parameter"), [("plain", 12), ("zero2", 20)])
def test_the_files_of_real_checkpoints_are_as_large(run: str, per_parameter: int) -> None:
    """Each tensor adds a header of about 1 kB, which only a small model notices."""
    big = {".safetensors", ".pt"}
    checkpoint = OLD_RUNS / run / "checkpoint-4"
    files = [path for path in checkpoint.rglob("*") if path.suffix in big and path.stat().st_size > 20_000]
    count = (checkpoint / "model.safetensors").stat().st_size / 4
    assert sum(path.stat().st_size for path in files) == pytest.approx(per_parameter * count, rel=0.06)


@pytest.mark.parametrize(
    ("arguments", "there", "come"),
    [
        ({"save_steps": 100}, (), 10),
        ({"save_steps": 300}, (), 4),
        ({"save_steps": 0.25}, (), 4),
        ({"save_steps": 100, "save_total_limit": 2}, (), 3),
        ({"save_steps": 600, "save_total_limit": 5}, (), 2),
        ({"save_steps": 100, "save_total_limit": 2}, (300, 400), 1),
        ({"save_steps": 100}, (300, 400), 6),
        ({"save_steps": 100}, (1000,), 0),
        ({"save_strategy": "no"}, (), 0),
    ],
)
def test_checkpoints_that_will_lie_there_at_once(
    arguments: dict[str, Any], there: tuple[int, ...], come: int, tmp_path: Path
) -> None:
    planned = plan(tmp_path, **arguments)
    for step in there:
        (tmp_path / "run" / f"checkpoint-{step}").mkdir(parents=True)
    assert checkpoints_to_come(planned) == come


def test_a_disk_that_is_large_enough_is_a_note_and_one_that_is_not_a_problem(tmp_path: Path) -> None:
    planned = plan(tmp_path, save_steps=100)
    needed = 10 * 12 * N + 4 * N
    enough = found(planned, needed)
    assert not enough.problems
    (note,) = enough.notes
    assert "10 checkpoints of 1.5 GB, the model of 516.5 MB" in note
    assert str(tmp_path / "run") in note
    assert "16.0 GB are free" in note
    rows = check_room(planned, Findings(), lambda folder: Disk("one", 7))
    assert [(row["what"], row["bytes"], row["free"]) for row in rows] == [
        ("checkpoints", 10 * 12 * N, 7),
        ("model", 4 * N, 7),
    ]
    assert planned.after(Checked(disk=rows)).to_dict()["disk"] == rows
    (problem,) = found(planned, needed - 10**9).problems
    assert (problem.id, problem.key) == ("disk-too-small", "output_dir")
    assert "16.0 GB to write" in problem.found
    assert "15.0 GB free" in problem.found
    assert problem.fix.startswith("Free 1.1 GB there, or write --save_total_limit 2, or write another --output_dir")


def test_each_disk_is_compared_with_its_own_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "a.txt").write_bytes(b"a" * 1_000_000)
    planned = plan(tmp_path, dataset=[str(tmp_path / "a.txt")])
    out = Findings()
    sizes = {"home": 300_000, "run": 10**12}
    check_room(planned, out, lambda folder: next(Disk(n, free) for n, free in sizes.items() if n in folder.parts))
    (problem,) = out.problems
    assert problem.key == "dataset"
    assert "HF_HOME" in problem.fix
    assert "output_dir" not in problem.fix
    assert len(out.notes) == 2


def test_tokens_are_counted_until_the_cache_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    text, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_bytes(b"one word after another\n" * 1000)
    lines.write_bytes(b'{"text": "x"}\n' * 100)
    planned = plan(tmp_path, dataset=[str(text), str(lines)], tokenizer_name=str(OLD_RUNS / "plain-model"))
    assert token_bytes(planned) == (23_000 + 700) * 2 // 5
    from hf_mamba.data.tokenizer import load_tokenizer

    tokenize_source(parse_sources([str(text)])[0], load_tokenizer(OLD_RUNS / "plain-model"), num_proc=1, progress=False)
    assert token_bytes(planned) == 700 * 2 // 5


def test_a_plan_for_another_machine_is_a_note_alone(tmp_path: Path) -> None:
    planned = resolve(
        {"preset": "7b_mamba", "max_steps": 1000, "output_dir": str(tmp_path / "run")},
        environ={},
        device="cpu",
        world_size=4,
    ).require()
    out = found(planned, 0)
    assert not out.problems
    assert "free" not in out.notes[0]
    assert {row["free"] for row in check_room(planned, Findings())} == {None}


def test_the_memory_table_says_what_the_disk_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--preset", "130m_mamba", "--num_gpus", "1", "--gpu_memory", "80GB", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["recommendation"]["setting"] == "no DeepSpeed"
    free = document["disk"].pop("free_bytes")
    assert free > 0
    tokens = get_preset("130m_mamba").max_tokens
    assert document["disk"] == {"checkpoint_bytes": 12 * N, "model_bytes": 4 * N, "token_bytes": 2 * tokens}
    assert main(["--preset", "130m_mamba", "--num_gpus", "1", "--gpu_memory", "80GB"]) == 0
    assert "Disk: 1.5 GB a checkpoint, of which save_total_limit + 1 lie there at once" in capsys.readouterr().out


def test_a_temporary_folder_has_room_for_sockets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The bound is Linux's own: the longest path that is not refused can be bound."""
    for length, refused in ((75, False), (76, True)):
        monkeypatch.setattr("tempfile.tempdir", "/tmp/" + "t" * (length - 5))
        plan = resolve({"max_steps": 2, "dataloader_num_workers": 1}, environ={}, device="cpu").require()
        assert ("temporary-folder-too-long" in [p.id for p in verify(plan).problems]) is refused
    with socket.socket(socket.AF_UNIX) as one, contextlib.chdir(tmp_path):
        one.bind(("x" * 107).encode())
    with socket.socket(socket.AF_UNIX) as one, pytest.raises(OSError, match="too long"):
        one.bind(("x" * 108).encode())
