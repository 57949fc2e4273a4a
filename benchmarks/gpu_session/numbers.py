"""Do the kernels run: every operation against float64 at sizes of real models, repeated, and under a race checker."""

import itertools
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_session.step import Context
from benchmarks.gpu_session.timing import served
from hf_mamba import ops

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCES = {"fp32": 1e-5, "bf16": 2**-6, "fp16": 2**-9}  # of a tensor's largest value: two roundings of 16 bits
Draw = Callable[..., Tensor]


@dataclass(frozen=True)
class Operation:
    """An operation with inputs like a trained model's.

    Attributes:
        inputs: (draw, *size) -> its arguments by name, in fp32.
        stored: those that have the dtype of the activations.
        sizes: of real models; the first one for every dtype, packed and carried, the others as training has them.
        exact: the backend of the float64 reference. The definition's loop over tokens takes minutes for the longest;
            tests/ops hold torch's chunks to it in float64.
        state: the argument that a step replaces in place.
        packs, carries: it takes seq_idx, or an initial_state; `last`: it returns the last state, too.
    """

    inputs: Callable[..., dict[str, Tensor]]
    stored: tuple[str, ...]
    sizes: tuple[tuple[int, ...], ...]
    small: tuple[int, ...]
    exact: str = "reference"
    state: str = ""
    packs: bool = False
    carries: bool = False
    last: bool = False


def scan(draw: Draw, batch: int, length: int, width: int, states: int) -> dict[str, Tensor]:
    """Δ is mostly 1e-3 to 1e-1, and A is S4D-real's."""
    inputs = {name: draw(batch, length, width) for name in ("x", "dt", "z")}
    inputs |= {name: draw(batch, length, states) for name in ("B", "C")}
    A = -torch.arange(1.0, states + 1, device=inputs["x"].device).repeat(width, 1)
    return inputs | {"A": A, "D": draw(width), "dt_bias": draw(width) - 4, "initial_state": draw(batch, width, states)}


def scan_step(draw: Draw, batch: int, width: int, states: int) -> dict[str, Tensor]:
    inputs = scan(draw, batch, 1, width, states)
    inputs["state"] = inputs.pop("initial_state")
    return {name: value[:, 0] if name in ("x", "dt", "z", "B", "C") else value for name, value in inputs.items()}


def dual(draw: Draw, batch: int, length: int, heads: int, width: int, groups: int, states: int) -> dict[str, Tensor]:
    inputs = {name: draw(batch, length, groups, states) for name in ("B", "C")}
    inputs |= {"x": draw(batch, length, heads, width), "D": draw(heads)}
    inputs |= {"a": -0.3 * draw(batch, length, heads).abs(), "w": draw(batch, length, heads)}
    return inputs | {"initial_state": draw(batch, heads, width, states)}


def dual_step(draw: Draw, batch: int, heads: int, width: int, groups: int, states: int) -> dict[str, Tensor]:
    inputs = dual(draw, batch, 1, heads, width, groups, states)
    inputs["state"] = inputs.pop("initial_state")
    return {name: value if name in ("D", "state") else value[:, 0] for name, value in inputs.items()}


def convolution(draw: Draw, batch: int, length: int, width: int) -> dict[str, Tensor]:
    rest = {"weight": draw(width, 4), "bias": draw(width), "initial_state": draw(batch, width, 3)}
    return {"x": draw(batch, length, width)} | rest


def convolution_step(draw: Draw, batch: int, width: int) -> dict[str, Tensor]:
    rest = {"weight": draw(width, 4), "bias": draw(width), "conv_state": draw(batch, width, 4)}
    return {"x": draw(batch, width)} | rest


def norm(names: tuple[str, ...], draw: Draw, rows: int, width: int, groups: int = 0) -> dict[str, Any]:
    more = {"groups": groups} if groups else {}
    return {name: draw(rows, width) for name in names} | {"weight": draw(width), "eps": 1e-5} | more


def head(draw: Draw, rows: int, width: int, vocabulary: int) -> dict[str, Tensor]:
    weight = draw(vocabulary, width) * 0.02
    return {"hidden": draw(rows, width), "weight": weight, "labels": torch.arange(rows, device=weight.device) % 97}


