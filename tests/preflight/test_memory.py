"""The planner: what it adds up to, what it refuses, what it answers at once."""

import json
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_mamba import MambaConfig, MambaForCausalLM
from hf_mamba.cli import main
from hf_mamba.family import count_parameters, get_preset
from hf_mamba.models.mamba.presets import PRESETS
from hf_mamba.models.mamba.table import Geometry
from hf_mamba.models.mamba.table import table as parameters
from hf_mamba.preflight.cost.memory import (
    compare,
    estimate,
    job_of,
    largest_micro_batch,
    parse_capacity,
    plan_memory,
    recommend,
    zero_of,
)
from hf_mamba.preflight.cost.states import Zero, states
from hf_mamba.preflight.cost.table import KINDS, by_kind

SEVEN = get_preset("7b_mamba").config
SMALL = {"hidden_size": 64, "num_hidden_layers": 3, "vocab_size": 300}
GRADIENTS_IN_FP32 = {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}}


def ask(config=SMALL, **more):
    numbers = {"seq_len": 128, "world_size": 1, "dtype": "bf16", "ds_config": {"zero_optimization": {"stage": 2}}}
    return plan_memory(config, **(numbers | {"micro_batch_size": 2} | more))


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GB", 80 * 10**9), ("80 gb", 80 * 10**9), ("79.6GiB", int(79.6 * 2**30)), ("512MiB", 2**29), (10**9, 10**9)],
)
def test_capacities(text, size):
    assert parse_capacity(text) == size


@pytest.mark.parametrize("text", ["80", "eighty", "80 parsecs", "-80GB", "0GB", "", "GB", 0, -1])
def test_a_capacity_that_is_none_gets_one_line(text):
    with pytest.raises(ValueError, match="gpu_memory") as error:
        parse_capacity(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [*PRESETS, "untied", "bias"])
def test_the_parameters_are_the_models(name):
    """Order and sizes of `named_parameters()` decide who owns what; so they are the model's own."""
    extra = {"untied": {"tie_word_embeddings": False}, "bias": {"use_bias": True, "use_conv_bias": False}}
    config = PRESETS[name].config if name in PRESETS else SMALL | extra[name]
    own = parameters(Geometry.of(config))
    assert sum(p.size for p in own) == sum(count_parameters(config).values())
    if name not in PRESETS or name in ("tiny_mamba", "minute_mamba"):
        model = MambaForCausalLM(MambaConfig(**config))
        assert [(p.name, p.shape) for p in own] == [(name, tuple(p.shape)) for name, p in model.named_parameters()]
        model = MambaForCausalLM._from_config(MambaConfig(**config), dtype=torch.bfloat16)
        assert [p.fp32 for p in own] == [p.dtype == torch.float32 for p in model.parameters()]


@pytest.mark.parametrize(
    ("stage", "world", "w", "bytes_per_parameter"),
    [(0, 1, 2, 14), (0, 2, 2, 14), (1, 1, 2, 14), (1, 2, 2, 8), (2, 2, 2, 8), (2, 2, 4, 10), (3, 1, 2, 16)],
)
def test_persistent_bytes_per_parameter(stage, world, w, bytes_per_parameter):
    """As measured on DeepSpeed 0.19.8: 2 + 12/W in stages 1 and 2 (4 + 12/W in fp32), 16/W in stage 3."""
    kept = states(parameters(Geometry.of(SEVEN)), Zero(stage, reduce_bucket=0), world, w)
    assert sum(kept.device.values()) / kept.count == pytest.approx(bytes_per_parameter, rel=1e-4)


def test_the_table_holds_every_component_once():
    row = estimate(job_of(SEVEN, seq_len=2048, world_size=4, dtype="bf16", zero=Zero.auto(3, "none", 4864)), 4)
    listed = [kind for kinds in KINDS.values() for kind in kinds]
    assert len(listed) == len(set(listed))
    assert sum(by_kind(row).values()) == row.device_bytes


