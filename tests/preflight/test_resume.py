"""Can this plan resume: read from names and headers, held against real checkpoints of two ranks; and the conversion."""

import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hf_mamba.findings import Findings
from hf_mamba.formats.torch_header import Tensor, read_header, read_safetensors_header
from hf_mamba.names import MANIFEST
from hf_mamba.plan import Refused
from hf_mamba.preflight import Plan, resolve
from hf_mamba.preflight.command_line import Arguments, read_arguments
from hf_mamba.preflight.cost.disk import needs
from hf_mamba.preflight.settings import DEFAULT_PRESET
from hf_mamba.preflight.stored import arguments_to_keep, go_on
from hf_mamba.run.manifest import Manifest, describe, verify
from hf_mamba.run.resume import find_checkpoint, find_universal, inspect
from hf_mamba.run.universal import convert

MODEL = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 64}


def settings(**more: Any) -> dict[str, Any]:
    return {"preset": "tiny_mamba", "model_config": MODEL, "seq_len": 16, "max_steps": 4, "warmup_steps": 0, **more}


def plan(folder: Path, stage: int | None, world: int = 2, **more: Any) -> Plan:
    ds = None if stage is None else {"zero_optimization": {"stage": stage}}
    return resolve(settings(resume=str(folder), deepspeed=ds, **more), world_size=world, environ={}, device="cpu")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> dict[int, Path]:
    """checkpoint-2 of two ranks at stages 2 and 3, through Trainer and DeepSpeed."""
    from test_engine import extension_folder, start_all

    root = tmp_path_factory.mktemp("runs")
    cases = []
    for stage in (2, 3):
        values = settings(max_steps=2, global_batch_size=4, deepspeed={"zero_optimization": {"stage": stage}})
        values |= {"output_dir": str(root / f"z{stage}"), "save_steps": 2, "resume": "never"}
        made = resolve(values, world_size=2, environ={}, device="cpu").require()
        cases.append(
            {"training_arguments": made.training_arguments, "model_config": MODEL, "seq_len": 16, "save": True}
        )
    results = start_all(cases, root, extension_folder(pytestconfig))
    assert not [result for result in results if "error" in result], results
    return {stage: root / f"z{stage}" / "checkpoint-2" for stage in (2, 3)}


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to / folder.name)
    return to / folder.name


def keys(found: Plan) -> list[str]:
    return [problem.key for problem in found.problems]


def test_what_a_checkpoint_says(checkpoints: dict[int, Path]) -> None:
    for stage, folder in checkpoints.items():
        found = inspect(folder)
        assert (found.step, found.world_size, found.stage, found.dtype, found.damage) == (2, 2, stage, "fp32", [])
        assert plan(folder, stage).ok


def test_what_does_not_fit(checkpoints: dict[int, Path]) -> None:
    z2, z3 = checkpoints[2], checkpoints[3]
    assert plan(z2, 1).ok  # the same shards: seen to work both ways
    assert keys(plan(z2, 0)) == ["zero_optimization.stage"]
    assert keys(plan(z3, 0)) == ["zero_optimization.stage"]
    assert keys(plan(z2, 2, bf16=True)) == ["dtype"]
    assert keys(plan(z2, None)) == ["resume"]
    for folder, stage, world, why in ((z2, 2, 1, "2 ranks"), (z2, 3, 2, "stage 2"), (z3, 1, 1, "stage 3")):
        found = plan(folder, stage, world=world, output_dir="none", global_batch_size=4).require()
        assert found.ds_config["checkpoint"] == {"load_universal": True}  # type: ignore[index]
        assert any(why in note and "is made at the start" in note for note in found.notes)
        assert "conversion" in [need.what for need in needs(found)]
    other = resolve(
        {"resume": str(z2), "deepspeed": {"zero_optimization": {"stage": 2}}}, world_size=2, environ={}, device="cpu"
    )
    assert "hidden_size 32, now 192" in other.problems[0].found


