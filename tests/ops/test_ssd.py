"""ssd, ssd_update and gated_rms_norm against their definitions, finite differences and the paper's formula."""

import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scan_cases import assert_close, documents, leaves, reference, with_gradients
from torch.utils.flop_counter import FlopCounterMode

from hf_mamba import ops, sizes
from hf_mamba.ops.operands import Ssd
from hf_mamba.ops.sums import by_doubling
from hf_mamba.ops.torch import ssd as chunked

CHUNK = sizes.SSD_CHUNK
TOKENS = ("x", "a", "w", "B", "C")  # arguments with a length
lengths = st.lists(
    st.one_of(st.integers(1, 40), st.sampled_from([CHUNK - 1, CHUNK, CHUNK + 1])), min_size=1, max_size=4
)
heads_and_groups = st.sampled_from([(1, 1), (4, 1), (4, 2), (3, 3)])


def arguments(batch: int, length: int, heads: int, width: int, groups: int, states: int, seed: int = 0) -> dict:
    """Every float argument, float64, with decays from 1 to e^-3 a step."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rate = torch.rand(heads, generator=generator, dtype=torch.float64) * 2
    return {
        "x": normal(batch, length, heads, width),
        "a": -rate * torch.nn.functional.softplus(normal(batch, length, heads) - 2),
        "w": normal(batch, length, heads),
        "B": normal(batch, length, groups, states),
        "C": normal(batch, length, groups, states),
        "D": normal(heads),
        "initial_state": normal(batch, heads, width, states),
    }


def cut_of(kw: dict, cut: slice) -> dict:
    return {name: t[:, cut] if name in TOKENS else t for name, t in kw.items()}


@pytest.fixture
def kernels():
    if (reason := ops.available_backends()["cpu"]) != "available":
        pytest.skip(reason)
    with ops.backend("cpu"):
        yield


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("length", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5])
@pytest.mark.parametrize(("heads", "groups"), [(4, 1), (4, 2), (3, 3)])
def test_equals_the_recurrence(heads, groups, length, packed):
    exact = arguments(2, length, heads, 5, groups, 6)
    options = {"seq_idx": documents(2, length, rate=0.05) if packed else None, "return_final_state": True}
    want = with_gradients(reference.ssd, leaves(exact), **options)
    for backend, dtype, tolerance in (
        ("torch", None, 1e-11),
        ("torch", torch.float32, 2e-5),
        ("cpu", torch.float32, 2e-5),
    ):
        if ops.available_backends()[backend] == "available":
            with ops.backend(backend):
                assert_close(with_gradients(ops.ssd, leaves(exact, dtype), **options), want, tolerance)


@pytest.mark.parametrize(("width", "states"), [(64, 128), (80, 16), (17, 33)], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_kernels_at_the_sizes_of_models(kernels, width, states, packed):
    exact = arguments(1, 2 * CHUNK + 37, 4, width, 2, states)
    options = {"seq_idx": documents(1, 2 * CHUNK + 37, rate=0.01) if packed else None, "return_final_state": True}
    with ops.backend("torch"):
        want = with_gradients(ops.ssd, leaves(exact), **options)
    assert_close(with_gradients(ops.ssd, leaves(exact, torch.float32), **options), want, 2e-5)


@pytest.mark.parametrize("length", [1, CHUNK + 3])
def test_a_decay_that_is_no_number_is_seen(kernels, length):
    given = {name: t.float() for name, t in arguments(1, length, 2, 5, 1, 6).items()}
    given["a"][0, length - 1, 0] = torch.nan
    y = ops.ssd(**given)
    assert y[0, -1, 0].isnan().all()
    assert y[0, -1, 1].isfinite().all()


def test_a_head_wider_than_the_kernels_hold_is_torchs_and_refused_where_they_are_forced():
    exact = arguments(1, 5, 2, 300, 1, 4)
    want = with_gradients(reference.ssd, leaves(exact))
    values = leaves(exact, torch.float32)
    assert_close(with_gradients(ops.ssd, values), want, 2e-5)
    assert ops.which("ssd", width=256) == "cpu"
    assert ops.which("ssd", width=300) == ops.which("ssd_update", width=300) == "torch"
    with ops.backend("cpu"):
        with pytest.raises(ValueError, match="heads have at most 256 channels, not 300"):
            ops.ssd(**values)
        with pytest.raises(ValueError, match="heads have at most 256 channels, not 300"):
            ops.ssd_update(values["initial_state"], *(values[name][:, 0] for name in TOKENS))


def test_kernels_give_the_same_bits_on_any_number_of_threads(kernels):
    """Also in bf16, with operands that are slices of one projection, and gradients that arrive expanded."""
    joined = torch.randn(2, 300, 4 * 32 + 2 * 2 * 24 + 4).bfloat16()
    weight = torch.randn(128).bfloat16()
    results = []
    threads = torch.get_num_threads()
    for count in (1, 3):
        torch.set_num_threads(count)
        leaf = joined.clone().requires_grad_()
        x, B, C, w = leaf.split([128, 48, 48, 4], 2)
        x, B, C = x.unflatten(2, (4, 32)), B.unflatten(2, (2, 24)), C.unflatten(2, (2, 24))
        y, state = ops.ssd(x, -w.float().abs(), w.float(), B, C, return_final_state=True)
        y = ops.gated_rms_norm(y.flatten(2), leaf[..., :128], weight, 1e-5, groups=2)
        results.append((y, state, *torch.autograd.grad((y * y[:, :1]).sum() + state.sum(), leaf)))
    torch.set_num_threads(threads)
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("batch", "length"), [(2, 0), (0, 3)])
def test_empty_rows_keep_their_state(batch, length):
    values = leaves(arguments(batch, length, 4, 3, 2, 5))
    y, state = ops.ssd(**values, return_final_state=True)
    assert y.shape == (batch, length, 4, 3)
    if not length:
        assert torch.equal(state, values["initial_state"])
    (y.sum() + (state * 3).sum()).backward()
    assert torch.equal(values["initial_state"].grad, torch.full_like(values["initial_state"], 3.0))


@pytest.mark.parametrize("start", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK])
def test_documents_that_start_at_the_border_of_a_chunk(start):
    exact = arguments(1, 2 * CHUNK + 1, 2, 3, 1, 4)
    seq_idx = (torch.arange(2 * CHUNK + 1) >= start).int()[None]
    options = {"seq_idx": seq_idx, "return_final_state": True}
    want = with_gradients(reference.ssd, leaves(exact), **options)
    assert_close(with_gradients(ops.ssd, leaves(exact), **options), want, 1e-11)
    assert_close(with_gradients(ops.ssd, leaves(exact, torch.float32), **options), want, 2e-5)


def test_a_document_number_that_comes_back_is_a_new_document():
    exact = arguments(1, 30, 2, 3, 1, 4)
    seq_idx = torch.tensor([0] * 10 + [1] * 10 + [0] * 10).int()[None]
    want = with_gradients(reference.ssd, leaves(exact), seq_idx=seq_idx)
    assert_close(with_gradients(ops.ssd, leaves(exact), seq_idx=seq_idx), want, 1e-11)


def test_optional_arguments_can_be_left_out_one_by_one():
    exact = arguments(2, CHUNK + 3, 2, 3, 1, 4)
    for absent in (("D",), ("initial_state",), ("D", "initial_state")):
        given_ = {name: t for name, t in exact.items() if name not in absent}
        want = with_gradients(reference.ssd, leaves(given_))
        assert_close(with_gradients(ops.ssd, leaves(given_)), want, 1e-11)
        assert_close(with_gradients(ops.ssd, leaves(given_, torch.float32)), want, 2e-5)


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
def test_a_rate_for_each_head_is_a_decay_in_proportion_to_the_weight(backend):
    kw = {name: t.float() for name, t in arguments(2, 9, 4, 3, 2, 5).items()} | {"a": -torch.rand(4)}
    with ops.backend(backend):
        want = with_gradients(lambda a, w, **rest: ops.ssd(a=a * w, w=w, **rest), leaves(kw))
        got = with_gradients(ops.ssd, leaves(kw))
        states = [kw["initial_state"].clone() for _ in range(2)]
        x, w, B, C = (kw[name][:, 0] for name in ("x", "w", "B", "C"))
        steps = [ops.ssd_update(state, x, a, w, B, C) for state, a in zip(states, (kw["a"], kw["a"] * w), strict=True)]
    assert_close(got, want, 0)
    assert torch.equal(*states)
    assert torch.equal(*steps)


def test_gradients_by_finite_differences():
    values = leaves(arguments(1, CHUNK + 2, 2, 2, 1, 2))
    seq_idx = documents(1, CHUNK + 2, rate=0.02)

    def function(*tensors):
        return ops.ssd(*tensors, seq_idx=seq_idx, return_final_state=True)

    assert torch.autograd.gradcheck(function, tuple(values.values()), fast_mode=True)
    short = leaves(arguments(2, 5, 4, 2, 2, 3))
    seq_idx = documents(2, 5, rate=0.4)
    assert torch.autograd.gradcheck(function, tuple(short.values()))


@pytest.mark.parametrize("use", ["y", "state"])
def test_gradients_through_one_output_alone(use):
    exact = arguments(1, CHUNK + 7, 2, 3, 1, 4)

    def of(function):
        return lambda **kw: function(**kw, return_final_state=True)[use == "state"]

    values, references = leaves(exact), leaves(exact)
    if use == "state":  # neither C nor D is part of the state
        for kw in (values, references):
            del kw["D"]
    got = torch.autograd.grad(of(ops.ssd)(**values).sum(), list(values.values()), allow_unused=True)
    want = torch.autograd.grad(of(reference.ssd)(**references).sum(), list(references.values()), allow_unused=True)
    for name, mine, exact_one in zip(values, got, want, strict=True):
        torch.testing.assert_close(mine, torch.zeros_like(mine) if exact_one is None else exact_one, msg=name)


def test_equals_the_formula_of_the_paper():
    """Y = (L ∘ C Bᵀ) X with the whole L x L mask of equation 13, per head: no recurrence and no chunks."""
    kw = arguments(2, CHUNK + 30, 4, 3, 2, 5)
    sums = kw["a"].cumsum(1)
    mask = torch.ones(CHUNK + 30, CHUNK + 30, dtype=torch.bool).tril()
    decay = (sums[:, :, None] - sums[:, None]).masked_fill(~mask[..., None], -torch.inf).exp()  # (B, t, s, H)
    B, C = (kw[name].repeat_interleave(2, 2) for name in "BC")
    attention = torch.einsum("bthn,bshn,btsh,bsh->btsh", C, B, decay, kw["w"])
    want = torch.einsum("btsh,bshp->bthp", attention, kw["x"])
    del kw["D"], kw["initial_state"]
    torch.testing.assert_close(ops.ssd(**kw), want, rtol=1e-11, atol=1e-11)


def test_equals_the_selective_scan_where_both_can_express_it():
    """Mamba-1 with one rate for every state is this operation with heads of one channel."""
    kw = arguments(1, 50, 6, 1, 1, 4)
    delta, rates = torch.rand(1, 50, 6, dtype=torch.float64), -torch.rand(6, dtype=torch.float64)
    dual = ops.ssd(kw["x"], delta * rates, delta, kw["B"], kw["C"], kw["D"])[..., 0]
    A = rates[:, None].expand(6, 4)
    scan = ops.selective_scan(kw["x"][..., 0], delta, A, kw["B"][:, :, 0], kw["C"][:, :, 0], kw["D"], dt_softplus=False)
    torch.testing.assert_close(dual, scan, rtol=1e-11, atol=1e-11)


@given(
    lengths=lengths, shape=heads_and_groups, width=st.integers(1, 5), states=st.integers(1, 6), seed=st.integers(0, 99)
)
def test_packed_documents_equal_separate_ones(lengths, shape, width, states, seed):
    heads, groups = shape
    exact = arguments(2, sum(lengths), heads, width, groups, states, seed)
    del exact["initial_state"]
    numbers = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(torch.tensor(lengths)).expand(2, -1)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    cuts = [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]

    def separately(**kw):
        return torch.cat([ops.ssd(**cut_of(kw, cut)) for cut in cuts], 1)

    want = with_gradients(separately, leaves(exact))
    assert_close(with_gradients(ops.ssd, leaves(exact), seq_idx=numbers), want, 1e-10)


@given(
    lengths=lengths, shape=heads_and_groups, width=st.integers(1, 5), states=st.integers(1, 6), seed=st.integers(0, 99)
)
def test_cut_anywhere_with_the_state_carried(lengths, shape, width, states, seed):
    heads, groups = shape
    exact = arguments(2, sum(lengths), heads, width, groups, states, seed)
    ends = torch.tensor(lengths).cumsum(0).tolist()

    def in_pieces(initial_state, **kw):
        outputs, state = [], initial_state
        for end, length in zip(ends, lengths, strict=True):
            piece = cut_of(kw, slice(end - length, end))
            y, state = ops.ssd(**piece, initial_state=state, return_final_state=True)
            outputs.append(y)
        return torch.cat(outputs, 1), state

    want = with_gradients(ops.ssd, leaves(exact), return_final_state=True)
    assert_close(with_gradients(in_pieces, leaves(exact)), want, 1e-10)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [(b, t) for b in ("reference", "torch") for t in (torch.float64, torch.float32, torch.bfloat16)]
    + [("cpu", torch.float32), ("cpu", torch.bfloat16)],
)
def test_decoding_step_by_step_equals_one_pass(backend, dtype):
    kw = {name: t.to(dtype) for name, t in arguments(2, 9, 4, 3, 2, 5).items()}
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    want, final = reference.ssd(**kw, return_final_state=True)
    state = kw.pop("initial_state").to(exact)
    with ops.backend(backend):
        steps = [ops.ssd_update(state, *(kw[name][:, t] for name in TOKENS), kw["D"]) for t in range(9)]
    assert steps[0].dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    assert_close({"y": torch.stack(steps, 1), "state": state}, {"y": want, "state": final}, tolerance)


def test_strong_decays_and_bf16_stay_finite_and_near():
    exact = arguments(2, 2 * CHUNK, 2, 8, 1, 16)
    exact["a"] = exact["a"] * 30
    low = {name: t.bfloat16() if name in ("x", "B", "C") else t.float() for name, t in exact.items()}
    same = {name: t.double() for name, t in low.items()}
    want = with_gradients(reference.ssd, leaves(same), return_final_state=True)
    values = {name: t.requires_grad_() for name, t in low.items()}
    got = with_gradients(ops.ssd, values, return_final_state=True)
    assert got["output 0"].dtype == torch.bfloat16
    assert got["output 1"].dtype == torch.float32
    assert_close(got, want, 1e-2)


def test_strided_views_are_served():
    """The operands of a mixer are slices of one convolution's output."""
    exact = arguments(2, 40, 4, 3, 2, 5)
    joined = torch.cat([exact[name].flatten(2) for name in ("x", "B", "C")], 2)
    x, B, C = joined.split([12, 10, 10], 2)
    got = ops.ssd(x.unflatten(2, (4, 3)), exact["a"], exact["w"], B.unflatten(2, (2, 5)), C.unflatten(2, (2, 5)))
    want = ops.ssd(*(exact[name] for name in TOKENS))
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_the_operator_is_registered_as_torch_wants_it():
    low = leaves(arguments(1, 6, 2, 3, 1, 4), torch.float32)
    for backend in ("torch", "cpu"):
        torch.library.opcheck(torch.ops.hf_mamba.chunked_ssd.default, (*low.values(), documents(1, 6), True, backend))
    norm = [torch.randn(2, 5, 12, requires_grad=True) for _ in "xz"] + [torch.ones(12, requires_grad=True)]
    torch.library.opcheck(torch.ops.hf_mamba.gated_norm.default, (*norm, 1e-5, 2, True, "cpu"))