@given(
    stage=st.integers(0, 3),
    world=st.integers(1, 9),
    micro=st.integers(1, 9),
    length=st.integers(2, 600),
    checkpointing=st.booleans(),
)
def test_more_needs_more(stage, world, micro, length, checkpointing):
    def needs(micro=micro, length=length, stage=stage, world=world, checkpointing=checkpointing):
        zero = Zero.auto(stage, "none", 64)
        job = job_of(SMALL, seq_len=length, world_size=world, dtype="bf16", zero=zero, backend="cpu", device="cpu")
        return estimate(job.__class__(**{**vars(job), "gradient_checkpointing": checkpointing}), micro).device_bytes

    assert needs(micro=micro + 1) >= needs()
    assert needs(length=length + 1) >= needs()
    assert needs(world=2 * world) <= needs() or stage in (0, 3) or world == 1


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("capacity", ["950MB", "2GB", "4GB"])  # of a CPU: with the libraries
def test_the_largest_micro_batch_fits_and_the_next_does_not(stage, capacity):
    job = {"seq_len": 512, "world_size": 2, "dtype": "bf16", "zero": Zero.auto(stage, "none", 64), "device": "cpu"}
    largest = largest_micro_batch(SMALL, capacity=capacity, **job)
    assert largest > 0
    limit = parse_capacity(capacity)
    assert estimate(job_of(SMALL, **job), largest).device_bytes <= limit
    assert estimate(job_of(SMALL, **job), largest + 1).device_bytes > limit


def test_a_run_that_cannot_fit_is_told_what_would():
    deepspeed = {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}
    numbers = {"seq_len": 2048, "world_size": 4, "ds_config": deepspeed, "capacity": "80GB"}
    answer = ask(SEVEN, micro_batch_size=8, **numbers)
    assert answer.fits is False
    assert "--gradient_checkpointing" in answer.advice
    assert f"--per_device_train_batch_size {answer.largest_micro_batch_size}" in answer.advice
    assert ask(SEVEN, micro_batch_size=answer.largest_micro_batch_size, **numbers).fits
    assert ask(SEVEN, micro_batch_size=8, gradient_checkpointing=True, **numbers).fits
    assert "with --gradient_checkpointing" not in answer.advice, "it is enough alone"
    hopeless = ask(SEVEN, micro_batch_size=1, **numbers | {"capacity": "4GB"})
    assert hopeless.largest_micro_batch_size == 0
    assert "more or larger devices" in hopeless.advice


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_without_deepspeed(dtype):
    """Weights, gradients and moments in fp32, unsharded; autocast keeps 16-bit copies of the weights beside them."""
    answer = ask(SEVEN, ds_config=None, dtype=dtype, capacity="80GB", world_size=8)
    assert answer.fits is False
    assert "ZeRO" in answer.advice
    count = sum(count_parameters(SEVEN).values())
    kept = answer.estimate.phases["step"].parts
    assert kept["weights"] + kept["moments"] + kept["gradients"] == 16 * count
    assert kept["ddp_buckets"] == 4 * count
    assert "ddp_buckets" not in ask(SEVEN, ds_config=None, dtype=dtype, world_size=1).estimate.phases["step"].parts
    assert ask(ds_config=None, dtype=dtype, capacity="80GB").fits


def test_an_unknown_capacity_claims_nothing():
    answer = ask()
    assert answer.fits is None
    assert answer.largest_micro_batch_size is None


def test_auto_is_the_largest():
    answer = ask(capacity="8GB", micro_batch_size=None)
    assert answer.fits
    assert answer.estimate.micro_batch_size == answer.largest_micro_batch_size > 1


def test_every_way_out_is_one():
    """Each setting that the advice names fits by the planner's own account."""
    job = job_of(SEVEN, seq_len=2048, world_size=4, dtype="bf16", zero=Zero.auto(0, "none", 4864))
    rows = compare(job, 4, parse_capacity("80GB"))
    chosen, reason = recommend(rows)
    assert chosen is not None
    assert chosen.fits
    assert chosen.job.label in reason
    cheaper = rows[: rows.index(chosen)]
    assert not any(row.fits for row in cheaper)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, Zero()),
        ({"zero_optimization": {"stage": 2}}, Zero(2)),
        (
            {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}},
            Zero(3, reduce_bucket=4096),
        ),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, Zero(2, "optimizer")),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}}, Zero(2)),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, Zero(0)),
    ],
)
def test_ds_configs(config, expected):
    assert zero_of(config, 64) == expected


