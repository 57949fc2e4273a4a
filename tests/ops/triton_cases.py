"""The Triton kernels against the float64 definitions. On the CPU run by test_triton.py, under Triton's interpreter.

Shapes are tiny, since the interpreter is slow, and odd: no length is a multiple of a chunk, no width of a block.
"""

import os
from contextlib import contextmanager

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from scan_cases import Served, reference

from hf_mamba import ops
from hf_mamba import segments as rule
from hf_mamba.ops.operands import Conv, ConvStep, Norm, Scan, Step

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
EXACT = torch.float64
triton = Served("triton")


def random(*shape, seed=0, dtype=torch.float32):
    """Values that the storage dtype represents exactly, so that rounding of inputs is not measured."""
    generator = torch.Generator().manual_seed(seed + sum(shape) * 7919)
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def scan_inputs(batch, length, width, states, dtype=torch.float32, initial=True, seed=0):
    inputs = {
        "x": random(batch, length, width, seed=seed, dtype=dtype),
        "dt": random(batch, length, width, seed=seed + 1, dtype=dtype) - 1,
        "A": -random(width, states, seed=seed + 2).abs() * 2 - 0.05,
        "B": random(batch, length, states, seed=seed + 3, dtype=dtype),
        "C": random(batch, length, states, seed=seed + 4, dtype=dtype),
        "D": random(width, seed=seed + 5),
        "z": random(batch, length, width, seed=seed + 6, dtype=dtype),
        "dt_bias": random(width, seed=seed + 7) * 0.3,
    }
    if initial:
        inputs["initial_state"] = random(batch, width, states, seed=seed + 8)
    return inputs


def documents(batch, length, chance=0.15, seed=0):
    """Document numbers that skip some (empty documents), with documents of one token; each row cut elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    starts = (torch.rand(batch, length, generator=generator) < chance).int()
    starts[:, length // 2 : length // 2 + 2] = 1
    return (2 * starts.cumsum(1)).int().to(DEVICE)


@contextmanager
def segments(count):
    """Splits every sequence into about so many parts; by rule where `count` is 0."""
    with pytest.MonkeyPatch.context() as patch:
        if count:
            patch.setattr(rule, "choose", lambda *call: rule.of_length(call[3], count))
        yield


def run(function, inputs, weights, **options):
    """Outputs, and the gradients of their weighted sum for every input."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in inputs.items()}
    outputs = function(**leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    weights = (
        [random(*o.shape, seed=90 + i).to(o.dtype).to(EXACT) for i, o in enumerate(outputs)]
        if weights is None
        else weights
    )
    loss = sum((o.to(EXACT) * w).sum() for o, w in zip(outputs, weights, strict=True))
    return outputs, dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True)), weights


def error(found, expected):
    """The largest difference, relative to the largest expected value; absolute where everything expected is zero."""
    found, expected = found.detach().to(EXACT), expected.detach().to(EXACT)
    scale = float(expected.abs().max())
    return float((found - expected).abs().max()) / (scale or 1.0)


def check(function, definition, inputs, tolerance=3e-6, **options):
    """Outputs and gradients against the definition in float64; returns them with the loss's weights."""
    outputs, gradients, weights = run(function, inputs, None, **options)
    exact = {name: value.to(EXACT) for name, value in inputs.items()}
    true_outputs, true_gradients, _ = run(definition, exact, weights, **options)
    for i, (found, expected) in enumerate(zip(outputs, true_outputs, strict=True)):
        assert error(found, expected) < tolerance, f"output {i}"
    for name, value in inputs.items():
        assert gradients[name].dtype == value.dtype
        assert gradients[name].shape == value.shape
        assert error(gradients[name], true_gradients[name]) < tolerance, f"gradient of {name}"
    return outputs, gradients, weights