def test_autocast_does_not_reach_the_products():
    kw = {name: t.float() for name, t in arguments(1, 20, 2, 4, 1, 8).items()}
    want = ops.ssd(**kw)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ops.ssd(**kw), want)


@pytest.mark.parametrize("length", [40, 2 * CHUNK + 9])
def test_products_are_those_of_the_formula(length):
    s = Ssd(**arguments(3, length, 4, 6, 2, 5), seq_idx=None)
    with FlopCounterMode(display=False) as forward:
        y, final, saved = chunked.ssd_forward(s, True)
    with FlopCounterMode(display=False) as backward:
        chunked.ssd_backward(s, saved, y, final)
    assert forward.get_total_flops() == 3 * sizes.ssd_flops(length, 4, 6, 2, 5)
    assert backward.get_total_flops() == 3 * sizes.ssd_flops(length, 4, 6, 2, 5, backward=True)


@pytest.mark.parametrize("length", [40, 2 * CHUNK + 9])
def test_saved_bytes_are_those_of_the_formula(length):
    kw = leaves(arguments(3, length, 4, 6, 2, 5), torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.ssd(**kw)
    operands = {t.data_ptr() for t in kw.values()}
    saved = sum(t.untyped_storage().nbytes() for t in kept if t.data_ptr() not in operands)
    assert saved == 3 * sizes.ssd_saved_bytes(length, 4, 6, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.zeros(2, 7, 3)}, "a has shape"),
        ({"C": torch.zeros(2, 7, 1, 5)}, "C has shape"),
        ({"D": torch.zeros(5)}, "D has shape"),
        ({"initial_state": torch.zeros(2, 4, 5, 3)}, "initial_state has shape"),
        ({"B": torch.zeros(2, 7, 3, 5), "C": torch.zeros(2, 7, 3, 5)}, "4 heads cannot share B and C in 3 groups"),
        ({"x": torch.zeros(2, 7, 12)}, "ssd takes"),
        ({"seq_idx": torch.zeros(7)}, "seq_idx has shape"),
    ],
)
def test_shapes_that_do_not_agree_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        ops.ssd(**arguments(2, 7, 4, 3, 2, 5) | change)


