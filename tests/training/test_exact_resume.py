"""Stop and resume: bit for bit the run that was never stopped."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import ROOT, SMALL_HYBRID, SMALL_MAMBA2, Launcher, curve, log_lines, same_bytes, stop_in

from hf_mamba.cli import main
from hf_mamba.family import family_of
from hf_mamba.run.manifest import file_sha256
from hf_mamba.run.resume import find_universal
from hf_mamba.run.universal import convert

pytestmark = pytest.mark.core

# fp32 with one process is stopped in test_checkpoints.py, two processes without DeepSpeed in test_preemption.py
SLOW = pytest.mark.slow
ENGINES = {
    "bf16": (1, {"bf16": True}),
    "mamba2": (1, SMALL_MAMBA2),
    "hybrid": (1, SMALL_HYBRID),
    "zero2-mamba2": (2, {"deepspeed": str(ROOT / "ds_configs" / "zero2.json"), **SMALL_MAMBA2}),
    "muon": (2, {"optim": "muon"}),
    "zero3-bf16-hybrid": (2, {"deepspeed": str(ROOT / "ds_configs" / "zero3.json"), "bf16": True, **SMALL_HYBRID}),
    "zero3-bf16": (2, {"deepspeed": "zero3", "bf16": True}),
    "zero1-mamba2": (2, {"deepspeed": "zero1", **SMALL_MAMBA2}),
    "zero1-hybrid": (2, {"deepspeed": "zero1", **SMALL_HYBRID}),
    "zero2-hybrid": (2, {"deepspeed": "zero2", **SMALL_HYBRID}),
    "zero3-bf16-mamba2": (2, {"deepspeed": str(ROOT / "ds_configs" / "zero3.json"), "bf16": True, **SMALL_MAMBA2}),
}
IN_CI = ("bf16", "mamba2", "hybrid", "muon", "zero2-mamba2", "zero3-bf16-hybrid")


@pytest.mark.parametrize("engine", [name if name in IN_CI else pytest.param(name, marks=SLOW) for name in ENGINES])
def test_stopped_twice_is_bitwise_the_undisturbed_run(launcher: Launcher, engine: str):
    """Losses, norms, rates, weights, moments and generators; the log lines fall between the saves.

    What the run exports is a stock model: transformers' own class computes the same from it.
    """
    world, settings = ENGINES[engine]
    settings = {**settings, "save_steps": 3, "max_steps": 10, "logging_steps": 2}
    whole, parts = launcher.folder / f"{engine}-whole", launcher.folder / f"{engine}-parts"
    launcher.run(whole, world, **settings)
    for stop in (3, 6):
        launcher.run(parts, world, expect=85, patch=stop_in(stop), **settings)
    launcher.run(parts, world, **settings)
    assert curve(parts) == curve(whole)
    assert [row[0] for row in curve(whole)] == [2, 4, 6, 8, 10]
    assert not same_bytes(whole / "checkpoint-10", parts / "checkpoint-10")
    assert not same_bytes(whole / "model", parts / "model")
    assert log_lines(parts, "eval_loss") == log_lines(whole, "eval_loss")
    assert json.loads((parts / "status.json").read_text())["status"] == "finished"
    torch.testing.assert_close(*logits(parts / "model"), atol=1e-5, rtol=0)


@torch.no_grad()
def logits(folder: Path) -> list[torch.Tensor]:
    """Of the same tokens: transformers' own class, and ours."""
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = family_of(stock.config).model_class.from_pretrained(folder, dtype=torch.float32)
    assert type(stock) is not type(ours)
    tokens = torch.arange(1, 61).view(2, 30)
    return [model.eval()(tokens).logits for model in (stock, ours)]


@pytest.fixture(scope="module")
def undisturbed(launcher: Launcher) -> Callable[[str], Path]:
    """A run of two processes that was never stopped, by the name of its engine; each is made once."""

    @cache
    def make(engine: str) -> Path:
        launcher.run(f"undisturbed-{engine}", 2, **of_engine(engine), save_strategy="no")
        return launcher.folder / f"undisturbed-{engine}"

    return make


def of_engine(name: str) -> dict[str, Any]:
    """The settings of "engine[-bf16][-family]"."""
    engine, *words = name.split("-")
    deepspeed = {} if engine == "ddp" else {"deepspeed": engine}
    family = {"mamba2": SMALL_MAMBA2, "hybrid": SMALL_HYBRID}.get(words[-1] if words else "", {})
    return {"max_steps": 8} | deepspeed | ({"bf16": True} if "bf16" in words else {}) | family


