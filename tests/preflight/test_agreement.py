"""The resolver against the installed DeepSpeed, transformers and accelerate, over generated configurations.

Configurations, arguments and worlds, many of them broken in the ways that users break them:
- what the resolver passes, the stack accepts, with the same numbers;
- what the stack refuses, the resolver has named, or repaired and said so;
- what the stack accepts but takes for something else than was written, the resolver has named, repaired or noted.
HF_MAMBA_CASES sets how many are tried. `python -m benchmarks.run fuzz` tries thousands of another kind.
"""

import json
import os
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from benchmarks.stack_oracle import Refused, numbers, run_stack
from hf_mamba.dotted import get, put
from hf_mamba.preflight import Plan, resolve
from hf_mamba.preflight.deepspeed.keys import KINDS
from hf_mamba.preflight.deepspeed.migrations import MIGRATIONS, REFUSED
from hf_mamba.preflight.kinds import Kind

CASES = int(os.environ.get("HF_MAMBA_CASES", "300"))
BROKEN = [1.5, True, "4", 0, -1, None, "auto", [], {}, "x", float("nan"), float("inf"), 8.0]

GOOD = {bool: [True, False], int: [1, 2, 3, 64], float: [0.5, 1.0, 1], list: [[]], str: ["x", "/tmp"], object: [1]}


def good_values(kind: Kind) -> list[Any]:
    """Values of a kind."""
    base = get_args(kind)[0] if get_origin(kind) is Annotated else get_origin(kind) or kind
    return list(get_args(kind)) if base is Literal else GOOD.get(base, GOOD[object])


# use_gds asserts a GPU in this machine, which the generated runs may not have
LEAVES = sorted(key for key, kind in KINDS.items() if kind is not dict and "batch_size" not in key and "gds" not in key)
LEGACY = sorted({row.old for row in MIGRATIONS} | set(REFUSED))


@st.composite
def pairs(draw: st.DrawFn, broken: bool) -> tuple[str, Any]:
    """A (dotted key, value): one that DeepSpeed knows, or knew, or a misspelt one."""
    sort = draw(st.integers(0, 9))
    if sort < 6:
        key = draw(st.sampled_from(LEAVES))
        return key, draw(st.sampled_from(BROKEN if broken and sort == 0 else good_values(KINDS[key])))
    if sort < 9:
        return draw(st.sampled_from(LEGACY)), draw(st.sampled_from([True, False, None, {"enabled": False}]))
    key = draw(st.sampled_from(LEAVES))
    at = draw(st.integers(1, len(key) - 1))
    return (key[:at] + key[at - 1] + key[at:] if broken else key), draw(st.booleans())


