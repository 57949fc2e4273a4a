"""The operations as PyTorch operators: differentiable, and opaque to torch.compile. One mechanism for every backend.

A differentiable operation is one `Operation`. A backend serves it by two plain functions in its module (dispatch.py):

    <stem>_forward(operands, save)                 the results and, last, what is saved beside the operands
    <stem>_backward(operands, saved, *gradients)   a gradient for each differentiable operand

A gradient of a result may be None. Operators may not return None, so the gradient of an operand that is absent is an
empty tensor. A result is dense and shares no memory with another.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

import torch
from torch import Tensor

from hf_mamba.ops import dispatch, reference
from hf_mamba.ops.operands import Conv, ConvStep, GatedNorm, Norm, Scan, Ssd, Step
from hf_mamba.ops.reference import compute_dtype
from hf_mamba.sizes import SCAN_CHUNK, SSD_CHUNK, ceil_div

Optional = Tensor | None
SCHEMA = {Tensor: "Tensor", Optional: "Tensor?", bool: "bool", float: "float", int: "int"}


def _keep_operands(s: Any, results: tuple[Tensor, ...]) -> Any:
    return s


def _like_operands(operation: "Operation", s: Any) -> tuple[Tensor, ...]:
    return tuple(s[0].new_empty(0) if t is None else t.new_empty(t.shape) for t in s[: operation.differentiable])


@dataclass(frozen=True)
class Operation:
    """What registers a differentiable operation.

    Attributes:
        name: of its operator; the backward's ends in "_backward". Inductor's caches know it by this name alone: where
            the shape of a result changes, it gets another.
        stem: of the functions that compute it.
        operands: a NamedTuple of ops/operands.py.
        differentiable: how many of its first operands are.
        results: how many tensors the forward returns, the saved one included.
        empty_results: (operands, save, backend) -> tensors shaped as the forward's.
        kept: (operands, results) -> the operands that the backward is given.
        empty_gradients: (this, kept operands) -> tensors shaped as the backward's.
        again: (kept operands, gradients of the results) -> gradients of the operands, to be differentiated again.
        state: operands -> the shape of one of the states that are saved, (B, chunks, *state), where they are. The
            operator hands them on as (B, all): a length that is one chunk or several is one graph.
    """

    name: str
    stem: str
    operands: type
    differentiable: int
    results: int
    empty_results: Callable[[Any, bool, str], tuple[Tensor, ...]]
    kept: Callable[[Any, tuple[Tensor, ...]], Any] = _keep_operands
    empty_gradients: Callable[["Operation", Any], tuple[Tensor, ...]] = _like_operands
    again: Callable[[Any, tuple[Optional, ...]], Sequence[Optional]] | None = None
    state: Callable[[Any], tuple[int, ...]] | None = None


def _schema(operands: type) -> str:
    return ", ".join(f"{SCHEMA[kind]} {name}" for name, kind in get_type_hints(operands).items())


def _register(operation: Operation) -> Callable[..., Any]:
    """Registers forward and backward; returns (operands, backend) -> the results without what is saved."""
    kinds = list(get_type_hints(operation.operands).values())
    tensors = sum(kind in (Tensor, Optional) for kind in kinds)
    outputs, flat = operation.results - 1, _schema(operation.operands)
    gradients = "".join(f"Tensor? grad_{i}, " for i in range(outputs))

    @torch.library.custom_op(
        f"hf_mamba::{operation.name}",
        mutates_args=(),
        schema=f"({flat}, bool save, str backend) -> ({', '.join(['Tensor'] * operation.results)})",
    )
    def forward(*arguments):
        *operands, save, backend = arguments
        compute = getattr(dispatch.module(backend), f"{operation.stem}_forward")
        *found, saved = compute(operation.operands(*operands), save)
        return *found, saved if operation.state is None else saved.flatten(1)

    @forward.register_fake
    def _(*arguments):
        *operands, save, backend = arguments
        return operation.empty_results(operation.operands(*operands), save, backend)

    @torch.library.custom_op(
        f"hf_mamba::{operation.name}_backward",
        mutates_args=(),
        schema=f"({gradients}{flat}, Tensor saved, str backend) -> "
        f"({', '.join(['Tensor'] * operation.differentiable)})",
    )
    def backward(*arguments):
        *operands, saved, backend = arguments[outputs:]
        compute = getattr(dispatch.module(backend), f"{operation.stem}_backward")
        s = operation.operands(*operands)
        if operation.state is not None:
            saved = saved.unflatten(1, (-1, *operation.state(s)))
        return compute(s, saved, *arguments[:outputs])

    @backward.register_fake
    def _(*arguments):
        return operation.empty_gradients(operation, operation.operands(*arguments[outputs:-2]))

    def context(ctx: Any, inputs: tuple, output: tuple) -> None:
        kept = operation.kept(operation.operands(*inputs[:-2]), output)
        ctx.save_for_backward(*kept[:tensors], output[-1])
        ctx.plain, ctx.backend = kept[tensors:], inputs[-1]
        ctx.set_materialize_grads(False)

    def gradient(ctx: Any, *grads: Optional) -> tuple:
        *kept, saved = ctx.saved_tensors
        nothing = (None,) * (len(kinds) + 2)
        if all(grad is None for grad in grads[:-1]):
            return nothing
        operands = operation.operands(*kept, *ctx.plain)
        if torch.is_grad_enabled() and operation.again is not None:  # create_graph=True
            found = operation.again(operands, grads[:-1])[: operation.differentiable]
            return *found, *nothing[operation.differentiable :]
        found = backward(*grads[:-1], *operands, saved, ctx.backend)
        given = (None if t is None else grad for t, grad in zip(kept, found, strict=False))
        return *given, *nothing[operation.differentiable :]

    forward.register_autograd(gradient, setup_context=context)

    def apply(s: Any, backend: str) -> Any:
        wanted = any(t is not None and t.requires_grad for t in s[: operation.differentiable])
        results = forward(*s, torch.is_grad_enabled() and wanted, backend)
        return results[0] if outputs == 1 else results[:outputs]

    return apply


def _register_update(name: str, stem: str, operands: type) -> Callable[..., Any]:
    """Registers a decoding step, which changes its first operand, `state`; returns (operands, backend) -> y."""

    @torch.library.custom_op(
        f"hf_mamba::{name}",
        mutates_args=("state",),
        schema=f"({_schema(operands).replace('Tensor', 'Tensor(a!)', 1)}, str backend) -> Tensor",
    )
    def update(*arguments):
        *values, backend = arguments
        return getattr(dispatch.module(backend), stem)(operands(*values))

    @update.register_fake
    def _(*arguments):
        return arguments[1].new_empty(arguments[1].shape)

    def apply(s: Any, backend: str) -> Tensor:
        return update(*s, backend)

    return apply


def _scan_results(s: Scan, save: bool, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, L, E), the final state (B, E, N), and one state per chunk (B, chunks N E)."""
    batch, length, width = s.x.shape
    states, dtype = s.A.shape[1], compute_dtype(s.x.dtype)
    chunks = ceil_div(length, SCAN_CHUNK[backend]) if save else 0
    return (
        s.x.new_empty(batch, length, width),
        s.x.new_empty(batch, width, states, dtype=dtype),
        s.x.new_empty(batch, chunks * states * width, dtype=dtype),
    )