FAILING_CONVERTER = "import hf_mamba.run.universal as u; u._CONVERTER = 'raise OSError(\"no converter\")'"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("ddp", 2), ("ddp", 1)),
        (("ddp", 1), ("ddp", 2)),
        (("zero2-hybrid", 2), ("zero2", 1)),
        (("zero3-mamba2", 2), ("zero1", 1)),
        (("zero1", 1), ("zero3", 2)),
        pytest.param(("zero3", 2), ("zero1", 1), marks=SLOW),
        pytest.param(("zero3", 1), ("zero3", 2), marks=SLOW),
        pytest.param(("zero1", 2), ("zero1", 1), marks=SLOW),
        pytest.param(("zero2", 1), ("zero1", 2), marks=SLOW),
        pytest.param(("zero2", 2), ("zero3", 2), marks=SLOW),
        pytest.param(("zero3", 2), ("zero2", 2), marks=SLOW),
        pytest.param(("zero1", 2), ("zero2", 2), marks=SLOW),
        pytest.param(("zero3-bf16", 2), ("zero1-bf16", 1), marks=SLOW),
        pytest.param(("zero1-bf16", 1), ("zero3-bf16", 2), marks=SLOW),
        pytest.param(("zero2", 2), ("zero2", 1), marks=SLOW),
        pytest.param(("ddp-hybrid", 2), ("ddp", 1), marks=SLOW),
        pytest.param(("zero1-hybrid", 1), ("zero3", 2), marks=SLOW),
        pytest.param(("zero3-bf16-hybrid", 2), ("zero2", 1), marks=SLOW),
        pytest.param(("ddp-mamba2", 2), ("ddp", 1), marks=SLOW),
        pytest.param(("zero2-mamba2", 2), ("zero2", 1), marks=SLOW),
        pytest.param(("zero1-mamba2", 1), ("zero3", 2), marks=SLOW),
        pytest.param(("zero3-bf16-mamba2", 2), ("zero1", 1), marks=SLOW),
    ],
    ids=lambda engine: "-".join(map(str, engine)),
)
def test_another_world_and_stage_train_on_the_same_samples(
    launcher: Launcher, undisturbed: Callable[[str], Path], before: tuple[str, int], after: tuple[str, int]
):
    """Losses equal to rounding, which another sample, or a moment that is lost, would break by orders of magnitude.

    The run's folder is all that the second start is told, and where its engine is another one, that.
    """
    whole, bf16 = undisturbed(before[0]), "bf16" in before[0]
    stages = before[0].split("-")[0], after[0].split("-")[0]
    parts = launcher.folder / f"world-{before}-{after}"
    launcher.run(parts, before[1], expect=85, patch=stop_in(4), **of_engine(before[0]), save_steps=4)
    original = bytes_of(parts / "checkpoint-4")
    converts = "zero" in before[0] and ("zero3" in stages or before[1] != after[1])
    if beforehand := before[0] == "zero2-hybrid" and after[1] == 1:
        assert main(["preflight", "--resume", str(parts), "--convert"]) == 0
    if damaged := before == ("zero1", 1):  # one bit of the copy is wrong: named, and the start makes another
        file = next(convert(parts / "checkpoint-4").glob("zero/*embed*/exp_avg.pt"))
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    engine = ["--deepspeed", stages[1]] if stages[0] != stages[1] else []
    line = ["--resume", str(parts), *engine]
    if before == ("zero3-mamba2", 2):  # what fails on the rank that converts ends all of them, and leaves nothing
        failed = launcher.launch(line, 2, patch=FAILING_CONVERTER).ended(2).text()
        assert failed.count("error: DeepSpeed's converter failed on") == failed.count("OSError: no converter") == 1
        assert bytes_of(parts / "checkpoint-4") == original
    text = launcher.launch(line, after[1]).ended(0).text()
    assert log_lines(parts) == pytest.approx(log_lines(whole), abs=5e-3 if bf16 else 2e-4)
    assert log_lines(parts, "learning_rate") == log_lines(whole, "learning_rate")
    assert original.items() <= bytes_of(parts / "checkpoint-4").items()
    assert (find_universal(parts / "checkpoint-4")[0] is not None) == converts
    assert text.count("written and verified: ") == (converts and not beforehand)
    assert text.count("global_step4_universal: the content of zero/") == damaged
    assert "Traceback" not in text


def bytes_of(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file_sha256(file) for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def first(launcher: Launcher):
    launcher.run("first", save_steps=4)
    return launcher.folder / "first"


def test_a_named_checkpoint_goes_on_in_another_folder(launcher: Launcher, first):
    launcher.run("branch", resume=str(first / "checkpoint-4"), save_steps=4)
    branch = launcher.folder / "branch"
    assert curve(branch) == curve(first)[4:]
    assert not same_bytes(first / "checkpoint-12", branch / "checkpoint-12")


def test_a_run_that_is_through_is_not_trained_again(launcher: Launcher, first):
    before = (first / "log.jsonl").read_text().count('"loss"')
    launcher.run(first, save_steps=4)
    assert (first / "log.jsonl").read_text().count('"loss"') == before


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"dataset": "other"}, "this run's data is not the checkpoint's"),
        ({"eval_fraction": 0.2}, "the held-out part (eval_fraction)"),
        ({"global_batch_size": 4}, "global_batch_size"),
        ({"seed": 7}, "seed"),
        ({"resume": "never"}, "found never, and"),
        ({"resume": "no/such/folder"}, "no/such/folder"),
    ],
    ids=["data", "held out", "batch", "seed", "never", "folder"],
)
def test_what_would_be_another_run_is_refused(launcher: Launcher, first, settings: dict, expected: str):
    if settings.get("dataset"):
        other = launcher.folder / "other.txt"
        other.write_text("one two three four five six seven\n" * 400)
        settings = {"dataset": [str(launcher.corpus), str(other)]}
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*") if path.is_file()}
    refused = launcher.run(first, expect=2, save_steps=4, **settings)
    assert expected in refused.text()
    assert "Traceback" not in refused.text()
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*") if path.is_file()} == before
