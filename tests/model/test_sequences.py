"""Padding, packing and the carried state: whatever way tokens reach the model, each document reads as if alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import addresses, carried
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, StaticCache

VOCAB = 61
documents = st.lists(st.integers(1, 9), min_size=1, max_size=5)
few = settings(max_examples=13)  # for each family


def tokens(lengths: list[int], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (n,), generator=generator) for n in lengths]


def packing_arguments(lengths: list[int]) -> dict[str, dict[str, torch.Tensor]]:
    """The three ways to say where documents start."""
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return {
        "seq_idx": {"seq_idx": torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None].int()},
        "position_ids": {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None]},
        "cu_seq_lens_q": {"cu_seq_lens_q": offsets.int()},
    }


@pytest.mark.parametrize("how", ["seq_idx", "position_ids", "cu_seq_lens_q"])
@few
@given(lengths=documents, seed=st.integers(0, 9))
def test_packed_documents_read_as_if_alone(model, how, lengths, seed):
    docs = tokens(lengths, seed)
    with torch.no_grad():
        packed = model(torch.cat(docs)[None], use_cache=True, **packing_arguments(lengths)[how])
        alone = [model(doc[None], use_cache=True) for doc in docs]
    torch.testing.assert_close(packed.logits, torch.cat([out.logits for out in alone], 1))
    # what is carried on is the last document's state only
    torch.testing.assert_close(carried(packed.cache_params), carried(alone[-1].cache_params))


@few
@given(lengths=documents, seed=st.integers(0, 9))
def test_packed_gradients_are_the_sum_of_separate_ones(model, lengths, seed):
    docs = tokens(lengths, seed)
    inputs = [model.get_input_embeddings()(doc[None]).detach().requires_grad_() for doc in docs]
    torch.stack([model(inputs_embeds=x).logits.square().sum() for x in inputs]).sum().backward()
    packed = torch.cat(inputs, 1).detach().requires_grad_()
    model(inputs_embeds=packed, **packing_arguments(lengths)["seq_idx"]).logits.square().sum().backward()
    torch.testing.assert_close(packed.grad, torch.cat([x.grad for x in inputs], 1))


def test_a_document_cannot_see_the_one_before_it(model, family):
    """The leak test: change the last token of A, and B does not move."""
    lengths = [7, 6]
    first, second = tokens(lengths)
    changed = first.clone()
    changed[-1] = (changed[-1] + 1) % VOCAB
    arguments = packing_arguments(lengths)["seq_idx"]
    before = model(torch.cat([first, second])[None], **arguments).logits
    after = model(torch.cat([changed, second])[None], **arguments).logits
    rounding = 0 if family.model_type == "mamba" else 1e-14  # ssd sums the decays of a whole chunk
    torch.testing.assert_close(before[:, 7:], after[:, 7:], rtol=0, atol=rounding)
    assert not torch.equal(before[:, 6], after[:, 6])


@pytest.mark.parametrize("side", ["left", "right", "scattered"])
@few
@given(lengths=documents, seed=st.integers(0, 9))
def test_padded_rows_read_as_if_alone_and_continue_alike(model, side, lengths, seed):
    docs = tokens(lengths, seed)
    longest = max(lengths) + (side == "scattered") * 3
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (len(docs), longest), generator=generator)  # padding is any token
    mask = torch.zeros(len(docs), longest, dtype=torch.long)
    for row, doc in enumerate(docs):
        if side == "scattered":
            where = torch.randperm(longest, generator=generator)[: len(doc)].sort().values
        else:
            where = torch.arange(len(doc)) + (longest - len(doc) if side == "left" else 0)
        ids[row, where], mask[row, where] = doc, 1
    following = torch.randint(0, VOCAB, (len(docs), 3), generator=generator)
    with torch.no_grad():
        padded = model(ids, attention_mask=mask, use_cache=True)
        longer_mask = torch.cat([mask, torch.ones(len(docs), 3, dtype=torch.long)], 1)
        after = model(following, attention_mask=longer_mask, cache_params=padded.cache_params, use_cache=True)
        for row, doc in enumerate(docs):
            whole = model(torch.cat([doc, following[row]])[None]).logits[0]
            torch.testing.assert_close(padded.logits[row, mask[row].bool()], whole[: len(doc)])
            torch.testing.assert_close(after.logits[row], whole[len(doc) :])


@few
@given(chunks=st.lists(st.integers(1, 7), min_size=1, max_size=5), seed=st.integers(0, 9))
def test_continuing_from_a_cache_equals_one_pass(model, chunks, seed):
    ids = torch.stack(tokens([sum(chunks)] * 2, seed))
    whole = model(ids).logits
    for gradients in (False, True):  # without gradients, single tokens take the decoding path
        with torch.set_grad_enabled(gradients):
            cache = DynamicCache(config=model.config)
            parts = [model(part, cache_params=cache, use_cache=True).logits for part in ids.split(chunks, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), whole)


@few
@given(chunks=st.lists(st.integers(1, 5), min_size=2, max_size=4))
def test_gradients_flow_through_the_carried_state(model, chunks):
    ids = torch.stack(tokens([sum(chunks)] * 2))
    embeds = model.get_input_embeddings()(ids).detach()
    whole, split = embeds.clone().requires_grad_(), embeds.clone().requires_grad_()
    model(inputs_embeds=whole).logits[:, -1].square().sum().backward()
    cache = DynamicCache(config=model.config)
    for part in split.split(chunks, 1):
        last = model(inputs_embeds=part, cache_params=cache, use_cache=True).logits[:, -1]
    last.square().sum().backward()
    torch.testing.assert_close(split.grad, whole.grad)


def test_packing_and_padding_and_a_carried_state_together(model):
    """A row continues its document, which ends; another starts; padding follows on one row only."""
    past, rest, second = tokens([5, 3, 4])
    with torch.no_grad():
        cache = model(past[None].expand(2, -1), use_cache=True).cache_params
        ids = torch.stack([torch.cat([rest, second]), torch.cat([rest, second[:2], second[:2]])])
        mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
        seq_idx = torch.tensor([[0] * 3 + [1] * 4] * 2, dtype=torch.int32)
        out = model(ids, attention_mask=mask, seq_idx=seq_idx, cache_params=cache, use_cache=True)
        first = model(torch.cat([past, rest])[None]).logits[0, 5:]
        other = model(second[None], use_cache=True)
        torch.testing.assert_close(out.logits[:, :3], first.expand(2, -1, -1))
        torch.testing.assert_close(out.logits[0, 3:], other.logits[0])
        torch.testing.assert_close(out.logits[1, 3:5], other.logits[0, :2])
        short = model(second[None, :2], use_cache=True).cache_params
        torch.testing.assert_close(carried(out.cache_params, 0), carried(other.cache_params))
        torch.testing.assert_close(carried(out.cache_params, 1), carried(short))


def test_position_zero_starts_a_new_document_though_a_state_is_carried(model):
    past, new = tokens([5, 4])
    with torch.no_grad():
        cache = model(past[None], use_cache=True).cache_params
        out = model(new[None], position_ids=torch.arange(4)[None], cache_params=cache, use_cache=True)
        torch.testing.assert_close(out.logits, model(new[None]).logits)
        cache = model(past[None], use_cache=True).cache_params
        out = model(new[None], position_ids=torch.arange(5, 9)[None], cache_params=cache, use_cache=True)
        torch.testing.assert_close(out.logits, model(torch.cat([past, new])[None]).logits[:, 5:])


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_keeps_its_addresses_and_refuses_a_foreign_one(model, kind: str):
    """Of keys and values only a static cache's are fixed."""
    config = model.config
    cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=20)
    ids = pad_sequence(tokens([6, 6]), batch_first=True)
    with torch.no_grad():
        model(ids, cache_params=cache, use_cache=True)
        before = addresses(cache)
        model(ids, cache_params=cache, use_cache=True)
        step = model(ids[:, :1], cache_params=cache, use_cache=True).logits
        torch.testing.assert_close(step, model(torch.cat([ids, ids, ids[:, :1]], 1)).logits[:, -1:])
    assert before == addresses(cache)
    with pytest.raises(ValueError, match="DynamicCache.config=model.config"):
        model(ids, cache_params=DynamicCache())


