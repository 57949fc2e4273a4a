"""What a training step keeps and needs for a moment, in bytes, from the code of the model and of each backend.

Symbols: B batch · L length · M = B·L tokens · V vocabulary · d width · E inner width · N states · k taps ·
R rank of Δ · w bytes of a weight · r bytes of the residual stream (4, or w where `residual_in_fp32` is off).

One block saves for its backward, in the order of `MambaBlock.forward` (modeling_mamba.py):

    residual  M·d·r          the normed residual                               rms_norm saves its input,
    norm      M·d·w + 4·M    in_proj's input, and 1/rms                        and one number per row
    in_proj   M·2E·w         [x; z]: the convolution saves x, the scan z, both views of it
    conv1d    M·E·w          the convolution's output: saved by x_proj and by the scan
    x_proj    M·(R+2N)·w     [Δ; B; C]: saved by dt_proj and by the scan, as views
    dt_proj   M·E·w          Δ before its softplus
    scan      B·⌈L/T⌉·N·E·4 + 8·E·N   a state per T steps; exp(A_log) and A = -exp(A_log), both fp32
    out_proj  M·E·w          the gated output

Under autocast (a 16-bit run without DeepSpeed) w is 2 while weights are stored in s = 4 bytes; else s = w. Then a block
also saves the 16-bit casts of its four linear weights, 2·(2E·d + E·(R+2N) + R·E + E·d), made once a forward; the norm
returns s bytes, so that in_proj saves a cast of it; and the embedding and the loss's gradients are s bytes an element.

The batch saves token ids, 8·M (and packed rows their document numbers, 4·M), the final norm M·d·r + 4·M, and the loss
the two gradients that it has computed already, M·d·s and V·d·4, and the number of labels, 8. Parameters are not counted
here, nor views of them.
tests/preflight/test_memory_activations.py holds all of this, to the byte, against what autograd really keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hf_mamba.presets import Geometry

Bytes = dict[str, int]  # by kind, as in the table above, plus "workspace"

RANDOM_STATE = 5056  # torch.get_rng_state().nbytes: the Mersenne twister
CPU_LOSS_ROWS, GPU_LOSS_ROWS = 512, 2048  # rows of the loss at a time (ops/loss.py)
LOSS_VOCABULARY_ROWS = 8192  # of the head's 16-bit gradient at a time


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def total(*parts: Bytes) -> int:
    return sum(sum(part.values()) for part in parts)


def add(*parts: Bytes) -> Bytes:
    """The sum by kind."""
    out: Bytes = {}
    for part in parts:
        for kind, size in part.items():
            out[kind] = out.get(kind, 0) + size
    return out


@dataclass(frozen=True)
class Shape:
    """A micro-batch of a model: everything that the bytes of its activations depend on."""

    model: Geometry
    batch: int
    length: int
    weight_bytes: int  # w
    residual_bytes: int = 4  # r
    packed: bool = False
    device: str = "cpu"
    autocast: bool = False

    @property
    def stored(self) -> int:
        """s, bytes of a stored weight."""
        return 4 if self.autocast else self.weight_bytes

    def casts(self, *linears: str) -> int:
        """The 16-bit casts of some of a block's linear weights; nothing without autocast."""
        m = self.model
        sizes = {
            "in_proj": 2 * m.intermediate_size * m.hidden_size,
            "x_proj": m.intermediate_size * (m.time_step_rank + 2 * m.state_size),
            "dt_proj": m.time_step_rank * m.intermediate_size,
            "out_proj": m.intermediate_size * m.hidden_size,
        }
        return self.weight_bytes * sum(sizes[name] for name in linears) if self.autocast else 0

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    def wide(self, itemsize: int | None = None) -> int:
        """A tensor (B, L, E)."""
        return self.tokens * self.model.intermediate_size * (itemsize or self.weight_bytes)

    def narrow(self, itemsize: int | None = None) -> int:
        """A tensor (B, L, d)."""
        return self.tokens * self.model.hidden_size * (itemsize or self.weight_bytes)

    @property
    def state(self) -> int:
        """A state (B, N, E) in fp32."""
        return 4 * self.batch * self.model.state_size * self.model.intermediate_size

    @property
    def rates(self) -> int:
        """A (E, N) in fp32."""
        return 4 * self.model.intermediate_size * self.model.state_size


