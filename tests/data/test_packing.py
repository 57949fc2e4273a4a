"""Rows: where documents begin, what is a target, what is held out; the loader over worlds and splits."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import document, write_jsonl

from hf_mamba.data import build_dataloader, check_fingerprint, parse_sources, prepare_data, tokenize_source
from hf_mamba.data.dataset import ArrayStream, EvalDataset, PackedDataset, make_row
from hf_mamba.data.loader import StepSampler


@pytest.fixture(scope="module")
def data(tmp_path_factory, tokenizer):
    """Three hundred documents, a tenth held out."""
    folder = tmp_path_factory.mktemp("packing")
    write_jsonl(folder / "texts.jsonl", [document(i, 5 + i % 40) for i in range(300)])
    return prepare_data(
        [str(folder / "texts.jsonl")],
        seq_len=64,
        seed=3,
        tokenizer=tokenizer,
        eval_fraction=0.1,
        cache_dir=folder / "cache",
        progress=False,
    )


def texts_of(tokenizer, rows) -> list[str]:
    """The documents in consecutive rows, by splitting at EOS (a document's own text has none)."""
    ids = np.concatenate([row["input_ids"].numpy() for row in rows])
    ends = np.flatnonzero(ids == tokenizer.eos_token_id)
    return [tokenizer.decode(piece) for piece in np.split(ids, ends + 1) if len(piece)]


def test_the_stream_is_the_documents_with_eos_between(data):
    """Unshuffled, the rows spell out every training document; with the held-out ones they are all of them."""
    stream = data.train.streams[0]
    ids, starts = stream.read(0, stream.size)
    pieces = np.split(ids, starts[1:])
    eos = data.tokenizer.eos_token_id
    assert all(piece[-1] == eos and (piece[:-1] != eos).all() for piece in pieces)
    train = [data.tokenizer.decode(piece[:-1]) for piece in pieces]
    held = [text.removesuffix("<|endoftext|>") for text in texts_of(data.tokenizer, data.eval)]
    held = [text for text in held if text]  # the padding of the last row
    everything = [document(i, 5 + i % 40) for i in range(300)]
    assert sorted(train + held) == sorted(everything)
    assert train == [text for text in everything if text not in set(held)]
    assert 10 <= len(held) <= 60


def test_rows_of_an_epoch_are_the_stream_cut_in_pieces(data):
    stream, rows = data.train.streams[0], data.train.tokens // 64
    ids, _ = stream.read(0, rows * 64)
    found = sorted(tuple(data.train[i]["input_ids"].tolist()) for i in range(rows))
    assert found == sorted(tuple(row) for row in ids.reshape(rows, 64).astype(int).tolist())


def test_seq_idx_and_labels_follow_the_documents(data):
    eos = data.tokenizer.eos_token_id
    for sample in range(50):
        row = data.train[sample]
        assert {k: v.dtype for k, v in row.items()} == {
            "input_ids": torch.int64,
            "labels": torch.int64,
            "seq_idx": torch.int32,
        }
        ids, labels, seq_idx = row["input_ids"], row["labels"], row["seq_idx"]
        begins = torch.zeros(64, dtype=torch.bool)
        begins[1:] = ids[:-1] == eos  # nothing is held out in the middle of a document here
        assert torch.equal(seq_idx, begins.cumsum(0).int())
        assert torch.equal(labels == -100, begins | (torch.arange(64) == 0))
        assert torch.equal(labels[labels != -100], ids[labels != -100])


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=20),
    seq_len=st.integers(2, 25),
)
def test_eval_covers_every_token_once_in_order(lengths, seq_len):
    documents = [np.full(n, i + 1) for i, n in enumerate(lengths)]
    rows = list(EvalDataset([ArrayStream(documents)], seq_len, pad_id=0))
    ids = torch.cat([row["input_ids"] for row in rows])
    labels = torch.cat([row["labels"] for row in rows])
    total = sum(lengths)
    assert ids[:total].tolist() == [i + 1 for i, n in enumerate(lengths) for _ in range(n)]
    assert (ids[total:] == 0).all()
    assert (labels[total:] == -100).all()
    for row in rows:  # a document's number changes exactly where seq_idx does
        assert torch.equal(row["input_ids"].diff() != 0, row["seq_idx"].diff() != 0)
        assert (row["labels"][1:] == -100).equal((row["input_ids"].diff() != 0) | (row["input_ids"][1:] == 0))


def test_a_target_is_never_predicted_across_documents():
    row = make_row(np.array([5, 6, 1, 7, 8, 1, 9]), np.array([0, 3, 6]))
    assert row["seq_idx"].tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert row["labels"].tolist() == [-100, 6, 1, -100, 8, 1, -100]