@pytest.mark.parametrize("op", ["ssd", "ssd_update", "gated_rms_norm"])
def test_a_forced_backend_that_lacks_the_operation_raises(op):
    with ops.backend("mamba_ssm"), pytest.raises(ValueError, match="is forced but cannot serve"):
        ops.which(op)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_gated_norm_equals_its_definition(dtype, tolerance, groups):
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (2, 5, 12), "z": (2, 5, 12), "weight": (12,)}
    exact = {k: torch.randn(v, generator=generator, dtype=torch.float64) for k, v in shapes.items()}
    options = {"eps": 1e-5, "groups": groups}
    want = with_gradients(reference.gated_rms_norm, leaves(exact), **options)
    assert_close(with_gradients(ops.gated_rms_norm, leaves(exact, dtype), **options), want, tolerance)
    assert torch.autograd.gradcheck(lambda *t: ops.gated_rms_norm(*t, **options), tuple(leaves(exact).values()))
    low = {name: t.bfloat16() for name, t in exact.items()}
    want = with_gradients(reference.gated_rms_norm, leaves({name: t.double() for name, t in low.items()}), **options)
    assert_close(with_gradients(ops.gated_rms_norm, leaves(low), **options), want, 2**-7)


def test_gated_norm_is_transformers_own():
    """With one group: modeling_mamba2's MambaRMSNormGated; with more, its grouped form as zamba2 and bamba write it."""
    from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

    x, z = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    many = "group_size" in inspect.signature(MambaRMSNormGated.__init__).parameters
    for groups in (1, 2) if many else (1,):
        norm = MambaRMSNormGated(8, *([8 // groups] if many else []), eps=1e-5)
        torch.nn.init.normal_(norm.weight)
        torch.testing.assert_close(ops.gated_rms_norm(x, z, norm.weight, 1e-5, groups), norm(x, z))


def test_gated_norm_saves_its_operands_and_one_number_per_group():
    x, z, weight = (torch.randn(shape, requires_grad=True) for shape in ((2, 5, 12), (2, 5, 12), (12,)))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.gated_rms_norm(x, z, weight, 1e-5, 3)
    operands = {t.data_ptr() for t in (x, z, weight)}
    assert sum(t.nbytes for t in kept if t.data_ptr() not in operands) == sizes.gated_norm_saved_bytes(10, 3)


def test_gated_norm_names_what_cannot_be_divided():
    with pytest.raises(ValueError, match="5 equal groups"):
        ops.gated_rms_norm(torch.zeros(3, 12), torch.zeros(3, 12), torch.zeros(12), 1e-5, 5)


@pytest.mark.parametrize("steps", [1, 2, 37, 128])
def test_running_sums_in_a_fixed_order(steps: int):
    """Which a GPU takes where torch refuses `cumsum` as not deterministic."""
    numbers = torch.randn(3, 2, steps, dtype=torch.float64)
    torch.testing.assert_close(by_doubling(numbers), numbers.cumsum(-1), atol=1e-13, rtol=1e-13)