@st.composite
def runs(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any], int]:
    """(ds_config, arguments, world size): a run that works, with some of its numbers left out, moved or broken."""
    broken = draw(st.booleans())

    def number(right: int) -> Any:
        return draw(st.sampled_from([right, right, right, "auto", *(BROKEN if broken else [right])]))

    def some(chance: int) -> bool:
        return draw(st.integers(0, chance)) == 0

    world, micro, steps = draw(st.integers(1, 6)), draw(st.integers(1, 5)), draw(st.integers(1, 5))
    total = micro * steps * world if not broken else draw(st.integers(1, 64))
    config: dict[str, Any] = {}
    arguments: dict[str, Any] = {"preset": "tiny_mamba", "max_steps": 10, "resume": "never"}
    for key, argument, right in (
        ("train_batch_size", "global_batch_size", total),
        ("train_micro_batch_size_per_gpu", "per_device_train_batch_size", micro),
        ("gradient_accumulation_steps", "gradient_accumulation_steps", steps),
    ):
        if some(1):
            config[key] = number(right)
        if some(2):
            arguments[argument] = number(right) if broken else right
    if not broken or not some(9):
        stages = [0, 1, 2, 3, "auto", *(["3", 4, 2.0, True, None] if broken else [])]
        stage = draw(st.sampled_from(stages))
        config["zero_optimization"] = {} if stage is None else {"stage": stage}
    dtype = draw(st.sampled_from(["bf16", "fp16", "fp32", "fp32"]))
    for name in ("bf16", "fp16"):
        if some(2):
            config[name] = {
                "enabled": draw(st.sampled_from([dtype == name, "auto", *([True, False] if broken else [])]))
            }
        if some(1):
            arguments[name] = dtype == name if not broken else draw(st.booleans())
    clip = draw(st.sampled_from([0, 1.0, 5.0, 0.5]))
    if some(1):
        config["gradient_clipping"] = draw(st.sampled_from([clip, "auto", *(["1.0", 3] if broken else [])]))
    if some(1):
        arguments["max_grad_norm"] = clip if not broken else draw(st.sampled_from([clip, -1, 2.0]))
    if some(3):
        arguments["optim"] = draw(st.sampled_from(["adamw_torch", "adafactor"]))
    if some(3):
        arguments["warmup_steps"] = draw(st.sampled_from([0, 0.1, 5, *([-3, 11] if broken else [])]))
    if broken and some(3):
        name = draw(st.sampled_from(["seq_len", "global_batch_tokens", "max_steps", "max_tokens", "num_gpus"]))
        arguments[name] = draw(st.sampled_from([*BROKEN, 256, 4097, 8192]))
    if some(2):
        device = draw(st.sampled_from(["cpu", "none", "auto", "nvme"]))
        put(config, f"zero_optimization.offload_{draw(st.sampled_from(['optimizer', 'param']))}.device", device)
    for key, value in draw(st.lists(pairs(broken), max_size=3)):
        put(config, key, value)
    return config, arguments, world


def written(value: Any) -> Any:
    """A value that was really written: a number, not "auto" and not nothing."""
    return None if value in ("auto", None) or isinstance(value, bool | str | list | dict) else value


def has_auto(block: Any) -> bool:
    if isinstance(block, dict):
        return any(has_auto(value) for key, value in block.items() if key != "keep_in_fp32_modules")
    return block == "auto"


def said(plan: Plan, word: str) -> bool:
    """Whether the report mentions it."""
    texts = [*plan.notes, *(str(p) for p in plan.problems), *(f"{m.old} {m.new}" for m in plan.migrations)]
    return any(word in text for text in texts)


def check_passed(plan: Plan, arguments: dict[str, Any], config: dict[str, Any], world: int) -> None:
    """A plan without problems: the stack accepts it, and does exactly what it says."""
    assert plan.ds_config is not None
    assert not has_auto(plan.ds_config)
    assert "train_batch_size" not in plan.ds_config
    got = numbers(run_stack(plan.ds_config, plan.training_arguments, world, 192, plan.total_steps or 1))
    assert got == {
        "micro_batch_size": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "global_batch_size": plan.global_batch_size,
        "stage": plan.ds_config["zero_optimization"]["stage"],
        "gradient_clipping": plan.training_arguments["max_grad_norm"],
        "bf16": plan.dtype == "bf16",
        "fp16": plan.dtype == "fp16",
        "offload_optimizer": get(plan.ds_config, "zero_optimization.offload_optimizer.device", "none"),
        "offload_param": get(plan.ds_config, "zero_optimization.offload_param.device", "none"),
    }
    for value in (plan.micro_batch_size, plan.gradient_accumulation_steps, plan.global_batch_size):
        assert type(value) is int
        assert value > 0
    # what was written is what is done
    for name, number in (
        ("per_device_train_batch_size", plan.micro_batch_size),
        ("gradient_accumulation_steps", plan.gradient_accumulation_steps),
        ("global_batch_size", plan.global_batch_size),
        ("max_grad_norm", plan.training_arguments["max_grad_norm"]),
    ):
        assert written(arguments.get(name)) in (None, number)
    for key, number in (
        ("train_batch_size", plan.global_batch_size),
        ("train_micro_batch_size_per_gpu", plan.micro_batch_size),
        ("gradient_accumulation_steps", plan.gradient_accumulation_steps),
        ("gradient_clipping", plan.training_arguments["max_grad_norm"]),
    ):
        assert written(config.get(key)) in (None, number)
    for name in ("micro_batch_size", "gradient_accumulation_steps", "global_batch_size", "total_steps", "dtype"):
        assert plan.provenance[name]