def test_a_long_document_continues_in_the_next_row_and_over_segments(tmp_path, tokenizer):
    """200,000 characters are several segments but one document: one EOS, and no new seq_idx within."""
    text = "\n".join(document(i) for i in range(2500))
    write_jsonl(tmp_path / "book.jsonl", [text, "short"])
    shards = tokenize_source(
        parse_sources([str(tmp_path / "book.jsonl")])[0], tokenizer, cache_dir=tmp_path / "cache", progress=False
    )
    assert (shards.documents, shards.units[0]["segments"] > 4) == (2, True)
    ids, starts = shards.read(0, 0, shards.tokens)
    assert starts.tolist() == [0, int(np.flatnonzero(ids == tokenizer.eos_token_id)[0]) + 1]
    assert tokenizer.decode(ids[: starts[1] - 1]) == text


def test_a_hole_left_by_a_held_out_segment_counts_as_a_boundary(tmp_path, tokenizer):
    """What comes after the hole does not continue what was before it, so it is a document of its own."""
    (tmp_path / "book.txt").write_text("\n".join(document(i) for i in range(6000)))
    data = prepare_data(
        [str(tmp_path / "book.txt")],
        seq_len=32,
        tokenizer=tokenizer,
        eval_fraction=0.3,
        cache_dir=tmp_path / "cache",
        progress=False,
    )
    stream = data.train.streams[0]
    ids, starts = stream.read(0, stream.size)
    text = (tmp_path / "book.txt").read_text()
    pieces = [tokenizer.decode(piece).removesuffix("<|endoftext|>") for piece in np.split(ids, starts[1:])]
    assert len(pieces) > 1  # there are holes
    assert all(piece in text for piece in pieces)
    assert sum(map(len, pieces)) + len("".join(texts_of(tokenizer, data.eval)).replace("<|endoftext|>", "")) == len(
        text
    )


