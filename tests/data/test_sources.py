"""What may be named as data, how it is read, and what is said about what cannot be."""

import csv
import gzip
import io
import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from texts import document, write_jsonl

from hf_mamba.data import parse_sources, prepare_data, records, segments, tokenize_source
from hf_mamba.data.records import plan_units, read_unit
from hf_mamba.data.segments import BadRecords, cut
from hf_mamba.data.sources import left_out, stdlib_files

TEXTS = [document(i) for i in range(60)] + ["zwölf Boxkämpfer\njagen 🐍 Viktor", "  two\n\nspaces  "]


def read(spec: str, **options) -> tuple[list[str], BadRecords]:
    """All documents of a source, put together from their segments."""
    source = parse_sources([spec], **options)[0]
    bad, documents = BadRecords(), []
    for unit in plan_units(source.files()):
        for segment in read_unit(unit, source.text_column, bad):
            if segment.first:
                documents.append("")
            documents[-1] += segment.text
    return documents, bad


def write(path: Path, texts: list[str]) -> Path:
    """The texts in the format that the name says."""
    table = pa.table({"id": list(range(len(texts))), "text": texts})
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if "array" in path.name:
        lines = json.dumps([{"text": text} for text in texts], indent=1).encode()
    elif ".csv" in path.name:
        csv.writer(out := io.StringIO()).writerows([("id", "text"), *enumerate(texts)])
        lines = out.getvalue().encode()
    elif ".txt" in path.name:
        lines = "\n<|endoftext|>\n".join(texts).encode()
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=7)
    elif path.suffix == ".arrow":
        opener = pa.ipc.new_stream if "stream" in path.name else pa.ipc.new_file
        with opener(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines))
    elif path.suffix == ".zst":
        with pa.output_stream(path, compression="zstd") as file:
            file.write(lines)
    else:
        path.write_bytes(lines)
    return path


FORMATS = ["a.jsonl", "a.json", "a.ndjson", "a.jsonl.gz", "a.json.zst", "a.parquet", "a.arrow", "a_stream.arrow"]
FORMATS += ["a_array.json", "a_array.jsonl.gz", "a.csv", "a.csv.zst", "a.txt.gz"]


@pytest.mark.parametrize("unit_bytes", [1 << 22, 100])
@pytest.mark.parametrize("name", [*FORMATS, "a.txt"])
def test_every_format_gives_the_same_documents_however_it_is_cut(tmp_path, monkeypatch, name, unit_bytes):
    monkeypatch.setattr(records, "MIN_UNIT_BYTES", unit_bytes)
    write(tmp_path / name, TEXTS)
    documents, bad = read(str(tmp_path / name))
    if ".txt" in name:
        documents = [text.removesuffix("\n") for text in documents]
    assert documents == TEXTS
    assert not bad.counts
    if unit_bytes == 100 and not name.endswith(("gz", "zst", "csv", "array.json")):
        assert len(plan_units(parse_sources([str(tmp_path / name)])[0].files())) > 5


@given(
    documents=st.lists(st.lists(st.text("ab é🐍", max_size=9), min_size=1, max_size=5), min_size=1, max_size=6),
    unit_bytes=st.integers(1, 60),
    newline=st.sampled_from(["\n", "\r\n"]),
)
def test_text_files_are_cut_at_lines_without_losing_any(tmp_path_factory, documents, unit_bytes, newline):
    """Byte ranges of any length, separators at range ends, empty lines, CRLF: the same documents."""
    path = tmp_path_factory.mktemp("text") / "a.txt"
    bodies = ["".join(line + newline for line in lines) for lines in documents]
    path.write_bytes(f"<|endoftext|>{newline}".join(bodies).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "MIN_UNIT_BYTES", unit_bytes)
        patch.setattr(segments, "SEGMENT_CHARS", 7)
        found, bad = read(str(path))
    assert [t for t in found if t.strip()] == [t for t in bodies if t.strip()]
    assert set(bad.counts) <= {"empty"}  # a file of blank lines only


@given(text=st.text("ab\n", max_size=300), limit=st.integers(1, 40))
def test_segments_add_up_to_the_document(text, limit):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "SEGMENT_CHARS", limit)
        pieces = list(cut(text))
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.first for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(0 < len(piece.text) <= limit for piece in pieces) or not text


