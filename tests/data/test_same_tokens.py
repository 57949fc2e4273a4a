"""A file tokenised first and the same file streamed give the same tokens: every format, packing and tokenizer, whole
files and hostile ones. What is read is what is kept and what is counted."""

import csv
import gzip
import io
import itertools
import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from hf_mamba.data import Source, parse_sources, records, segments, stream_rows
from hf_mamba.data.encoding import Encoding
from hf_mamba.data.records import check_columns, plan_units
from hf_mamba.data.segments import BadRecords
from hf_mamba.data.shards import TokenShards, seal
from hf_mamba.data.stream_rows import Packer, open_stream
from hf_mamba.data.worker import Job, tokenize_unit

TEXTS = [
    "plain words",
    "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nhi<|im_end|>",
    "CRLF\r\nline\rend\u2028of line",
    "\ufeffmarked zwölf 🐍",
    'quotes "," and\n\nblank lines\n',
    "a document that is longer than one segment " * 9,
    "<s> begins, </s>, <|endoftext|> is text",
]
KINDS = [f"a.{k}{c}" for k, c in itertools.product(("jsonl", "json", "csv", "txt"), ("", ".gz", ".zst"))]
KINDS += ["a.parquet", "a.arrow"]


@pytest.fixture(scope="module")
def tokenizers(tokenizer) -> dict[str, PreTrainedTokenizerFast]:
    """The trained one, and ones that put tokens around a text and have special tokens of their own."""

    def variant(template: str | None, **options) -> PreTrainedTokenizerFast:
        inner = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", bos_token="<s>", **options)
        made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        if template:
            pairs = [(t, made.convert_tokens_to_ids(t)) for t in ("<s>", "</s>")]
            made.backend_tokenizer.post_processor = processors.TemplateProcessing(template, special_tokens=pairs)
        return made

    return {
        "plain": tokenizer,
        "special": variant(None),
        "bos": variant("<s> $A"),
        "both": variant("<s> $A </s>"),
        "split": variant("<s> $A", split_special_tokens=True),
    }


def write(path: Path, texts: list, column: str = "text") -> Path:
    """The texts, or lists of ids, in the format that the name says."""
    name = path.name
    if name.endswith((".parquet", ".arrow")):
        table = pa.table({column: texts})
        if name.endswith(".parquet"):
            pq.write_table(table, path, row_group_size=2)
        else:
            with pa.ipc.new_file(path, table.schema) as writer:
                writer.write_table(table, max_chunksize=2)
        return path
    if ".jsonl" in name:
        data = "".join(json.dumps({column: text}) + "\n" for text in texts)
    elif ".json" in name:
        data = json.dumps([{column: text} for text in texts], indent=1)
    elif ".csv" in name:
        csv.writer(out := io.StringIO()).writerows([["text", "n"], *([text, 1] for text in texts)])
        data = out.getvalue()
    else:
        data = "\n<|endoftext|>\n".join(texts)
    return pack(path, data.encode())


def pack(path: Path, data: bytes) -> Path:
    if path.suffix == ".zst":
        with pa.output_stream(path, compression="zstd") as file:
            file.write(data)
    else:
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def tokenised(path: Path, encoding: Encoding) -> tuple[list[int], list[int], TokenShards]:
    """(tokens, where documents start, the shards) by way of the cache's files, without its processes."""
    source = parse_sources([str(path)])[0]
    check_columns(source.files(), "text")
    job = Job(plan_units(source.files()), "text", encoding)
    folder = path.with_name(path.name + ".shards")
    folder.mkdir()
    units = [tokenize_unit(n, job, folder, folder) for n in range(len(job.units))]
    manifest = {"content": "", "tokenizer": "", "dtype": encoding.dtype, "units": units}
    (folder / "manifest.json").write_bytes(seal(manifest))
    shards = TokenShards(folder)
    tokens, starts, before = [], [], 0
    for number, unit in enumerate(units):
        ids, begins = shards.read(number, 0, unit["tokens"])
        tokens += ids.tolist()
        starts += (begins + before).tolist()
        before += unit["tokens"]
    return tokens, starts, shards