@pytest.mark.parametrize(
    ("batch", "length", "width", "states"),
    [(1, 1, 1, 1), (1, 67, 3, 1), (2, 7, 35, 3), (1, 7, 33, 16), (1, 3, 5, 64), (1, 3, 2, 128), (1, 2, 3, 100)],
)
@pytest.mark.parametrize("packed", [False, True])
def test_scan_shapes(batch, length, width, states, packed):
    if packed and length < 3:
        pytest.skip("one token is one document")
    seq_idx = documents(batch, length) if packed else None
    inputs = scan_inputs(batch, length, width, states, initial=not packed or states < 16)
    check(triton.selective_scan, reference.selective_scan, inputs, seq_idx=seq_idx, return_final_state=True)


@pytest.mark.parametrize("absent", ["D", "z", "dt_bias", "initial_state", "all"])
def test_scan_without_optional_inputs(absent):
    inputs = scan_inputs(1, 9, 5, 3)
    for name in ("D", "z", "dt_bias", "initial_state") if absent == "all" else (absent,):
        del inputs[name]
    check(triton.selective_scan, reference.selective_scan, inputs)


def test_scan_without_softplus():
    inputs = scan_inputs(1, 9, 5, 3)
    inputs["dt"] = inputs["dt"].abs() * 0.3
    inputs["dt_bias"] = inputs["dt_bias"].abs()
    check(triton.selective_scan, reference.selective_scan, inputs, dt_softplus=False, seq_idx=documents(1, 9))


def test_scan_small_and_large_steps():
    """Δ from 1e-7 to 30: softplus and its slope keep their relative accuracy where log2 near 1 has none."""
    inputs = scan_inputs(1, 8, 6, 2, initial=False)
    del inputs["dt_bias"], inputs["z"]
    inputs["dt"] = torch.linspace(-16, 30, 48, device=DEVICE).view(1, 8, 6)
    _, gradients, weights = run(triton.selective_scan, inputs, None)
    exact = {name: value.to(EXACT) for name, value in inputs.items()}
    _, true_gradients, _ = run(reference.selective_scan, exact, weights)
    relative = (gradients["dt"] - true_gradients["dt"]).abs() / true_gradients["dt"].abs()
    assert float(relative[:, :3].max()) < 1e-4  # steps under 1e-3, each judged by its own size
    assert error(gradients["dt"], true_gradients["dt"]) < 3e-6


@given(
    st.integers(1, 2), st.integers(1, 6), st.integers(1, 34), st.integers(1, 5), st.booleans(), st.booleans(),
    st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=8, phases=[Phase.generate])
