"""The C kernels where offsets pass 2^31 elements; for Triton's see triton_large.py."""

import pytest
import torch

from hf_mamba import ops
from hf_mamba.ops.cpu import kernels as cpu
from hf_mamba.ops.operands import Conv, GatedNorm, Scan, Ssd

pytestmark = pytest.mark.skipif(ops.which("linear") != "cpu", reason="no compiled kernels on this machine")

FAR_HEADS = {"x": (4, 5), "B": (2, 10), "C": (2, 10), "grad_y": (4, 5)}
FAR = 1_200_000_000  # elements between two rows: memory that is reserved and, but for the rows, never touched


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def _far(rows: torch.Tensor) -> torch.Tensor:
    """A copy of (1, 3, width) or (3, width) whose rows are FAR apart."""
    strides = (*([0] if rows.ndim == 3 else []), FAR, 1)
    view = torch.empty(2 * FAR + rows.shape[-1], dtype=rows.dtype).as_strided(rows.shape, strides)
    return view.copy_(rows)


@pytest.mark.parametrize("name", ["x", "dt", "z", "grad_y"])
def test_scan_and_convolution_read_rows_that_are_far_apart(name: str):
    inputs = {key: _random(1, 3, 20, seed=i) for i, key in enumerate(("x", "dt", "z", "grad_y"))}
    A, bc = -torch.rand(20, 2) - 0.1, _random(1, 3, 2, seed=9)
    weight = _random(20, 4, seed=8)
    results = []
    for far in (False, True):
        given = inputs | ({name: _far(inputs[name])} if far else {})
        scan = Scan(given["x"], given["dt"], A, bc, bc, z=given["z"])
        y, _, saved = cpu.scan_forward(scan, True)
        gradients = cpu.scan_backward(scan, saved, given["grad_y"], None)
        conv = Conv(given["x"], weight)
        convolved, nothing = cpu.conv_forward(conv, True)
        backward = cpu.conv_backward(conv, nothing, given["grad_y"])
        results.append((y, *gradients, convolved, *backward))
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["x", "B", "C", "z", "grad_y"])
def test_dual_and_gated_norm_read_rows_that_are_far_apart(name: str):
    inputs = {key: _random(1, 3, 20, seed=i) for i, key in enumerate(("x", "B", "C", "z", "grad_y"))}
    a, w, weight = -torch.rand(1, 3, 4), torch.rand(1, 3, 4), _random(20, seed=8)
    results = []
    for far in (False, True):
        given = inputs | ({name: _far(inputs[name])} if far else {})
        x, B, C, grad_y = (given[key].unflatten(2, shape) for key, shape in FAR_HEADS.items())
        dual = Ssd(x, a, w, B, C)
        y, final, saved = cpu.ssd_forward(dual, True)
        gradients = cpu.ssd_backward(dual, saved, grad_y, None)
        norm = GatedNorm(given["x"], given["z"], weight, 1e-5, 2)
        normed, scale = cpu.gated_norm_forward(norm, True)
        results.append((y, final, *gradients, normed, *cpu.gated_norm_backward(norm, scale, given["grad_y"])))
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


def test_a_thin_product_with_a_far_weight():
    weight = _random(3, 40)
    for count in (1, 3):
        x = _random(count, 40, seed=1)
        assert torch.equal(cpu.linear(x, _far(weight)), cpu.linear(x, weight))
        if count == 3:
            assert torch.equal(cpu.linear(_far(x), weight), cpu.linear(x, weight))


@pytest.mark.slow
def test_outputs_of_more_than_2_to_31_elements():
    """4.3 GB each. Every token is the same, so that the last output is the limit that a short sequence reaches, too.

    The last chunks of both have 40 steps.
    """
    length, width = (1 << 21) + 40, 1024
    row = _random(1, 1, width)
    weight = _random(width, 4, seed=1)
    A, bc = -torch.ones(width, 1), _random(1, 1, 1, seed=2)
    last = []
    for steps in (168, length):
        x = row.expand(1, steps, width)
        y, _ = cpu.conv_forward(Conv(x, weight), False)
        last.append(y[:, -40:].clone())
        del y
        b = bc.expand(1, steps, 1)
        y, final, _ = cpu.scan_forward(Scan(x, (row.abs() + 1).expand_as(x), A, b, b, z=x), False)
        last[-1] = torch.cat([last[-1], y[:, -40:], final.transpose(1, 2).bfloat16()], 1)
        del y
        number = row[..., :16].float().expand(1, steps, 16)
        dual = Ssd(x.unflatten(2, (16, 64)), -number.abs() - 1, number, b[..., None], b[..., None])
        y, final, _ = cpu.ssd_forward(dual, False)
        last[-1] = torch.cat([last[-1], y[:, -40:].flatten(2), final.flatten(1)[:, None].bfloat16()], 1)
        del y
    assert torch.equal(*last)