OPERATIONS = {
    "selective_scan": Operation(
        scan,
        ("x", "dt", "z", "B", "C"),
        ((2, 2048, 1536, 16), (8, 2048, 5120, 16), (1, 8192, 1536, 16), (1, 1000, 200, 128)),
        (1, 70, 5, 4),
        exact="torch",
        packs=True,
        carries=True,
        last=True,
    ),
    "selective_state_update": Operation(
        scan_step, ("x", "dt", "z", "B", "C"), ((64, 1536, 16),), (2, 35, 4), state="state"
    ),
    "ssd": Operation(
        dual,
        ("x", "B", "C"),
        ((2, 2048, 24, 64, 1, 128), (8, 2048, 80, 64, 1, 128), (1, 2000, 16, 128, 8, 256)),
        (1, 130, 2, 5, 1, 3),
        exact="torch",
        packs=True,
        carries=True,
        last=True,
    ),
    "ssd_update": Operation(dual_step, ("x", "B", "C"), ((64, 24, 64, 1, 128),), (2, 4, 3, 2, 4), state="state"),
    "causal_conv1d": Operation(
        convolution, ("x",), ((2, 2048, 1536), (8, 2048, 10_496)), (1, 33, 5), packs=True, carries=True
    ),
    "causal_conv1d_update": Operation(convolution_step, ("x",), ((64, 1536),), (2, 5), state="conv_state"),
    "rms_norm": Operation(partial(norm, ("x",)), ("weight",), ((16_384, 768), (4096, 2560)), (5, 33)),
    "add_rms_norm": Operation(
        partial(norm, ("hidden", "residual")), ("hidden",), ((16_384, 768), (4096, 2560)), (5, 33)
    ),
    "gated_rms_norm": Operation(
        partial(norm, ("x", "z")), ("x", "z"), ((16_384, 1536, 1), (4096, 5120, 8)), (5, 12, 3)
    ),
    "linear_cross_entropy": Operation(head, ("hidden", "weight"), ((4096, 768, 50_280),), (7, 8, 97)),
}


def variants(operation: Operation, small: bool) -> Iterator[tuple[tuple[int, ...], str, bool, bool]]:
    """(size, dtype, packed, carried)"""
    first, *others = (operation.small,) if small else operation.sizes
    kinds = itertools.product((False, True)[: 1 + operation.packs], (False, True)[: 1 + operation.carries])
    yield from ((first, dtype, *kind) for dtype, kind in itertools.product(DTYPES, list(kinds)))
    yield from ((size, "bf16", operation.packs, operation.carries) for size in others)


def arguments(
    operation: Operation, device: str, size: tuple[int, ...], dtype: str, packed: bool, carried: bool, seed: int = 0
) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    inputs: dict[str, Any] = operation.inputs(draw, *size)
    for name in operation.stored:
        inputs[name] = inputs[name].to(DTYPES[dtype])
    if not carried:
        inputs.pop("initial_state", None)
    if packed:
        starts = torch.rand(size[:2], generator=generator, device=device) < 5 / size[1]
        inputs["seq_idx"] = starts.cumsum(1).int()
    return inputs | ({"return_final_state": True} if operation.last and carried else {})


def results(call: Callable, operation: Operation, given: dict[str, Any], weights: list[Tensor]) -> dict[str, Tensor]:
    """The outputs, the state after a step, and the gradients under these weights; an empty list is filled."""
    given = {name: t.clone() if name == operation.state else t for name, t in given.items()}
    floats = [name for name, t in given.items() if isinstance(t, Tensor) and t.is_floating_point()]
    wanted = {} if operation.state else {name: given[name].detach().requires_grad_() for name in floats}
    outputs = call(**given | wanted)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    found = {f"output {number}": output.detach() for number, output in enumerate(outputs)}
    if operation.state:
        return found | {"state": given[operation.state]}
    if not weights:
        generator = torch.Generator(outputs[0].device).manual_seed(1)
        weights += [torch.randn(t.shape, generator=generator, device=t.device).to(t.dtype) for t in outputs]
    gradients = torch.autograd.grad(
        outputs, list(wanted.values()), [w.to(t.dtype) for w, t in zip(weights, outputs, strict=True)]
    )
    return found | {f"gradient of {name}": t for name, t in zip(wanted, gradients, strict=True)}


def ours(name: str) -> Callable:
    return partial(served, "triton", name)


def exact(name: str) -> Callable:
    """The function that is right, for float64."""
    undispatched = name == "linear_cross_entropy"
    return getattr(ops.reference, name) if undispatched else partial(served, OPERATIONS[name].exact, name)


