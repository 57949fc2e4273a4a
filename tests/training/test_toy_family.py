"""The contract of a family, proved by one that the package does not know: tests/toy and a row are all that it takes."""

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from runs import ROOT, Launcher, at, curve, log_lines, same_bytes
from safetensors import safe_open

from hf_mamba.cli import main
from hf_mamba.family import FAMILIES, get_preset

ROW = f"""
import sys
from hf_mamba.family import FAMILIES
sys.path.insert(0, {str(ROOT / "tests")!r})
FAMILIES["toy"] = "toy:FAMILY"
"""
KILLED = at("training_step", 13, "os.kill(os.getpid(), signal.SIGKILL)")
RUN = {"preset": "tiny_toy", "vocab_size": None, "seq_len": None, "max_steps": 20, "save_steps": 10}


@pytest.fixture(scope="module", autouse=True)
def row() -> Iterator[None]:
    FAMILIES["toy"] = "toy:FAMILY"
    yield
    del FAMILIES["toy"]


@pytest.fixture(scope="module")
def run(launcher: Launcher) -> Path:
    """20 steps, undisturbed."""
    launcher.run("toy", patch=ROW, **RUN)
    return launcher.folder / "toy"


@pytest.fixture(scope="module")
def model(run: Path):
    from toy.modeling import ToyForCausalLM

    return ToyForCausalLM.from_pretrained(run / "model").eval()


def test_it_shares_no_tensor_with_mamba_and_its_layers_differ():
    from hf_mamba.family import family_of

    toy, mamba = ({row.name for row in family_of(c).parameters(c)} for c in ({"model_type": "toy"}, {}))
    assert not toy & mamba
    sizes = [row.size for row in family_of({"model_type": "toy"}).parameters({}) if row.component == "back"]
    assert sizes == [32 * 32, 32 * 64, 32 * 32]