def streamed(path: Path, encoding: Encoding) -> tuple[list[int], list[int], BadRecords]:
    """(tokens, where documents start, what could not be used) of one pass of the stream."""
    stream = open_stream(parse_sources([str(path)])[0], (0, 1), encoding)
    tokens, starts = [], []
    for item in stream.read(None):
        if item.segment.first:
            starts.append(len(tokens))
        tokens += encoding.encode([item.segment])[0]
    return tokens, starts, stream.bad


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(records, "MIN_UNIT_BYTES", 200)
    monkeypatch.setattr(segments, "SEGMENT_CHARS", 60)


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_and_tokenised_are_the_same(tmp_path, tokenizers, kind):
    path = write(tmp_path / kind, TEXTS)
    for number, (name, tokenizer) in enumerate(tokenizers.items()):
        (tmp_path / str(number)).mkdir()
        encoding = Encoding.of(tokenizer)
        copy = tmp_path / str(number) / kind
        copy.write_bytes(path.read_bytes())
        tokens, starts, shards = tokenised(copy, encoding)
        found = streamed(copy, encoding)
        assert (found[0], found[1]) == (tokens, starts), name
        assert len(starts) == shards.documents == len(TEXTS)
        packer = Packer(parse_sources([str(copy)])[0], encoding, (0, 1), 0, None)
        row, begins = packer.row(len(tokens))
        assert row.tolist() == tokens
        assert begins.tolist() == starts


@pytest.mark.parametrize("name", ["plain", "special", "bos", "both", "split"])
def test_a_documents_tokens_are_what_the_tokenizer_makes_of_it(tmp_path, tokenizers, monkeypatch, name):
    """With the tokenizer's own begin and end, once; the token that ends documents is text inside of one."""
    monkeypatch.setattr(segments, "SEGMENT_CHARS", 1 << 16)
    tokenizer = tokenizers[name]
    encoding = Encoding.of(tokenizer)
    tokens, starts, shards = tokenised(write(tmp_path / "a.jsonl", TEXTS), encoding)
    for text, ids in zip(TEXTS, np.split(np.array(tokens), starts[1:]), strict=True):
        expected = tokenizer(text)["input_ids"]
        if expected[-1] != tokenizer.eos_token_id:
            expected = [*expected, tokenizer.eos_token_id]
        if tokenizer.eos_token not in text:
            assert ids.tolist() == expected
        assert ids.tolist().count(tokenizer.eos_token_id) == 1
        assert ids[-1] == tokenizer.eos_token_id
        if name in ("bos", "both", "split"):
            assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids).removeprefix("<s>" if encoding.prefix else "") == text + tokenizer.eos_token
    counted = (
        {"<s>": 1, "<|endoftext|>": 1, "<|im_end|>": 2, "<|im_start|>": 2} if name in ("special", "bos", "both") else {}
    )
    assert shards.special == counted


WITHOUT_END = [text for text in TEXTS if "</s>" not in text and "<|endoftext|>" not in text]


@pytest.mark.parametrize("kind", ["a.jsonl", "a.json.zst", "a.parquet", "a.arrow"])
def test_ids_of_texts_are_the_same_tokens_as_the_texts(tmp_path, tokenizers, monkeypatch, kind):
    """What `dataset.map(tokenizer)` leaves in input_ids: cached and streamed, from every format that has lists."""
    monkeypatch.setattr(segments, "SEGMENT_CHARS", 1 << 16)
    for name, tokenizer in tokenizers.items():
        folder = tmp_path / name
        folder.mkdir()
        encoding = Encoding.of(tokenizer)
        ids = [tokenizer(text)["input_ids"] for text in WITHOUT_END]
        tokens, starts, shards = tokenised(write(folder / kind, ids, "input_ids"), encoding)
        expected = tokenised(write(folder / f"text-{kind}", WITHOUT_END), encoding)
        assert (tokens, starts) == expected[:2], name
        assert shards.documents == len(WITHOUT_END)
        assert not shards.bad
        assert streamed(folder / kind, encoding)[:2] == (tokens, starts)


def test_saved_datasets_with_ids_are_read_and_text_goes_first(tmp_path, tokenizers, monkeypatch):
    from datasets import Dataset

    monkeypatch.setattr(segments, "SEGMENT_CHARS", 1 << 16)
    encoding = Encoding.of(tokenizers["both"])
    texts = Dataset.from_dict({"text": WITHOUT_END})
    ids = texts.map(lambda rows: tokenizers["both"](rows["text"]), batched=True)
    ids.save_to_disk(tmp_path / "with_text")
    ids.remove_columns("text").save_to_disk(tmp_path / "ids")
    expected = tokenised(write(tmp_path / "a.jsonl", WITHOUT_END), encoding)
    for name in ("with_text", "ids"):
        tokens, starts, shards = tokenised(tmp_path / name, encoding)
        assert (tokens, starts) == expected[:2]
        assert streamed(tmp_path / name, encoding)[:2] == expected[:2]
        assert bool(shards.text_bytes) == (name == "with_text")
    source = parse_sources([f"{tmp_path}/with_text@input_ids"])[0]
    assert source.text_column == "input_ids"
    check_columns(source.files(), "input_ids")