def compare(context: Context, *names: str) -> None:
    """The worst tensor of every call, beside its tolerance."""
    for name in names:
        for size, dtype, packed, carried in variants(OPERATIONS[name], context.rehearse):
            given = arguments(OPERATIONS[name], context.device, size, dtype, packed, carried)
            setting = f"{name} {size} {dtype}{', packed' * packed}{', carried' * carried}"
            try:
                worst, value = largest_error(name, given)
            except Exception as fault:  # of one call
                worst, value = said(fault), float("inf")
            context.report(setting, "error", value, "of the largest value", TOLERANCES[dtype], worst)


def largest_error(name: str, given: dict[str, Any]) -> tuple[str, float]:
    """(tensor, error) of the worst one."""
    weights: list[Tensor] = []
    found = results(ours(name), OPERATIONS[name], given, weights)
    double = {key: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for key, t in given.items()}
    expected = results(exact(name), OPERATIONS[name], double, weights)
    errors = {key: error(found[key], value) for key, value in expected.items()}
    return max(errors.items(), key=lambda item: item[1])


def said(fault: Exception) -> str:
    return f"{type(fault).__name__}: {fault}"[:200]


def error(found: Tensor, expected: Tensor) -> float:
    """The greatest, over the greatest value; infinite where one is not a number."""
    if not expected.numel():
        return 0
    value = ((found.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()
    return value if value == value else float("inf")


def repeat(context: Context) -> None:
    """How many tensors of 20 runs are not the same bits."""
    for deterministic, (name, operation) in itertools.product((False, True), OPERATIONS.items()):
        size = context.pick(operation.sizes[0], operation.small)
        given = arguments(operation, context.device, size, "bf16", operation.packs, operation.carries)
        torch.use_deterministic_algorithms(deterministic)
        try:
            differ = differing(name, given, context.pick(20, 2))
            broken, note = float(len(differ)), f"differ: {', '.join(sorted(differ)) or 'none'}"
        except Exception as fault:  # such as an operation of torch's that has no fixed order
            broken, note = float("inf"), said(fault)
        torch.use_deterministic_algorithms(False)
        setting = f"{name}, {'deterministic' if deterministic else 'as it is'}"
        context.report(setting, "broken promises", broken, "tensors", 0, note)


def differing(name: str, given: dict[str, Any], runs: int) -> set[str]:
    """The tensors that are not the same bits in each of the runs."""
    weights: list[Tensor] = []
    first = results(ours(name), OPERATIONS[name], given, weights)
    differ: set[str] = set()
    for _ in range(runs - 1):
        again = results(ours(name), OPERATIONS[name], given, weights)
        differ |= {key for key, value in first.items() if not torch.equal(value, again[key])}
    return differ


def tiny(context: Context) -> None:
    """Every kernel once, small, for a checker to watch; its inputs come from the host, whose kernels are none."""
    for name, operation in OPERATIONS.items():
        given = arguments(operation, "cpu", operation.small, "bf16", operation.packs, operation.carries)
        given = {key: t.to(context.device) if isinstance(t, Tensor) else t for key, t in given.items()}
        results(ours(name), operation, given, [])
        print(name, flush=True)


def races(context: Context) -> None:
    """What compute-sanitizer's racecheck finds in shared memory, where it is installed."""
    command = [sys.executable, "-m", "benchmarks.gpu_session.step", "tiny", ".numbers:tiny", str(context.folder)]
    checker = shutil.which("compute-sanitizer")
    if checker is None:
        command += ["--rehearse"] * context.rehearse
        print("compute-sanitizer is not installed: the kernels run without it", flush=True)
        subprocess.run(command, check=True)
        return
    done = subprocess.run([checker, "--tool", "racecheck", *command], capture_output=True, text=True, check=False)
    print(done.stdout[-6000:], done.stderr[-2000:], flush=True)
    found = re.search(r"RACECHECK SUMMARY: (\d+) hazard", done.stdout)
    if done.returncode or found is None:
        raise SystemExit(f"racecheck ended with {done.returncode}")
    context.report("every kernel, tiny", "races", int(found[1]), "hazards", 0)


def tests(context: Context) -> None:
    """The tests that need a GPU, in the room of the kernels, the models and the pre-flight."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    folders = context.pick(("tests/ops", "tests/model", "tests/preflight"), ("tests/ops/test_triton_gpu.py",))
    done = subprocess.run([*command, *folders], capture_output=True, text=True, check=False)
    print(done.stdout[-15_000:], done.stderr[-2000:], flush=True)
    last = done.stdout.splitlines()[-1]
    for name in ("passed", "failed", "error", "skipped"):
        found = re.search(rf"(\d+) {name}", last)
        context.report("pytest -m gpu", name, int(found[1]) if found else 0, "tests")