def _ssd_results(s: Ssd, save: bool, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, L, H, P), the final state (B, H, P, N), and one state per chunk (B, chunks H P N)."""
    batch, length, heads, width = s.x.shape
    states, dtype = s.B.shape[3], compute_dtype(s.x.dtype)
    chunks = ceil_div(length, SSD_CHUNK) if save else 0
    return (
        s.x.new_empty(batch, length, heads, width),
        s.x.new_empty(batch, heads, width, states, dtype=dtype),
        s.x.new_empty(batch, chunks * heads * width * states, dtype=dtype),
    )


def _scan_state(s: Scan) -> tuple[int, ...]:
    return s.A.shape[1], s.x.shape[2]


def _ssd_state(s: Ssd) -> tuple[int, ...]:
    return s.x.shape[2], s.x.shape[3] * s.B.shape[3]


def _conv_results(s: Conv, save: bool, backend: str) -> tuple[Tensor, Tensor]:
    """y (B, L, E); nothing is saved beside the operands."""
    return s.x.new_empty(s.x.shape), s.x.new_empty(0)


def _norm_results(s: Norm, save: bool, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """y in the weight's dtype, the sum in fp32 (empty without a residual), and 1/rms of each row."""
    total = s.x.new_empty(0 if s.residual is None else s.x.shape, dtype=torch.float32)
    return s.x.new_empty(s.x.shape, dtype=s.weight.dtype), total, total.new_empty(math.prod(s.x.shape[:-1]))


