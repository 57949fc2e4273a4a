"""The recipe, launched as a user launches it: every engine gives the same run, and a mistake is one message."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from launching import ROOT, environment, logged, recipe, write_corpus
from runs import Launcher

from hf_mamba.processor import bf16_unit

pytestmark = pytest.mark.core

SETTINGS = """
preset: tiny_mamba
vocab_size: 320
seq_len: 48
gradient_accumulation_steps: 2
max_steps: 5
logging_steps: 1
save_strategy: "no"
eval_fraction: 0.05
use_cpu: true
bf16: false
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe")
    (path / "run.yaml").write_text(SETTINGS)
    write_corpus(path / "corpus.jsonl")
    return path


def arguments(folder: Path, output: str, *more: str) -> list[str]:
    data = ["--dataset", str(folder / "corpus.jsonl")]
    return ["--config", str(folder / "run.yaml"), *data, "--output_dir", str(folder / output), *more]


@pytest.fixture(scope="module")
def plain(folder: Path) -> list[float]:
    """The losses of the undivided run: one process, micro-batch 4."""
    said = ["--license", "apache-2.0", "--language", "code", "en"]
    done = recipe("plain", arguments(folder, "plain", "--micro_batch_size", "4", *said), folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "8 = 4 x 2 x 1" in done.stdout
    assert re.search(r"held-out loss \d+\.\d+  perplexity \d+\.\d  \d\.\d+ bits/byte", done.stdout)
    return logged(folder / "plain")


def test_the_run_learns_and_leaves_a_stock_model(folder: Path, plain: list[float]):
    assert len(plain) == 5
    assert plain[-1] < plain[0] - 0.5
    assert json.loads((folder / "plain" / "model" / "config.json").read_text())["use_cache"] is True
    (perplexity,) = logged(folder / "plain", "eval_perplexity")
    assert 1 < perplexity < 320
    model = folder / "plain" / "model"
    expected = "README.md config.json generation_config.json loss_curve.png model.safetensors plan.json"
    assert sorted(path.name for path in model.iterdir()) == [
        *expected.split(),
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert (model / "loss_curve.png").read_bytes()[:4] == b"\x89PNG"
    plan = json.loads((folder / "plain" / "plan.json").read_text())
    assert plan["global_batch_size"] == 8
    checked = json.loads((folder / "plain" / "checked.json").read_text())
    assert checked["backend"] == "cpu"
    assert checked["parameters"] == plan["parameters"]["by_component"]
    assert plan["provenance"]["gradient_accumulation_steps"].startswith("config ")


def test_the_card_says_what_was_said_and_measured(folder: Path, plain: list[float]):
    card = ModelCard.load(folder / "plain" / "model" / "README.md")
    last = json.loads((folder / "plain" / "trainer_state.json").read_text())["log_history"][-1]
    measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
    expected = {"loss": "eval_loss", "perplexity": "eval_perplexity", "bits_per_byte": "eval_bits_per_byte"}
    assert measured == {kind: pytest.approx(last[key], abs=1e-4) for kind, key in expected.items()}
    assert card.data.metrics == list(expected)
    assert (card.data.license, card.data.language) == ("apache-2.0", ["code", "en"])
    assert card.data.datasets is None  # a file of this machine is no data set of the Hub
    assert str(folder) not in str(card)
    assert "recipes/pretrain.py --config run.yaml --dataset corpus.jsonl --output_dir plain" in str(card)


def test_stock_transformers_loads_and_generates_without_this_package(folder: Path, plain: list[float]):
    script = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
inputs = tokenizer("the quick", return_tensors="pt", return_token_type_ids=False)
out = model.generate(**inputs, max_new_tokens=5)
assert out.shape[1] > inputs["input_ids"].shape[1], out
assert type(model).__module__.startswith("transformers."), type(model)
assert not [name for name in sys.modules if name.startswith("hf_mamba")]
print("generated", tokenizer.decode(out[0]))
"""
    command = [sys.executable, "-c", script, str(folder / "plain" / "model")]
    done = subprocess.run(command, env=environment(folder), cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "generated the quick" in done.stdout


def test_a_compiled_run_gives_the_plain_losses(folder: Path):
    """--torch_compile with Inductor, as the CPU compiles it; one layer, for the compiler's time."""
    if shutil.which("g++") is None:
        pytest.skip("Inductor compiles with g++")
    small = ["--micro_batch_size", "4", "--config_overrides", "num_hidden_layers=1", "--max_steps", "3"]
    losses = []
    for name, more in (("eager", []), ("compiled", ["--torch_compile", "true"])):
        done = recipe("plain", arguments(folder, name, *small, *more), folder)
        assert done.returncode == 0, done.stderr[-3000:]
        losses.append(logged(folder / name))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert json.loads((folder / "compiled" / "plan.json").read_text())["training_arguments"]["torch_compile"] is True


@pytest.mark.parametrize(
    ("name", "started", "template"),
    [
        ("ddp", "ddp", None),
        ("zero2_offload", "deepspeed", "zero2_offload"),
        pytest.param("fsdp", "fsdp", None, marks=pytest.mark.slow),  # accelerate makes it plain data parallel here
    ],
)
def test_two_processes_give_the_plain_run(folder: Path, plain: list[float], name: str, started: str, template):
    """Through `accelerate launch`; the other stages are in tests/training, with an environment like torchrun's."""
    if template == "zero2_offload" and shutil.which("g++") is None:
        pytest.skip("DeepSpeed compiles its CPU Adam with g++")
    more = ["--micro_batch_size", "2"]
    if template:
        more += ["--deepspeed", str(ROOT / "ds_configs" / f"{template}.json")]
    done = recipe(started, arguments(folder, name, *more), folder)
    assert done.returncode == 0, done.stderr[-3000:]
    card = (folder / name / "model" / "README.md").read_text()
    assert re.search(r"\naccelerate launch --(multi_gpu|use_deepspeed) --num_processes 2 .*recipes/pretrain\.py ", card)
    assert str(folder) not in card
    assert "8 = 2 x 2 x 2" in done.stdout
    same_run(folder, name, plain)


def same_run(folder: Path, name: str, plain: list[float]) -> None:
    # fp32 rounding: the sums over rows, ranks and shards run in another order
    assert logged(folder / name) == pytest.approx(plain, abs=2e-4)
    weights = [path / "model" / "model.safetensors" for path in (folder / "plain", folder / name)]
    assert weights[0].stat().st_size == weights[1].stat().st_size


@pytest.mark.parametrize(("world", "stage"), [(1, 2), (2, 3)])
def test_deepspeed_needs_no_launcher(launcher: Launcher, folder: Path, plain: list[float], world: int, stage: int):
    """A world of one; and processes that know each other by torchrun's variables alone."""
    more = ["--micro_batch_size", str(4 // world), "--deepspeed", str(ROOT / "ds_configs" / f"zero{stage}.json")]
    launcher.recipe(arguments(folder, f"zero{stage}", *more), world)
    same_run(folder, f"zero{stage}", plain)


def test_dry_run_of_the_7b_preset(launcher: Launcher):
    said = launcher.recipe(["--preset", "7b_mamba", "--num_gpus", "4", "--dry_run"])
    for expected in ("128 = 4 x 8 x 4", "6,893,552,640", "0.0%", "DeepSpeed reads back 128: equal"):
        assert expected in said


def test_mistakes_are_one_message(launcher: Launcher, folder: Path):
    """The kinds of mistakes are in tests/training/test_mistakes.py."""
    more = ["--learning_rate", "-1", "--max_grad_norm", "x", "--preset", "7b_mambo"]
    said = launcher.recipe([*arguments(folder, "mistake"), *more], expect=2)
    assert "Traceback" not in said
    expected = ("learning_rate", "max_grad_norm", "here is no preset '7b_mambo'", "7b_mamba", "3 problem")
    assert not [text for text in expected if text not in said]
    assert not (folder / "mistake").exists()


def test_the_default_precision_is_the_processors(launcher: Launcher, folder: Path, plain: list[float]):
    words = arguments(folder, "default", "--micro_batch_size", "4")
    yaml = folder / "default.yaml"
    yaml.write_text(SETTINGS.replace("bf16: false\n", ""))
    said = launcher.recipe([str(yaml) if word.endswith("run.yaml") else word for word in words])
    assert f"precision        {'bf16' if bf16_unit() else 'fp32'}" in said
    assert logged(folder / "default") == pytest.approx(plain, rel=0.01)


def test_training_continues_from_a_model_folder(launcher: Launcher, folder: Path, plain: list[float]):
    model = str(folder / "plain" / "model")
    launcher.recipe(arguments(folder, "more", "--model_name_or_path", model, "--micro_batch_size", "4"))
    assert logged(folder / "more")[0] < plain[0] - 0.5
