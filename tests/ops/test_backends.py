"""Every backend that runs here computes the reference's outputs and gradients."""

import pytest
import torch
from scan_cases import assert_close, conv_arguments, documents, leaves, reference, scan_arguments, with_gradients

from hf_mamba import ops

FAST = ["torch", "cpu"]
# (B, L, E, N): nothing is a multiple of anything, one of everything, and the real proportions
SHAPES = [(2, 70, 20, 16), (1, 1, 1, 1), (3, 33, 17, 5), (1, 65, 150, 24), (2, 64, 128, 16), (1, 7, 3, 128)]
EXACT = {torch.float64: 1e-12, torch.float32: 5e-6}


@pytest.fixture(params=FAST)
def backend(request):
    reason = ops.available_backends()[request.param]
    if reason != "available":
        pytest.skip(reason)
    with ops.backend(request.param):
        yield request.param


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_scan_and_all_its_gradients(backend, shape, packed, dtype):
    if backend == "cpu" and dtype == torch.float64:
        pytest.skip("the kernels compute in fp32")
    arguments = scan_arguments(*shape)
    options = {"seq_idx": documents(*shape[:2]) if packed else None, "return_final_state": True}
    want = with_gradients(reference.selective_scan, leaves(arguments), **options)
    got = with_gradients(ops.selective_scan, leaves(arguments, dtype), **options)
    assert got["output 0"].dtype == dtype
    assert_close(got, want, EXACT[dtype])


@pytest.mark.parametrize("left_out", ["D", "z", "dt_bias", "initial_state", "all", "softplus"])
def test_scan_without_optional_arguments(backend, left_out):
    arguments = scan_arguments(2, 37, 19, 16)
    optional = ["D", "z", "dt_bias", "initial_state"]
    options = {"dt_softplus": left_out != "softplus"}
    if left_out == "softplus":
        arguments["dt"], arguments["dt_bias"] = arguments["dt"].abs(), arguments["dt_bias"].abs()
    for name in optional if left_out == "all" else [left_out]:
        arguments.pop(name, None)
    want = with_gradients(reference.selective_scan, leaves(arguments), **options)
    assert_close(with_gradients(ops.selective_scan, leaves(arguments, torch.float32), **options), want, 5e-6)


def test_scan_gradient_of_the_final_state_alone(backend):
    arguments = scan_arguments(2, 37, 19, 16)

    def final(**kw):
        return ops.selective_scan(**kw, return_final_state=True)[1]

    def expected(**kw):
        return reference.selective_scan(**kw, return_final_state=True)[1]

    kept = {name: arguments[name] for name in ("x", "dt", "A", "B", "dt_bias", "initial_state")}
    rest = {"C": arguments["C"].float()}
    want = with_gradients(expected, leaves(kept), C=arguments["C"])
    assert_close(with_gradients(final, leaves(kept, torch.float32), **rest), want, 5e-6)


def test_scan_over_an_empty_sequence_returns_the_state(backend):
    arguments = {name: t.float() for name, t in scan_arguments(2, 0, 5, 4).items()}
    y, state = ops.selective_scan(**arguments, return_final_state=True)
    assert y.shape == (2, 0, 5)
    torch.testing.assert_close(state, arguments["initial_state"])


@pytest.mark.parametrize("steps", [-60.0, 60.0])
def test_scan_with_extreme_steps(backend, steps):
    """softplus far out on either side: a step of nothing keeps the state, a huge one forgets it."""
    arguments = scan_arguments(1, 40, 16, 16)
    arguments["dt"] = arguments["dt"] + steps
    want = with_gradients(reference.selective_scan, leaves(arguments))
    got = with_gradients(ops.selective_scan, leaves(arguments, torch.float32))
    assert_close(got, want, 2e-5)


def test_scan_keeps_nan_visible(backend):
    arguments = {name: t.float() for name, t in scan_arguments(1, 40, 16, 16).items()}
    for name in ("x", "dt", "B"):
        broken = arguments | {name: arguments[name].clone()}
        broken[name][0, 10] = float("nan")
        assert ops.selective_scan(**broken)[0, 10:].isnan().any()


@pytest.mark.parametrize(
    "shape", [(2, 70, 20, 4), (1, 1, 1, 4), (3, 200, 17, 2), (1, 65, 150, 8), (2, 2, 5, 4)], ids=str
)
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("carried", [False, True])
def test_convolution_and_all_its_gradients(backend, shape, packed, activation, carried):
    arguments = conv_arguments(*shape)
    if not carried:
        del arguments["initial_state"]
    options = {"activation": activation, "seq_idx": documents(*shape[:2], rate=0.3) if packed else None}
    want = with_gradients(reference.causal_conv1d, leaves(arguments), **options)
    got = with_gradients(ops.causal_conv1d, leaves(arguments, torch.float32), **options)
    assert_close(got, want, 5e-6)