def test_a_folder_is_read_in_a_fixed_order_without_its_evaluation_splits(tmp_path):
    for name in ("sub/train-00001.jsonl", "train-00000.jsonl", "validation.jsonl", "test/0.jsonl", ".hidden/x.jsonl"):
        write_jsonl(tmp_path / name, [name])
    (tmp_path / "notes.pdf").touch()
    assert read(str(tmp_path))[0] == ["sub/train-00001.jsonl", "train-00000.jsonl"]
    assert read(f"{tmp_path}/**/*.jsonl")[0] == [
        "sub/train-00001.jsonl",
        "test/0.jsonl",
        "train-00000.jsonl",
        "validation.jsonl",
    ]


def test_links_are_followed_once_and_code_has_no_splits(tmp_path):
    """A link out of the folder is read; one to a folder that is read anyway, or to a parent, is not read again."""
    for name in ("corpus/a/x.jsonl", "away/y.jsonl", "code/train.py", "code/test_it.py", "splits/train.jsonl"):
        write_jsonl(tmp_path / name, [name])
    write_jsonl(tmp_path / "splits/eval.csv", ["text"])
    for link, target in (("b", "../away"), ("again", "a"), ("loop", ".."), ("gone", "nowhere")):
        (tmp_path / "corpus" / link).symlink_to(target)
    assert read(f"{tmp_path}/corpus")[0] == ["corpus/a/x.jsonl", "away/y.jsonl"]
    assert len(parse_sources([f"{tmp_path}/code"])[0].files()) == 2
    found = [left_out(parse_sources([f"{tmp_path}/{name}"])[0]) for name in ("code", "splits", "corpus")]
    assert found == [[], ["eval.csv"], []]


def test_a_column_is_named_with_its_source(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": "one", "text": "two"}) + "\n")
    assert read(f"{tmp_path}/a.jsonl@body:0.5")[0] == ["one"]
    assert read(f"{tmp_path}/a.jsonl")[0] == ["two"]
    assert [(s.text_column, s.weight) for s in parse_sources(["o/n@x:2", "embedded:1"])] == [("x", 2.0), ("text", 1.0)]
    odd = write_jsonl(tmp_path / "b@c.jsonl", ["x"])  # a file of this very name is a file
    assert parse_sources([str(odd)])[0].text_column == "text"


def test_the_embedded_data_are_the_standard_librarys_sources():
    files = stdlib_files()
    names = [file.name.split("/", 1)[1] for file in files]
    assert {"argparse.py", "json/decoder.py", "asyncio/tasks.py"} <= set(names)
    assert not [n for n in names if n.split("/")[0] in ("test", "idlelib", "site-packages", "dist-packages")]
    assert 4e6 < sum(os.path.getsize(file.path) for file in files) < 2e7
    assert files == stdlib_files()


def test_weights_are_read_from_the_names(tmp_path):
    odd = write_jsonl(tmp_path / "odd:0.5", ["x"])  # a file of this very name is a file
    sources = parse_sources([f"{tmp_path}/x.jsonl:0.7", "embedded:2", "Salesforce/wikitext/wikitext-2-raw-v1:1e-1"])
    assert [(s.kind, s.weight) for s in sources] == [("files", 0.7), ("embedded", 2.0), ("hub", 0.1)]
    assert parse_sources([str(odd)])[0].weight is None


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([], "no data was named"),
        ([""], "empty name"),
        (["embedded:"], "'' is not a weight"),
        (["embedded:many"], "'many' is not a weight; write NAME:WEIGHT with a number, as in embedded:0.5"),
        (["embedded:0"], "must be a finite number above 0"),
        (["embedded:nan"], "must be a finite number above 0"),
        (["embedded", "x.jsonl:1"], "no weight was given for 'embedded'"),
        (["embedded", "embedded"], "named twice"),
        (["what is this!"], "no file, no folder"),
    ],
)
def test_bad_lists_are_named(specs, message):
    with pytest.raises(ValueError, match=message):
        parse_sources(specs) and [source.files() for source in parse_sources(specs)]