def test_scan_any_shape(batch, length, width, states, packed, initial, seed):
    inputs = scan_inputs(batch, length, width, states, initial=initial, seed=seed)
    seq_idx = documents(batch, length, seed=seed) if packed else None
    check(triton.selective_scan, reference.selective_scan, inputs, 1e-5, seq_idx=seq_idx, return_final_state=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scan_half_precision(dtype):
    """Only the stored results are rounded: the error is one rounding, however long the sequence."""
    inputs = scan_inputs(1, 20, 6, 3, dtype=dtype)
    check(triton.selective_scan, reference.selective_scan, inputs, torch.finfo(dtype).eps, return_final_state=True)


def test_scan_strided_inputs():
    """Halves of in_proj's output, slices of x_proj's, a transposed x: same result as contiguous copies."""
    batch, length, width, states = 2, 7, 5, 3
    inputs = scan_inputs(batch, length, width, states)
    projected = torch.cat([inputs["x"], inputs["z"]], -1)
    selected = torch.cat([random(batch, length, 2), inputs["B"], inputs["C"]], -1)
    views = inputs | {"x": projected[..., :width], "z": projected[..., width:]}
    views |= {"B": selected[..., 2 : 2 + states], "C": selected[..., 2 + states :]}
    views["dt"] = inputs["dt"].transpose(1, 2).contiguous().transpose(1, 2)
    views["A"] = inputs["A"].t().contiguous().t()
    assert not any(views[name].is_contiguous() for name in ("x", "z", "B", "C", "dt", "A"))
    leaves = {name: value.detach().requires_grad_() for name, value in views.items()}
    y = triton.selective_scan(**leaves)
    gradients = torch.autograd.grad((y * y).sum(), list(leaves.values()))
    expected_leaves = {name: value.detach().clone().contiguous().requires_grad_() for name, value in views.items()}
    expected = triton.selective_scan(**expected_leaves)
    assert torch.equal(y, expected)
    for found, wanted in zip(
        gradients, torch.autograd.grad((expected * expected).sum(), list(expected_leaves.values())), strict=True
    ):
        assert torch.equal(found, wanted)
    assert error(y, reference.selective_scan(**{name: value.to(EXACT) for name, value in inputs.items()})) < 3e-6


def test_scan_offsets_above_32_bits():
    """Rows 1.2e9 elements apart, in memory that is reserved but never touched."""
    if DEVICE == "cuda":
        pytest.skip("tests/ops/test_triton_gpu.py does this with real sizes")
    inputs = scan_inputs(1, 3, 2, 1, dtype=torch.bfloat16)
    far = torch.empty(2_400_000_004, dtype=torch.bfloat16)
    for name in ("x", "dt", "z"):
        expected = triton.selective_scan(**inputs)
        view = far.as_strided((1, 3, 2), (2, 1_200_000_000, 1))
        view.copy_(inputs[name])
        assert torch.equal(triton.selective_scan(**inputs | {name: view}), expected)
    weight = random(2, 4)
    assert torch.equal(triton.causal_conv1d(view, weight), triton.causal_conv1d(inputs["z"], weight))


@pytest.mark.parametrize("packed", [False, True])
def test_scan_split_sequence(packed):
    """Three segments, the last one short, give what one segment gives, forward and backward."""
    inputs = scan_inputs(1, 130, 2, 1)
    # only the middle segment has a start, so the others must pass the state through
    seq_idx = (torch.arange(130, device=DEVICE) >= 70).int()[None] if packed else None
    options = {"seq_idx": seq_idx, "return_final_state": True}
    with segments(3):
        split, gradients, weights = check(triton.selective_scan, reference.selective_scan, inputs, **options)
    with segments(1):
        whole, whole_gradients, _ = run(triton.selective_scan, inputs, weights, **options)
    for found, expected in zip((*split, *gradients.values()), (*whole, *whole_gradients.values()), strict=True):
        assert error(found, expected) < 2e-6


def test_scan_is_deterministic():
    """Twice the same bits, from several channel blocks."""
    inputs = scan_inputs(1, 6, 133, 3)
    _, first, weights = run(triton.selective_scan, inputs, None)
    _, second, _ = run(triton.selective_scan, inputs, weights)
    for name in inputs:
        assert torch.equal(first[name], second[name])


def test_scan_split_over_rows_and_blocks():
    """Two rows of two channel blocks in two segments: every index of the buffers counts."""
    inputs = scan_inputs(2, 66, 130, 2)
    options = {"seq_idx": documents(2, 66, chance=0.03), "return_final_state": True}
    with segments(2):
        check(triton.selective_scan, reference.selective_scan, inputs, **options)


def test_scan_in_two_pieces():
    """Two calls that hand the state over give the outputs and gradients of one."""
    inputs = scan_inputs(2, 13, 4, 3)
    seq_idx = documents(2, 13)

    def in_pieces(**leaves):
        head = {name: value[:, :5] if name in ("x", "dt", "B", "C", "z") else value for name, value in leaves.items()}
        tail = {name: value[:, 5:] if name in ("x", "dt", "B", "C", "z") else value for name, value in leaves.items()}
        left, state = triton.selective_scan(**head, seq_idx=seq_idx[:, :5], return_final_state=True)
        right, state = triton.selective_scan(
            **tail | {"initial_state": state}, seq_idx=tail_idx, return_final_state=True
        )
        return torch.cat([left, right], 1), state

    seq_idx[:, 5] = seq_idx[:, 4]  # the first token of a call never starts a document
    tail_idx = seq_idx[:, 5:].contiguous()
    whole, gradients, weights = run(
        triton.selective_scan, inputs, None, seq_idx=seq_idx.contiguous(), return_final_state=True
    )
    pieces, piece_gradients, _ = run(in_pieces, inputs, weights)
    for found, expected in zip((*pieces, *piece_gradients.values()), (*whole, *gradients.values()), strict=True):
        assert error(found, expected) < 1e-6


def test_scan_packed_is_separate():
    """Nothing crosses a document boundary, not even when the document before it is huge."""
    inputs = scan_inputs(1, 12, 3, 2, initial=False)
    inputs["x"][:, :7] *= 1e20
    seq_idx = (torch.arange(12, device=DEVICE) >= 7).int()[None]
    packed = triton.selective_scan(**inputs, seq_idx=seq_idx)
    alone = triton.selective_scan(
        **{name: value[:, 7:] if name in ("x", "dt", "B", "C", "z") else value for name, value in inputs.items()}
    )
    assert torch.equal(packed[:, 7:], alone)


def test_scan_final_state_only():
    """A loss that sees only the final state; then only y, with the state returned and unused."""
    inputs = scan_inputs(1, 6, 3, 2)
    del inputs["D"], inputs["z"], inputs["C"]
    C = random(1, 6, 2)
    check(
        lambda **leaves: triton.selective_scan(**leaves, C=C, return_final_state=True)[1],
        lambda **leaves: reference.selective_scan(**leaves, C=C.to(EXACT), return_final_state=True)[1],
        inputs,
    )
    check(
        lambda **leaves: triton.selective_scan(**leaves, C=C, return_final_state=True)[0],
        lambda **leaves: reference.selective_scan(**leaves, C=C.to(EXACT), return_final_state=True)[0],
        inputs,
    )


def test_scan_empty():
    inputs = scan_inputs(1, 0, 3, 2)
    y, state = triton.selective_scan(**inputs, return_final_state=True)
    assert y.shape == (1, 0, 3)
    assert torch.equal(state, inputs["initial_state"])


@pytest.mark.parametrize(
    ("batch", "length", "width", "taps"), [(1, 3, 130, 4), (1, 2, 3, 4), (2, 18, 5, 3), (1, 9, 4, 1)]
)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("initial", [False, True])
def test_conv(batch, length, width, taps, packed, initial):
    if initial and taps == 1:
        pytest.skip("one tap has no past")
    inputs = {"x": random(batch, length, width), "weight": random(width, taps), "bias": random(width, seed=1)}
    if initial:
        inputs["initial_state"] = random(batch, width, taps - 1)
    seq_idx = documents(batch, length) if packed else None
    check(triton.causal_conv1d, reference.causal_conv1d, inputs, seq_idx=seq_idx)


@pytest.mark.parametrize("activation", ["silu", None])
def test_conv_variants(activation):
    """No bias, no activation, half precision, a view of in_proj's output; longer than one program's share of steps."""
    inputs = {"x": random(1, 150, 3), "weight": random(3, 4)}
    check(triton.causal_conv1d, reference.causal_conv1d, inputs, activation=activation)
    halves = {"x": random(1, 9, 3, dtype=torch.bfloat16), "weight": random(3, 4)}
    check(triton.causal_conv1d, reference.causal_conv1d, halves, torch.finfo(torch.bfloat16).eps, activation=activation)
    wide = random(2, 6, 10)
    for view in (wide[..., 5:], wide[..., 5:].transpose(1, 2).contiguous().transpose(1, 2)):
        assert not view.is_contiguous()
        found = triton.causal_conv1d(view, random(5, 4), activation=activation)
        assert torch.equal(found, triton.causal_conv1d(view.contiguous(), random(5, 4), activation=activation))


@pytest.mark.parametrize(("rows", "width"), [((3,), 3), ((2, 3), 77), ((515,), 4)])
def test_rms_norm(rows, width):
    inputs = {"x": random(*rows, width), "weight": random(width)}
    check(triton.rms_norm, reference.rms_norm, inputs, eps=1e-5)


def test_rms_norm_dtypes():
    """fp32 residual in, the weight's dtype out."""
    x, weight = random(3, 9), random(9, dtype=torch.bfloat16)
    found = triton.rms_norm(x, weight, 1e-5)
    assert found.dtype == torch.bfloat16
    expected = reference.rms_norm(x.to(EXACT), weight.to(EXACT), 1e-5)
    assert error(found, expected) < torch.finfo(torch.bfloat16).eps  # the interpreter truncates, the GPU rounds
    strided = random(4, 3, 9).transpose(0, 1)
    assert (
        error(triton.rms_norm(strided, random(9), 1e-5), reference.rms_norm(strided.to(EXACT), random(9), 1e-5)) < 1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_rms_norm(dtype):
    def definition(hidden, residual, weight, eps):
        total = hidden + residual
        return reference.rms_norm(total, weight, eps), total

    inputs = {"hidden": random(2, 5, 33, dtype=dtype), "residual": random(2, 5, 33, seed=1), "weight": random(33)}
    tolerance = 3e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    check(triton.add_rms_norm, definition, inputs, tolerance, eps=1e-5)
    _, total = triton.add_rms_norm(**inputs, eps=1e-5)
    assert total.dtype == torch.float32
    assert torch.equal(total, inputs["hidden"].float() + inputs["residual"])


@pytest.mark.parametrize("states", [1, 3, 16, 128])
def test_decode_steps_are_a_scan(states):
    """Token by token, in place, from strided rows, gives the scan's outputs and state."""
    inputs = scan_inputs(3, 4, 35, states)
    state = inputs.pop("initial_state")
    expected, last = reference.selective_scan(
        **{name: value.to(EXACT) for name, value in inputs.items()},
        initial_state=state.to(EXACT),
        return_final_state=True,
    )
    address = state.data_ptr()
    for t in range(4):
        step = {name: value[:, t] if name in ("x", "dt", "B", "C", "z") else value for name, value in inputs.items()}
        y = triton.selective_state_update(state, **step)
        assert error(y, expected[:, t]) < 3e-6
    assert state.data_ptr() == address
    assert error(state, last) < 3e-6


@pytest.mark.parametrize("contiguous", [True, False])
def test_decode_convolution(contiguous):
    x, weight, bias = random(2, 6, 5), random(5, 4), random(5, seed=1)
    window = torch.zeros(2, 5, 4, device=DEVICE)
    if not contiguous:
        window = window.transpose(1, 2).contiguous().transpose(1, 2)
    expected = reference.causal_conv1d(x.to(EXACT), weight.to(EXACT), bias.to(EXACT))
    for t in range(6):
        assert error(triton.causal_conv1d_update(x[:, t], window, weight, bias), expected[:, t]) < 3e-6
    assert torch.equal(window, x[:, 2:].transpose(1, 2))


def test_operator_contracts():
    """Fake implementations, autograd registration and mutation, by PyTorch's own checker."""
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    inputs = {name: value.requires_grad_() for name, value in scan_inputs(1, 3, 4, 2).items()}
    op = torch.ops.hf_mamba
    scan = (*Scan(**inputs, seq_idx=documents(1, 3)), True, "triton")
    torch.library.opcheck(op.chunked_scan.default, scan, test_utils=tests)
    x, weight = random(1, 3, 4).requires_grad_(), random(4, 3).requires_grad_()
    conv = (*Conv(x, weight, initial_state=random(1, 4, 2).requires_grad_()), True, "triton")
    torch.library.opcheck(op.causal_conv1d.default, conv, test_utils=tests)
    for residual in (None, random(1, 3, 4).requires_grad_()):
        norm = (*Norm(x, residual, random(4).requires_grad_(), 1e-5), True, "triton")
        torch.library.opcheck(op.norm.default, norm, test_utils=tests)
    step = {name: value.detach()[:, 0] if name in "xdtzBC" else value.detach() for name, value in inputs.items()}
    del step["initial_state"]
    tests = ("test_schema", "test_faketensor")
    step = (*Step(random(1, 4, 2), **step), "triton")
    torch.library.opcheck(op.selective_state_update.default, step, test_utils=tests)
    step = (*ConvStep(random(1, 4, 3), random(1, 4), random(4, 3)), "triton")
    torch.library.opcheck(op.causal_conv1d_update.default, step, test_utils=tests)


def test_compiled_training_step():
    """torch.compile(fullgraph=True) through the public operations, forward and backward."""
    inputs = scan_inputs(1, 5, 4, 2)
    weight = random(4, 3)

    def block(x, dt, A, B, C, D, z, dt_bias, initial_state):
        x = ops.causal_conv1d(ops.rms_norm(x, D, 1e-5), weight)
        y, state = ops.selective_scan(x, dt, A, B, C, D, z, dt_bias, True, initial_state, None, True)
        return y, state

    with ops.backend("triton"):
        plain, gradients, weights = run(block, inputs, None)
        compiled, compiled_gradients, _ = run(
            torch.compile(block, fullgraph=True, backend="aot_eager"), inputs, weights
        )
    for found, expected in zip((*compiled, *compiled_gradients.values()), (*plain, *gradients.values()), strict=True):
        assert error(found, expected) < 1e-6


def test_compiled_decode_step():
    x, state, window = random(2, 4), random(2, 4, 3), random(2, 4, 2)
    A, B, weight = -random(4, 3).abs(), random(2, 3), random(4, 2)

    def step(state, window):
        y = ops.causal_conv1d_update(x, window, weight)
        return ops.selective_state_update(state, y, x, A, B, B)

    with ops.backend("triton"):
        eager = state.clone(), window.clone()
        expected = step(*eager)
        traced = state.clone(), window.clone()
        found = torch.compile(step, fullgraph=True, backend="aot_eager")(*traced)
    assert torch.equal(found, expected)
    assert torch.equal(traced[0], eager[0])
    assert torch.equal(traced[1], eager[1])


def test_second_backward_through_a_retained_graph():
    x = random(1, 5, 4).requires_grad_()
    weight = random(4, 3).requires_grad_()
    rest = {name: value for name, value in scan_inputs(1, 5, 4, 2).items() if name != "x"}
    y = triton.selective_scan(triton.causal_conv1d(triton.rms_norm(x, rest["D"], 1e-5), weight), **rest)
    first = torch.autograd.grad(y.sum(), (x, weight), retain_graph=True)
    second = torch.autograd.grad(y.sum(), (x, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("frozen", [None, "weight", "hidden"])
@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm"])
def test_gradients_of_a_norms_gradients(name, frozen):
    given = {"hidden": random(2, 3, 9), "residual": random(2, 3, 9, seed=1), "weight": random(9, seed=2)}

    def twice(backend, dtype):
        leaves = {key: value.to(dtype).requires_grad_(key != frozen) for key, value in given.items()}
        if name == "rms_norm":
            loss = backend.rms_norm(leaves["hidden"] * leaves["residual"], leaves["weight"], 1e-5).pow(3).sum()
        else:
            normed, total = backend.add_rms_norm(*leaves.values(), 1e-5)
            loss = normed.pow(3).sum() + total.square().sum()
        wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
        first = torch.autograd.grad(loss, wanted, create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.pow(3).sum() for g in first), wanted)]

    for found, expected in zip(twice(triton, torch.float32), twice(reference, EXACT), strict=True):
        torch.testing.assert_close(found.double(), expected.double(), rtol=2e-4, atol=2e-4)


def dual_inputs(batch, length, heads, width, groups, states, dtype=torch.float32):
    return {
        "x": random(batch, length, heads, width, seed=1, dtype=dtype),
        "a": -random(batch, length, heads, seed=2).abs() * 0.3,
        "w": random(batch, length, heads, seed=3),
        "B": random(batch, length, groups, states, seed=4, dtype=dtype),
        "C": random(batch, length, groups, states, seed=5, dtype=dtype),
        "D": random(heads, seed=6),
        "initial_state": random(batch, heads, width, states, seed=7),
    }


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 1, 1), (2, 70, 2, 5, 1, 3), (1, 128, 3, 2, 3, 1), (1, 200, 4, 17, 2, 20)], ids=str
)
@pytest.mark.parametrize("packed", [False, True])
def test_dual_shapes(shape, packed):
    if packed and shape[1] < 3:
        pytest.skip("one token is one document")
    seq_idx = documents(*shape[:2], chance=0.05) if packed else None
    check(triton.ssd, reference.ssd, dual_inputs(*shape), 1e-5, seq_idx=seq_idx, return_final_state=True)