@dataclass(frozen=True)
class Backend:
    """One row per way of computing the scan: what it saves, and its kernels' temporaries beside inputs and outputs.

    Attributes:
        chunk: T, steps between two saved states.
        scan_forward, scan_backward, conv_forward, conv_backward: Shape -> bytes of temporaries at their largest moment.
        norm_in_kernel: the norm is one kernel, without fp32 copies.
    """

    chunk: int
    scan_forward: Callable[[Shape], int]
    scan_backward: Callable[[Shape], int]
    conv_forward: Callable[[Shape], int]
    conv_backward: Callable[[Shape], int]
    norm_in_kernel: bool = False
    extra_saved: Callable[[Shape], int] = lambda s: 0
    note: str = ""


def _chunked_parts(s: Shape) -> tuple[int, int, bool]:
    """(P, Q, several): (B, T, E) and (B, T, N, E) in fp32, and whether there is more than one chunk."""
    row = 4 * s.batch * min(32, s.length) * s.model.intermediate_size
    return row, row * s.model.state_size, s.length > 32


def _torch_scan_forward(s: Shape) -> int:
    """ops/chunked.py: the new decay and history beside the last chunk's history; Δ, its slope, Δu, the last output."""
    p, q, several = _chunked_parts(s)
    return (3 if several else 2) * q + (4 if several else 3) * p + (p if s.weight_bytes < 4 else 0) + s.state + s.rates


def _torch_scan_backward(s: Shape) -> int:
    """ops/chunked.py: decay, history, its gradient, and one more; nine rows (B, T, E); copies of what is not fp32."""
    p, q, several = _chunked_parts(s)
    return 4 * q + (9 if several else 7) * p + (2 * p if s.weight_bytes < 4 else 0) + s.state + 2 * s.rates


def _torch_conv_forward(s: Shape) -> int:
    """ops/chunked.py: the padded input and the sum (then the sum and its silu), in fp32, without the output."""
    return 2 * s.wide(4) if s.weight_bytes < 4 else s.wide(4)


def _torch_conv_backward(s: Shape) -> int:
    """ops/chunked.py: six (B, L, E) in fp32, the last of which is the output where the input is fp32."""
    return 6 * s.wide(4) - (s.wide() if s.weight_bytes == 4 else 0)


def _cpu_scan_backward(s: Shape) -> int:
    """ops/cpu.py: dB and dC of each group of 128 channels and a sum of one, dA, the first state's gradient."""
    groups = ceil_div(s.model.intermediate_size, 128)
    sums = 2 * groups + (1 if s.weight_bytes < 4 else 0)
    return sums * 4 * s.tokens * s.model.state_size + 2 * s.state + s.rates + _starts(s)


def _cpu_conv_backward(s: Shape) -> int:
    """ops/cpu.py: the gradients of taps and bias of every 128 rows."""
    rows = s.batch * ceil_div(s.length, 128)
    return 4 * rows * (s.model.conv_kernel + 1) * s.model.intermediate_size + _starts(s)


def _starts(s: Shape) -> int:
    return s.tokens if s.packed else 0  # bool (B, L)