@pytest.mark.parametrize("packed", [False, True])
def test_a_hub_stream_gives_the_same_tokens_and_names_bad_records(tmp_path, tokenizers, monkeypatch, caplog, packed):
    """The datasets library reads it; its record is named, and a resume finds the segment again."""
    from datasets import load_dataset

    rows = [[5, 6, 0, 7], [8, 9, 10, 11], [0, 12, 13, 14]] if packed else [[5, 6], None, list(range(7, 60)), [9]]
    table = pa.table({"input_ids": pa.array(rows, pa.list_(pa.int32()))})
    pq.write_table(table, tmp_path / "a.parquet")
    hub = lambda spec, streaming: load_dataset(  # noqa: E731
        "parquet", data_files=f"{tmp_path}/a.parquet", split="train", streaming=streaming, cache_dir=tmp_path / "hub"
    )
    monkeypatch.setattr(stream_rows, "hub_dataset", hub)
    encoding = Encoding.of(tokenizers["plain"])
    tokens, _, _ = tokenised(tmp_path / "a.parquet", encoding)
    packer = Packer(Source("owner/name", "hub"), encoding, (0, 1), 0, None)
    assert packer.row(len(tokens))[0].tolist() == tokens
    assert ("owner/name record 1: no text (skipped)" in caplog.text) != packed
    packer = Packer(Source("owner/name", "hub"), encoding, (0, 1), 0, None)
    packer.row(8)
    again = Packer(Source("owner/name", "hub"), encoding, (0, 1), 0, json.loads(json.dumps(packer.state())))
    assert again.row(len(tokens) - 8)[0].tolist() == tokens[8:]


def test_rows_that_were_packed_stay_as_they_are(tmp_path, tokenizers):
    """Rows of one length, cut from a stream: nothing is put around them, and documents end where they end."""
    tokenizer = tokenizers["both"]
    encoding, end = Encoding.of(tokenizer), tokenizer.eos_token_id
    rows = [[5, 6, end, 7], [8, 9, 10, 11], [end, 12, 13, end]]
    for kind in ("a.jsonl", "a.parquet"):
        tokens, starts, _ = tokenised(write(tmp_path / kind, rows, "input_ids"), encoding)
        assert tokens == [i for row in rows for i in row]
        assert starts == [0, 3, 4, 8, 9]
        assert streamed(tmp_path / kind, encoding)[:2] == (tokens, starts)
    rows = [[5, 6, end, 7], [8, end, end, end]]  # documents of their own, two of them in one record
    (tmp_path / "own").mkdir()
    tokens, starts, _ = tokenised(write(tmp_path / "own" / "a.jsonl", [*rows, [9]], "input_ids"), encoding)
    begin = tokenizer.bos_token_id
    assert tokens == [begin, 5, 6, end, begin, 7, end, begin, 8, end, begin, 9, end]
    assert starts == [0, 4, 7, 10]


def test_a_long_document_of_ids_is_cut_into_segments(tmp_path, tokenizers):
    ids = [5 + i % 200 for i in range(1000)]
    encoding = Encoding.of(tokenizers["plain"])
    tokens, starts, shards = tokenised(write(tmp_path / "a.arrow", [ids, ids[:3]], "input_ids"), encoding)
    end = tokenizers["plain"].eos_token_id
    assert tokens == [*ids, end, *ids[:3], end]
    assert starts == [0, 1001]
    assert sum(unit["segments"] for unit in shards.units) > 60
    packer = Packer(parse_sources([f"{tmp_path}/a.arrow"])[0], encoding, (0, 1), 0, None)
    packer.row(500)
    state = packer.state()
    again = Packer(parse_sources([f"{tmp_path}/a.arrow"])[0], encoding, (0, 1), 0, state)
    assert again.row(505)[0].tolist() == packer.row(505)[0].tolist() == tokens[500:]


