"""What training does with the operations: compile, autocast, checkpoint, a second backward; and the loss head."""

import pytest
import torch
from scan_cases import conv_arguments, documents, leaves, scan_arguments
from torch.utils.checkpoint import checkpoint

from hf_mamba import ops
from hf_mamba.ops import reference
from hf_mamba.ops.operands import Conv, Scan


@pytest.fixture(params=["torch", "cpu"])
def backend(request):
    with ops.backend(request.param):
        yield request.param


def block(arguments: dict, weight, norm, head, labels, seq_idx=None):
    """Every operation of a layer and the loss."""
    u = ops.causal_conv1d(arguments["x"], weight, seq_idx=seq_idx)
    rest = {name: t for name, t in arguments.items() if name != "x"}
    y, state = ops.selective_scan(u, **rest, seq_idx=seq_idx, return_final_state=True)
    loss = ops.linear_cross_entropy(ops.rms_norm(y, norm, 1e-5).flatten(0, 1), head, labels, z_loss=1e-3)
    return loss + state.square().mean()


def block_arguments(length: int = 40):
    arguments = leaves(scan_arguments(2, length, 24, 16), torch.float32)
    others = [torch.randn(24, 4), torch.ones(24), torch.randn(31, 24) / 5]
    labels = torch.randint(0, 31, (2 * length,))
    labels[::5] = -100
    return arguments, [t.requires_grad_() for t in others], labels