@st.composite
def _row(draw, length: int):
    """A row of `length` columns: which are real (any), and the document of each real token."""
    real = draw(st.lists(st.booleans(), min_size=length, max_size=length))
    starts = draw(st.lists(st.booleans(), min_size=length, max_size=length))
    return torch.tensor(real), torch.tensor(starts)


def _described(how: str, real: torch.Tensor, document: torch.Tensor, position: torch.Tensor) -> dict:
    """The arguments of one way to say what is where; at padding each holds what its users put there."""
    if how == "seq_idx, -1 at padding":
        return {"seq_idx": torch.where(real, document, -1).int()}
    if how == "seq_idx, going on":
        return {"seq_idx": document.int()}
    if how == "position_ids, 0 at padding":
        return {"position_ids": position.masked_fill(~real, 0)}
    if how == "position_ids, 1 at padding":
        return {"position_ids": position.masked_fill(~real, 1)}
    starts = torch.nn.functional.pad((document.flatten()[1:] != document.flatten()[:-1]), (1, 0), value=True)
    return {"cu_seq_lens_q": torch.cat([starts.nonzero()[:, 0], torch.tensor([document.numel()])]).int()}


HOWS = ["seq_idx, -1 at padding", "seq_idx, going on", "position_ids, 0 at padding", "position_ids, 1 at padding", "cu"]


