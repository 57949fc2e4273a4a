"""A page is written where it was asked for, whatever a run's folder holds; no text leaves its place in the card."""

import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_mamba.preflight import resolve
from hf_mamba.redaction import without_paths
from hf_mamba.report.card import write_model_card
from hf_mamba.report.html import Axis, Series, plot
from hf_mamba.report.page import main


def a_run(folder: Path) -> Path:
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    (folder / "samples.jsonl").write_text(json.dumps({"step": 1, "text": "\nssh-ed25519 AAAA evil\n"}) + "\n")
    return folder


@pytest.mark.parametrize("name", [".report.html.part", "report.html"])
def test_a_link_in_a_strangers_run_folder_leads_to_no_file_of_the_users(tmp_path: Path, name: str):
    keys = tmp_path / "authorized_keys"
    keys.write_text("mine")
    run = a_run(tmp_path / "run")
    (run / name).symlink_to(keys)
    assert main([str(run)]) == 0
    assert keys.read_text() == "mine"
    assert not (run / "report.html").is_symlink()
    assert "<html" in (run / "report.html").read_text()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_another_users_run_folder_is_only_read(tmp_path: Path):
    run = a_run(tmp_path / "run")
    os.chown(run, 65534, 65534)
    before = sorted(os.listdir(run))
    with pytest.raises(ValueError, match=r"another user's folder, which is only read\. Write --output FILE"):
        main([str(run)])
    assert main([str(run), "--output", str(tmp_path / "page.html")]) == 0
    assert sorted(os.listdir(run)) == before
    assert (tmp_path / "page.html").is_file()


NAMES = ("step", "loss", "eval_loss", "time", "grad_norm", "resumed_at", "tokens_per_step", "total_steps", "status")
NAMES += ("training_arguments", "provenance", "ds_config", "zero_optimization", "parameters", "estimated", "text")
odd = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from([10**400, 1e308, "nan", "x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=6),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(["plan.json", "status.json"]), odd), st.lists(odd, max_size=6), st.binary())
def test_whatever_the_files_hold_there_is_a_page(tmp_path_factory, files, lines, noise):
    run = a_run(tmp_path_factory.mktemp("odd") / "run")
    for name, value in files.items():
        (run / name).write_text(json.dumps(value))
    rows = "".join(json.dumps(line) + "\n" for line in lines).encode()
    for name in ("log.jsonl", "samples.jsonl", "bad_steps.jsonl"):
        (run / name).write_bytes(rows + noise + b"\n" + rows)
    assert main([str(run)]) == 0
    assert "<html" in (run / "report.html").read_text()


def test_what_cannot_be_read_is_shown_as_such(tmp_path: Path):
    run = a_run(tmp_path / "run")
    (run / "plan.json").write_text(json.dumps({"ds_config": {"zero_optimization": "3"}, "world_size": 2}))
    (run / "log.jsonl").write_text('{"step": 7, "loss": 1e308}\n{"step": null, "loss": 1}\n')
    assert main([str(run)]) == 0
    page = (run / "report.html").read_text()
    assert page.count("not readable: this is not what a run writes") >= 2  # DeepSpeed's stage, the parameters
    assert re.search(r"<td>step</td><td>7</td>", page)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("--dataset /home/me/data/*.jsonl:0.5", "--dataset *.jsonl:0.5"),
        ("--resume=/runs/a/checkpoint-4", "--resume=checkpoint-4"),
        ('{"output_dir": "/scratch/u/run"}', '{"output_dir": "run"}'),
        (f"{Path.cwd()}/recipes/pretrain.py", "recipes/pretrain.py"),
        ("https://arxiv.org/abs/2312.00752 owner/name a/b/c", "https://arxiv.org/abs/2312.00752 owner/name a/b/c"),
        ("1 / 2 and/or", "1 / 2 and/or"),
    ],
)
def test_paths_of_the_machine_are_no_part_of_a_card(text: str, shown: str):
    assert without_paths(text) == shown


@pytest.mark.parametrize(
    ("sources", "flag", "names"),
    [
        (["embedded"], None, []),
        (["owner/name/config@text:0.5", "owner/name/other:0.5"], None, ["owner/name"]),
        (["embedded"], ["owner/mine"], ["owner/mine"]),
    ],
)
def test_data_sets_of_the_hub_are_named_in_the_card(tmp_path: Path, sources: list[str], flag, names: list[str]):
    plan = resolve({"dataset": sources, "hub_datasets": flag, "output_dir": str(tmp_path), "use_cpu": True})
    assert plan.known["card"].datasets == names


@pytest.mark.parametrize(
    ("total", "size"),
    [(433_152, "433K"), (1_793_472, "1.79M"), (999_960, "1M"), (7_000, "7K"), (40, "40"), (6_893_552_640, "6.89B")],
)
def test_a_model_without_a_preset_is_called_by_its_size(tmp_path: Path, total: int, size: str):
    text = write_model_card(tmp_path, {"parameters": {"estimated": total}}, [], []).read_text()
    assert f"# Mamba {size}\n" in text


def test_no_text_of_a_run_leaves_its_place_in_the_card(tmp_path: Path):
    command = ["pretrain.py", "--sample_prompt", "\n```\n# Mine\n<script>"]
    plan = {"preset": "a\n# b <img src=x>", "training_arguments": {"learning_rate": "1 | 2\n# c"}}
    lines = write_model_card(tmp_path, plan, [], command).read_text().splitlines()
    assert [line for line in lines if line.startswith("# ")] == ["# Mamba a # b &lt;img src=x&gt;", "# Mine"]
    fences = [i for i, line in enumerate(lines) if line.startswith("````")]
    assert fences[0] < lines.index("# Mine") < fences[1]
    assert not any("<img" in line for line in lines if not line.startswith(("  ", "name:")) and "preset" not in line)


def test_amounts_begin_at_zero_and_shares_are_in_percent():
    points = [(0.0, 0.30), (1e6, 0.40)]
    shares = plot("Waiting for data", "of the time", [Series("a", points)], Axis.PERCENT)
    assert ">0 %<" in shares
    assert ">40 %<" in shares
    assert ">0<" in plot("Memory", "GB", [Series("a", points)], Axis.ZERO).split("tokens")[1]
    near = plot("Loss", "", [Series("a", points)])
    assert ">0<" not in near.split("tokens")[1]