@pytest.mark.parametrize("packed", [False, True])
def test_compiled_training_step(backend, packed):
    """fullgraph: nothing of a layer breaks the graph, forward or backward. aot_eager traces as inductor does."""
    torch.compiler.reset()
    arguments, others, labels = block_arguments()
    seq_idx = documents(2, 40) if packed else None
    inputs = [*arguments.values(), *others]
    want = block(arguments, *others, labels, seq_idx)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    got = compiled(arguments, *others, labels, seq_idx)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_compiled_decode_step(backend):
    torch.compiler.reset()
    arguments = {name: t.float() for name, t in scan_arguments(2, 1, 24, 16).items()}
    step = {name: t[:, 0] if t.dim() == 3 else t for name, t in arguments.items() if name != "initial_state"}
    weight = torch.randn(24, 4)

    def decode(x, state, window):
        u = ops.causal_conv1d_update(x, window, weight)
        return ops.selective_state_update(state, u, **{name: t for name, t in step.items() if name != "x"})

    caches = [arguments["initial_state"].clone(), torch.randn(2, 24, 4)]
    twins = [t.clone() for t in caches]
    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        torch.testing.assert_close(compiled(step["x"], *caches), decode(step["x"], *twins), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(caches, twins, rtol=1e-4, atol=1e-5)


def test_operators_obey_pytorch_rules(backend):
    """PyTorch's own check of schema, fake implementations (dynamic shapes too) and autograd registration."""
    a = leaves(scan_arguments(2, 40, 24, 16), torch.float32)
    scan = torch.ops.hf_mamba.chunked_scan.default
    torch.library.opcheck(scan, (*Scan(**a, seq_idx=documents(2, 40)), True, backend))
    bare = {name: a[name] for name in "xABC"} | {"dt": a["dt"].detach().abs().requires_grad_()}
    torch.library.opcheck(scan, (*Scan(**bare, dt_softplus=False), True, backend))
    c = leaves(conv_arguments(2, 40, 24, 4), torch.float32)
    torch.library.opcheck(torch.ops.hf_mamba.causal_conv1d.default, (*Conv(**c), True, backend))


def test_finite_differences():
    arguments = leaves(scan_arguments(1, 5, 3, 2))
    names = list(arguments)

    def scan(*values):
        return ops.selective_scan(**dict(zip(names, values, strict=True)), return_final_state=True)

    assert torch.autograd.gradcheck(scan, tuple(arguments.values()))
    conv = leaves(conv_arguments(1, 6, 3, 4))
    assert torch.autograd.gradcheck(lambda *v: ops.causal_conv1d(*v[:3], "silu", v[3]), tuple(conv.values()))
    x, weight = torch.randn(3, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    norm = (x.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, w: ops.rms_norm(x, w, 1e-5), norm)


def test_autocast_does_not_lower_the_arithmetic(backend):
    """Inside autocast the fp32 matrix products of the chunked scan stay fp32."""
    arguments = {name: t.float() for name, t in scan_arguments(2, 40, 24, 16).items()}
    want = ops.selective_scan(**arguments)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.selective_scan(**arguments), want)


def test_second_backward_through_a_retained_graph(backend):
    arguments, others, labels = block_arguments()
    inputs = [*arguments.values(), *others]
    loss = block(arguments, *others, labels)
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradient_checkpointing(backend):
    arguments, others, labels = block_arguments()
    inputs = [*arguments.values(), *others]
    want = torch.autograd.grad(block(arguments, *others, labels), inputs)
    got = torch.autograd.grad(checkpoint(block, arguments, *others, labels, use_reentrant=False), inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_gradients_of_gradients_are_the_definitions(backend):
    """Although one operand is computed from another, whose own gradient must not count it twice."""
    found = []
    for name in (backend, "reference"):
        arguments = leaves(scan_arguments(1, 5, 3, 2), torch.float32)
        x, dt = arguments["x"], arguments["dt"]
        with ops.backend(name):
            y = ops.selective_scan(**arguments | {"dt": dt * x})
            gradients = torch.autograd.grad(y.square().sum(), [x, dt], create_graph=True)
            found.append(torch.autograd.grad(sum(g.square().sum() for g in gradients), [x, dt]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_only_what_is_asked_for_is_differentiated(backend):
    """Frozen weights, as under LoRA: the gradients that remain are the same."""
    arguments = leaves(scan_arguments(2, 40, 24, 16), torch.float32)
    (want,) = torch.autograd.grad(ops.selective_scan(**arguments).sum(), arguments["dt"])
    frozen = {name: t if name == "dt" else t.detach() for name, t in arguments.items()}
    (got,) = torch.autograd.grad(ops.selective_scan(**frozen).sum(), arguments["dt"])
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rms_norm(backend, dtype):
    if backend == "cpu" and dtype == torch.float64:
        pytest.skip("the kernels compute in fp32")
    x, weight = torch.randn(3, 7, 40).to(dtype).requires_grad_(), torch.randn(40).to(dtype).requires_grad_()
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    got, want = ops.rms_norm(x, weight, 1e-5), reference.rms_norm(*exact, 1e-5)
    assert got.dtype == dtype
    with torch.no_grad():
        torch.testing.assert_close(
            ops.rms_norm(x, weight, 1e-5), got, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=0
        )
        strided = ops.rms_norm(x.transpose(0, 1), weight, 1e-5).transpose(0, 1)
        torch.testing.assert_close(strided, got, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=0)
    scale = torch.randn(3, 7, 40).to(dtype)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    pairs = [(got, want)]
    pairs += zip(
        torch.autograd.grad((got * scale).sum(), (x, weight)),
        torch.autograd.grad((want * scale.double()).sum(), exact),
        strict=True,
    )
    for a, b in pairs:
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * b.abs().max().item())


@pytest.mark.parametrize("num_items", [None, 13, torch.tensor(21)], ids=["mean", "int", "tensor"])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [1, 16, 1000])
def test_loss_and_its_gradients(num_items, z_loss, chunk):
    hidden, weight, bias = (
        torch.randn(*shape, dtype=torch.float64).requires_grad_() for shape in ((50, 8), (31, 8), (31,))
    )
    labels = torch.randint(0, 31, (50,))
    labels[::7] = -100
    options = {"num_items": num_items, "z_loss": z_loss}
    want = reference.linear_cross_entropy(hidden, weight, labels, bias, **options)
    got = ops.linear_cross_entropy(hidden, weight, labels, bias, **options, chunk=chunk)
    torch.testing.assert_close(got, want)
    inputs = (hidden, weight, bias)
    for a, b in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [7, 1000])
def test_the_losses_of_rows(chunk, z_loss):
    """Their cross-entropies, z-loss or not."""
    hidden, weight = torch.randn(50, 8, dtype=torch.float64).requires_grad_(), torch.randn(31, 8, dtype=torch.float64)
    labels = torch.randint(0, 31, (50,))
    labels[::7] = -100
    loss, rows = ops.linear_cross_entropy(hidden, weight, labels, chunk=chunk, z_loss=z_loss, row_losses=True)
    want = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="none")
    torch.testing.assert_close(rows, want)
    assert not rows.requires_grad
    assert torch.equal(loss, ops.linear_cross_entropy(hidden, weight, labels, chunk=chunk, z_loss=z_loss))
    totals = loss, ops.linear_cross_entropy(hidden, weight, labels, z_loss=z_loss)
    torch.testing.assert_close(*(torch.autograd.grad(total, hidden)[0] for total in totals))