def test_places_without_data_are_named(tmp_path):
    write_jsonl(tmp_path / "corpus.jsonl", ["x"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").touch()
    for spec, message in [
        (f"{tmp_path}/corpsu.jsonl", "no such file or folder; did you mean .*corpus.jsonl"),
        (f"{tmp_path}/empty", "is an empty folder"),
        (f"{tmp_path}/images", r"has only files of types \.png; the types read here are \.txt"),
        (f"{tmp_path}/images/a.png", "unknown file type"),
        (f"{tmp_path}/*.parquet", "matches no file"),
    ]:
        with pytest.raises(ValueError, match=message):
            parse_sources([spec])[0].files()


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.arrow"])
def test_a_missing_column_is_named_with_those_that_are_there(tmp_path, tokenizer, name):
    table = pa.table({"contents": ["x"] * 5, "url": ["y"] * 5})
    path = tmp_path / name
    if name.endswith("jsonl"):
        path.write_text(json.dumps({"contents": "x", "url": "y"}) + "\n")
    elif name.endswith("parquet"):
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    options = {"seq_len": 8, "cache_dir": tmp_path / "cache", "tokenizer": tokenizer, "progress": False}
    with pytest.raises(ValueError, match="no column 'content'; the columns there are: contents, url; did you mean"):
        prepare_data([str(path)], text_column="content", **options)
    pq.write_table(pa.table({"n": [1, 2]}), tmp_path / "n.parquet")
    with pytest.raises(ValueError, match="column 'n' holds int64, not strings"):
        prepare_data([f"{tmp_path}/n.parquet"], text_column="n", **options)
    assert not list((tmp_path / "cache" / "tokens").glob("*"))


BROKEN_LINES = [
    b'{"text": "good one"}',
    b'{"text": "cut off',
    b'["no object"]',
    b'{"other": 1}',
    b'{"text": null}',
    b'{"text": 7}',
    b'{"text": "  \\n"}',
    b'{"text": "\xff"}',
    b'{"text": "\\ud800"}',
    b"[" * 100_000,
    b"",
    b'{"text": "good two"}',
]


def test_broken_records_are_counted_and_named(tmp_path, tokenizer, caplog):
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(BROKEN_LINES))
    source = parse_sources([f"{tmp_path}/a.jsonl"])[0]
    options = {"cache_dir": tmp_path / "cache", "progress": False}
    shards = tokenize_source(source, tokenizer, **options)
    assert shards.documents == 2
    assert shards.bad == {
        "invalid JSON": 2,
        "not a JSON object": 1,
        "no key 'text'": 1,
        "no text": 1,
        "text is not a string": 1,
        "empty": 1,
        "not UTF-8 text": 1,
        "lone surrogate (not Unicode text)": 1,
    }
    assert "a.jsonl byte 21: invalid JSON" in caplog.text
    for cache in ("cache", "fresh"):  # from the cache, and while building
        with pytest.raises(ValueError, match=r"unusable records: .*a\.jsonl byte 21: invalid JSON"):
            tokenize_source(source, tokenizer, **{**options, "cache_dir": tmp_path / cache}, on_bad_record="raise")


def test_other_broken_files_are_counted(tmp_path):
    (tmp_path / "latin.txt").write_bytes("one\nzw\xf6lf\nthree\n".encode("latin-1"))
    (tmp_path / "binary.txt").write_bytes(b"a\0b\n")
    (tmp_path / "empty.txt").touch()
    documents, bad = read(f"{tmp_path}/*.txt")
    assert documents == ["one\nthree\n"]
    assert bad.counts == {"not UTF-8 text": 2, "empty": 1}

    whole = write(tmp_path / "a.jsonl.gz", [document(i) for i in range(5000)]).read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    documents, bad = read(f"{tmp_path}/a.jsonl.gz")
    assert documents == [document(i) for i in range(len(documents))]
    assert 1 <= len(documents) < 5000
    assert sum(bad.counts.values()) == 1

    whole = bytearray(write(tmp_path / "a.parquet", TEXTS).read_bytes())
    (tmp_path / "a.parquet").write_bytes(whole[:-40])
    write(tmp_path / "b.parquet", TEXTS)
    documents, bad = read(f"{tmp_path}/*.parquet")
    assert documents == TEXTS
    assert next(iter(bad.counts)).startswith("damaged parquet file")


def test_data_without_any_text_is_named(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(BROKEN_LINES[1:3]))
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "nothing.jsonl").touch()
    for name, message in [
        ("a.jsonl", "there is no text in it; unusable records: 1 × invalid JSON, 1 × not a JSON object"),
        ("latin.txt", "1 × not UTF-8 text"),
        ("nothing.jsonl", "unusable records: none"),
    ]:
        for how in ({"tokenizer": tokenizer}, {"vocab_size": 300}):
            with pytest.raises(ValueError, match=message):
                prepare_data([f"{tmp_path}/{name}"], seq_len=8, cache_dir=tmp_path / "c", progress=False, **how)
    assert not list((tmp_path / "c" / "tokens").glob("*"))