def test_missing_and_truncated_shards(checkpoints: dict[int, Path], tmp_path: Path) -> None:
    folder = copy(checkpoints[2], tmp_path)
    shards = sorted((folder / "global_step2").glob("zero_pp_rank_*"))
    shards[1].write_bytes(shards[1].read_bytes()[:-2000])
    assert "truncated" in plan(folder, 2).problems[0].found
    shards[1].unlink()
    assert "rank 1 is missing" in plan(folder, 2).problems[0].found
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert any("model.safetensors" in problem.found for problem in plan(folder, 2).problems)
    (folder / "latest").unlink()
    assert any("latest" in problem.found for problem in plan(folder, 2).problems)
    (folder / "trainer_state.json").unlink()
    assert "no trainer_state.json" in plan(folder, 2).problems[0].found


def test_another_run(checkpoints: dict[int, Path], tmp_path: Path) -> None:
    folder = copy(checkpoints[2], tmp_path)
    before = {"model_config": MODEL, "seq_len": 16, "global_batch_size": 4, "seed": 42, "data": "x"}
    (tmp_path / "run.json").write_text(json.dumps(before))
    assert plan(folder, 2, global_batch_size=4).ok
    assert "global_batch_size 4, now 8" in plan(folder, 2, global_batch_size=8).problems[0].found
    assert "seed 42, now 1" in plan(folder, 2, global_batch_size=4, seed=1).problems[0].found


def test_a_run_is_gone_on_with_by_its_folder(checkpoints: dict[int, Path], tmp_path: Path) -> None:
    """The same numbers as from all of its flags, on any number of ranks; what is written beside it wins."""
    run = tmp_path / "run"
    sealed(copy(checkpoints[2], run), 1)
    flags = ["--preset", "tiny_mamba", "--vocab_size", "64", "--config_overrides", "hidden_size=32,num_hidden_layers=1"]
    flags += ["--seq_len", "16", "--micro_batch_size", "2", "--gradient_accumulation_steps", "2", "--max_tokens", "512"]
    flags += ["--warmup_ratio", "0.5", "--deepspeed", "zero2", "--output_dir", str(run)]

    def resolved(flags: list[str], world: int = 2) -> Plan | Refused:
        return resolve(read_arguments(flags), world_size=world, environ={}, device="cpu")

    first = resolved(flags).require()
    first.save(run)
    (run / "run.json").write_text(json.dumps({name: first.known[name] for name in first.run.identity}))
    assert "hf_secret" not in json.dumps(resolved([*flags, "--hub_token", "hf_secret"]).to_dict())
    again = resolved(["--resume", str(run)]).require()
    assert again.known == first.known
    for world, batch in ((1, (2, 4)), (4, (2, 1)), (8, (1, 1))):
        other = resolved(["--resume", str(run)], world).require()
        assert (other.micro_batch_size, other.gradient_accumulation_steps) == batch
        assert (other.global_batch_size, other.total_steps, other.warmup_steps) == (8, 4, 2)
    changed = resolved(
        ["--resume", str(run), "--max_steps", "9", "--warmup_steps", "1", "--deepspeed", "zero3"]
    ).require()
    assert (changed.total_steps, changed.warmup_steps) == (9, 1)
    assert changed.run.written.keys() & {"max_tokens", "warmup_ratio"} == set()
    assert [p.id for p in resolved(["--resume", str(run), "--output_dir", "elsewhere"]).problems] == [
        "run-goes-on-elsewhere"
    ]
    stored = json.loads((run / "plan.json").read_text())
    del stored["run"]["written"]
    (run / "plan.json").write_text(json.dumps(stored))
    (problem, *_) = resolved(["--resume", str(run)]).problems
    assert problem.id == "run-without-arguments"
    assert f"--output_dir {run}" in problem.fix


def sealed(folder: Path, serial: int) -> Path:
    """With the manifest that training would have given it."""
    files = {str(f.relative_to(folder)): describe(f) for f in folder.rglob("*") if f.is_file() and f.name != MANIFEST}
    Manifest(int(folder.name.rsplit("-", 1)[1]), serial, 2, files).write(folder)
    return folder