def test_loss_with_frozen_parts_and_without_gradients():
    hidden, weight = torch.randn(20, 8).requires_grad_(), torch.randn(31, 8).requires_grad_()
    labels = torch.randint(0, 31, (20,))
    want = torch.autograd.grad(ops.linear_cross_entropy(hidden, weight, labels), (hidden, weight))
    assert torch.equal(
        torch.autograd.grad(ops.linear_cross_entropy(hidden, weight.detach(), labels), hidden)[0], want[0]
    )
    assert torch.equal(
        torch.autograd.grad(ops.linear_cross_entropy(hidden.detach(), weight, labels), weight)[0], want[1]
    )
    with torch.no_grad():
        assert not ops.linear_cross_entropy(hidden, weight, labels).requires_grad


def test_loss_of_extreme_logits_and_of_nothing():
    hidden = torch.tensor([[1000.0], [-1000.0]], requires_grad=True)
    weight, labels = torch.tensor([[1.0], [-1.0]]), torch.tensor([1, 1])
    loss = ops.linear_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(loss, torch.tensor(1000.0))
    assert torch.autograd.grad(loss, hidden)[0].isfinite().all()
    ignored = torch.full((2,), -100)
    assert ops.linear_cross_entropy(hidden, weight, ignored, num_items=5) == 0


def test_loss_under_autocast_is_near_and_its_weight_gradient_is_summed_in_fp32():
    hidden, weight = torch.randn(600, 32).requires_grad_(), (torch.randn(50, 32) / 6).requires_grad_()
    labels = torch.randint(0, 50, (600,))
    want = ops.linear_cross_entropy(hidden, weight, labels)
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.linear_cross_entropy(hidden, weight, labels, chunk=64)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-2, atol=0)
    for a, b in zip(
        torch.autograd.grad(got, (hidden, weight)), torch.autograd.grad(want, (hidden, weight)), strict=True
    ):
        assert a.dtype == torch.float32
        assert (a - b).norm() <= 1e-2 * b.norm()


def test_shapes_that_do_not_agree_are_named():
    arguments = {name: t.float() for name, t in scan_arguments(2, 10, 8, 4).items()}
    for name, wrong in (("dt", (2, 9, 8)), ("B", (2, 10, 5)), ("D", (7,)), ("initial_state", (2, 4, 8))):
        with pytest.raises(ValueError, match=f"^{name} has shape"):
            ops.selective_scan(**arguments | {name: torch.zeros(wrong)})
    with pytest.raises(ValueError, match="weight has shape"):
        ops.causal_conv1d(arguments["x"], torch.zeros(9, 4))
    with pytest.raises(ValueError, match="'gelu' is not supported"):
        ops.causal_conv1d(arguments["x"], torch.zeros(8, 4), activation="gelu")
