"""Times of the operations at sizes of real models, beside the least that the card could take and beside their peers.

Batch times width of 12k and 41k channels fill a card and more than fill it; one sequence does not. The rules that stand
in place of autotuning (segments of a sequence, channels of a program, programs at once) are each timed against what
they did not choose. Contestants get inputs in their own layout: no transposition is timed, but in "as dispatched".
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_session.card import Work, instructions_per_update, least_ms
from benchmarks.gpu_session.numbers import OPERATIONS, arguments
from benchmarks.gpu_session.step import Context
from benchmarks.gpu_session.timing import Step, alternate, served
from benchmarks.measure import triton_segments
from hf_mamba import ops, sizes
from hf_mamba.ops import mamba_ssm

SHAPES = ((8, 2048, 1536), (8, 2048, 5120), (1, 2048, 1536), (1, 2048, 5120), (1, 32_768, 1536))  # (B, L, E)
SMALL = ((1, 12, 8),)
BYTES = 2  # of a number in bf16
RULES = (("hf_mamba.sizes", "TRITON_RESIDENT", (1, 2)),)  # of the scan, and values that it did not choose
Calls = dict[str, tuple[Callable[..., Any], dict[str, Any]]]
OURS, DISPATCHED = "triton", "mamba-ssm as dispatched"


class Contest(NamedTuple):
    """Contestants for one thing to do, ours first, and what none of them can do without."""

    setting: str
    steps: dict[str, Step]
    work: Work


def measure(context: Context, suite: str) -> None:
    """The times of each contestant; ours over each peer's, and over the best of the rules that it did not follow."""
    torch.manual_seed(0)
    for contest in SUITES[suite](context):
        found = alternate(contest.steps, context.pick(20, 1))
        least, units = least_ms(context, contest.work)
        for name, times in found.items():
            context.report(contest.setting, name, times.ms, "ms", least, f"{times}; least: {units}")
        ours, *others = found
        own = found[ours].ms
        rules = [name for name in others if name.startswith(f"{ours}, ")]
        for name in set(others) - set(rules):
            context.report(contest.setting, f"{ours} / {name}", own / found[name].ms, "x", note="of its time")
            if found[name].peak:
                share = found[ours].peak / found[name].peak
                context.report(contest.setting, f"{ours} / {name}, memory", share, "x", note="of its MB")
        if rules:
            best = min(rules, key=lambda name: found[name].ms)
            context.report(contest.setting, f"{ours} / best rule", own / found[best].ms, "x", note=best)
        del contest


def both(setting: str, calls: Calls, work: Sequence[Work], ruled: dict | None = None) -> Iterator[Contest]:
    """A forward that saves for the backward, and a backward whose graph is kept; `ruled`: ours under other rules."""
    forward: dict[str, Step] = {}
    backward: dict[str, Step] = {}
    for name, (call, given) in calls.items():
        floats = [key for key, t in given.items() if isinstance(t, Tensor) and t.is_floating_point()]
        leaves = {key: given[key].detach().requires_grad_() for key in floats}
        forward[name] = partial(call, **given | leaves)
        try:
            outputs = forward[name]()
        except Exception as error:  # such as what a peer refuses
            print(f"{setting}: {name}: {type(error).__name__}: {error}", flush=True)
            del forward[name]
            continue
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        weights = [torch.randn_like(output) for output in outputs]
        backward[name] = partial(torch.autograd.grad, outputs, list(leaves.values()), weights, retain_graph=True)
        if name == OURS:
            for rule, otherwise in (ruled or {}).items():
                forward[f"{OURS}, {rule}"] = partial(under, otherwise, forward[OURS])
                backward[f"{OURS}, {rule}"] = partial(under, otherwise, backward[OURS])
    yield Contest(f"{setting} forward", forward, work[0])
    yield Contest(f"{setting} backward", backward, work[1])


def under(otherwise: Callable[[], AbstractContextManager], step: Step) -> object:
    with otherwise():
        return step()


def peer(op: str) -> bool:
    """Whether mamba-ssm or causal-conv1d has the operation, and it works."""
    return mamba_ssm.unavailable() is None and mamba_ssm.fault_of(op) is None


def given_of(name: str, context: Context, *size: int) -> dict[str, Any]:
    return arguments(OPERATIONS[name], context.device, size, "bf16", packed=False, carried=False)


def scan(context: Context) -> Iterator[Contest]:
    for batch, length, width in context.pick(SHAPES, SMALL):
        states = context.pick(16, 4)
        given = given_of("selective_scan", context, batch, length, width, states)
        calls: Calls = {name: (partial(served, name, "selective_scan"), given) for name in (OURS, "torch")}
        if peer("selective_scan"):
            from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

            theirs = {
                key: t.transpose(1, 2).contiguous() if key in ("x", "dt", "z", "B", "C") else t.clone()
                for key, t in given.items()
            }
            theirs = {{"x": "u", "dt": "delta", "dt_bias": "delta_bias"}.get(key, key): t for key, t in theirs.items()}
            calls["mamba-ssm"] = partial(selective_scan_fn, delta_softplus=True), theirs
            calls[DISPATCHED] = partial(served, "mamba_ssm", "selective_scan"), given
        ruled: dict[str, Callable] = {f"{n} segments": partial(triton_segments, n) for n in (1, 2, 4, 8, 16)}
        for module, name, values in RULES:
            if hasattr(importlib.import_module(module), name):
                ruled |= {f"{name} {value}": partial(mock.patch, f"{module}.{name}", value) for value in values}
        channels = batch * length * width
        updates, shared, saved = channels * states, 2 * batch * length * states, 4 * channels * states // 64
        yield from both(
            f"B={batch} L={length} E={width} N={states}",
            calls,
            (
                Work(
                    BYTES * (4 * channels + shared) + saved,
                    updates + 3 * channels,
                    updates * instructions_per_update("scan_forward"),
                ),
                Work(
                    BYTES * 7 * channels + (BYTES + 4) * shared + saved,
                    updates + 3 * channels,
                    updates * instructions_per_update("scan_backward"),
                ),
            ),
            ruled,
        )