def test_equal_documents_are_on_the_same_side(tmp_path, tokenizer):
    write_jsonl(tmp_path / "a.jsonl", [document(i % 50) for i in range(200)])
    write_jsonl(tmp_path / "b.jsonl", [document(i) for i in range(100)])
    data = prepare_data(
        [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")],
        seq_len=16,
        tokenizer=tokenizer,
        eval_fraction=0.2,
        cache_dir=tmp_path / "cache",
        progress=False,
    )
    ids, starts = data.train.streams[0].read(0, data.train.tokens)
    train = {tokenizer.decode(piece) for piece in np.split(ids, starts[1:])}
    held = set(texts_of(tokenizer, data.eval)) - {"<|endoftext|>"}
    assert held
    assert not train & held
    assert len(train) + len(held) == 100


def test_held_out_documents_stay_held_out_when_data_is_added(tmp_path, tokenizer):
    def held(count: int) -> set[str]:
        path = write_jsonl(tmp_path / f"{count}.jsonl", [document(i) for i in range(count)])
        data = prepare_data(
            [str(path)],
            seq_len=16,
            tokenizer=tokenizer,
            eval_fraction=0.1,
            cache_dir=tmp_path / "cache",
            progress=False,
        )
        return set(texts_of(tokenizer, data.eval)) - {"<|endoftext|>"}

    assert held(200) < held(400)


@settings(max_examples=20)
@given(
    split=st.sampled_from([(1, 8, 1), (2, 2, 2), (4, 1, 2), (1, 2, 4), (2, 4, 1), (8, 1, 1), (1, 1, 8)]),
    start=st.integers(0, 1000),
    skip=st.lists(st.tuples(st.integers(0, 9000), st.integers(1, 50)), max_size=3),
)
def test_a_step_has_the_same_samples_whatever_the_split(split, start, skip):
    micro, accumulation, world = split
    ranges = [(begin, begin + n) for begin, n in skip]

    def sampler(**sizes):
        return StepSampler(start_step=start, num_steps=3, skip=ranges, **sizes)

    whole = list(sampler(micro_batch_size=8))
    sizes = {"micro_batch_size": micro, "accumulation": accumulation, "world_size": world}
    ranks = [list(sampler(**sizes, rank=rank)) for rank in range(world)]
    assert all(len(batches) == len(sampler(**sizes)) == 3 * accumulation for batches in ranks)
    for step in range(3):
        mine = [i for rank in ranks for batch in rank[step * accumulation : (step + 1) * accumulation] for i in batch]
        assert sorted(mine) == whole[step] == sampler(**sizes).samples(start + step)
    skipped = {i for begin, end in ranges for i in range(begin, end)}
    everything = [i for i in range(8 * (start + 3) + len(skipped)) if i not in skipped]
    assert [i for batch in whole for i in batch] == everything[8 * start : 8 * (start + 3)]


def test_skipped_samples_are_the_only_ones_missing():
    skip = [(16, 24), (40, 48)]
    served = [i for batch in StepSampler(micro_batch_size=8, num_steps=6, skip=skip) for i in batch]
    assert served == [i for i in range(64) if not (16 <= i < 24 or 40 <= i < 48)]


def test_overlapping_skips_count_once():
    served = [i for batch in StepSampler(micro_batch_size=4, num_steps=3, skip=[(2, 6), (4, 9), (3, 5)]) for i in batch]
    assert served == [0, 1, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18]


def test_a_thousand_skipped_ranges_leave_out_what_they_name():
    skip = [(20 * n, 20 * n + 3 + n % 5) for n in range(1, 1000)]
    served = [i for batch in StepSampler(micro_batch_size=8, num_steps=2000, skip=skip) for i in batch]
    out = {i for begin, end in skip for i in range(begin, end)}
    assert served == [i for i in range(served[-1] + 1) if i not in out]


def test_an_iteration_that_begins_at_a_late_step_draws_nothing_before_it():
    sampler = StepSampler(micro_batch_size=4, accumulation=2, num_steps=10**12, skip=[(8, 16)])
    sampler.first_step = 10**12 - 2
    assert len(sampler) == 2 * 10**12  # of the whole run
    assert [i - 8 * 10**12 for batch in sampler for i in batch] == list(range(-8, 8))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_resumes_at_any_step(data, workers):
    full = list(build_dataloader(data.train, micro_batch_size=2, accumulation=2, num_steps=6, num_workers=workers))
    rest = list(
        build_dataloader(data.train, micro_batch_size=2, accumulation=2, start_step=4, num_steps=2, num_workers=workers)
    )
    assert len(full) == 12
    for a, b in zip(full[8:], rest, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert full[0]["input_ids"].shape == (2, 64)


def test_the_loader_after_a_change_of_batch_size_goes_on_where_it_was(data):
    before = StepSampler(micro_batch_size=8, num_steps=5)
    after = StepSampler(micro_batch_size=3, world_size=2, start_step=5, start_sample=before.consumed(5))
    assert after.samples(5) == list(range(40, 46))


def test_the_loader_leaves_torchs_generator_alone(data):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    next(iter(build_dataloader(data.train, micro_batch_size=2)))
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    "wrong",
    [
        {"micro_batch_size": 0},
        {"micro_batch_size": 1, "world_size": 2, "rank": 2},
        {"micro_batch_size": 1, "start_step": -1},
        {"micro_batch_size": 1, "skip": [(3, 3)]},
    ],
)
def test_impossible_batches_are_named(wrong):
    with pytest.raises(ValueError, match="must|write"):
        StepSampler(**wrong)


def test_weighted_sources_have_their_share_and_are_named(tmp_path, tokenizer):
    for name, base in (("a", 0), ("b", 1000)):
        write_jsonl(tmp_path / f"{name}.jsonl", [document(base + i) for i in range(100)])
    data = prepare_data(
        [f"{tmp_path}/a.jsonl:3", f"{tmp_path}/b.jsonl:1"],
        seq_len=32,
        tokenizer=tokenizer,
        eval_fraction=0.0,
        cache_dir=tmp_path / "cache",
        with_source=True,
        progress=False,
    )
    assert data.eval is None
    counts = data.train.source_counts(range(400))
    assert list(counts.values()) == pytest.approx([300, 100], abs=3)
    for sample in range(40):
        row = data.train[sample]
        text = tokenizer.decode(row["input_ids"])
        assert row["source_id"] == data.train.source_of(sample)
        if "document 1" in text and text.count("document") > 1:
            numbers = [int(part.split(":")[0]) for part in text.split("document ")[1:] if part.split(":")[0].isdigit()]
            assert all((n >= 1000) == (row["source_id"] == 1) for n in numbers[:-1] if n > 99 or row["source_id"] == 0)


def test_a_resume_on_other_data_is_refused_with_the_reason(tmp_path, tokenizer):
    def fingerprint(**changes):
        texts = changes.pop("texts", 50)
        path = write_jsonl(tmp_path / f"texts{texts}.jsonl", [document(i) for i in range(texts)])
        options = {"seq_len": 16, "tokenizer": tokenizer, "cache_dir": tmp_path / "cache", "progress": False}
        return prepare_data([f"{path}{changes.pop('weight', '')}"], **{**options, **changes}).fingerprint

    base = fingerprint()
    check_fingerprint(base, fingerprint())
    for changes, reason in [
        ({"seq_len": 32}, "row length: the checkpoint has 16, this run 32"),
        ({"seed": 1}, "seed of the order"),
        ({"eval_fraction": 0.5}, "held-out part"),
        ({"texts": 51}, "content of"),
        ({"weight": ":2"}, "weight of"),
        ({"tokenizer": None, "vocab_size": 300}, "tokenizer"),
    ]:
        with pytest.raises(ValueError, match=reason):
            check_fingerprint(base, fingerprint(**changes))
    moved = tmp_path / "elsewhere.jsonl"
    moved.write_bytes((tmp_path / "texts50.jsonl").read_bytes())
    options = {"seq_len": 16, "tokenizer": tokenizer, "cache_dir": tmp_path / "cache", "progress": False}
    check_fingerprint(base, prepare_data([str(moved)], **options).fingerprint)


def test_packed_dataset_counts_passes(data):
    dataset = PackedDataset(data.train.streams, 64, 0)
    assert dataset.epoch(0) == 0
    assert dataset.epoch(2 * dataset.tokens // 64) == pytest.approx(2, abs=64 / dataset.tokens * 2)