def test_one_piece_of_text_cannot_be_held_out_of_itself(tmp_path, tokenizer):
    write_jsonl(tmp_path / "a.jsonl", [document(1, 200)])
    options = {"seq_len": 8, "tokenizer": tokenizer, "cache_dir": tmp_path / "cache", "progress": False}
    with pytest.raises(ValueError, match="one piece of text"):
        prepare_data([f"{tmp_path}/a.jsonl"], **options)
    assert prepare_data([f"{tmp_path}/a.jsonl"], eval_fraction=0.0, **options).eval is None
    own = prepare_data([f"{tmp_path}/a.jsonl"], eval_sources=[f"{tmp_path}/a.jsonl"], **options)
    assert own.eval is not None
    assert own.eval.tokens == own.train.tokens


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seq_len": 1}, "at least 2"),
        ({"seq_len": 8, "eval_fraction": 1.0}, "below 1"),
        ({"seq_len": 8, "tokenizer": "x", "vocab_size": 300}, "either a tokenizer"),
        ({"seq_len": 8, "on_bad_record": "ignore"}, "count.*raise"),
        ({"seq_len": 10**9}, "fewer than one row"),
    ],
)
def test_bad_settings_are_named(tmp_path, tokenizer, wrong, message):
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    options = {"tokenizer": tokenizer, "cache_dir": tmp_path / "cache", "progress": False}
    with pytest.raises(ValueError, match=message):
        prepare_data([f"{tmp_path}/a.jsonl"], **{**options, **wrong})


def test_a_saved_dataset_is_read_by_its_train_split(tmp_path):
    from datasets import Dataset, DatasetDict

    train, other = Dataset.from_dict({"text": TEXTS}), Dataset.from_dict({"text": ["held out"]})
    DatasetDict({"train": train, "test": other}).save_to_disk(tmp_path / "both")
    train.save_to_disk(tmp_path / "one")
    assert read(str(tmp_path / "both"))[0] == read(str(tmp_path / "one"))[0] == TEXTS
    DatasetDict({"test": other}).save_to_disk(tmp_path / "none")
    with pytest.raises(ValueError, match="has the splits test, and no train split"):
        read(str(tmp_path / "none"))


def test_a_hub_name_is_loaded_by_the_datasets_library(tmp_path, monkeypatch):
    """From the library's own cache, as any machine without network does after a first download."""
    import datasets.config

    built = write(tmp_path / "train.parquet", TEXTS)
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    datasets.load_dataset("parquet", data_files=str(built))
    (config,) = (cache / "parquet").iterdir()
    shutil.copytree(config, cache / "owner___corpus" / "default")
    for info in (cache / "owner___corpus").rglob("dataset_info.json"):
        info.write_text(info.read_text().replace('"dataset_name": "parquet"', '"dataset_name": "corpus"'))
    for arrow in (cache / "owner___corpus").rglob("parquet-train.arrow"):
        arrow.rename(arrow.with_name("corpus-train.arrow"))
    assert read("owner/corpus")[0] == TEXTS


def test_an_unknown_hub_name_is_one_clear_message(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="owner/nothing: no file or folder of this name is here, and as a hub"):
        prepare_data(["owner/nothing"], seq_len=8, tokenizer=tokenizer, cache_dir=tmp_path)
