"""Streams: the same documents as the files hold, each once per pass, and a resume that is exact or refused."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from texts import document, write_jsonl

from hf_mamba.data import StreamingLoader

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


def loader(folder, tokenizer, **options) -> StreamingLoader:
    return StreamingLoader([str(folder)], tokenizer, **{"seq_len": 32, "micro_batch_size": 2, **options})


def take(stream, count: int) -> list[dict[str, torch.Tensor]]:
    batches = iter(stream)
    found = [next(batches) for _ in range(count)]
    batches.close()
    return found


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
        mine = documents_in(take(loader(folder, tokenizer, rank=rank, world_size=world), 200 // world), tokenizer)
        first_pass = mine[: mine.index(mine[0], 1)]
        again = mine[len(first_pass) : 2 * len(first_pass)]
        assert again == first_pass[: len(again)]
        found += first_pass
    assert sorted(found) == sorted(document(i, 1 + i * 7 % 60) for i in range(COUNT))


@pytest.mark.parametrize(("rank", "world"), [(0, 1), (1, 2), (2, 3)])
def test_a_resume_after_any_batch_is_exact(folder, tokenizer, rank, world):
    """Also in the second pass, twice in a row, and through JSON."""
    share = {"rank": rank, "world_size": world}
    whole = take(loader(folder, tokenizer, **share), 130)
    stream, states = loader(folder, tokenizer, **share), []
    for batch in stream:
        assert same([batch], [whole[len(states)]])
        states.append(json.dumps(stream.state_dict()))
        if len(states) == 125:
            break
    for at in [*range(1, 60, 4), *range(60, 125, 17)]:
        resumed = loader(folder, tokenizer, **share)
        resumed.load_state_dict(json.loads(states[at - 1]))
        assert same(take(resumed, 2), whole[at : at + 2])
        again = loader(folder, tokenizer, **share)
        again.load_state_dict(resumed.state_dict())
        assert same(take(again, 2), whole[at + 2 : at + 4])


def test_a_resume_before_the_first_batch_is_the_beginning(folder, tokenizer):
    fresh, other = loader(folder, tokenizer), loader(folder, tokenizer)
    other.load_state_dict(fresh.state_dict())
    assert same(take(fresh, 3), take(other, 3))


def test_seq_idx_and_labels_are_those_of_packed_rows(folder, tokenizer):
    for batch in take(loader(folder, tokenizer), 30):
        begins = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
        begins[:, 1:] = batch["input_ids"][:, :-1] == tokenizer.eos_token_id
        assert torch.equal(batch["seq_idx"], begins.cumsum(1).int())
        assert torch.equal(batch["labels"] == -100, begins | (torch.arange(32) == 0))


def test_other_settings_and_other_data_are_refused(folder, tokenizer, tmp_path):
    stream = loader(folder, tokenizer)
    take(stream, 5)
    state = stream.state_dict()
    for change, reason in [
        ({"world_size": 2}, "world_size: 1 then, 2 now"),
        ({"seq_len": 16}, "seq_len: 32 then, 16 now"),
        ({"eval_fraction": 0.1}, "held_out"),
    ]:
        with pytest.raises(ValueError, match=reason):
            loader(folder, tokenizer, **change).load_state_dict(state)
    write_jsonl(tmp_path / "data" / "a.jsonl", [document(i) for i in range(50)])
    stream = loader(tmp_path / "data", tokenizer)
    take(stream, 5)
    write_jsonl(tmp_path / "data" / "a.jsonl", [document(i + 1) for i in range(50)])
    changed = loader(tmp_path / "data", tokenizer)
    changed.load_state_dict(stream.state_dict())
    with pytest.raises(ValueError, match="does not go on with the document at which the checkpoint was taken"):
        take(changed, 1)


def test_held_out_documents_are_not_trained_on(folder, tokenizer):
    stream = loader(folder, tokenizer, eval_fraction=0.2)
    train = set(documents_in(take(stream, 200), tokenizer))
    rows = list(stream.held_out(10**6, pad_id=0))
    held = set(documents_in(rows, tokenizer)) - {""}
    assert held
    assert not train & held
    assert train | held == {document(i, 1 + i * 7 % 60) for i in range(COUNT)}
    with pytest.raises(ValueError, match="no document of the stream is held out"):
        loader(folder, tokenizer).held_out(100, 0)


def test_weighted_streams_have_their_share(tmp_path, tokenizer):
    for name, base in (("a", 0), ("b", 500)):
        write_jsonl(tmp_path / f"{name}.jsonl", [document(base + i) for i in range(100)])
    with pytest.raises(ValueError, match="no known size"):
        StreamingLoader([f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"], tokenizer, seq_len=32, micro_batch_size=2)
    stream = StreamingLoader(
        [f"{tmp_path}/a.jsonl:3", f"{tmp_path}/b.jsonl:1"], tokenizer, seq_len=256, micro_batch_size=2
    )
    batches = take(stream, 20)
    rows = [tokenizer.decode(row) for batch in batches for row in batch["input_ids"]]
    from_b = [any(f"document {500 + i}:" in row for i in range(100)) for row in rows]
    assert sum(from_b) == pytest.approx(10, abs=1)
    resumed = StreamingLoader(
        [f"{tmp_path}/a.jsonl:3", f"{tmp_path}/b.jsonl:1"], tokenizer, seq_len=256, micro_batch_size=2
    )
    resumed.load_state_dict(stream.state_dict())
    assert same(take(resumed, 3), take(stream, 3))


def test_what_cannot_be_streamed_is_named_when_the_first_batch_is_made(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(ValueError, match="no column 'text'; the columns there are: body; did you mean 'body'"):
        take(StreamingLoader([f"{tmp_path}/a.jsonl"], tokenizer, seq_len=8, micro_batch_size=1), 1)
    write_jsonl(tmp_path / "b.jsonl", ["", "  "])
    with pytest.raises(ValueError, match="found no text"):
        take(StreamingLoader([f"{tmp_path}/b.jsonl"], tokenizer, seq_len=8, micro_batch_size=1), 1)