@pytest.mark.parametrize("how", HOWS)
@settings(max_examples=8)
@given(data=st.data(), length=st.integers(1, 8), seed=st.integers(0, 9), past=st.integers(0, 3))
def test_masks_positions_documents_and_a_carried_state_together(model, how, data, length, seed, past):
    """Any mask, any documents, with and without a past: each document is what it is alone, gradients included."""
    rows = [data.draw(_row(length)) for _ in range(2)]
    real, starts = (torch.stack(part) for part in zip(*rows, strict=True))
    starts = starts & real
    restarts = [bool(data.draw(st.booleans())) and "position" in how and past > 0 for _ in range(2)]
    document = starts.cumsum(1) + 10 * torch.arange(2)[:, None]  # rows differ, for cu_seq_lens
    position = torch.zeros(2, length, dtype=torch.long)
    pieces: list[tuple[int, torch.Tensor, bool]] = []  # row, columns, whether it continues the past
    for row in range(2):
        columns = real[row].nonzero()[:, 0]
        groups = [columns[document[row, columns] == number] for number in document[row, columns].unique()]
        for number, group in enumerate(groups):
            first = past if number == 0 and not restarts[row] else 0
            position[row, group] = torch.arange(len(group)) + first
            pieces.append((row, group, number == 0 and not restarts[row]))
    ids = torch.stack(tokens([length] * 2, seed))
    before = torch.stack(tokens([max(past, 1)] * 2, seed + 50))[:, :past]
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    cache = DynamicCache(config=model.config)
    if past:
        with torch.no_grad():
            model(before, cache_params=cache, use_cache=True)
    arguments = _described(how, real, document, position)
    out = model(inputs_embeds=embeds, attention_mask=real.long(), cache_params=cache, use_cache=True, **arguments)
    weights = torch.randn(out.logits.shape, dtype=out.logits.dtype, generator=torch.Generator().manual_seed(seed))
    (out.logits * weights)[real].sum().backward()
    expected_gradient = torch.zeros_like(embeds)
    for row, group, continues in pieces:
        alone = embeds.detach()[row, group][None].requires_grad_()
        state = DynamicCache(config=model.config)
        if past and continues:
            with torch.no_grad():
                model(before[row][None], cache_params=state, use_cache=True)
        logits = model(inputs_embeds=alone, cache_params=state, use_cache=True).logits
        torch.testing.assert_close(out.logits[row, group], logits[0])
        (logits[0] * weights[row, group]).sum().backward()
        expected_gradient[row, group] = alone.grad[0]
        last = group[-1] == real[row].nonzero()[-1, 0]
        if last:
            torch.testing.assert_close(carried(out.cache_params, row), carried(state))
    torch.testing.assert_close(embeds.grad * real[..., None], expected_gradient)


@pytest.mark.parametrize("position", ["of the real tokens", "of the columns"])
@few
@given(data=st.data())
def test_padding_within_a_document_is_none_of_its_positions_business(model, position, data):
    """transformers' recipe, mask.cumsum - 1, and plain column numbers: neither cuts a document at its padding."""
    real = data.draw(_row(7))[0][None]
    ids = tokens([7])[0][None]
    recipe = (real.long().cumsum(1) - 1).clamp(min=0) if position == "of the real tokens" else torch.arange(7)[None]
    with torch.no_grad():
        found = model(ids, attention_mask=real.long(), position_ids=recipe).logits[real]
        torch.testing.assert_close(found, model(ids[real][None]).logits[0] if real.any() else found)
