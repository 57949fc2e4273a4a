"""What decoding adds to the operations: products of a few rows, and rates that follow the parameter."""

import pytest
import torch

from hf_mamba import ops

pytestmark = pytest.mark.skipif(ops.which("linear") != "cpu", reason="no compiled kernels on this machine")

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8}


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 5), (35, 48), (80, 771), (129, 64)])
def test_a_thin_product_is_the_product(dtype: torch.dtype, count: int, rows: int, width: int):
    weight = _random(rows, width + 3, dtype=dtype)[:, 1 : width + 1]  # neither dense nor aligned
    bias = _random(rows, seed=1, dtype=dtype)
    batches = {"dense": _random(count, 1, width, seed=2, dtype=dtype)}
    batches["view"] = _random(count, width + 7, seed=3, dtype=dtype)[:, 2 : width + 2]
    batches["transposed"] = _random(width, count, seed=4, dtype=dtype).t()
    for x in batches.values():
        for b in (None, bias):
            with torch.no_grad():
                found = ops.linear(x, weight, b)
            exact = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
            assert found.dtype == dtype
            assert found.shape == (*x.shape[:-1], rows)
            size = x.double().abs() @ weight.double().abs().t() + (0 if b is None else b.double().abs())
            assert ((found - exact).abs() / size).max() < TOLERANCE[dtype]


def test_a_thin_product_is_the_same_on_any_number_of_threads():
    x, weight = _random(2, 768), _random(1000, 768, seed=1)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with torch.no_grad():
                results.append(ops.linear(x, weight))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_product_is_torchs_own_where_that_means_something_else():
    """Gradients, autocast, tensor subclasses and dtypes that do not agree."""
    x, weight = _random(1, 8), _random(5, 8, seed=1).requires_grad_()
    assert ops.linear(x, weight).requires_grad
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert ops.linear(x, weight).dtype == torch.bfloat16
    with torch.no_grad(), pytest.raises(RuntimeError, match="dtype"):
        ops.linear(x, weight.bfloat16())
    weight = weight.detach()
    with torch._subclasses.FakeTensorMode() as mode, torch.no_grad():
        assert ops.linear(mode.from_tensor(x), mode.from_tensor(weight)).shape == (1, 5)


@pytest.mark.parametrize("name", ["cpu", "torch", "reference"])
def test_a_step_exponentiates_the_parameter(name: str):
    state, x, dt, bc = _random(2, 6, 3), _random(2, 6), _random(2, 6, seed=1), _random(2, 3, seed=2)
    A_log = _random(6, 3, seed=3) * 4
    twin = state.clone()
    with ops.backend(name):
        given = ops.selective_state_update(state, x, dt, -A_log.exp(), bc, bc)
        found = ops.selective_state_update(twin, x, dt, A_log, bc, bc, A_is_log=True)
    torch.testing.assert_close(found, given, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(twin, state, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [1, 24, 771])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_sum_and_its_norm_in_one_call(dtype: torch.dtype, width: int):
    hidden, residual = _random(2, 3, width, dtype=dtype), _random(2, 3, width, seed=1) * 3
    weight = _random(width, seed=2, dtype=dtype)
    exact, _ = ops.reference.add_rms_norm(hidden.double(), residual.double(), weight.double(), 1e-5)
    for context in (torch.no_grad, torch.enable_grad):
        with context():
            found, total = ops.add_rms_norm(hidden, residual, weight, 1e-5)
        assert torch.equal(total, hidden.float() + residual)
        assert found.dtype == dtype
        assert ((found - exact).abs() / exact.abs()).max() < (2**-8 if dtype == torch.bfloat16 else 1e-6)
