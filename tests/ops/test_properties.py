"""Documents packed in a row, or a row cut anywhere with its state handed over, change nothing, gradients included."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scan_cases import assert_close, conv_arguments, leaves, scan_arguments, with_gradients

from hf_mamba import ops

TOKENS = ("x", "dt", "B", "C", "z")  # arguments with a length
lengths = st.lists(st.integers(1, 40), min_size=1, max_size=5)
# in float64 the torch backend shows that the equality is exact; a sum over tokens in fp32 may cancel
backends = pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [("torch", torch.float64, 1e-11), ("cpu", torch.float32, 1e-4)],
    ids=["torch", "cpu"],
)


def part(arguments: dict, cut: slice) -> dict:
    return {name: t[:, cut] if name in TOKENS else t for name, t in arguments.items()}


@backends
@given(lengths=lengths, width=st.integers(1, 40), states=st.sampled_from([1, 5, 16]), seed=st.integers(0, 1000))
def test_packed_documents_equal_separate_ones(backend, dtype, tolerance, lengths, width, states, seed):
    arguments = scan_arguments(2, sum(lengths), width, states, seed)
    del arguments["initial_state"]
    conv = conv_arguments(2, sum(lengths), width, 4, seed)
    del conv["initial_state"]
    numbers = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(torch.tensor(lengths)).expand(2, -1)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    cuts = [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]

    def separately(**kw):
        return torch.cat([ops.selective_scan(**part(kw, cut)) for cut in cuts], 1)

    def separate_convolutions(x, weight, bias):
        return torch.cat([ops.causal_conv1d(x[:, cut], weight, bias) for cut in cuts], 1)

    with ops.backend(backend):
        want = with_gradients(separately, leaves(arguments, dtype))
        assert_close(with_gradients(ops.selective_scan, leaves(arguments, dtype), seq_idx=numbers), want, tolerance)
        want = with_gradients(separate_convolutions, leaves(conv, dtype))
        assert_close(with_gradients(ops.causal_conv1d, leaves(conv, dtype), seq_idx=numbers), want, tolerance)


@backends
@given(lengths=lengths, width=st.integers(1, 40), states=st.sampled_from([1, 5, 16]), seed=st.integers(0, 1000))
def test_cut_anywhere_with_the_state_carried(backend, dtype, tolerance, lengths, width, states, seed):
    """One pass equals pieces that hand over state and last inputs, with documents that start inside of them."""
    total = sum(lengths)
    arguments = scan_arguments(2, total, width, states, seed)
    conv = conv_arguments(2, total, width, 4, seed)
    starts = torch.rand(2, total, generator=torch.Generator().manual_seed(seed)) < 0.1
    ends = torch.tensor(lengths).cumsum(0).tolist()
    starts[:, ends[:-1]] = False  # a piece's first token continues the state; new documents begin inside
    numbers = starts.cumsum(1).int()
    cuts = [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]

    def in_pieces(initial_state, **kw):
        outs, state = [], initial_state
        for cut in cuts:
            out, state = ops.selective_scan(
                **part(kw, cut), initial_state=state, seq_idx=numbers[:, cut], return_final_state=True
            )
            outs.append(out)
        return torch.cat(outs, 1), state

    with ops.backend(backend):
        want = with_gradients(in_pieces, leaves(arguments, dtype))
        got = with_gradients(ops.selective_scan, leaves(arguments, dtype), seq_idx=numbers, return_final_state=True)
        assert_close(got, want, tolerance)

        def pieces_of_convolution(x, weight, bias, initial_state):
            before, outs = initial_state, []
            for cut in cuts:
                outs.append(ops.causal_conv1d(x[:, cut], weight, bias, initial_state=before))
                before = torch.cat([before, x[:, cut].transpose(1, 2)], -1)[..., -3:]
            return torch.cat(outs, 1)

        want = with_gradients(pieces_of_convolution, leaves(conv, dtype))
        assert_close(with_gradients(ops.causal_conv1d, leaves(conv, dtype)), want, tolerance)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_results_do_not_depend_on_the_number_of_threads_or_the_run(backend):
    arguments = leaves(scan_arguments(2, 150, 300, 16), torch.float32)
    conv = leaves(conv_arguments(2, 300, 300, 4), torch.float32)
    found = []
    threads = torch.get_num_threads()
    try:
        with ops.backend(backend):
            for count in (1, 2, 5, 2) if backend == "cpu" else (1, 1):
                torch.set_num_threads(count)
                results = with_gradients(ops.selective_scan, arguments, return_final_state=True)
                found.append([*results.values(), *with_gradients(ops.causal_conv1d, conv).values()])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_saved_memory_is_linear_and_small(backend):
    """Saved for the backward: the inputs and one state per 32 steps, nothing of size B·L·E·N."""
    sizes = {}
    for length in (256, 512):
        arguments = leaves(scan_arguments(1, length, 64, 16), torch.float32)
        given, extra = {t.data_ptr() for t in arguments.values()}, []
        with (
            ops.backend(backend),
            torch.autograd.graph.saved_tensors_hooks(
                lambda t, given=given, extra=extra: extra.append(0 if t.data_ptr() in given else t.numel()) or t,
                lambda t: t,
            ),
        ):
            ops.selective_scan(**arguments)
        sizes[length] = sum(extra)
    assert sizes == {length: length // 32 * 64 * 16 for length in sizes}