def test_bfloat16_inputs_cost_only_their_own_rounding(backend):
    """Inputs, outputs and gradients are rounded to bf16, nothing between: float64 on the same inputs is near."""
    arguments = {name: t.bfloat16().double() for name, t in scan_arguments(2, 100, 40, 16).items()}
    kept_exact = ("A", "D", "dt_bias", "initial_state")
    given = {n: t.detach().to(torch.float32 if n in kept_exact else torch.bfloat16) for n, t in arguments.items()}
    want = with_gradients(reference.selective_scan, leaves(arguments), return_final_state=True)
    got = with_gradients(ops.selective_scan, leaves(given), return_final_state=True)
    assert got["output 0"].dtype == torch.bfloat16
    assert got["output 1"].dtype == torch.float32
    assert all(got[f"gradient of {name}"].dtype == t.dtype for name, t in given.items())
    assert_close(got, want, 2**-7)
    assert_close({"s": got["output 1"]}, {"s": want["output 1"]}, 5e-6)

    mixed = leaves(given)
    mixed["dt"], mixed["z"] = (mixed[n].detach().double().requires_grad_() for n in ("dt", "z"))
    got = with_gradients(ops.selective_scan, mixed, return_final_state=True)
    assert got["gradient of dt"].dtype == torch.float64
    assert_close(got, want, 2**-7)

    arguments = {name: t.bfloat16().double() for name, t in conv_arguments(2, 100, 40, 4).items()}
    want = with_gradients(reference.causal_conv1d, leaves(arguments))
    assert_close(with_gradients(ops.causal_conv1d, leaves(arguments, torch.bfloat16)), want, 2**-7)


def test_strided_and_broadcast_inputs(backend):
    """x and z are halves of one projection, B and C slices of another, gradients arrive transposed or expanded."""
    width, states = 24, 16
    joint = torch.randn(2, 50, 2 * width, dtype=torch.float64)
    small = torch.randn(2, 50, 3 + 2 * states, dtype=torch.float64)
    rest = {n: t for n, t in scan_arguments(2, 50, width, states).items() if n in ("dt", "A", "D")}

    def run(function, joint, small, **rest):
        x, z = joint.chunk(2, -1)
        _, B, C = small.split([3, states, states], -1)
        return function(x, B=B, C=C, z=z, **rest).transpose(0, 1)

    want = with_gradients(
        lambda **kw: run(reference.selective_scan, **kw), leaves({"joint": joint, "small": small} | rest)
    )
    given = leaves({"joint": joint, "small": small} | rest, torch.float32)
    assert_close(with_gradients(lambda **kw: run(ops.selective_scan, **kw), given), want, 5e-6)

    x = torch.randn(2, width, 50).transpose(1, 2).requires_grad_()  # channels not dense
    weight = torch.randn(width, 4)
    y = ops.causal_conv1d(x, weight)
    (gradient,) = torch.autograd.grad(y.sum(), x)  # an expanded gradient
    exact = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(reference.causal_conv1d(exact, weight.double()).sum(), exact)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-5)


def test_decode_steps(backend):
    """Steps one at a time equal the sequence operations, in state and output, in fp32 and with bf16 inputs."""
    arguments = scan_arguments(3, 6, 150, 16)
    want, state = reference.selective_scan(**arguments, return_final_state=True)
    conv = conv_arguments(3, 6, 150, 4)
    conv_want = reference.causal_conv1d(**conv)
    single = {name: t.float() for name, t in arguments.items()}
    running = single.pop("initial_state").clone()
    window = torch.cat([torch.zeros(3, 150, 1), conv["initial_state"].float()], -1)
    for t in range(6):
        step = {name: value[:, t] if value.dim() == 3 else value for name, value in single.items()}
        y = ops.selective_state_update(running, **step)
        torch.testing.assert_close(y.double(), want[:, t], rtol=1e-4, atol=1e-5)
        y = ops.causal_conv1d_update(conv["x"][:, t].float(), window, conv["weight"].float(), conv["bias"].float())
        torch.testing.assert_close(y.double(), conv_want[:, t], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(running.double(), state, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(window.double(), conv["x"][:, -4:].transpose(1, 2).contiguous(), rtol=1e-6, atol=1e-6)

    low = {name: t.bfloat16() if t.dim() == 2 and name != "A" else t for name, t in step.items()}
    twin = running.clone()
    y = ops.selective_state_update(running, **low)
    with ops.backend("reference"):
        expected = ops.selective_state_update(twin, **low)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(running, twin, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y, expected, rtol=2**-7, atol=1e-3)