@pytest.mark.parametrize(
    "bad",
    [
        {"seq_len": -1},
        {"seq_len": 0},
        {"world_size": 0},
        {"micro_batch_size": -2},
        {"micro_batch_size": 1.5},
        {"dtype": "int8"},
        {"backend": "magic"},
        {"ds_config": {"zero_optimization": {"stage": 4}}},
        {"ds_config": {"zero_optimization": {"stage": 2, "reduce_bucket_size": "big"}}},
        {"ds_config": {"zero_optimization": True}},
        {"ds_config": {"zero_optimization": {}}},
        {"capacity": "80"},
    ],
)
def test_bad_numbers_get_one_line(bad):
    with pytest.raises(ValueError, match="write|must|Write") as error:
        ask(**bad)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--gpu_memory", "80"], "unit"),
        (["--gpu_memory", "nanGB"], "size"),
        (["--preset", "9b_mamba"], "9b_mamba"),
        (["--deepspeed", "absent.json"], "absent.json"),
        (["--tokens_per_second", "-5"], "-5"),
        (["--tokens_per_second", "nan"], "nan"),
        (["--tokens_per_second", "inf"], "inf"),
        (["--tokens_per_second", "1e12", "--device", "H100 SXM"], "times the peak"),
        (["--seq_len", "-3"], "--seq_len"),
        (["--seq_len", "99999999999999"], "--seq_len"),
        (["--micro_batch_size", "0"], "--micro_batch_size"),
        (["--num_gpus", "two"], "--num_gpus"),
        (["--backend", "cpu"], "--backend"),
        (["--sequence_length", "8"], "--sequence_length"),
    ],
)
def test_the_command_says_what_is_wrong(flags, named, capsys):
    assert main(["memory", "--preset", "130m_mamba", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("hf-mamba memory: ")
    assert named in err
    assert err.count("\n") == 1 + ("problem found" in err)


@pytest.mark.parametrize(
    ("text", "flags", "named"),
    [
        ('{"zero_optimization": {"stage": 2}', [], "delimiter"),
        ('{"zero_optimization": {"stage": 2, "reduce_bucket_sizes": 5}}', [], "reduce_bucket_size"),
        ('{"zero_optimization": {"stage": 2, "reduce_bucket_size": NaN}}', [], "finite"),
        ('{"fp16": {"enabled": true}, "zero_optimization": {"stage": 2}}', ["--dtype", "bf16"], "--dtype"),
        ('{"train_micro_batch_size_per_gpu": 7}', ["--micro_batch_size", "3"], "--micro_batch_size"),
    ],
)
def test_a_template_that_cannot_be(text, flags, named, tmp_path, capsys):
    path = tmp_path / "ds.json"
    path.write_text(text)
    assert main(["memory", "--preset", "130m_mamba", "--deepspeed", str(path), *flags]) == 2
    assert named in capsys.readouterr().err


def test_a_template_is_what_the_table_shows(tmp_path, capsys):
    """Its batch and precision where no flag has them, its own rows marked, and the keys that no formula is for."""
    path = tmp_path / "ds.json"
    zero = {"stage": 1, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 1000}
    config = {"zero_optimization": zero, "train_micro_batch_size_per_gpu": 7, "fp16": {"enabled": True}}
    config |= {"gradient_accumulation_steps": 3, "data_types": {"grad_accum_dtype": "fp32"}}
    path.write_text(json.dumps(config))
    flags = ["memory", "--preset", "130m_mamba", "--deepspeed", str(path)]
    assert main([*flags, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["micro_batch_size"], document["gradient_accumulation_steps"], document["dtype"]) == (7, 3, "fp16")
    own = [row["setting"] for row in document["rows"] if row["of_the_deepspeed_file"]]
    assert own == ["ZeRO 1 + optimizer offload"] * 2
    assert document["without_formula"] == ["data_types.grad_accum_dtype"]
    assert main(flags) == 0
    text = capsys.readouterr().out
    assert text.count("ZeRO 1 + optimizer offload *") == 2
    assert "Not in these numbers: data_types.grad_accum_dtype" in text


def test_a_template_at_another_stage_overlaps_as_deepspeed_does():
    """What it does not say of overlap_comm is DeepSpeed's default at each stage, not the one at its own."""
    config = {"zero_optimization": {"stage": 3, "reduce_bucket_size": 5000}}
    job = job_of(SMALL, seq_len=128, world_size=2, dtype="bf16", ds_config=config)
    for row in compare(job, 2, None):
        if row.job.zero is None:  # FSDP2
            continue
        stage = row.job.zero.stage
        config = {"zero_optimization": {"stage": stage, "reduce_bucket_size": 5000}}
        same = job_of(SMALL, seq_len=128, world_size=2, dtype="bf16", ds_config=config)
        if row.job.zero.offload == "none" and not row.job.gradient_checkpointing:
            assert row.device_bytes == estimate(same, 2).device_bytes, stage


def test_the_table_and_the_json_agree(capsys, tmp_path):
    template = tmp_path / "ds.json"
    template.write_text('{"zero_optimization": {"stage": 2, "cpu_offload": false, "reduce_bucket_size": 1000000}}')
    flags = ["memory", "--preset", "7b_mamba", "--num_gpus", "4", "--gpu_memory", "80GB", "--deepspeed", str(template)]
    flags += ["--tokens_per_second", "20000", "--device", "NVIDIA H100 80GB HBM3"]
    assert main(flags) == 0
    text = capsys.readouterr().out
    assert main([*flags, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["parameters"] == 6_893_552_640
    assert document["recommendation"]["setting"] in text
    for row in document["rows"]:
        assert sum(row["device_bytes_by_component"].values()) == row["device_bytes"]
        assert row["fits"] == (row["device_bytes"] <= document["capacity_bytes"])
        assert f"{row['device_bytes'] / 1e9:.1f}" in text
    assert 0 < document["time"]["mfu"] < 1


def test_it_answers_without_torch():
    code = (
        "import sys; from hf_mamba.cli import main; main(['memory', '--preset', '7b_mamba', '--gpu_memory', '80GB']);"
        "assert not {'torch', 'transformers', 'deepspeed', 'matplotlib', 'numpy'} & set(sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("flags", "environ", "named"),
    [
        ({"optim": "adafactor"}, {}, "adafactor"),
        ({}, {"ACCELERATE_USE_FSDP": "true"}, "FSDP"),
        ({"deepspeed": GRADIENTS_IN_FP32}, {}, "data_types.grad_accum_dtype"),
        ({}, {}, None),
    ],
)
def test_what_no_formula_is_for_is_unknown(flags, environ, named):
    """Neither refused nor promised: the run does not fit by the formulas of DDP and AdamW."""
    from hf_mamba.preflight.resolve import resolve

    wanted = {"preset": "7b_mamba", "num_gpus": 4, "bf16": True, "gpu_memory": "24GB", "per_device_train_batch_size": 4}
    plan = resolve(wanted | flags, environ=environ, device="gpu")
    assert any("fit" in problem.why for problem in plan.problems) == (named is None)
    assert any(named in note and "unknown" in note for note in plan.notes) if named else not plan.notes, plan.notes


def test_the_verdict_counts_the_allowance_twice():
    job = job_of(SMALL, seq_len=128, world_size=1, dtype="bf16", device="cuda")
    needs = estimate(job, 2)
    assert needs.verdict == "unknown"
    twice = needs.device_bytes + needs.allowance
    for capacity, verdict in ((needs.device_bytes - 1, "does not fit"), (twice - 1, "tight"), (twice, "fits")):
        assert estimate(job, 2, capacity).verdict == verdict


@pytest.mark.parametrize(("columns", "whole"), [("40", False), ("80", False), ("100", False), ("200", True)])
def test_the_table_on_a_terminal(columns, whole, monkeypatch, capsys):
    """Nothing is cut: where the components have no room, they are left out, and it says where they are."""
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert main(["memory", "--preset", "7b_mamba", "--num_gpus", "4", "--gpu_memory", "80GB"]) == 0
    text = re.sub("\x1b\\[[0-9;]*m", "", capsys.readouterr().out)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= max(80, int(columns))
    titles = next(line for line in text.splitlines() if " setting" in line)
    assert ("activations" in titles) == whole
    assert ("--json" in text) == (not whole)


def test_a_card_that_nobody_names_is_assumed(capsys):
    for flags in ([], ["--preset", "7b_mamba", "--num_gpus", "4"]):
        texts = []
        for card in ([], ["--gpu_memory", "80GB"]):
            assert main(["memory", *flags, *card]) == 0
            texts.append(capsys.readouterr().out)
        assert "assumed" in texts[0]
        assert "assumed" not in texts[1]
        assert [line for line in texts[0].splitlines() if "assumed" not in line] == [
            line for line in texts[1].splitlines() if "fits: the first" not in line
        ]


def test_the_resolver_refuses_what_cannot_fit_and_plans_auto():
    from hf_mamba.preflight.resolve import resolve

    wanted = {"preset": "7b_mamba", "num_gpus": 4, "seq_len": 2048, "bf16": True, "gpu_memory": "80GB"}
    wanted["deepspeed"] = {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}, "bf16": {"enabled": "auto"}}
    planned = resolve(wanted | {"per_device_train_batch_size": "auto"}, environ={}, device="gpu")
    assert planned.provenance["micro_batch_size"] == "the memory planner"
    assert not any("fit" in problem.why for problem in planned.problems)
    refused = resolve(wanted | {"per_device_train_batch_size": 64}, environ={}, device="gpu")
    problem = next(problem for problem in refused.problems if "fit" in problem.why)
    assert f"--per_device_train_batch_size {planned.micro_batch_size}" in problem.fix
