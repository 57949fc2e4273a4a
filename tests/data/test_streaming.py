"""Streams: the same documents as the files hold, each once per pass, and a resume that is exact or refused."""

import json

import hypothesis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from texts import document, write_jsonl

from hf_mamba.data import StreamedDataset, build_dataloader, check_fingerprint, stream_data
from hf_mamba.data.encoding import Encoding
from hf_mamba.data.sources import parse_sources
from hf_mamba.data.stream_rows import Packer

COUNT = 120


@pytest.fixture(scope="module", params=["jsonl", "parquet", "arrow"])
def folder(request, tmp_path_factory):
    """Documents of 1 to 60 words in three files of different lengths."""
    folder = tmp_path_factory.mktemp("stream")
    for part, numbers in enumerate(np.split(np.arange(COUNT), [50, 63])):
        texts = [document(int(i), 1 + int(i) * 7 % 60) for i in numbers]
        table = pa.table({"text": texts})
        path = folder / f"part{part}.{request.param}"
        if request.param == "jsonl":
            write_jsonl(path, texts)
        elif request.param == "parquet":
            pq.write_table(table, path, row_group_size=9)
        else:
            with pa.ipc.new_stream(path, table.schema) as writer:
                writer.write_table(table, max_chunksize=9)
    return folder


BATCH = 2
# as version 0.1 wrote it, when the datasets library read the files
OLD_STATE = {
    "rank": 0,
    "world_size": 1,
    "rows": 3,
    "streams": [{"before": {"epoch": 0}, "part": 0, "hash": "0", "used": 1, "passes": 0}],
}


def dataset(folder, tokenizer, **options) -> StreamedDataset:
    return StreamedDataset([str(folder)], tokenizer, **{"seq_len": 32, **options})


def opened(folder, tokenizer, share=(0, 1), state=None, **options) -> StreamedDataset:
    stream = dataset(folder, tokenizer, **options)
    stream.open(*share, state)
    return stream


def batches_of(stream: StreamedDataset, skip=()):
    """From where the stream is, as in a run."""
    state = stream.state_dict()
    rank, world = state["rank"], state["world_size"]
    start = state["rows"] // BATCH
    shares = {"rank": rank, "world_size": world, "start_step": start, "skip": skip}
    return build_dataloader(stream, micro_batch_size=BATCH, **shares)


def take(stream: StreamedDataset, count: int, skip=()) -> list[dict[str, torch.Tensor]]:
    return [batch for _, batch in zip(range(count), batches_of(stream, skip), strict=False)]


def documents_in(batches, tokenizer) -> list[str]:
    ids = torch.cat([batch["input_ids"].flatten() for batch in batches]).numpy()
    pieces = np.split(ids, np.flatnonzero(ids == tokenizer.eos_token_id) + 1)[:-1]
    return [tokenizer.decode(piece[:-1]) for piece in pieces]


