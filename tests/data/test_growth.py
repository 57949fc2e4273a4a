"""What grows with files, sources, documents and shards, and how fast: what costs the time is counted, not the time."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from texts import document, write_jsonl

from hf_mamba.data import parse_sources, records, shards, tables, tokenize_source
from hf_mamba.data.cache import Notes, cache_root, digest, file_checksum, remembered_checksums
from hf_mamba.data.segments import BadRecords
from hf_mamba.data.tokenize import tokenize_sources

SCRIPT = str(Path(__file__).with_name("count_calls.py"))


def write_files(folder: Path, count: int) -> list[Path]:
    folder.mkdir()
    paths = [folder / f"{number:04d}.txt" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_text(document(number))
    return paths


def counts(folder: Path, tokenizer: Any, sources: list[str]) -> list[dict[str, int]]:
    """Of a first start, of one that finds its tokens, and of one that was told what the files hold, as ranks are."""
    tokenizer.save_pretrained(folder / "tokenizer")
    command = [sys.executable, SCRIPT, str(folder / "cache"), str(folder / "tokenizer"), *sources]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_start_with_many_files_opens_each_once_and_writes_one_note_a_folder(tmp_path: Path, tokenizer: Any):
    seen = {}
    for count in (20, 200):
        folder = tmp_path / str(count)
        folder.mkdir()
        write_files(folder / "data", count)
        first, second, told = seen[count] = counts(folder, tokenizer, [str(folder / "data")])
        assert first["data"] == 2 * count  # can it be read, and its checksum; workers read it a third time
        assert second["data"] == count
        assert "data" not in told
        assert [path.suffix for path in (folder / "cache" / "files").iterdir()] == [".json"]
    for name in ("fsync", "files", "tokens", "locks", "processes"):
        assert [start.get(name) for start in seen[20]] == [start.get(name) for start in seen[200]], name


def test_many_sources_are_tokenised_by_one_pool_with_one_fingerprint_of_the_tokenizer(tmp_path: Path, tokenizer: Any):
    seen = {}
    for count in (3, 30):
        folder = tmp_path / str(count)
        folder.mkdir()
        paths = write_files(folder / "data", count)
        first, second, _ = seen[count] = counts(folder, tokenizer, list(map(str, paths)))
        assert first["processes"] == 2
        assert first["fingerprints"] == second["fingerprints"] == 1
        assert "processes" not in second
    growth = (seen[30][0]["fsync"] - seen[3][0]["fsync"]) / 27  # of a source
    assert growth == pytest.approx(seen[3][0]["fsync"] / 3, rel=0.2)


def test_tokens_do_not_depend_on_the_sources_beside_them(tmp_path: Path, tokenizer: Any):
    paths = write_files(tmp_path / "data", 5)
    together = shards_of(tmp_path / "one", tokenizer, paths)
    for path, beside in zip(paths, together, strict=True):
        alone = tokenize_source(
            parse_sources([str(path)])[0], tokenizer, cache_dir=tmp_path / "other", num_proc=1, progress=False
        )
        names = [file.name for file in sorted(alone.path.iterdir()) if file.name != "job.json"]
        for name in names:
            assert (alone.path / name).read_bytes() == (beside.path / name).read_bytes()


def shards_of(cache: Path, tokenizer: Any, paths: list[Path]) -> list[shards.TokenShards]:
    return tokenize_sources(
        parse_sources(list(map(str, paths))), tokenizer, cache_dir=cache, num_proc=2, progress=False
    )


def test_a_source_that_cannot_be_tokenised_ends_all_and_leaves_what_is_finished(tmp_path: Path, tokenizer: Any):
    paths = [*write_files(tmp_path / "data", 3), tmp_path / "data" / "empty.jsonl"]
    paths[-1].write_text('{"text": ""}\n')
    with pytest.raises(ValueError, match="empty.jsonl: there is no text in it"):
        shards_of(tmp_path / "cache", tokenizer, paths)
    assert not list((tmp_path / "cache" / "parts").iterdir())
    assert len(shards_of(tmp_path / "cache", tokenizer, paths[:3])) == 3


def test_notes_of_checksums_outlive_more_files_and_earlier_versions_and_see_changes(tmp_path: Path):
    paths, root = write_files(tmp_path / "data", 4), cache_root(tmp_path / "cache")
    for path in paths[:2]:  # as versions before noted them
        stat = path.stat()
        note = {"state": [stat.st_size, stat.st_mtime_ns, stat.st_ino], "checksum": f"old {path.name}"}
        (root / "files" / digest(str(path.resolve()))).write_text(json.dumps(note))
    known = ["old 0000.txt", "old 0001.txt", *map(file_checksum, paths[2:])]
    assert Notes(root).known(paths) is None
    assert remembered_checksums(paths, root) == Notes(root).known(paths) == known
    paths[1].write_text("changed")
    paths[3].write_text("too")
    more = [*paths, tmp_path / "data" / "more.txt"]
    more[-1].write_text("one more file")
    known = [known[0], file_checksum(paths[1]), known[2], *map(file_checksum, more[3:])]
    assert remembered_checksums(more, root) == Notes(root).known(more) == known
    (note,) = (root / "files").glob("*.json")
    note.write_bytes(note.read_bytes()[:50])  # the machine crashed
    assert Notes(root).known(more) is None
    assert remembered_checksums(more, root)[1:] == known[1:]


def test_each_row_group_is_looked_up_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pq.write_table(pa.table({"text": [f"text {n}" for n in range(300)]}), tmp_path / "a.parquet", row_group_size=1)
    looked = []

    class Counted:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        @property
        def metadata(self) -> Any:
            looked.append(1)
            return self.file.metadata

    opened = pq.ParquetFile
    monkeypatch.setattr(pq, "ParquetFile", lambda *args, **kwargs: Counted(opened(*args, **kwargs)))
    (file,) = parse_sources([str(tmp_path / "a.parquet")])[0].files()
    rows = list(tables.read_rows(file, 0, -1, "text", BadRecords()))
    assert [value for _, value in rows] == [f"text {n}" for n in range(300)]
    assert len(looked) == 300


@pytest.fixture
def many_units(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> shards.TokenShards:
    """A source in about 70 units."""
    write_jsonl(tmp_path / "a.jsonl", [document(i, 30 + i % 50) for i in range(2000)])
    monkeypatch.setattr(records, "MIN_UNIT_BYTES", 1 << 13)
    source = parse_sources([str(tmp_path / "a.jsonl")])[0]
    return tokenize_source(source, tokenizer, cache_dir=tmp_path / "cache", num_proc=2, progress=False)


def test_what_is_computed_of_a_large_index_is_read_by_later_processes(
    many_units: shards.TokenShards, monkeypatch: pytest.MonkeyPatch
):
    threshold = 1 << 60
    computed = [many_units.hash_range(), *(many_units.runs(threshold, held_out=held) for held in (False, True))]
    monkeypatch.setattr(shards, "KEPT_FROM", 1)

    def again() -> list[Any]:
        return [many_units.hash_range(), *(many_units.runs(threshold, held_out=held) for held in (False, True))]

    first = again()
    kept = sorted(many_units.path.parents[1].glob("files/*-*")) + sorted(
        many_units.path.parents[1].glob("files/*.hashes")
    )
    assert len(kept) == 3
    content = [path.read_bytes() for path in kept]
    for path, raw in zip(kept, content, strict=True):  # damaged: computed again
        path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    second = again()
    assert [path.read_bytes() for path in kept] == content
    for file in many_units.path.glob("*.idx"):
        file.unlink()
    shards.forget_maps()
    for found in (first, second, again()):
        assert found[0] == computed[0]
        assert all(np.array_equal(a, b) for a, b in zip(found[1:], computed[1:], strict=True))


def test_without_a_held_out_share_no_index_is_read(many_units: shards.TokenShards):
    def runs() -> list[np.ndarray]:
        return [many_units.runs(threshold, held_out=held) for threshold in (0, 1) for held in (False, True)]

    nothing, none, least, rest = runs()
    assert np.array_equal(nothing, least)  # no hash is below 1, but to know it they are read
    assert none.shape == rest.shape == (0, 4)
    for file in many_units.path.glob("*.idx"):
        file.unlink()
    shards.forget_maps()
    assert np.array_equal(many_units.runs(0, held_out=False), nothing)
    with pytest.raises(shards.DamagedShards, match=r"000000\.idx is missing"):
        many_units.runs(1, held_out=False)


def test_shards_that_another_process_has_sized_are_compared_when_they_are_read(many_units: shards.TokenShards):
    file = many_units.path / "000003.bin"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(shards.DamagedShards, match=r"000003\.bin has .* bytes instead of"):
        shards.TokenShards(many_units.path)
    sized = shards.TokenShards(many_units.path, sized=True)
    assert len(sized.read(2, 0, 5)[0]) == 5
    with pytest.raises(shards.DamagedShards, match=r"000003\.bin holds .* numbers instead of"):
        sized.read(3, 0, 5)


def test_a_file_of_many_shards_is_opened_once(many_units: shards.TokenShards):
    """With the soft limit of descriptors that a shell gives, or below; each map holds one."""
    code = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (80, 600))
from collections import Counter
from pathlib import Path
from hf_mamba.data import TokenShards
opened = Counter()
sys.addaudithook(lambda event, args: opened.update([str(args[0])[-4:]] if event == "open" else []))
shards = TokenShards(Path({str(many_units.path)!r}))
for _ in range(3):
    for unit in range(len(shards.units)):
        shards.read(unit, 0, 1)
print(len(shards.units), opened[".bin"], opened[".idx"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    units, tokens, index = map(int, done.stdout.split())
    assert units == tokens == index > 60