def ssd(context: Context) -> Iterator[Contest]:
    for batch, length, channels in context.pick(SHAPES, SMALL):
        width, states = context.pick((64, 128), (4, 3))
        heads = channels // width
        given = given_of("ssd", context, batch, length, heads, width, 1, states)
        calls: Calls = {name: (partial(served, name, "ssd"), given) for name in (OURS, "torch")}
        if peer("ssd"):
            rates = given | {"a": -torch.rand(heads, device=context.device) - 0.5, "w": given["w"].abs() * 0.1}
            calls[DISPATCHED] = partial(served, "mamba_ssm", "ssd"), rates
        moved, shared, steps = (batch * length * n for n in (channels, 2 * states, 2 * heads))
        saved = batch * sizes.ssd_saved_bytes(length, heads, width, states)
        flops = [batch * sizes.ssd_flops(length, heads, width, 1, states, backward) for backward in (False, True)]
        yield from both(
            f"B={batch} L={length} H={heads} P={width} N={states}",
            calls,
            (
                Work(BYTES * (2 * moved + shared) + 4 * steps + saved, flops=flops[0], products="tf32"),
                Work(BYTES * (3 * moved + 2 * shared) + 8 * steps + saved, flops=flops[1], products="tf32"),
            ),
        )


def pointwise(context: Context) -> Iterator[Contest]:
    """The convolution and the norms, bound by bytes: how often forward and backward move a tensor of x's size."""
    for batch, length, width in context.pick(SHAPES[:3], SMALL):
        rows = batch * length
        for name, size, passes in (
            ("causal_conv1d", (batch, length, width), (2, 3)),
            ("gated_rms_norm", (rows, width), (3, 5)),
            ("rms_norm", (rows, width // 2), (2, 3)),
            ("add_rms_norm", (rows, width // 2), (6, 6)),  # with a residual in fp32
        ):
            given = given_of(name, context, *size)
            calls: Calls = {backend: (partial(served, backend, name), given) for backend in (OURS, "torch")}
            if name == "causal_conv1d" and peer(name):
                from causal_conv1d import causal_conv1d_fn

                theirs = given | {"x": given["x"].transpose(1, 2)}  # channels last
                calls["causal-conv1d"] = partial(causal_conv1d_fn, activation="silu"), theirs
            moved = BYTES * given["hidden" if name == "add_rms_norm" else "x"].numel()
            yield from both(f"{name} {size}", calls, [Work(n * moved) for n in passes])


def head(context: Context) -> Iterator[Contest]:
    for width in context.pick((768, 2560), (8,)):
        rows, vocabulary = context.pick((16_384, 50_280), (7, 97))
        given = given_of("linear_cross_entropy", context, rows, width, vocabulary)
        hidden, weight = (given[name].requires_grad_() for name in ("hidden", "weight"))

        def chunked(hidden=hidden, weight=weight, labels=given["labels"]) -> None:
            torch.autograd.grad(ops.linear_cross_entropy(hidden, weight, labels), (hidden, weight))

        def plain(hidden=hidden, weight=weight, labels=given["labels"]) -> None:
            loss = F.cross_entropy(F.linear(hidden, weight).float(), labels)
            torch.autograd.grad(loss, (hidden, weight))

        work = Work(BYTES * 2 * (rows + vocabulary) * width, flops=6 * rows * width * vocabulary)
        yield Contest(f"M={rows} V={vocabulary} d={width}", {"hf_mamba": chunked, "all logits": plain}, work)


def mixer(context: Context) -> Iterator[Contest]:
    """A mixer, forward and backward, in bf16; beside transformers' own, compiled, at one length."""
    from benchmarks import mamba2, peers

    def first() -> tuple[Any, Any]:
        model = peers.our_model(layers=1, vocab=16)
        weights = {name: t.clone() for name, t in model.state_dict().items()}
        return model, peers.stock_mixer(weights, use_associative_scan=True)

    def second() -> tuple[Any, Any]:
        ours, stock = mamba2.models(context.pick(mamba2.Sizes(), mamba2.SMALL), 1)
        return ours, stock.backbone.layers[0].mixer

    for family, make in context.pick({"mamba2": second, "mamba": first}, {"mamba2": second}).items():
        model, theirs = (module.to(context.device, torch.bfloat16) for module in make())
        mine, theirs = peers.OurMixer(model, context.pick(OURS, "cpu")), torch.compile(theirs)
        width = model.config.hidden_size
        for number, length in enumerate(context.pick((2048, 16_384, 131_072), (16, 32))):
            x = torch.randn(1, length, width, device=context.device, dtype=torch.bfloat16, requires_grad=True)

            def run(module, x=x) -> None:
                y = module(x)
                torch.autograd.grad(y, [x, *module.parameters()], torch.ones_like(y))

            steps: dict[str, Step] = {"hf_mamba": partial(run, mine)}
            if not number:
                steps["transformers compiled"] = partial(run, theirs)
            flops = 6 * length * sum(p.numel() for p in mine.parameters() if p.dim() == 2)
            yield Contest(f"{family} B=1 L={length} d={width}", steps, Work(flops=flops))


SUITES = {"scan": scan, "ssd": ssd, "pointwise": pointwise, "head": head, "mixer": mixer}