@pytest.mark.parametrize("wrong", [400, -1, 2**40])
def test_ids_of_another_tokenizer_are_refused(tmp_path, tokenizers, wrong):
    encoding = Encoding.of(tokenizers["plain"])
    for kind in ("a.jsonl", "a.parquet"):
        write(tmp_path / kind, [[1, 2], [3], [4, wrong]], "input_ids")
        for way in (tokenised, streamed):
            with pytest.raises(ValueError, match=f"{kind} .*: id {wrong} is not one of the tokenizer's"):
                way(tmp_path / kind, encoding)


def test_ids_that_are_none_are_counted(tmp_path, tokenizers):
    table = pa.table({"input_ids": pa.array([[1, 2], None, [], [3, None], [4]], pa.list_(pa.int32()))})
    pq.write_table(table, tmp_path / "a.parquet")
    rows = [json.dumps({"input_ids": row}) for row in ([1, 2], None, [], [3, 1.5], [4], [True])]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    for name, count in (("a.parquet", 1), ("a.jsonl", 2)):
        _, starts, shards = tokenised(tmp_path / name, Encoding.of(tokenizers["plain"]))
        assert len(starts) == 2
        assert shards.bad == {"no text": 1, "empty": 1, "text is not a string": count}


HOSTILE_LINES = [
    b"[" * 2_000,
    b'{"text": ' + b"[" * 1100 + b"]" * 1100 + b"}",
    b'{"text": "cut',
    b'{"text": "\xff"}',
    b'{"text": "\\ud800"}',
    b'{"text": null}',
    b'{"text": 1e999}',
    b"\0" * 50,
    b'{"other": ""}',
    b'"text"',
    b'{"text": ""}',
]


def hostile(path: Path, rng: random.Random) -> int:
    """Write a damaged file; return how many of its documents are certain to be whole."""
    texts = [f"document {i} " + "word " * rng.randint(0, 40) + f"{i}" for i in range(rng.randint(1, 12))]
    write(path, texts)
    data = bytearray(path.read_bytes())
    damage = rng.choice(["cut", "flip", "zeros", "lines", "empty"])
    if damage == "lines" and path.name.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")):
        lines = [json.dumps({"text": text}).encode() for text in texts]
        for line in rng.choices(HOSTILE_LINES, k=4):
            lines.insert(rng.randint(0, len(lines)), line)
        pack(path, b"\n".join(lines))
        return len(texts)
    if damage == "zeros" and path.suffix == ".gz":
        path.write_bytes(data + b"\0" * rng.randint(1, 2000))
        return len(texts)
    if damage == "cut":
        del data[rng.randint(0, len(data)) :]
    elif damage == "empty":
        data.clear()
    else:
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return 0


def account(path: Path, encoding: Encoding) -> tuple[object, ...]:
    """What the cached way makes of a file; a file without the column is an error of the user's."""
    try:
        tokens, starts, shards = tokenised(path, encoding)
    except ValueError as error:
        return (str(error).split(":")[0],)
    assert len(tokens) == shards.tokens == sum(unit["tokens"] for unit in shards.units)
    assert len(starts) == shards.documents
    return tokens, starts, shards.bad


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_files_end_nothing_and_lose_nothing_else(tmp_path, tokenizers, kind):
    """15 files of each kind: the same tokens and the same account both ways, and no exception but for a column."""
    encoding = Encoding.of(tokenizers["bos"])
    rng = random.Random(kind)
    for number in range(15):
        folder = tmp_path / str(number)
        folder.mkdir()
        whole = hostile(folder / kind, rng)
        one = account(folder / kind, encoding)
        if len(one) == 1:  # damage of the column's name, of which both ways speak
            with pytest.raises(ValueError, match="no column|not strings"):
                streamed(folder / kind, encoding)
            continue
        other = streamed(folder / kind, encoding)
        assert one == (other[0], other[1], dict(other[2].counts))
        assert len(one[1]) >= whole
        assert all(kind in example for example in other[2].examples)


def test_a_document_begins_where_its_first_usable_line_is(tmp_path, tokenizers):
    """Its first line is none and ends a unit: the rest, in the next one, is still a document of its own."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"\n<|endoftext|>\n".join([b"one " * 30, b"\xff" * 90 + b"\n" + b"the rest " * 12]))
    one = account(path, Encoding.of(tokenizers["plain"]))
    other = streamed(path, Encoding.of(tokenizers["plain"]))
    assert one == (other[0], other[1], dict(other[2].counts))
    assert len(one[1]) == 2
