"""The Triton kernels where tensors have more than 2^31 elements, under the interpreter. Run by test_triton.py.

Most of the memory is reserved and never touched, and of a large grid only the last programs run. The interpreter also
checks every 32-bit sum and product for overflow.
"""

import builtins

import pytest
import torch
import triton.runtime.interpreter as interpreter
from scan_cases import Served

from hf_mamba import segments
from hf_mamba.ops.operands import Conv, GatedNorm, Norm, Scan, Ssd
from hf_mamba.ops.triton import launch as triton_launch
from hf_mamba.ops.triton import ssd as triton_ssd
from hf_mamba.ops.triton import ssd_launch

triton = Served("triton")
WIDTH = 256
LENGTH = (1 << 23) + 256  # times WIDTH beyond 2^31
SEGMENT, TAIL, BLOCK = 256, 64, 32  # steps, steps that are looked at, channels of a forward program


@pytest.fixture(autouse=True)
def _only_the_last_program(monkeypatch):
    def some(*bounds):
        large = len(bounds) == 1 and bounds[0] > 4096  # a grid
        return builtins.range(bounds[0] - 1, bounds[0]) if large else builtins.range(*bounds)

    monkeypatch.setattr(interpreter, "range", some, raising=False)
    # tensors are on the host already: copying them back to themselves would touch all of them
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *arguments: None)


