"""What a problem or a note says: the kinds of messages that once misled, each with what it must name."""

from typing import Any

import pytest

from hf_mamba.preflight import Plan, resolve
from hf_mamba.preflight.command_line import read_arguments
from hf_mamba.preflight.deepspeed.config import suggest

TWO: dict[str, Any] = {"zero_optimization": {"stage": 2}}


def plan(config: Any, world: int = 4, **arguments: Any) -> Plan:
    values = {"resume": "never", "max_steps": 5, "deepspeed": config, **arguments}
    return resolve(values, world_size=world, environ={}, device="gpu")


def zero(stage: Any, **keys: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **keys}}


@pytest.mark.parametrize(
    ("config", "world", "key", "words"),
    [
        (zero(3, zero_hpz_partition_size=8), 12, "zero_optimization.zero_hpz_partition_size", "2, 3, 4, 6 and 12"),
        (zero(2, zero_hpz_partition_size=8), 16, "zero_optimization.zero_hpz_partition_size", "8 at stage 2"),
        ({**TWO, "prescale_gradients": True}, 4, "prescale_gradients", '"reduce_scatter": false'),
        (
            {**TWO, "data_types": {"param_dtype": "bf16"}, "bf16": {"enabled": False}},
            4,
            "data_types.param_dtype",
            "in a run in fp32",
        ),
        ({**TWO, "train_micro_batch_size_per_gpu": 0}, 4, "train_micro_batch_size_per_gpu", "It is too small."),
        ({**TWO, "train_micro_batch_size_per_gpu": 1e300}, 4, "train_micro_batch_size_per_gpu", "It is too large."),
        ({**TWO, "gradient_clipping": 10**400}, 4, "gradient_clipping", "about 400 digits. It is too large."),
        ({**TWO, "train_batch_size": 7}, 2, "train_batch_size", "Write 6 or 8."),
        ({**TWO, "steps ": 1}, 4, '"steps "', "ends in a blank. Remove it."),
        ({**TWO, "stage": 2}, 4, "stage", "Did you mean zero_optimization.stage?"),
        ({**TWO, "bf16": {"type": "AdamW"}}, 4, "bf16.type", "Remove it."),
        ({**TWO, "optimizer": {"type": "AdamW", "PARAMS": {}}}, 4, "optimizer.PARAMS", 'Did you mean "params"?'),
        ({**TWO, "scheduler": {"type": "WarmupLR", "params": 0}}, 4, "scheduler.params", "It is no block."),
        ('{"zero_optimization": {"stage": 2,\n"stage": 3}}', 4, "zero_optimization.stage", "lines 1, 2"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_problem_names_its_cause_and_what_to_write(config: Any, world: int, key: str, words: str) -> None:
    (problem,) = plan(config, world).problems
    assert problem.key == key
    assert words in str(problem)


@pytest.mark.parametrize(
    ("config", "arguments", "words"),
    [
        (TWO, {"warmup_steps": 2.5}, "warmup_steps of 2.5 is read as 2"),
        ({**TWO, "scheduler": {"type": "WarmupLR"}}, {"warmup_steps": 0}, "warmup_steps of 0 becomes 2"),
        (
            {**TWO, "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 0}}},
            {},
            "scheduler.params.warmup_num_steps of 0 becomes 2",
        ),
    ],
)
def test_a_number_that_is_kept_otherwise_is_said(config: Any, arguments: dict[str, Any], words: str) -> None:
    assert any(words in note for note in plan(config, **arguments).require().notes)


def test_a_schedule_counts_though_it_says_enabled_false() -> None:
    """DeepSpeed reads a scheduler's type and params, and nothing else."""
    config = {**TWO, "scheduler": {"type": "WarmupDecayLR", "enabled": False}}
    found = plan(config).require()
    assert found.rates is not None
    assert "left out of ds_config: scheduler.enabled" in found.provenance
    assert [problem.id for problem in plan({**TWO, "scheduler": {"type": []}}).problems] == ["unknown-scheduler"]


def test_a_token_is_not_shown() -> None:
    (problem,) = plan(TWO, hub_token="hf_secret", push_to_hub=True, hub_model_id="user/name").problems
    assert (problem.key, problem.found) == ("hub_token", "***")


@pytest.mark.parametrize("name", ["learning_rate", "per_device_train_batch_size", "num_train_epochs", "seq_len"])
def test_an_argument_of_the_run_in_a_deepspeed_file_is_named_as_one(name: str) -> None:
    """Nobody would read it: a problem, unless the run has that value or the file leaves it open."""
    (problem,) = plan({**TWO, name: 1}).problems
    assert (problem.key, problem.id) == (name, "run-argument-in-deepspeed-file")
    assert f"Write --{name} 1," in problem.fix
    assert plan({**TWO, name: "auto"}).ok
    assert plan({**TWO, "learning_rate": 1e-3}, learning_rate=1e-3).ok


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("ZERO_OPTIMIZATION", "zero_optimization"),
        ("Gradient_Clipping", "gradient_clipping"),
        ("mics_shard_size", ""),
        ("gather_fp16_weights", ""),
        ("stage3_gather_fp16_weights_on_model_save", "zero_optimization.stage3_gather_16bit_weights_on_model_save"),
        ("zero_optimization.Stage", "zero_optimization.stage"),
    ],
)
def test_a_suggestion_would_pass(written: str, meant: str) -> None:
    assert suggest(written) == meant


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"seq_len": 0}, "It is too small."),
        ({"warmup_ratio": 1.5}, "It is too large."),
        ({"learning_rate": float("nan")}, "It is not a finite number."),
        ({"seq_len": 0.5}, "It is not a whole number."),
        ({"bf16": "yes"}, "It is of the wrong kind."),
    ],
    ids=str,
)
def test_an_argument_says_what_is_wrong_with_it(arguments: dict[str, Any], why: str) -> None:
    (problem,) = plan(TWO, **arguments).problems
    assert (problem.key, problem.why) == (next(iter(arguments)), why)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("block_size", "seq_len"),
        ("train_file", "dataset"),
        ("validation_file", "eval_dataset"),
        ("lr", "learning_rate"),
    ],
)
def test_a_name_of_other_scripts_is_translated(written: str, meant: str) -> None:
    assert [p.fix for p in read_arguments([f"--{written}", "1"]).problems] == [f"Did you mean --{meant}?"]


def test_nothing_is_suggested_where_the_nearest_name_is_another_thing() -> None:
    (problem,) = read_arguments(["--overwrite_output_dir"]).problems
    assert problem.fix.startswith("A folder is never overwritten: write another --output_dir")