def _triton_segments(s: Shape) -> int:
    """ops/triton_launch.py, `split`: parts of the sequence where too few channels fill the device."""
    width = s.batch * s.model.intermediate_size
    segments = max(1, min(40_960 // max(width, 1), s.length // 256))
    steps = 64 * ceil_div(ceil_div(s.length, segments), 64)
    return ceil_div(s.length, steps)


def _triton_scan_forward(s: Shape) -> int:
    """ops/triton_launch.py: B and C as fp32 pairs (stacked, then cast), the last state twice, the segments' states."""
    pairs = 2 * s.tokens * s.model.state_size * (4 + (s.weight_bytes if s.weight_bytes < 4 else 0))
    segments = _triton_segments(s)
    return pairs + 2 * s.state + (2 * segments * s.state if segments > 1 else 0)


def _triton_scan_backward(s: Shape) -> int:
    """ops/triton_launch.py: B, C, dB, dC in fp32; dA, dD and dΔ's bias of each row and segment; states; scratch."""
    segments = _triton_segments(s)
    parts = segments * s.batch * (s.model.intermediate_size * 4) * (s.model.state_size + 2)
    padded = 1 << max(0, s.model.state_size - 1).bit_length()
    programs = min(ceil_div(s.model.intermediate_size, 32) * s.batch * segments, 132 * 8)  # an H100's worth
    scratch = programs * (16 * padded + 2 * 64 + 5 * 16) * 32 * 4
    return 16 * s.tokens * s.model.state_size + parts + (2 + 2 * (segments > 1) * segments) * s.state + scratch


def _triton_conv_backward(s: Shape) -> int:
    rows = s.batch * ceil_div(s.length, 128)
    return 4 * rows * (s.model.conv_kernel + 1) * s.model.intermediate_size


def _mamba_ssm_saved(s: Shape) -> int:
    """Channels-first copies of x, Δ, z, B and C, the ungated output, and a state pair per 2048 steps."""
    copies = 4 * s.wide() + 2 * s.tokens * s.model.state_size * s.weight_bytes
    return copies + 2 * s.batch * ceil_div(s.length, 2048) * s.model.intermediate_size * s.model.state_size * 4


BACKENDS: dict[str, Backend] = {
    "torch": Backend(32, _torch_scan_forward, _torch_scan_backward, _torch_conv_forward, _torch_conv_backward),
    "cpu": Backend(32, lambda s: 2 * s.state + s.rates + _starts(s), _cpu_scan_backward, _starts, _cpu_conv_backward),
    "triton": Backend(
        64, _triton_scan_forward, _triton_scan_backward, lambda s: 0, _triton_conv_backward, norm_in_kernel=True
    ),
    "mamba_ssm": Backend(
        1 << 62,
        lambda s: s.state,
        lambda s: 2 * s.wide() + 8 * s.tokens * s.model.state_size,
        lambda s: 0,
        lambda s: 4 * s.model.intermediate_size * (s.model.conv_kernel + 1),
        norm_in_kernel=True,
        extra_saved=_mamba_ssm_saved,
        note="read from mamba-ssm 2.3.2, not measured",
    ),
}


def saved_by_block(s: Shape, backend: Backend) -> Bytes:
    """The table at the top of this file."""
    m, w = s.model, s.weight_bytes
    chunks = ceil_div(s.length, backend.chunk) if backend.chunk < 1 << 62 else 0
    return {
        "residual": s.narrow(s.residual_bytes),
        "norm": s.narrow() + 4 * s.tokens,
        "in_proj": 2 * s.wide(),
        "conv1d": s.wide(),
        "x_proj": s.tokens * (m.time_step_rank + 2 * m.state_size) * w,
        "dt_proj": s.wide(),
        "scan": chunks * s.state + 2 * s.rates + backend.extra_saved(s),
        "out_proj": s.wide(),
        "casts": s.casts("in_proj", "x_proj", "dt_proj", "out_proj"),
    }


def saved_by_checkpoint(s: Shape, first: bool) -> Bytes:
    """With gradient checkpointing a block keeps its input (the first one's is the embedding, in s bytes), and the CPU's
    random state, which stays on the host."""
    return {
        "residual": s.narrow(s.stored if first else s.residual_bytes),
        "random_state": RANDOM_STATE if s.device == "cpu" else 0,
    }


def saved_by_batch(s: Shape) -> Bytes:
    """Token ids, which the embedding saves; document numbers, which every convolution and scan saves, once."""
    return {"batch": 8 * s.tokens + (4 * s.tokens if s.packed else 0)}


def saved_by_head(s: Shape) -> Bytes:
    """The final norm's input and statistics; the loss's gradients, which are computed in the forward (ops/loss.py)."""
    m = s.model
    return {
        "residual": s.narrow(s.residual_bytes),
        "norm": 4 * s.tokens,
        "loss": s.narrow(s.stored) + 4 * m.vocab_size * m.hidden_size + 8,
    }


def saved(s: Shape, backend: Backend, checkpointing: bool = False) -> Bytes:
    """Everything that the forward leaves behind for the backward, by kind."""
    layers = s.model.num_hidden_layers
    if checkpointing:
        blocks = [saved_by_checkpoint(s, first=i == 0) for i in range(layers)]
    else:
        blocks = [{kind: size * layers for kind, size in saved_by_block(s, backend).items()}]
    return add(saved_by_batch(s), *blocks, saved_by_head(s))