def _random(*shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _long(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(1, LENGTH, WIDTH) of which only the last steps are written, and a copy of those."""
    whole = torch.empty(1, LENGTH, WIDTH, dtype=torch.bfloat16)
    tail = _random(1, 2 * TAIL, WIDTH, seed=seed, dtype=torch.bfloat16)
    whole[:, -2 * TAIL :] = tail
    return whole, tail[:, -TAIL:].contiguous()


def test_scan_of_a_long_sequence(monkeypatch):
    """The tail is a document of its own, so it does not see that the segments before it never ran."""
    monkeypatch.setattr(triton_launch, "pass_states", lambda end, *others, **options: torch.zeros_like(end))
    monkeypatch.setattr(triton_launch, "resident_programs", lambda *arguments: 1 << 30)  # one item each
    (x, x_tail), (dt, dt_tail), (z, z_tail), (dy, dy_tail) = (_long(seed) for seed in range(4))
    dy_tail[..., :-BLOCK], dy[:, -2 * TAIL :, :-BLOCK] = 0, 0  # dB and dC sum over channels; other states are unknown
    B, C = torch.zeros(1, LENGTH, 1), torch.zeros(1, LENGTH, 1)
    B[:, -TAIL:], C[:, -TAIL:] = _random(1, TAIL, 1, seed=8), _random(1, TAIL, 1, seed=9)
    seq_idx = torch.zeros(1, LENGTH, dtype=torch.int32)
    seq_idx[:, -TAIL:] = 1
    rest = {"A": -torch.rand(WIDTH, 1) - 0.1, "D": torch.ones(WIDTH)}
    whole = Scan(x, dt, B=B, C=C, z=z, seq_idx=seq_idx, **rest)
    alone = Scan(x_tail, dt_tail, B=B[:, -TAIL:], C=C[:, -TAIL:], z=z_tail, **rest)
    monkeypatch.setattr(segments, "choose", lambda *call: (min(SEGMENT, call[3]), -(-call[3] // SEGMENT)))

    y, last, saved = triton_launch.scan_forward(whole, True)
    y_tail, last_tail, saved_tail = triton_launch.scan_forward(alone, True)
    assert torch.equal(y[:, -TAIL:, -BLOCK:], y_tail[..., -BLOCK:])
    assert torch.equal(last[:, -BLOCK:], last_tail[:, -BLOCK:])
    found = triton_launch.scan_backward(whole, saved, dy, None)
    expected = triton_launch.scan_backward(alone, saved_tail, dy_tail, None)
    for i in (0, 1, 6):  # x, dt, z
        assert torch.equal(found[i][:, -TAIL:, -BLOCK:], expected[i][..., -BLOCK:])
    for i in (3, 4):  # B, C
        assert torch.equal(found[i][:, -TAIL:], expected[i])


class _NoStates:
    """In the place of `pass_states`: every state is zero."""

    def __getitem__(self, grid):
        return lambda found, whole, first, last, *sizes, **options: (found.zero_(), last.zero_())


def test_dual_of_a_long_sequence(monkeypatch):
    """The tail is a document of its own, in the last chunk."""
    monkeypatch.setattr(triton_ssd, "pass_states", _NoStates())
    (x, _), (dy, _) = _long(0), _long(1)
    near, heads = 2 * TAIL, 2
    B, C, a, w = (torch.zeros(1, LENGTH, n) for n in (1, 1, heads, heads))
    for i, t in enumerate((B, C, a, w)):
        t[:, -near:] = _random(1, near, t.shape[2], seed=5 + i)
    seq_idx = torch.zeros(1, LENGTH, dtype=torch.int32)
    seq_idx[:, -TAIL:] = 1
    x, dy = x.unflatten(2, (heads, -1)), dy.unflatten(2, (heads, -1))
    whole = Ssd(x, -a.abs(), w, B[..., None], C[..., None], torch.ones(heads), seq_idx=seq_idx)
    alone = Ssd(*(None if t is None else t[:, -near:] if t.dim() > 1 else t for t in whole))
    y, _, saved = ssd_launch.ssd_forward(whole, True)
    y_tail, _, saved_tail = ssd_launch.ssd_forward(alone, True)
    tile = ssd_launch._tile(whole)  # of the last program, which has the last head
    assert torch.equal(y[:, -tile:, -1], y_tail[:, -tile:, -1])
    found = ssd_launch.ssd_backward(whole, saved, dy, None)
    expected = ssd_launch.ssd_backward(alone, saved_tail, dy[:, -near:], None)
    for i in (0, 1, 2):  # x, a, w
        assert torch.equal(found[i][:, -tile:, -1], expected[i][:, -tile:, -1])
    for i in (3, 4):  # B, C
        assert torch.equal(found[i][:, -tile:], expected[i][:, -tile:])


def test_convolution_of_a_long_sequence():
    (x, _), (dy, _) = _long(0), _long(1)
    weight = _random(WIDTH, 4, seed=2)
    near = 2 * TAIL
    y, nothing = triton_launch.conv_forward(Conv(x, weight), True)
    expected, _ = triton_launch.conv_forward(Conv(x[:, -near:], weight), True)
    assert torch.equal(y[:, -16:, -128:], expected[:, -16:, -128:])
    dx = triton_launch.conv_backward(Conv(x, weight), nothing, dy)[0]
    expected = triton_launch.conv_backward(Conv(x[:, -near:], weight), nothing, dy[:, -near:])[0]
    assert torch.equal(dx[:, -64:, -128:], expected[:, -64:, -128:])


def test_norm_of_many_rows():
    width, rows = 1 << 10, (1 << 21) + 5
    x, residual = (torch.empty(rows, width, dtype=torch.bfloat16) for _ in range(2))
    x[-1], residual[-1] = _random(width, seed=0), _random(width, seed=1)
    weight = _random(width, seed=2)
    for second in (None, residual):
        y, total, _ = triton_launch.norm_forward(Norm(x, second, weight, 1e-5), False)
        last = Norm(x[-1:], None if second is None else second[-1:], weight, 1e-5)
        alone, sum_alone, _ = triton_launch.norm_forward(last, False)
        assert torch.equal(y[-1:], alone)
        assert torch.equal(total[-1:], sum_alone)


def test_gated_norm_of_many_rows():
    width, rows = 1 << 10, (1 << 21) + 5
    x, z, dy = (torch.empty(rows, width, dtype=torch.bfloat16) for _ in range(3))
    for i, t in enumerate((x, z, dy)):
        t[-1] = _random(width, seed=i)
    weight = _random(width, seed=3)
    y, _ = ssd_launch.gated_norm_forward(GatedNorm(x, z, weight, 1e-5, 2), True)
    alone, _ = ssd_launch.gated_norm_forward(GatedNorm(x[-1:], z[-1:], weight, 1e-5, 2), True)
    part = slice(-width // 2, None)  # of the last program
    assert torch.equal(y[-1:, part], alone[:, part])


def test_decoding_of_many_rows():
    width, states, batch = 128, 16, (1 << 20) + 3
    state = torch.empty(batch, width, states)
    window = torch.empty(batch, width, 4)
    x, dt = (torch.empty(batch, width) for _ in range(2))
    B = torch.empty(batch, states)
    for i, t in enumerate((state, window, x, dt, B)):
        t[-1] = _random(*t.shape[1:], seed=i)
    A, weight = -torch.rand(width, states), _random(width, 4, seed=9)
    alone = [t[-1:].clone() for t in (state, window, x, dt, B)]
    expected = triton.selective_state_update(alone[0], alone[2], alone[3], A, alone[4], alone[4])
    y = triton.selective_state_update(state, x, dt, A, B, B)
    lanes = slice(-BLOCK, None)
    assert torch.equal(y[-1:, lanes], expected[:, lanes])
    assert torch.equal(state[-1:, lanes], alone[0][:, lanes])
    expected = triton.causal_conv1d_update(alone[2], alone[1], weight)
    assert torch.equal(triton.causal_conv1d_update(x, window, weight)[-1:, lanes], expected[:, lanes])
