"""The Triton kernels at real sizes, on a CUDA device: accuracy, repeatability, 64-bit offsets, and the CUDA kernel
beside them. Times are benchmarks/gpu_session's."""

import pytest
import torch
from scan_cases import Served, reference

from hf_mamba import segments

pytestmark = pytest.mark.gpu
EXACT = torch.float64
triton, mamba_ssm = Served("triton"), Served("mamba_ssm")


def scan_inputs(batch, length, width, states, dtype, seed=0):
    """Inputs of a trained model's scale: Δ mostly 1e-3 to 1e-1, A from S4D-real."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator, device="cuda")

    inputs = {name: random(batch, length, width).to(dtype) for name in ("x", "dt", "z")}
    inputs |= {name: random(batch, length, states).to(dtype) for name in ("B", "C")}
    inputs["A"] = -torch.arange(1, states + 1, device="cuda", dtype=torch.float32).repeat(width, 1)
    inputs["D"] = torch.ones(width, device="cuda")
    inputs["dt_bias"] = random(width) - 4
    inputs["initial_state"] = random(batch, width, states)
    return {name: value.requires_grad_() for name, value in inputs.items()}


def split_into(monkeypatch, count):
    monkeypatch.setattr(segments, "choose", lambda *call: segments.of_length(call[3], count))


def documents(batch, length):
    starts = torch.rand(batch, length, generator=torch.Generator().manual_seed(1)) < 0.01
    return starts.cumsum(1).int().cuda()


def gradients(function, inputs, grad_y, grad_last, **options):
    y, last = function(**inputs, **options, return_final_state=True)
    found = torch.autograd.grad([y, last], list(inputs.values()), [grad_y.to(y.dtype), grad_last.to(last.dtype)])
    return {"y": y, "last": last, **dict(zip(inputs, found, strict=True))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "length", "width", "states"),
    [(2, 1000, 1536, 16), (1, 4096, 200, 16), (1, 300, 100, 128), (1, 515, 70, 5)],
)
@pytest.mark.parametrize("packed", [False, True])
def test_scan_against_float64(batch, length, width, states, dtype, packed):
    inputs = scan_inputs(batch, length, width, states, dtype)
    options = {"seq_idx": documents(batch, length) if packed else None}
    grad_y = torch.randn(batch, length, width, device="cuda").to(dtype)
    grad_last = torch.randn(batch, width, states, device="cuda")
    found = gradients(triton.selective_scan, inputs, grad_y, grad_last, **options)
    exact = {name: value.detach().to(EXACT).requires_grad_() for name, value in inputs.items()}
    expected = gradients(reference.selective_scan, exact, grad_y, grad_last, **options)
    tolerance = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for name, value in expected.items():
        assert float((found[name].to(EXACT) - value).abs().max() / value.abs().max()) < tolerance, name


def test_the_largest_layer_against_float64():
    """A batch of the 2.8b model: channels do not meet except in dB and dC, so that a few of them can be checked."""
    batch, length, width, states = 8, 2048, 5120, 16
    inputs = scan_inputs(batch, length, width, states, torch.bfloat16)
    grad_y = torch.randn(batch, length, width, device="cuda").bfloat16()
    grad_last = torch.randn(batch, width, states, device="cuda")
    found = gradients(triton.selective_scan, inputs, grad_y, grad_last)
    some = torch.tensor([0, 31, 32, 2500, 5119], device="cuda")
    axis = {"x": 2, "dt": 2, "z": 2, "y": 2, "A": 0, "D": 0, "dt_bias": 0, "initial_state": 1, "last": 1}

    def part(name, value):
        return value.index_select(axis[name], some) if name in axis else value

    exact = {name: part(name, value.detach()).to(EXACT).requires_grad_() for name, value in inputs.items()}
    expected = gradients(reference.selective_scan, exact, part("y", grad_y), part("last", grad_last))
    for name in axis:
        error = (part(name, found[name]).to(EXACT) - expected[name]).abs().max() / expected[name].abs().max()
        assert float(error) < 2 * torch.finfo(torch.bfloat16).eps, name


@pytest.mark.mamba_ssm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cuda_kernel_computes_the_same(dtype):
    """At a real size, outputs and gradients; dB and dC are sums over all channels."""
    inputs = scan_inputs(2, 2048, 1536, 16, dtype)
    del inputs["initial_state"]
    grad_y = torch.randn(2, 2048, 1536, device="cuda").to(dtype)
    results = []
    for function in (triton.selective_scan, mamba_ssm.selective_scan):
        y = function(**inputs)
        results.append([y, *torch.autograd.grad(y, list(inputs.values()), grad_y)])
    for ours, theirs, name in zip(*results, ["y", *inputs], strict=True):
        error = float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())
        assert error < (1e-4 if dtype == torch.float32 else 2**-6), name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_another_device_than_the_current_one(monkeypatch):
    """Kernels start where the tensors are, and the current device stays what it was."""
    split_into(monkeypatch, 2)
    inputs = {name: value.detach() for name, value in scan_inputs(2, 300, 70, 16, torch.float32).items()}
    taps = torch.randn(70, 4, device="cuda")

    def everything(device):
        here = {name: value.to(device).requires_grad_() for name, value in inputs.items()}
        x = triton.causal_conv1d(triton.rms_norm(here["x"], here["D"], 1e-5), taps.to(device))
        y = triton.selective_scan(**here | {"x": x})
        state, window = here["initial_state"].detach().clone(), torch.zeros(2, 70, 4, device=device)
        step = {n: v.detach()[:, 0] if n in ("dt", "B", "C", "z") else v.detach() for n, v in here.items()}
        step |= {"x": triton.causal_conv1d_update(x.detach()[:, 0], window, taps.to(device))}
        del step["initial_state"]
        out = triton.selective_state_update(state, **step)
        return [t.to("cuda:0") for t in (y, state, window, out, *torch.autograd.grad(y.sum(), list(here.values())))]

    for found, expected in zip(everything("cuda:1"), everything("cuda:0"), strict=True):
        torch.testing.assert_close(found, expected)
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("count", [0, 8])
def test_repeat_runs_are_identical(monkeypatch, count):
    """A race between programs would show as a difference between runs."""
    if count:
        split_into(monkeypatch, count)
    inputs = scan_inputs(2, 2048, 1536, 16, torch.bfloat16)
    grad_y, grad_last = torch.randn(2, 2048, 1536, device="cuda"), torch.randn(2, 1536, 16, device="cuda")
    first = gradients(triton.selective_scan, inputs, grad_y, grad_last)
    for _ in range(10):
        again = gradients(triton.selective_scan, inputs, grad_y, grad_last)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_more_than_2_to_31_elements(monkeypatch):
    """The last row of a batch beyond 2^31 elements is what it is alone."""
    split_into(monkeypatch, 1)
    batch, length, width, states = 9, 32_768, 8192, 1  # 2.4e9 elements
    if torch.cuda.mem_get_info()[0] < 60 << 30:
        pytest.skip("needs 60 GB of free GPU memory")
    x = torch.randn(batch, length, width, device="cuda", dtype=torch.bfloat16).requires_grad_()
    dt = torch.randn(1, 1, width, device="cuda", dtype=torch.bfloat16).expand_as(x)
    A = -torch.ones(width, states, device="cuda")
    B = torch.randn(batch, length, states, device="cuda")
    weight = torch.randn(width, 4, device="cuda")
    y = triton.selective_scan(triton.causal_conv1d(x, weight), dt, A, B, B)
    (dx,) = torch.autograd.grad(y, x, y.detach())
    last = x[-1:].detach().clone().requires_grad_()
    alone = triton.selective_scan(triton.causal_conv1d(last, weight), dt[-1:], A, B[-1:], B[-1:])
    assert torch.equal(y[-1:], alone)
    (dlast,) = torch.autograd.grad(alone, last, alone.detach())
    assert torch.equal(dx[-1:], dlast)


def test_rms_norm_and_convolution_against_float64():
    x = torch.randn(4, 1000, 2560, device="cuda").requires_grad_()
    weight, taps = (
        torch.randn(2560, device="cuda").requires_grad_(),
        torch.randn(2560, 4, device="cuda").requires_grad_(),
    )
    grad_y = torch.randn_like(x)
    for function, definition, leaves, options in (
        (triton.rms_norm, reference.rms_norm, (x, weight), {"eps": 1e-5}),
        (triton.causal_conv1d, reference.causal_conv1d, (x, taps), {"seq_idx": documents(4, 1000)}),
    ):
        found = torch.autograd.grad(function(*leaves, **options), leaves, grad_y)
        exact = [leaf.detach().to(EXACT).requires_grad_() for leaf in leaves]
        expected = torch.autograd.grad(definition(*exact, **options), exact, grad_y.to(EXACT))
        for a, b in zip(found, expected, strict=True):
            assert float((a.to(EXACT) - b).abs().max() / b.abs().max()) < 1e-5


def test_decoding_in_a_captured_graph():
    """State and window keep their addresses, so one captured graph serves every step."""
    inputs = {name: value.detach() for name, value in scan_inputs(2, 5, 256, 16, torch.bfloat16).items()}
    state = inputs.pop("initial_state")
    taps, window = torch.randn(256, 4, device="cuda"), torch.zeros(2, 256, 4, device="cuda")

    def step(t):
        now = {name: value[:, t] if name in ("x", "dt", "B", "C", "z") else value for name, value in inputs.items()}
        now["x"] = triton.causal_conv1d_update(now["x"], window, taps)
        return triton.selective_state_update(state, **now)

    before = state.clone()
    step(0)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step(0)
    state.copy_(before)
    window.zero_()
    expected = step(0).clone()
    state.copy_(before)
    window.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)