def test_the_pre_flight_plans_it_and_counts_its_parameters(capsys, empty_folder):
    from hf_mamba.preflight import resolve, verify

    wanted = {"preset": "tiny_toy", "use_cpu": True, "max_steps": 20, "gpu_memory": "1GB"}
    plan = resolve(wanted | {"per_device_train_batch_size": "auto"}, environ={}).require()
    checked = verify(plan).require()
    assert checked.parameters == plan.parameters["by_component"]
    assert sum(checked.parameters.values()) == plan.parameters["estimated"]
    assert plan.provenance["micro_batch_size"] == "the memory planner"
    refused = resolve(wanted | {"per_device_train_batch_size": 2 * plan.micro_batch_size}, environ={})
    assert [problem.id for problem in refused.problems] == ["does-not-fit"]

    assert main(["presets"]) == 0
    assert "tiny_toy" in capsys.readouterr().out
    assert main(["memory", "--preset", "tiny_toy", "--gpu_memory", "80GB", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert table["parameters"] == plan.parameters["estimated"]
    assert table["backend"] == "torch"
    assert all(row["fits"] for row in table["rows"])


@pytest.fixture(scope="module")
def measured(launcher: Launcher) -> list[dict]:
    """Peaks of real steps beside the prediction, as benchmarks/memory.py takes them, in a fork with all imported."""
    code = f"""
import json, sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import memory_cases, memory_steps
memory_cases.MODELS["toy"] = {{"model_type": "toy", "hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 300}}
rest = {{"stage": None, "batch": 4, "length": 128, "backend": "torch"}}
for own in ({{}}, {{"checkpointing": True}}, {{"dtype": "bf16"}}, {{"stage": 2, "dtype": "bf16"}}):
    case = memory_cases.Case("toy", **rest | own)
    print("CASE", json.dumps([case.predict(), memory_steps.measure(case)]))
raise SystemExit(0)
"""
    launch = launcher.run("toy-memory", patch=ROW + code)
    found = [json.loads(line[5:]) for line in launch.text().splitlines() if line.startswith("CASE ")]
    assert len(found) == 4, launch.text()
    return [{phase: (size, peaks[phase]) for phase, (size, _) in told.items()} for told, peaks in found]


@pytest.mark.parametrize("case", range(4), ids=["plain", "checkpointing", "autocast", "zero2-bf16"])
def test_its_memory_is_as_predicted(measured, case):
    """Within 5%: the largest moment of each phase."""
    for phase, (predicted, peak) in measured[case].items():
        assert predicted == pytest.approx(peak, rel=0.05), phase


def test_a_killed_run_goes_on_bit_for_bit(launcher: Launcher, run: Path):
    parts = launcher.folder / "toy-parts"
    launcher.run(parts, patch=ROW + KILLED, expect=-signal.SIGKILL, **RUN)
    assert not (parts / "model").exists()
    launcher.run(parts, patch=ROW, **RUN)
    assert curve(parts) == curve(run)
    assert len(curve(run)) == 20
    assert not same_bytes(run / "checkpoint-20", parts / "checkpoint-20")
    assert not same_bytes(run / "model", parts / "model")


def test_it_learns_and_its_model_is_exported_whole(run: Path, model):
    losses = log_lines(run)
    assert losses[20] < losses[1] - 0.5
    with safe_open(run / "model" / "model.safetensors", framework="pt") as file:
        assert {name: file.get_tensor(name).shape for name in file.keys()} == {  # noqa: SIM118
            name: tensor.shape for name, tensor in model.state_dict().items()
        }
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in model.state_dict().items())


@torch.no_grad()
def test_packed_documents_and_padding_change_nothing(model):
    a, b = torch.randint(1, 320, (1, 9)), torch.randint(1, 320, (1, 14))
    alone = torch.cat([model(a).logits, model(b).logits], 1)
    positions = torch.cat([torch.arange(9), torch.arange(14)])[None]
    packed = model(torch.cat([a, b], 1), position_ids=positions).logits
    torch.testing.assert_close(packed, alone)
    padded = torch.cat([torch.nn.functional.pad(a, (5, 0)), b])
    mask = torch.ones_like(padded)
    mask[0, :5] = 0
    logits = model(padded, attention_mask=mask).logits
    torch.testing.assert_close(torch.cat([logits[:1, 5:], logits[1:]], 1), alone)


def test_it_generates_by_auto_classes_and_from_a_saved_state(model, run: Path, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import hf_mamba
    from hf_mamba import load_cache, save_cache

    hf_mamba.register()
    try:
        same = AutoModelForCausalLM.from_pretrained(run / "model").eval()
        prompt = AutoTokenizer.from_pretrained(run / "model")(["the quick", "a lazy dog"], padding=True)
    finally:
        hf_mamba.unregister()
    assert type(same) is type(model)
    inputs = {name: torch.tensor(prompt[name]) for name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    whole = same.generate(**inputs, **options)
    assert torch.equal(whole, model.generate(**inputs, **options, use_cache=False))

    first = model.generate(**inputs, **options | {"max_new_tokens": 5}, return_dict_in_generate=True)
    cache = first.get("cache_params") or first.past_key_values
    save_cache(cache, tmp_path / "state", model.config)
    again = load_cache(tmp_path / "state", model.config)
    rest = model.generate(first.sequences[:, -1:], cache_params=again, **options | {"max_new_tokens": 7})
    assert torch.equal(torch.cat([first.sequences, rest[:, 1:]], 1), whole)


def test_its_card_says_what_it_is(run: Path, model):
    card = (run / "model" / "README.md").read_text(encoding="utf-8")
    count = f"{model.num_parameters():,} parameters"
    assert card.startswith("---\n")
    for said in (
        "# Toy tiny_toy",
        "A Toy language model",
        "3 layers of width 32",
        count,
        "- recurrent",
        "hf_mamba.register()",
    ):
        assert said in card, said
    assert "The files are stock" not in card, "transformers has no toy"
    assert get_preset("tiny_toy").max_tokens == 20 * 8 * 48
    assert re.search(r"Trained for 20 of 20 steps: 7,680 tokens", card)
