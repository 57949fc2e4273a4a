"""`--deepspeed auto`, and the names of templates."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from hf_mamba import cli
from hf_mamba.family import all_presets
from hf_mamba.findings import Findings
from hf_mamba.names import LOG_FILE, PLAN_FILE, RUN_FILE
from hf_mamba.plan import Plan, Refused
from hf_mamba.preflight import resolve
from hf_mamba.preflight.command_line import read_arguments
from hf_mamba.preflight.cost.gpus import memory_of
from hf_mamba.preflight.cost.memory import plan_memory
from hf_mamba.preflight.deepspeed.templates import TEMPLATES, template
from hf_mamba.preflight.engine import _stored
from hf_mamba.preflight.launch.command import WORLD_FLAGS, _without
from hf_mamba.preflight.settings import Settings
from hf_mamba.preflight.training import plan_before

ROOT = Path(__file__).parents[2]


def plan(**more: Any) -> Plan | Refused:
    values = {"preset": "7b_mamba", "num_gpus": 4, "deepspeed": "auto", "output_dir": "runs/none"}
    return resolve(values | more, environ={})


def stage(found: Plan | Refused) -> int | None:
    config = found.known.get("ds_config")
    return config["zero_optimization"]["stage"] if config else None


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_name_is_the_file_of_that_name(name: str) -> None:
    assert template(name) == json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())
    assert plan(deepspeed=name).require().ds_config == plan(deepspeed=str(ROOT / f"ds_configs/{name}.json")).ds_config


def needs(choice: str, gpus: int, preset: str) -> int:
    found = resolve({"preset": preset, "num_gpus": gpus}, environ={}).require()
    config = None if choice == "none" else template(choice)
    return plan_memory(
        found.model_config,
        seq_len=found.seq_len,
        micro_batch_size=found.micro_batch_size,
        world_size=gpus,
        dtype="bf16",
        ds_config=config,
        gradient_accumulation_steps=found.gradient_accumulation_steps,
    ).estimate.device_bytes


@pytest.mark.parametrize(
    ("preset", "gpus", "memory"),
    [("7b_mamba", 8, "80GB"), ("7b_mamba", 4, "141GB"), ("130m_mamba", 4, "80GB"), ("2.8b_mamba", 8, "40GB")],
)
def test_the_lowest_stage_that_leaves_a_tenth_free(preset: str, gpus: int, memory: str) -> None:
    card = int(memory.removesuffix("GB")) * 10**9
    choices = ("none", "zero1", "zero2", "zero3")
    expected = next((n for n, c in enumerate(choices) if needs(c, gpus, preset) <= 0.9 * card), 3)
    found = plan(preset=preset, num_gpus=gpus, gpu_memory=memory)
    assert (stage(found) or 0) == expected


def test_offloading_is_offered_and_not_chosen() -> None:
    found = plan(gpu_memory="24GB", num_gpus=2)
    assert stage(found) == 3
    assert "offload_optimizer" not in found.known["ds_config"]["zero_optimization"]
    (problem,) = found.problems
    assert problem.id == "does-not-fit"
    assert "offload" in problem.fix


def test_an_assumed_card_is_labelled() -> None:
    found = plan(num_gpus=8).require()
    (note,) = [note for note in found.notes if "is assumed" in note]
    for card in (24, 40, 80, 141):
        fits = (c for c in ("none", "zero1", "zero2", "zero3") if needs(c, 8, "7b_mamba") <= 0.9e9 * card)
        assert f"{card}GB {next(fits, 'nothing')}" in note
    assert stage(found) == stage(plan(num_gpus=8, gpu_memory="80GB"))


def test_none_means_none_and_one_gpu_or_a_cpu_has_nothing_to_share() -> None:
    assert stage(plan(deepspeed="none")) is None
    assert stage(plan(num_gpus=1)) is None
    assert stage(plan(use_cpu=True, preset="tiny_mamba")) is None


def trained(folder: Path, **chosen: Any) -> Plan:
    """The plan of a run that has made a step in this folder."""
    found = plan(output_dir=str(folder), **chosen).require()
    folder.mkdir(exist_ok=True)
    found.save(folder)
    document = json.loads((folder / PLAN_FILE).read_text())
    (folder / RUN_FILE).write_text(json.dumps({name: document[name] for name in found.run.identity}))
    (folder / LOG_FILE).write_text("{}\n")
    return found


def test_what_was_chosen_from_a_machine_is_kept_at_every_resume(tmp_path: Path) -> None:
    """Engine, precision and the micro-batch that was planned; another machine that cannot serve them is a problem."""
    chosen: dict[str, Any] = {"num_gpus": 8, "per_device_train_batch_size": "auto", "output_dir": str(tmp_path)}
    first = plan(gpu_memory="80GB", **chosen).require()
    first.save(tmp_path)
    larger = plan(gpu_memory="1000GB", **chosen).require()
    assert larger.micro_batch_size > first.micro_batch_size  # no step was made: the folder is nobody's
    assert stage(larger) != stage(first)
    trained(tmp_path, gpu_memory="80GB", **{key: value for key, value in chosen.items() if key != "output_dir"})
    again = plan(gpu_memory="1000GB", **chosen).require()
    assert (stage(again), again.micro_batch_size) == (stage(first), first.micro_batch_size)
    assert stage(plan(gpu_memory="1000GB", **chosen | {"resume": "never"})) is None
    (problem,) = plan(gpu_memory="24GB", **chosen).problems
    assert problem.id == "does-not-fit"
    there = resolve({"preset": "7b_mamba", "output_dir": str(tmp_path), "use_cpu": True}, environ={})
    assert (there.known["dtype"], there.provenance["dtype"]) == ("bf16", "the plan of the run that is gone on with")
    alone = plan(output_dir=str(tmp_path), num_gpus=1)
    assert stage(alone) == stage(first)
    for flag in ({"bf16": False}, {"fp16": True}):
        changed = plan(gpu_memory="1000GB", **chosen, **flag).require()
        assert changed.dtype == ("fp16" if "fp16" in flag else "fp32")


def test_a_precision_that_the_machine_has_not_is_a_problem(tmp_path: Path) -> None:
    trained(tmp_path, fp16=True, deepspeed="none", preset="tiny_mamba", num_gpus=1)
    found = resolve({"output_dir": str(tmp_path)}, environ={}, device="cpu")
    (problem,) = [problem for problem in found.problems if problem.key != "output_dir"]  # no real run's folder
    assert (problem.id, problem.found) == ("fp16-on-a-cpu", "the plan of the run that is gone on with")


@pytest.mark.parametrize("name", ["plain", "zero2"])
def test_an_old_runs_folder_is_read(name: str) -> None:
    """Of a version before: precision and stage are its own, whatever this machine would choose."""
    folder = ROOT / "tests" / "old_runs" / name
    old = json.loads((folder / PLAN_FILE).read_text())
    settings = Settings({"output_dir": str(folder), "resume": "auto"}, Findings())
    assert plan_before(settings) == old
    assert _stored(old) == {"plain": "none", "zero2": "zero2"}[name]


@pytest.mark.parametrize(
    ("gpus", "said"), [(8, ""), (4, "--global_batch_size 256"), (16, "256 rows"), (3, "3 make 96.")]
)
def test_a_note_says_for_which_batch_a_preset_s_rate_is(gpus: int, said: str) -> None:
    notes = [note for note in plan(num_gpus=gpus).notes if note.startswith("The rate")]
    assert bool(notes) == bool(said)
    assert said in "".join(notes)
    assert not any(note.startswith("The rate") for note in plan(num_gpus=gpus, learning_rate=1e-3).notes)
    assert not any(note.startswith("The rate") for note in plan(num_gpus=gpus, per_device_train_batch_size=2).notes)


def test_the_command_names_what_was_chosen(capsys: pytest.CaptureFixture[str], monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    line = ["launch", "--preset", "7b_mamba", "--num_gpus", "8", "--output_dir", str(tmp_path / "run"), "--dry_run"]
    assert cli.main(line) == 0
    printed = capsys.readouterr().out.splitlines()[-1]
    assert "--use_deepspeed" in printed
    assert printed.split("--deepspeed ")[1].startswith("zero")
    assert "--dry_run" not in printed


def test_what_a_printed_command_repeats_the_recipe_accepts(capsys, monkeypatch, tmp_path: Path) -> None:
    """--gpu names the card as --gpu_memory says its size; the script gets it, and not what the launcher decides."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    line = ["launch", "--preset", "7b_mamba", "--num_gpus", "4", "--num-nodes", "2", "--gpu", "H200 SXM", "--convert"]
    line += ["--main_process_ip", "10.0.0.1", "--output_dir", str(tmp_path / "run"), "--dry_run"]
    assert cli.main([word for word in line if word != "--convert"]) == 0
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    script = next(place for place, word in enumerate(words) if word.endswith("recipes/pretrain.py"))
    arguments = read_arguments(words[script + 1 :])
    assert not arguments.problems
    assert arguments.get("gpu") == "H200 SXM"
    assert "num_nodes" not in arguments.written
    named, stated = plan(num_gpus=8, gpu="H200 SXM"), plan(num_gpus=8, gpu_memory="141GB")
    assert named.known["ds_config"] == stated.known["ds_config"] != plan(num_gpus=8).known["ds_config"]
    assert _without(line, WORLD_FLAGS) == [*line[:3], *line[7:9], *line[10:-1]]


@pytest.mark.parametrize(
    ("name", "size"),
    [("NVIDIA H100 80GB HBM3", 80), ("A100-SXM4-40GB", 40), ("A100", None), ("RTX 4090", 24), ("an abacus", None)],
)
def test_the_memory_of_a_card_by_its_name(name: str, size: int | None) -> None:
    assert memory_of(name) == (size and size * 10**9)


def test_memory_of_every_preset_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["memory", "--num_gpus", "8", "--gpu_memory", "80GB", "--json"]) == 0
    lines = {line["preset"]: line for line in json.loads(capsys.readouterr().out)["presets"]}
    assert set(all_presets()) == set(lines)
    assert lines["7b_mamba"]["bytes"]["ZeRO 3"] == needs("zero3", 8, "7b_mamba")
    assert lines["7b_mamba"]["cheapest"] == "ZeRO 3"
