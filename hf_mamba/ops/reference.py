"""The definitions: every operation as a plain PyTorch loop, in any dtype, on any device.

Nothing here is fast. Every other backend is tested against these functions, run in float64.

Symbols follow "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (Gu & Dao, 2023): B batch, L length,
E inner width, N state size, k convolution kernel, Δ (`dt`) the input-dependent step. `seq_idx` (B, L) numbers the
packed documents of a row: wherever it changes, a new document starts and nothing may flow across.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic: fp32 for every storage dtype but float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def document_starts(seq_idx: Tensor) -> Tensor:
    """(B, L) bool: True where a new document begins. Never at t = 0, which continues the carried state."""
    starts = torch.zeros_like(seq_idx, dtype=torch.bool)
    starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    return starts


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The selective state space, step by step (paper, equations 2a-2b with the discretisation of its Algorithm 2).

        Δ_t = softplus(dt_t + dt_bias)
        h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t
        y_t = (C_t · h_t + D x_t) · silu(z_t)

    Args:
        x, dt, z: (B, L, E); z is the gate.
        A: (E, N), negative. B, C: (B, L, N). D, dt_bias: (E,).
        dt_softplus: apply softplus to dt + dt_bias.
        initial_state: (B, E, N), the state before the first token; zero when absent.
        seq_idx: (B, L) int32, document numbers; the state is zeroed where they change.
        return_final_state: also return the state after the last token.

    Returns:
        y (B, L, E) in x's dtype, and with `return_final_state` the state (B, E, N) in fp32 (fp64 for fp64 input).
    """
    dtype = compute_dtype(x.dtype)
    delta = dt.to(dtype)
    if dt_bias is not None:
        delta = delta + dt_bias.to(dtype)
    if dt_softplus:
        delta = F.softplus(delta)
    u, A, B, C = x.to(dtype), A.to(dtype), B.to(dtype), C.to(dtype)
    batch, length, width = x.shape
    state = u.new_zeros(batch, width, A.shape[1]) if initial_state is None else initial_state.to(dtype)
    starts = None if seq_idx is None else document_starts(seq_idx)
    outputs = []
    for t in range(length):
        if starts is not None:
            state = state.masked_fill(starts[:, t, None, None], 0.0)
        decay = torch.exp(delta[:, t, :, None] * A)  # (B, E, N)
        state = decay * state + (delta[:, t] * u[:, t])[..., None] * B[:, t, None, :]
        outputs.append((state * C[:, t, None, :]).sum(-1))
    y = torch.stack(outputs, 1) if outputs else u.new_zeros(batch, 0, width)
    if D is not None:
        y = y + u * D.to(dtype)
    if z is not None:
        y = y * F.silu(z.to(dtype))
    y = y.to(x.dtype)
    return (y, state) if return_final_state else y


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = "silu",
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """Depthwise causal convolution, y_t = act(bias + Σ_j weight_j x_{t-k+1+j}), over one document at a time.

    Args:
        x: (B, L, E). weight: (E, k), the last tap on the current token. bias: (E,).
        activation: "silu" or None.
        initial_state: (B, E, k-1), the inputs before x, oldest first, of the first document; zeros when absent.
        seq_idx: (B, L) int32, document numbers; taps that reach into another document read zero.

    Returns:
        (B, L, E) in x's dtype.
    """
    dtype = compute_dtype(x.dtype)
    batch, length, width = x.shape
    taps = weight.shape[1]
    if initial_state is None:
        before = x.new_zeros(batch, taps - 1, width, dtype=dtype)
    else:
        before = initial_state.to(dtype).transpose(1, 2)  # (B, k-1, E)
    padded = torch.cat([before, x.to(dtype)], 1)
    if seq_idx is not None:
        # document 0 of the row is whatever came before it, too
        document = F.pad(document_starts(seq_idx).cumsum(1), (taps - 1, 0))
    y = x.new_zeros(batch, length, width, dtype=dtype)
    for j in range(taps):
        tap = padded[:, j : j + length]
        if seq_idx is not None:
            same = document[:, j : j + length] == document[:, taps - 1 :]
            tap = tap * same[..., None]
        y = y + tap * weight[:, j].to(dtype)
    if bias is not None:
        y = y + bias.to(dtype)
    return activate(y, activation).to(x.dtype)


def activate(y: Tensor, activation: str | None) -> Tensor:
    """Apply "silu" or nothing (None); anything else is a ValueError."""
    if activation is None:
        return y
    if activation == "silu":
        return F.silu(y)
    raise ValueError(f"activation {activation!r} is not supported by the convolution: use 'silu' or None.")


def negative_exp(A_log: Tensor) -> Tensor:
    """A = -exp(A_log), in the dtype of the arithmetic."""
    return -torch.exp(A_log.to(compute_dtype(A_log.dtype)))


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    A_is_log: bool = False,
) -> Tensor:
    """One step of `selective_scan`: updates `state` (B, E, N) in place. x, dt, z: (B, E); B, C: (B, N)."""
    A = negative_exp(A) if A_is_log else A
    gate = None if z is None else z[:, None]
    y, new_state = selective_scan(
        x[:, None], dt[:, None], A, B[:, None], C[:, None], D, gate, dt_bias, dt_softplus, state, None, True
    )
    state.copy_(new_state)
    return y[:, 0]


def causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = "silu"
) -> Tensor:
    """One step of `causal_conv1d`: push x (B, E) into `conv_state` (B, E, k) in place and return the output (B, E)."""
    conv_state.copy_(torch.cat([conv_state[..., 1:], x[..., None].to(conv_state.dtype)], -1))
    return causal_conv1d(x[:, None], weight, bias, activation, conv_state[..., :-1])[:, 0]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis, weight · x / sqrt(mean(x²) + eps), statistics in fp32; returns weight's dtype."""
    dtype = compute_dtype(x.dtype)
    x = x.to(dtype)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return (weight.to(dtype) * x).to(weight.dtype)


def add_rms_norm(hidden: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(s), s) with s = residual + hidden in the wider of their dtypes."""
    total = residual + hidden
    return rms_norm(total, weight, eps), total


def ssd(
    x: Tensor,
    a: Tensor,
    w: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The state space dual, step by step ("Transformers are SSMs", Dao & Gu 2024): one decay per head and step.

        h_t = exp(a_t) h_{t-1} + w_t x_t B_tᵀ
        y_t = h_t C_t + D x_t

    Args:
        x: (B, L, H, P). a, w: (B, L, H), the log of the decay and the weight of the input. Mamba-2: a = A Δ, w = Δ.
        B, C: (B, L, G, N), each shared by H / G heads that follow each other. D: (H,).
        initial_state: (B, H, P, N), the state before the first token; zero when absent.
        seq_idx: (B, L) int32, document numbers; the state is zeroed where they change.
        return_final_state: also return the state after the last token.

    Returns:
        y (B, L, H, P) in x's dtype, and with `return_final_state` the state (B, H, P, N) in fp32 (fp64 for fp64 input).
    """
    dtype = compute_dtype(x.dtype)
    batch, length, heads, width = x.shape
    u, decay, weight = x.to(dtype), torch.exp(a.to(dtype)), w.to(dtype)
    B, C = (t.to(dtype).repeat_interleave(heads // t.shape[2], 2) for t in (B, C))  # (B, L, H, N)
    state = u.new_zeros(batch, heads, width, B.shape[3]) if initial_state is None else initial_state.to(dtype)
    starts = None if seq_idx is None else document_starts(seq_idx)
    outputs = []
    for t in range(length):
        if starts is not None:
            state = state.masked_fill(starts[:, t, None, None, None], 0.0)
        drive = (weight[:, t, :, None] * u[:, t])[..., None] * B[:, t, :, None]  # (B, H, P, N)
        state = decay[:, t, :, None, None] * state + drive
        outputs.append((state * C[:, t, :, None]).sum(-1))
    y = torch.stack(outputs, 1) if outputs else u.new_zeros(batch, 0, heads, width)
    if D is not None:
        y = y + u * D.to(dtype)[:, None]
    y = y.to(x.dtype)
    return (y, state) if return_final_state else y


def ssd_update(state: Tensor, x: Tensor, a: Tensor, w: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None) -> Tensor:
    """One step of `ssd`: updates `state` (B, H, P, N) in place. x: (B, H, P); a, w: (B, H); B, C: (B, G, N)."""
    y, new_state = ssd(x[:, None], a[:, None], w[:, None], B[:, None], C[:, None], D, state, None, True)
    state.copy_(new_state)
    return y[:, 0]


def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int = 1) -> Tensor:
    """RMSNorm of x silu(z) over each of `groups` equal parts of the last axis, times weight; returns x's dtype."""
    dtype = compute_dtype(x.dtype)
    gated = (x.to(dtype) * F.silu(z.to(dtype))).unflatten(-1, (groups, -1))
    gated = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + eps)
    return (gated.flatten(-2) * weight.to(dtype)).to(x.dtype)


linear = F.linear


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    num_items: Tensor | int | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """Cross-entropy of `hidden @ weight.T + bias` against labels, with the whole logits in memory.

    Args:
        hidden: (M, d). weight: (V, d). bias: (V,). labels: (M,) int64; `ignore_index` rows do not count.
        num_items: divide the sum by this instead of by the number of rows that count (gradient accumulation).
        z_loss: weight of logsumexp², which keeps the logits from drifting (PaLM, section 5).

    Returns:
        A scalar, fp32 or float64.
    """
    dtype = compute_dtype(hidden.dtype)
    logits = F.linear(hidden, weight, bias).to(dtype)  # (M, V)
    counted = labels != ignore_index
    loss = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum")
    if z_loss:
        loss = loss + z_loss * (torch.logsumexp(logits, -1).square() * counted).sum()
    return loss / (counted.sum() if num_items is None else num_items)


def unavailable() -> str | None:
    """The definitions run everywhere."""
    return None


def cannot_serve(call: object) -> str | None:
    """The definitions serve every call."""
    return None