def test_auto_takes_the_newest_whole_one(checkpoints: dict[int, Path], tmp_path: Path) -> None:
    """By publication: the run went back from step 10 to step 2, and came to step 4."""
    earlier = sealed(copy(checkpoints[2], tmp_path), 2)
    newest, abandoned = tmp_path / "checkpoint-4", tmp_path / "checkpoint-10"
    for folder, serial in ((newest, 3), (abandoned, 1)):
        shutil.copytree(earlier, folder)
        sealed(folder, serial)
    out = Findings()
    assert find_checkpoint("auto", str(tmp_path), out) == newest
    assert not out.notes
    next((newest / "global_step2").glob("zero_pp_rank_0*")).write_bytes(b"PK")
    assert find_checkpoint("auto", str(tmp_path), out) == earlier
    (note,) = out.notes
    assert "checkpoint-4 is passed over: global_step2/" in note
    assert "instead of" in note
    assert find_checkpoint("never", str(tmp_path), out) is None
    assert find_checkpoint("auto", str(tmp_path / "none"), out) is None


@pytest.mark.parametrize("stage", [2, 3])
def test_conversion_changes_the_world(
    stage: int, checkpoints: dict[int, Path], tmp_path: Path, pytestconfig: Any
) -> None:
    """Two ranks wrote it, one continues: through DeepSpeed's universal copy, made by the command and verified."""
    from test_engine import environment_of_starts, extension_folder

    from hf_mamba.run.universal import verify as compare

    folder = copy(checkpoints[stage], tmp_path)
    target = convert(folder)
    assert compare(folder, target) == sum(
        struct_product(entry["shape"]) for entry in read_safetensors_header(folder / "model.safetensors").values()
    )
    found = plan(folder, stage, world=1, output_dir=str(tmp_path / "out"), global_batch_size=4).require()
    assert found.ds_config["checkpoint"] == {"load_universal": True}  # type: ignore[index]
    case = {"training_arguments": found.training_arguments, "model_config": MODEL, "seq_len": 16, "resume": str(folder)}
    (tmp_path / "case.json").write_text(json.dumps([case]))
    command = [sys.executable, str(Path(__file__).with_name("engine_runner.py")), "case.json", "result.json", "1"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment_of_starts(extension_folder(pytestconfig)), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (result,) = json.loads((tmp_path / "result.json").read_text())
    assert (result.get("steps"), result.get("global_batch_size")) == (4, 4), result
    weight = target / "zero" / "backbone.norm_f.weight" / "fp32.pt"
    os.replace(target / "zero" / "backbone.layers.0.norm.weight" / "fp32.pt", weight.with_name("other.pt"))
    with pytest.raises(ValueError, match="fp32"):
        compare(folder, target)


# the process and all it has started die at the n-th renaming in the checkpoint
AT_RENAME = """
import os, signal, sys
renames = []
def count(event, arguments):
    if event == "os.rename" and ".universal" in str(arguments[0]):
        renames.append(arguments)
        if len(renames) == {number}:
            os.killpg(0, signal.SIGKILL)
sys.addaudithook(count)
"""


def killed_conversion(folder: Path, written: int = 0, rename: int = 0) -> None:
    """Kill a conversion and its workers once `written` files are in the copy, or before its n-th renaming."""
    code = AT_RENAME.format(number=rename) if rename else ""
    code += f"from pathlib import Path; from hf_mamba.run.universal import convert; convert(Path({str(folder)!r}))"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    try:
        if not rename:
            while not (folder / ".universal").exists():
                assert process.poll() is None
                time.sleep(0.005)
            while not Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text():
                assert process.poll() is None
                time.sleep(0.005)
            process.send_signal(signal.SIGSTOP)  # the converter goes on, whose copy cannot be published now
            end = time.monotonic() + 120
            while sum(path.is_file() for path in (folder / ".universal").rglob("*")) < written:
                assert time.monotonic() < end
                time.sleep(0.005)
            os.killpg(process.pid, signal.SIGKILL)
        assert process.wait(120) == -signal.SIGKILL
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_a_conversion_that_is_killed_leaves_a_whole_copy_or_none(checkpoints: dict[int, Path], tmp_path: Path) -> None:
    folder = copy(checkpoints[2], tmp_path)
    plain = {path.relative_to(folder) for path in folder.rglob("*")}
    for moment in ({"written": 0}, {"written": 20}, {"rename": 1}, {"rename": 2}):
        killed_conversion(folder, **moment)
        assert find_universal(folder) == (None, "")
        assert inspect(folder).damage == []
    target = convert(folder)
    verify(target)
    assert find_universal(folder) == (target.name, "")
    left = {path.relative_to(folder) for path in folder.rglob("*")} - plain
    assert {path.parts[0] for path in left} == {target.name, "latest_universal"}
    largest = max(target.rglob("*.pt"), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    assert any(f"not used, and replaced: {target.name}: zero/" in n for n in plan(folder, 2, world=1).notes)
    killed_conversion(folder, written=20)
    assert f"{target.name}: zero/" in find_universal(folder)[1]  # the one that is to be replaced
    convert(folder)
    verify(target)
    made = target.stat().st_mtime_ns
    assert (convert(folder), target.stat().st_mtime_ns) == (target, made)


def test_a_conversion_needs_room_and_is_made_once(
    checkpoints: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder whose name DeepSpeed's converter would read as a pattern; two conversions at a time."""
    folder = copy(checkpoints[3], tmp_path / "run [1] (a+b)")
    before = set(folder.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**5))
        with pytest.raises(ValueError, match="needed there while its copy is written, and 0.00 GB are free"):
            convert(folder)
    assert set(folder.rglob("*")) == before
    lines: list[str] = []
    with ThreadPoolExecutor(2) as pool:
        assert set(pool.map(lambda _: convert(folder, lines.append), range(2))) == {folder / "global_step2_universal"}
    assert [line.split()[0] for line in lines] == ["converting", "written"]
    verify(folder / "global_step2_universal")


def struct_product(shape: list[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def test_headers_run_no_code(tmp_path: Path) -> None:
    """A pickle that would create a file when loaded: reading its description does not."""

    class Trap:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "sprung"),))

    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": Trap(), "b": 1}))
    assert read_header(tmp_path / "x.pt")["b"] == 1
    assert not (tmp_path / "sprung").exists()


def test_headers_of_real_and_broken_files(tmp_path: Path) -> None:
    import torch

    torch.save({"w": torch.nn.Parameter(torch.zeros(3, 4))}, tmp_path / "w.pt")
    assert read_header(tmp_path / "w.pt")["w"] == Tensor((3, 4))
    for content in (b"", b"PK\x03\x04", b"x" * 100):
        (tmp_path / "b.pt").write_bytes(content)
        with pytest.raises(ValueError, match="truncated"):
            read_header(tmp_path / "b.pt")
    for content in (
        b"",
        b"\1" * 7,
        struct.pack("<Q", 2**40),
        struct.pack("<Q", 2) + b"{",
        struct.pack("<Q", 2) + b"[]",
    ):
        (tmp_path / "b.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=r"truncated|no safetensors"):
            read_safetensors_header(tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="cannot be read"):
        read_header(tmp_path / "none.pt")


def test_a_run_without_a_preset_keeps_the_default_that_it_began_with(tmp_path: Path) -> None:
    """The first default's plans do not name it; another version may have another."""
    assert arguments_to_keep(Arguments({"seed": 3})) == {"seed": 3, "preset": DEFAULT_PRESET}
    (tmp_path / "run.json").write_text("{}")
    for written, preset in (
        ({"seed": 3}, "tiny_mamba"),
        ({"preset": "130m_mamba"}, "130m_mamba"),
        ({"config_name": "x"}, None),
    ):
        plan = {"run": {"written": written}, "global_batch_size": 8, "micro_batch_size": 8}
        (tmp_path / "plan.json").write_text(json.dumps(plan))
        gone_on = go_on(Arguments({"resume": str(tmp_path)})).written
        assert (gone_on["preset"].value if "preset" in gone_on else None) == preset