def _norm_kept(s: Norm, results: tuple[Tensor, ...]) -> Norm:
    """The sum stands for both of its terms; the first one's dtype is all that is left of it."""
    return s if s.residual is None else s._replace(x=s.x.new_empty(0), residual=results[1])


def _norm_gradients(operation: Operation, s: Norm) -> tuple[Tensor, ...]:
    normed = s.x if s.residual is None else s.residual
    exact = normed.new_empty(0 if s.residual is None else normed.shape, dtype=torch.float32)
    return normed.new_empty(normed.shape, dtype=s.x.dtype), exact, s.weight.new_empty(s.weight.shape)


def _gated_norm_results(s: GatedNorm, save: bool, backend: str) -> tuple[Tensor, Tensor]:
    """y (..., E), and 1/rms of each part of each row (rows, groups)."""
    return s.x.new_empty(s.x.shape), s.x.new_empty(math.prod(s.x.shape[:-1]), s.groups, dtype=torch.float32)


def _by(definition: Callable[..., Any], operands: type) -> Callable[..., list[Optional]]:
    """The gradients of a definition in ops/reference.py, which is called with the operands."""
    return lambda s, grads: reference.gradients(lambda *values: definition(operands(*values)), s, grads)


def _norm_again(s: Norm, grads: tuple[Optional, ...]) -> list[Optional]:
    """The sum, which is all that is kept of two terms, has the gradient of both."""
    total = s.x if s.residual is None else s.residual

    def definition(total: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return reference.rms_norm(total, weight, s.eps), total

    of_total, of_weight = reference.gradients(definition, (total, s.weight), grads)
    of_x = None if of_total is None else of_total.to(s.x.dtype)
    return [of_x, None if s.residual is None else of_total, of_weight]


selective_scan = _register(
    Operation(
        *("chunked_scan", "scan", Scan, 9, 3, _scan_results),
        again=_by(reference.selective_scan, Scan),
        state=_scan_state,
    )
)
causal_conv1d = _register(
    Operation("causal_conv1d", "conv", Conv, 4, 2, _conv_results, again=_by(reference.causal_conv1d, Conv))
)
ssd = _register(
    Operation("chunked_ssd", "ssd", Ssd, 7, 3, _ssd_results, again=_by(reference.ssd, Ssd), state=_ssd_state)
)
norm = _register(Operation("norm", "norm", Norm, 3, 3, _norm_results, _norm_kept, _norm_gradients, _norm_again))
gated_norm = _register(
    Operation(
        *("gated_norm", "gated_norm", GatedNorm, 3, 2, _gated_norm_results),
        again=_by(lambda s: reference.gated_rms_norm(*s), GatedNorm),
    )
)
selective_state_update = _register_update("selective_state_update", "scan_step", Step)
causal_conv1d_update = _register_update("causal_conv1d_update", "conv_step", ConvStep)