@pytest.mark.parametrize("absent", ["D", "initial_state"])
def test_dual_without_optional_inputs(absent):
    inputs = dual_inputs(1, 9, 2, 3, 1, 4)
    del inputs[absent]
    check(triton.ssd, reference.ssd, inputs, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dual_half_precision(dtype):
    inputs = dual_inputs(1, 70, 2, 5, 1, 3, dtype)
    check(triton.ssd, reference.ssd, inputs, torch.finfo(dtype).eps, return_final_state=True)


def test_dual_gives_the_same_bits_twice_and_follows_strides():
    inputs = dual_inputs(1, 70, 4, 3, 2, 4)
    joined = torch.cat([inputs[name].flatten(2) for name in ("x", "B", "C")], 2)
    x, B, C = joined.split([12, 8, 8], 2)
    views = inputs | {"x": x.unflatten(2, (4, 3)), "B": B.unflatten(2, (2, 4)), "C": C.unflatten(2, (2, 4))}
    assert not views["x"].is_contiguous()
    outputs, gradients, weights = run(triton.ssd, inputs, None)
    with torch.no_grad():
        assert torch.equal(triton.ssd(**views), outputs[0])
    _, again, _ = run(triton.ssd, inputs, weights)
    assert all(torch.equal(again[name], gradient) for name, gradient in gradients.items())


def test_dual_step_by_step():
    inputs = dual_inputs(2, 5, 4, 3, 2, 4)
    want, last = reference.ssd(**{name: t.to(EXACT) for name, t in inputs.items()}, return_final_state=True)
    state = inputs["initial_state"].clone()
    steps = [
        triton.ssd_update(state, *(inputs[n][:, t] for n in ("x", "a", "w", "B", "C")), inputs["D"]) for t in range(5)
    ]
    assert error(torch.stack(steps, 1), want) < 3e-6
    assert error(state, last) < 3e-6


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_norm(groups, dtype):
    inputs = {"x": random(2, 5, 12, seed=1, dtype=dtype), "z": random(2, 5, 12, seed=2, dtype=dtype)}
    inputs["weight"] = random(12, seed=3, dtype=dtype)
    tolerance = 3e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    check(triton.gated_rms_norm, reference.gated_rms_norm, inputs, tolerance, eps=1e-5, groups=groups)


def test_dispatch_refuses_what_the_kernels_cannot():
    with ops.backend("triton"):
        with pytest.raises(ValueError, match="fp32, bf16 and fp16"):
            ops.selective_scan(**{name: value.double() for name, value in scan_inputs(1, 2, 2, 2).items()})
        with pytest.raises(ValueError, match="state size 129"):
            ops.selective_scan(**scan_inputs(1, 2, 2, 129))
        with pytest.raises(ValueError, match="heads of 129 channels"):
            ops.ssd(**dual_inputs(1, 2, 2, 129, 1, 2))
