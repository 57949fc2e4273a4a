"""The operations of a Mamba model: each picks a backend (dispatch.py) and has one meaning (reference.py).

Symbols: B batch, L length, E inner width, N state size, k convolution kernel, Δ (`dt`) the step. Layouts are the matrix
products' own: nothing is transposed on the way in or out, and inputs may be strided views.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_mamba.ops import dispatch
from hf_mamba.ops.operands import Conv, ConvStep, Scan, Ssd, Step
from hf_mamba.private.torch import is_transformed

Optional = Tensor | None
THIN = 8  # rows of a matrix product that is bound by reading the weights


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional = None,
    z: Optional = None,
    dt_bias: Optional = None,
    dt_softplus: bool = True,
    initial_state: Optional = None,
    seq_idx: Optional = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The selective state space (Mamba, Gu & Dao 2023, Algorithm 2), differentiable in every float argument.

        Δ_t = softplus(dt_t + dt_bias)
        h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t
        y_t = (C_t · h_t + D x_t) · silu(z_t)

    Args:
        x, dt, z: (B, L, E); z is the gate.
        A: (E, N), negative. B, C: (B, L, N). D, dt_bias: (E,).
        dt_softplus: apply softplus to dt + dt_bias.
        initial_state: (B, E, N), the state before the first token; zero when absent.
        seq_idx: (B, L) int32, document numbers; the state is zeroed where they change, never at the first token.
        return_final_state: also return the state after the last token; gradients flow from it.

    Returns:
        y (B, L, E) in x's dtype, and with `return_final_state` the state (B, E, N) in fp32. The arithmetic is fp32
        (fp64 for fp64 input).

    Raises:
        ValueError: shapes that do not agree, or a forced backend that cannot serve the call.
    """
    s = Scan(x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx, dt_softplus)
    _check_scan(s)
    carried = initial_state is not None or return_final_state
    y, state = _serve("selective_scan", x, seq_idx is not None, carried, A.shape[1])(s)
    return (y, state) if return_final_state else y


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Optional = None,
    activation: str | None = "silu",
    initial_state: Optional = None,
    seq_idx: Optional = None,
) -> Tensor:
    """Depthwise causal convolution, y_t = act(bias + Σ_j weight_j x_{t-k+1+j}), over one document at a time.

    Args:
        x: (B, L, E). weight: (E, k), the last tap on the current token. bias: (E,).
        activation: "silu" or None.
        initial_state: (B, E, k-1), the inputs before x, oldest first, of the first document; zeros when absent.
        seq_idx: (B, L) int32, document numbers; taps that reach into another document read zero.

    Returns:
        (B, L, E) in x's dtype, computed in fp32 (fp64 for fp64 input). Differentiable in every float argument.

    Raises:
        ValueError: shapes that do not agree, an unknown activation, or a forced backend that cannot serve the call.
    """
    batch, length, width = x.shape
    taps = weight.shape[-1]
    _check_shape("weight", weight, (width, taps))
    _check_shape("bias", bias, (width,))
    _check_shape("initial_state", initial_state, (batch, width, taps - 1))
    _check_shape("seq_idx", seq_idx, (batch, length))
    _check_activation(activation)
    serve = _serve("causal_conv1d", x, seq_idx is not None, initial_state is not None, taps)
    return serve(Conv(x, weight, bias, initial_state, seq_idx, activation == "silu"))


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional = None,
    z: Optional = None,
    dt_bias: Optional = None,
    dt_softplus: bool = True,
    A_is_log: bool = False,
) -> Tensor:
    """One step of `selective_scan` for decoding; not differentiable.

    Args:
        state: (B, E, N) fp32, updated in place. x, dt, z: (B, E). A: (E, N). B, C: (B, N). D, dt_bias: (E,).
        A_is_log: A holds log(-A), the parameter. The cpu kernel exponentiates on the way: nothing is kept that could go
            stale when the weights change.

    Returns:
        (B, E) in x's dtype.
    """
    serve = _serve("selective_state_update", x, False, True, A.shape[1])
    with torch.no_grad():
        return serve(Step(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, A_is_log))


def causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Optional = None, activation: str | None = "silu"
) -> Tensor:
    """One step of `causal_conv1d` for decoding; not differentiable.

    Args:
        x: (B, E). conv_state: (B, E, k), the last k inputs, oldest first, updated in place. weight: (E, k). bias: (E,).

    Returns:
        (B, E) in x's dtype.
    """
    _check_activation(activation)
    serve = _serve("causal_conv1d_update", x, False, True, weight.shape[-1])
    with torch.no_grad():
        return serve(ConvStep(conv_state, x, weight, bias, activation == "silu"))


def ssd(
    x: Tensor,
    a: Tensor,
    w: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional = None,
    initial_state: Optional = None,
    seq_idx: Optional = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The state space dual ("Transformers are SSMs", Dao & Gu 2024), differentiable in every float argument.

        h_t = exp(a_t) h_{t-1} + w_t x_t B_tᵀ
        y_t = h_t C_t + D x_t

    Args:
        x: (B, L, H, P), heads of P channels.
        a, w: (B, L, H), the log of the decay (finite) and the weight of the input. An `a` of shape (H) is a rate, and
            the log is a w: Mamba-2's A, with its Δ as the weight.
        B, C: (B, L, G, N); group g serves the heads g H/G to (g + 1) H/G - 1, and G divides H.
        D: (H,).
        initial_state: (B, H, P, N), the state before the first token; zero when absent.
        seq_idx: (B, L) int32, document numbers; the state is zeroed where they change, never at the first token.
        return_final_state: also return the state after the last token; gradients flow from it.

    Returns:
        y (B, L, H, P) in x's dtype, and with `return_final_state` the state (B, H, P, N) in fp32. The arithmetic is
        fp32 (fp64 for fp64 input).

    Raises:
        ValueError: shapes that do not agree, or a forced backend that cannot serve the call.
    """
    if x.dim() != 4 or B.dim() != 4:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and B {tuple(B.shape)}: ssd takes (batch, length, heads, width) and "
            "(batch, length, groups, states)."
        )
    batch, length, heads, width = x.shape
    groups, states = B.shape[2:]
    _check_groups(heads, groups)
    rated = a.dim() == 1
    _check_shape("a", a, (heads,) if rated else (batch, length, heads))
    _check_shape("w", w, (batch, length, heads))
    _check_shape("B", B, (batch, length, groups, states))
    _check_shape("C", C, (batch, length, groups, states))
    _check_shape("D", D, (heads,))
    _check_shape("initial_state", initial_state, (batch, heads, width, states))
    _check_shape("seq_idx", seq_idx, (batch, length))
    carried = initial_state is not None or return_final_state
    name = _chosen("ssd", x, seq_idx is not None, carried, states, width, rated)
    a = a * w if rated and name not in dispatch.TAKE_RATES else a
    y, state = dispatch.module(name).ssd(Ssd(x, a, w, B, C, D, initial_state, seq_idx))
    return (y, state) if return_final_state else y


def ssd_update(state: Tensor, x: Tensor, a: Tensor, w: Tensor, B: Tensor, C: Tensor, D: Optional = None) -> Tensor:
    """One step of `ssd` for decoding; not differentiable.

    Args:
        state: (B, H, P, N) fp32, updated in place. x: (B, H, P). a, w: (B, H), or a (H). B, C: (B, G, N). D: (H,).

    Returns:
        (B, H, P) in x's dtype.
    """
    _check_groups(x.shape[1], B.shape[1])
    rated = a.dim() == 1
    name = _chosen("ssd_update", x, False, True, B.shape[2], x.shape[2], rated)
    with torch.no_grad():
        a = a * w if rated and name not in dispatch.TAKE_RATES else a
        return dispatch.module(name).ssd_update(state, x, a, w, B, C, D)


def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int = 1) -> Tensor:
    """RMSNorm of x silu(z) over each of `groups` equal parts of the last axis, times weight (Mamba-2's norm).

    x, z: (..., E). weight: (E,). The gate comes before the norm, as norm_before_gate=False in mamba-ssm. The arithmetic
    is fp32 (fp64 for fp64 input); returns x's dtype.
    """
    _check_shape("z", z, tuple(x.shape))
    _check_shape("weight", weight, (x.shape[-1],))
    if groups < 1 or x.shape[-1] % groups:
        raise ValueError(
            f"A width of {x.shape[-1]} cannot be normalised in {groups} equal groups: use a divisor of it."
        )
    return _serve("gated_rms_norm", x, False, False, 0)(x, z, weight, eps, groups)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis, weight · x / sqrt(mean(x²) + eps), statistics in fp32; returns weight's dtype."""
    return _serve("rms_norm", x, False, False, 0)(x, weight, eps)


def add_rms_norm(hidden: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(s), s) with s = residual + hidden (..., d) in the wider of their dtypes: a block's sum, normed.

    One pass over memory where the residual is fp32 and the backend has a kernel for it.
    """
    if residual.dtype != torch.float32:
        total = residual + hidden
        return rms_norm(total, weight, eps), total
    return _serve("add_rms_norm", hidden, False, False, 0)(hidden, residual, weight, eps)


def linear(x: Tensor, weight: Tensor, bias: Optional = None) -> Tensor:
    """x (..., d) times weight (V, d) transposed, plus bias (V,): (..., V), as torch.nn.functional.linear.

    The cpu backend multiplies up to `THIN` rows itself where no gradient is wanted; all else is torch's.
    """
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):  # first: a look at the rows would be a guard
        return F.linear(x, weight, bias)
    if x.device.type != "cpu" or x.numel() > THIN * x.shape[-1] or torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    if hasattr(weight, "full_tensor"):  # a part of it is here, and torch knows of the others
        return F.linear(x, weight, bias)
    serve = _serve("linear", x, False, False, 0)
    return serve(x, weight, bias)


def _serve(op: str, x: Tensor, packed: bool, carried: bool, states: int):
    return getattr(dispatch.module(_chosen(op, x, packed, carried, states)), op)


def _chosen(op: str, x: Tensor, packed: bool, carried: bool, states: int, width: int = 0, rated: bool = False) -> str:
    compiling = torch.compiler.is_compiling()
    if not compiling and is_transformed():
        return "reference"
    call = (op, x.device.type, x.dtype, packed, carried, states, width, rated, compiling)
    return dispatch.choose(*call, dispatch.forced())


def _check_scan(s: Scan) -> None:
    if s.x.dim() != 3:
        raise ValueError(f"x has shape {tuple(s.x.shape)}: selective_scan takes (batch, length, width).")
    batch, length, width = s.x.shape
    states = s.A.shape[-1]
    for name in ("dt", "z"):
        _check_shape(name, getattr(s, name), (batch, length, width))
    for name in ("D", "dt_bias"):
        _check_shape(name, getattr(s, name), (width,))
    for name in ("B", "C"):
        _check_shape(name, getattr(s, name), (batch, length, states))
    _check_shape("A", s.A, (width, states))
    _check_shape("initial_state", s.initial_state, (batch, width, states))
    _check_shape("seq_idx", s.seq_idx, (batch, length))


def _check_groups(heads: int, groups: int) -> None:
    if groups < 1 or heads % groups:
        raise ValueError(f"{heads} heads cannot share B and C in {groups} groups: the groups must divide the heads.")


def _check_shape(name: str, tensor: Optional, shape: tuple[int, ...]) -> None:
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but the other arguments require {shape}.")


def _check_activation(activation: str | None) -> None:
    if activation not in ("silu", None):
        raise ValueError(f"activation {activation!r} is not supported by the convolution: use 'silu' or None.")