def check_explained(plan: Plan, arguments: dict[str, Any], config: dict[str, Any], world: int) -> None:
    """What the stack does with the raw file, where the plan goes on: refused files were repaired, and it is said."""
    try:
        raw = numbers(run_stack(config, arguments, world, 192, plan.total_steps or 1))
    except Refused:
        event("refused by the stack, repaired")
        return
    event("accepted by both")
    assert plan.ds_config is not None
    zero = plan.ds_config["zero_optimization"]
    planned = {
        "train_micro_batch_size_per_gpu": (raw["micro_batch_size"], plan.micro_batch_size),
        "gradient_accumulation_steps": (raw["gradient_accumulation_steps"], plan.gradient_accumulation_steps),
        "gradient_clipping": (raw["gradient_clipping"], plan.training_arguments["max_grad_norm"]),
        "zero_optimization": (raw["stage"], zero["stage"]),
        "offload_optimizer": (raw["offload_optimizer"], get(zero, "offload_optimizer.device", "none")),
        "offload_param": (raw["offload_param"], get(zero, "offload_param.device", "none")),
    }
    for key, (meant, done) in planned.items():
        if "global_batch_size" in arguments and ("micro" in key or "accumulation" in key):
            continue  # the stack does not know this argument of ours, so it had other orders
        # done differently from what the stack would have done: the report says so
        assert meant == done or said(plan, key), (key, meant, done)
    dtype = "bf16" if raw["bf16"] else "fp16" if raw["fp16"] else "fp32"
    assert plan.dtype == dtype or plan.provenance["dtype"]


@settings(max_examples=CASES, suppress_health_check=list(HealthCheck))
@given(runs(), st.sampled_from(["cpu", "gpu"]))
def test_resolver_and_stack_agree(run: tuple[dict[str, Any], dict[str, Any], int], device: str) -> None:
    config, arguments, world = run
    plan = resolve({**arguments, "deepspeed": config}, world_size=world, environ={}, device=device)
    json.dumps(plan.to_dict(), allow_nan=False)
    if plan.ok:
        check_passed(plan, arguments, config, world)
        check_explained(plan, arguments, config, world)
    else:
        event("named by the resolver")
        assert all(problem.key and problem.found and problem.why and problem.fix for problem in plan.problems)


TRIAD = [None, "auto", 1, 2, 3, 4, 8, 12]


@pytest.mark.parametrize("world", [2, 3])
def test_every_batch_triad(world: int) -> None:
    """All 512 triads in a file, beside flags: the resolver passes exactly those that DeepSpeed can mean."""
    for total in TRIAD:
        for micro in TRIAD:
            for accumulation in TRIAD:
                triad = {
                    "train_batch_size": total,
                    "train_micro_batch_size_per_gpu": micro,
                    "gradient_accumulation_steps": accumulation,
                }
                config = {**triad, "zero_optimization": {"stage": 1}, "gradient_clipping": "auto"}
                plan = resolve({"deepspeed": config}, world_size=world, environ={}, device="cpu")
                tb, mb, gas = (written(value) for value in triad.values())
                unit = (mb or 1) * (gas or 1) * world
                possible = tb is None or (tb % unit == 0 and (mb is None or gas is None or tb == unit))
                assert plan.ok == possible, (triad, world)
                if possible:
                    check_passed(plan, {}, config, world)