def same(a, b) -> bool:
    return all(torch.equal(x[key], y[key]) for x, y in zip(a, b, strict=True) for key in x)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_document_is_seen_once_per_pass(folder, tokenizer, world):
    """Three files over three processes are a file each; over two, every other document."""
    found = []
    for rank in range(world):
        mine = documents_in(take(opened(folder, tokenizer, (rank, world)), 200 // world), tokenizer)
        first_pass = mine[: mine.index(mine[0], 1)]
        again = mine[len(first_pass) : 2 * len(first_pass)]
        assert again == first_pass[: len(again)]
        found += first_pass
    assert sorted(found) == sorted(document(i, 1 + i * 7 % 60) for i in range(COUNT))


@pytest.mark.parametrize("share", [(0, 1), (1, 2), (2, 3)])
def test_a_resume_after_any_batch_is_exact(folder, tokenizer, share):
    """Also in the second pass, twice in a row, and through JSON."""
    whole = take(opened(folder, tokenizer, share), 130)
    stream, states = opened(folder, tokenizer, share), []
    for batch in batches_of(stream):
        assert same([batch], [whole[len(states)]])
        states.append(json.dumps(stream.state_dict()))
        if len(states) == 125:
            break
    for at in [*range(1, 60, 4), *range(60, 125, 17)]:
        resumed = opened(folder, tokenizer, share, json.loads(states[at - 1]))
        assert same(take(resumed, 2), whole[at : at + 2])
        again = opened(folder, tokenizer, share, resumed.state_dict())
        assert same(take(again, 2), whole[at + 2 : at + 4])


def test_a_resume_before_the_first_batch_is_the_beginning(folder, tokenizer):
    fresh = opened(folder, tokenizer)
    other = opened(folder, tokenizer, state=json.loads(json.dumps(fresh.state_dict())))
    assert same(take(fresh, 3), take(other, 3))


def test_samples_that_are_left_out_are_passed_by(folder, tokenizer):
    """As after a rewind: a step's samples of both processes, also when the run resumes before them."""
    whole = take(opened(folder, tokenizer, (1, 2)), 12)
    step = 2 * BATCH  # both processes' rows
    left_out = [(3 * step, 5 * step)]
    assert same(take(opened(folder, tokenizer, (1, 2)), 6, left_out), whole[:3] + whole[5:8])
    stream = opened(folder, tokenizer, (1, 2))
    take(stream, 2)
    assert same(take(stream, 3, left_out), [whole[2], *whole[5:7]])
    with pytest.raises(ValueError, match="goes forward only"):
        stream[0]


def test_the_micro_batch_may_change(folder, tokenizer):
    two = take(opened(folder, tokenizer), 6)
    stream = opened(folder, tokenizer)
    six = next(iter(build_dataloader(stream, micro_batch_size=6)))
    assert same([six], [{key: torch.cat([batch[key] for batch in two[:3]]) for key in six}])
    rest = next(iter(build_dataloader(stream, micro_batch_size=3, start_step=2)))
    assert same([rest], [{key: torch.cat([batch[key] for batch in two[3:5]])[:3] for key in rest}])


def test_seq_idx_and_labels_are_those_of_packed_rows(folder, tokenizer):
    for batch in take(opened(folder, tokenizer), 30):
        begins = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
        begins[:, 1:] = batch["input_ids"][:, :-1] == tokenizer.eos_token_id
        assert torch.equal(batch["seq_idx"], begins.cumsum(1).int())
        assert torch.equal(batch["labels"] == -100, begins | (torch.arange(32) == 0))


def test_other_settings_and_other_data_are_refused(folder, tokenizer, tmp_path):
    stream = opened(folder, tokenizer)
    take(stream, 5)
    with pytest.raises(ValueError, match="written by 1 processes and this run has 2.*without --streaming"):
        opened(folder, tokenizer, (0, 2), stream.state_dict())
    for change, reason in [({"seq_len": 16}, "the row length.*32, this run 16"), ({"eval_fraction": 0.1}, "held-out")]:
        with pytest.raises(ValueError, match=reason):
            check_fingerprint(stream.fingerprint, dataset(folder, tokenizer, **change).fingerprint)
    check_fingerprint(stream.fingerprint, json.loads(json.dumps(dataset(folder, tokenizer).fingerprint)))
    shards = {"seq_len": 32, "sources": [{"name": "x", "content": "y", "tokens": 5, "weight": None}]}
    with pytest.raises(ValueError, match="whether it is streamed"):
        check_fingerprint(shards, stream.fingerprint)
    write_jsonl(tmp_path / "data" / "a.jsonl", [document(i) for i in range(50)])
    stream = opened(tmp_path / "data", tokenizer)
    take(stream, 5)
    write_jsonl(tmp_path / "data" / "a.jsonl", [document(i + 1) for i in range(50)])
    with pytest.raises(ValueError, match="does not go on with the document at which the checkpoint was taken"):
        opened(tmp_path / "data", tokenizer, state=stream.state_dict())


def test_held_out_documents_are_not_trained_on(folder, tokenizer):
    stream = opened(folder, tokenizer, eval_fraction=0.2)
    train = set(documents_in(take(stream, 200), tokenizer))
    rows = list(stream.held_out(10**6, pad_id=0))
    held = set(documents_in(rows, tokenizer)) - {""}
    assert held
    assert not train & held
    assert train | held == {document(i, 1 + i * 7 % 60) for i in range(COUNT)}
    with pytest.raises(ValueError, match="no document of the stream is held out"):
        dataset(folder, tokenizer).held_out(100, 0)
    with pytest.raises(ValueError, match="eval_fraction is 1.5"):
        stream_data([str(folder)], tokenizer=tokenizer, seq_len=32, eval_fraction=1.5)


def weighted(tmp_path, tokenizer, share=(0, 1), state=None) -> StreamedDataset:
    names = [f"{tmp_path}/a.jsonl:3", f"{tmp_path}/b.jsonl:1"]
    stream = StreamedDataset(names, tokenizer, seq_len=256, with_source=True)
    stream.open(*share, state)
    return stream


def test_weighted_streams_have_their_share(tmp_path, tokenizer):
    for name, base in (("a", 0), ("b", 500)):
        write_jsonl(tmp_path / f"{name}.jsonl", [document(base + i) for i in range(100)])
    with pytest.raises(ValueError, match="no known size"):
        StreamedDataset([f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"], tokenizer, seq_len=32)
    stream = weighted(tmp_path, tokenizer)
    batches = take(stream, 20)
    rows = [tokenizer.decode(row) for batch in batches for row in batch["input_ids"]]
    from_b = [any(f"document {500 + i}:" in row for i in range(100)) for row in rows]
    assert from_b == [source == 1 for batch in batches for source in batch["source_id"]]
    assert sum(from_b) == pytest.approx(10, abs=1)
    assert list(stream.source_counts(range(40)).values()) == [40 - sum(from_b), sum(from_b)]
    resumed = weighted(tmp_path, tokenizer, state=stream.state_dict())
    assert same(take(resumed, 3), take(stream, 3))
    two = [take(weighted(tmp_path, tokenizer, (rank, 2)), 10) for rank in range(2)]
    assert sum(int(batch["source_id"].sum()) for batch in two[0] + two[1]) == sum(from_b)  # the mix is the run's


BAD = [b'{"text": "cut of', b'{"text": "\xff\xfe"}', b'{"body": "x"}', b'{"text": 5}', b'{"text": " "}', b"[1]"]


def test_broken_records_are_counted_and_passed_by(tmp_path, tokenizer):
    good = [json.dumps({"text": document(i)}) for i in range(20)]
    lines = [*(line.encode() for line in good[:7]), *BAD, *(line.encode() for line in good[7:]), b"", b""]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    stream = opened(tmp_path, tokenizer)
    found = documents_in(take(stream, 40), tokenizer)
    assert found[:20] == [document(i) for i in range(20)]
    assert stream.unusable() >= len(BAD)  # the reader is ahead, perhaps within a later pass
    (account,) = stream.account()
    assert sum(account["unusable"].values()) >= len(BAD)
    assert account["kept"] >= 20


HOSTILE = st.one_of(
    st.binary(max_size=30).map(lambda value: value.replace(b"\n", b" ").replace(b"\r", b" ")),
    st.sampled_from(BAD),
    st.sampled_from(
        [b'{"text": "a \\u0000 b"}', b'{"text": "\\ud800"}', b'{"text": ' + b"[" * 5000, b'{"text": null}']
    ),
    st.text(min_size=1, max_size=40).map(lambda text: json.dumps({"text": text}).encode()),
)


@given(records=st.lists(HOSTILE, max_size=12), place=st.integers(0, 12))
@hypothesis.settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_pass_accounts_for_every_line(tmp_path, tokenizer, records, place):
    """Lines = kept + left out by reason, and the tokens are those of the documents kept, whatever the lines hold."""
    lines = [*records[:place], json.dumps({"text": document(0)}).encode(), *records[place:]]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    encoding = Encoding.of(tokenizer)
    packer = Packer(parse_sources([str(tmp_path)])[0], encoding, (0, 1), 0, None)
    kept, leading = [], packer.stream.bad.counts.total()  # before the first document of a pass
    while packer.passes == 0:
        kept.append(len(packer._tokens))
        packer._next()
    left_out = packer.stream.bad.counts.total() - leading
    assert packer.read["held out"] == 0
    assert packer.read["kept"] - 1 == len(kept)  # the next pass has begun with its first document
    assert len(kept) + left_out == sum(1 for line in lines if line.strip())
    assert packer.read["tokens"] == sum(kept) + kept[0]


def test_text_files_are_documents_and_separators_divide_them(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("one\n<|endoftext|>\ntwo\ntwo again\n<|endoftext|>\nthree")
    (tmp_path / "b.txt").write_text("four")
    stream = opened(tmp_path, tokenizer)
    states = []
    batches = []
    for batch in batches_of(stream):
        batches.append(batch)
        states.append(stream.state_dict())
        if len(states) == 6:
            break
    found = documents_in(batches, tokenizer)
    assert found[:5] == ["one\n", "two\ntwo again\n", "three", "four", "one\n"]
    for at in range(1, 5):
        assert same(take(opened(tmp_path, tokenizer, state=states[at - 1]), 2), batches[at : at + 2][:2])


def test_what_cannot_be_streamed_is_named_when_it_is_opened(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(ValueError, match="no column 'text'; the columns there are: body; did you mean 'body'"):
        opened(tmp_path / "a.jsonl", tokenizer)
    write_jsonl(tmp_path / "b.jsonl", ["", "  "])
    with pytest.raises(ValueError, match="found no text in its share"):
        opened(tmp_path / "b.jsonl", tokenizer)
    with pytest.raises(ValueError, match="read by an older version, in another way"):
        opened(tmp_path / "a.jsonl", tokenizer, state=OLD_STATE)
