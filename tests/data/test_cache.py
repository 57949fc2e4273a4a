"""The cache under kills, rivals, damage, full disks and folders that cannot be written: whole, or absent."""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from texts import document, write_jsonl

from hf_mamba.data import TokenShards, parse_sources, prepare_data, records, tokenize_source
from hf_mamba.data.cache import locked

SCRIPT = str(Path(__file__).with_name("build_cache.py"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, tokenizer):
    """About 2.5 MB of documents in 70 units, a saved tokenizer, and the cache as built in peace."""
    folder = tmp_path_factory.mktemp("corpus")
    write_jsonl(folder / "a.jsonl", [document(i, 30 + i % 50) for i in range(8000)])
    tokenizer.save_pretrained(folder / "tokenizer")
    path = subprocess.run(command(folder, folder / "cache"), check=True, capture_output=True, text=True).stdout.strip()
    return folder, tree(Path(path))


def command(folder: Path, cache: Path) -> list[str]:
    return [sys.executable, SCRIPT, str(folder / "a.jsonl"), str(folder / "tokenizer"), str(cache), "32768"]


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def units_done(cache: Path) -> int:
    return len(list(cache.glob("tokens/*.building/0*.json")))


def leftovers(cache: Path) -> list[str]:
    return [p.name for p in cache.glob("parts/*")] + [p.name for p in cache.glob("tokens/*.building")]


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def test_the_corpus_is_many_units(corpus):
    assert sum(name.endswith(".bin") for name in corpus[1]) >= 60


@pytest.mark.parametrize("kills", [8, pytest.param(60, marks=pytest.mark.slow)])
def test_kills_while_tokenising_leave_a_build_that_goes_on_to_the_same_bytes(corpus, tmp_path, kills):
    """kill -9 at random moments: what is finished is kept, what is published is complete and the same."""
    folder, expected = corpus
    moments = random.Random(kills)
    survived = kept = 0
    while survived < kills:
        process = subprocess.Popen(command(folder, tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        # From before the first unit until after the last: some kills are in the middle of any kind of work.
        goal = kept + moments.randint(0, 6)
        wait_for(lambda goal=goal, process=process: units_done(tmp_path) >= goal or process.poll() is not None)
        time.sleep(moments.random() * 0.05)
        process.kill()
        process.communicate()
        final = [p for p in tmp_path.glob("tokens/*") if p.suffix != ".building"]
        if final:  # it was published before the kill: begin anew
            assert tree(final[0]) == expected
            shutil.rmtree(tmp_path / "tokens")
            kept = 0
        else:
            assert units_done(tmp_path) >= kept
            kept = units_done(tmp_path)
            survived += 1
    done = subprocess.run(command(folder, tmp_path), capture_output=True, text=True, check=True)
    assert tree(Path(done.stdout.strip())) == expected
    assert not leftovers(tmp_path)


def test_a_killed_worker_is_reported_and_its_work_is_kept(corpus, tmp_path):
    folder, expected = corpus
    process = subprocess.Popen(command(folder, tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: units_done(tmp_path) >= 2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "ValueError: a tokenising process was killed by signal 9; if memory ran out, use fewer" in err
    assert "Traceback" not in err
    done = subprocess.run(command(folder, tmp_path), capture_output=True, text=True, check=True)
    assert tree(Path(done.stdout.strip())) == expected


def test_workers_end_with_their_parent(corpus, tmp_path):
    folder, _ = corpus
    process = subprocess.Popen(command(folder, tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for(lambda: units_done(tmp_path) >= 1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    process.kill()
    process.communicate()
    wait_for(lambda: not any(Path(f"/proc/{child}").exists() for child in children), 20)


def test_rivals_build_once_and_agree(corpus, tmp_path):
    """Four processes at once, as ranks do, the first of them killed: the others finish, with one result."""
    folder, expected = corpus
    rivals = [
        subprocess.Popen(command(folder, tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    wait_for(lambda: units_done(tmp_path) >= 3)
    owner = int(next(tmp_path.glob("locks/tokens-*.lock")).read_text().split()[1])
    os.kill(owner, signal.SIGKILL)
    results = [(rival.pid, rival.communicate(timeout=120)[0].strip(), rival.returncode) for rival in rivals]
    paths = {path for pid, path, _ in results if pid != owner}
    assert [code for pid, _, code in results if pid != owner] == [0, 0, 0]
    assert len(paths) == 1
    assert tree(Path(paths.pop())) == expected
    assert not leftovers(tmp_path)


def test_a_lock_is_free_when_its_owner_is_killed(tmp_path):
    (tmp_path / "locks").mkdir()
    code = f"""
from pathlib import Path; import time
from hf_mamba.data.cache import locked
with locked(Path({str(tmp_path)!r}), "x"):
    print("held", flush=True); time.sleep(100)"""
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "held\n"
    owner.kill()
    owner.communicate()
    with locked(tmp_path, "x"):
        pass


@pytest.fixture
def built(corpus, tokenizer, tmp_path, monkeypatch):
    """A finished cache in this process, and how to open it again."""
    monkeypatch.setattr(records, "MIN_UNIT_BYTES", 1 << 15)
    folder, expected = corpus
    source = parse_sources([str(folder / "a.jsonl")])[0]
    shutil.copytree(folder / "cache", tmp_path / "cache")

    def reopen(**options) -> TokenShards:
        return tokenize_source(source, tokenizer, cache_dir=tmp_path / "cache", progress=False, **options)

    return reopen(), reopen, expected


def flip(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("name", ["000003.bin", "000003.idx", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_truncated_or_missing_file_is_found_at_opening_and_made_again(built, caplog, name, damage):
    shards, reopen, expected = built
    inode = (shards.path / "000004.bin").stat().st_ino
    if damage == "missing":
        (shards.path / name).unlink()
    else:
        os.truncate(shards.path / name, (shards.path / name).stat().st_size - 2)
    with pytest.raises(ValueError, match=name):
        TokenShards(shards.path)
    repaired = reopen()
    assert f"{name}" in caplog.text
    assert tree(repaired.path) == expected
    assert (repaired.path / "000004.bin").stat().st_ino == inode  # the good units were kept


@pytest.mark.parametrize("name", ["000003.bin", "000003.idx"])
def test_a_flipped_bit_is_found_by_verify_and_made_again(built, name):
    shards, reopen, expected = built
    flip(shards.path / name, 100)
    with pytest.raises(ValueError, match=f"{name} has another checksum"):
        shards.verify()
    assert tree(reopen().path) != expected  # sizes alone do not show it
    assert tree(reopen(verify=True).path) == expected


def test_a_flipped_bit_in_the_manifest_is_found_at_opening(built):
    shards, reopen, expected = built
    text = (shards.path / "manifest.json").read_bytes()
    flip(shards.path / "manifest.json", text.index(b'"tokens": ') + 10)
    with pytest.raises(ValueError, match="manifest.json is missing or damaged"):
        TokenShards(shards.path)
    assert tree(reopen().path) == expected


def test_changed_text_is_other_data(built, corpus, tmp_path, tokenizer):
    """One byte changed, same size: another key, and the first result stays."""
    shards, _, _ = built
    changed = tmp_path / "a.jsonl"
    changed.write_bytes((corpus[0] / "a.jsonl").read_bytes().replace(b"document 5:", b"document X:"))
    again = tokenize_source(parse_sources([str(changed)])[0], tokenizer, cache_dir=tmp_path / "cache", progress=False)
    assert again.path != shards.path
    assert shards.path.exists()


def limited(folder: Path, cache: Path, limit: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(folder, cache),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )


def test_a_file_size_limit_is_one_clear_error(corpus, tmp_path):
    folder, expected = corpus
    failed = limited(folder, tmp_path, 10_000)
    assert failed.returncode == 1
    assert failed.stderr.count("Error") == 1
    assert "the file would exceed the size limit of this process" in failed.stderr
    assert not list(tmp_path.glob("parts/*"))
    assert not [p for p in tmp_path.glob("tokens/*") if p.suffix != ".building"]
    done = subprocess.run(command(folder, tmp_path), capture_output=True, text=True, check=True)
    assert tree(Path(done.stdout.strip())) == expected


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 700 kB, where this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this user may not mount a file system")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_is_one_clear_error_and_more_room_goes_on(corpus, small_disk):
    folder, expected = corpus
    cache = small_disk / "cache"
    failed = subprocess.run(command(folder, cache), capture_output=True, text=True)
    assert failed.returncode == 1
    assert "the disk is full" in failed.stderr
    assert "HF_HOME or the cache_dir" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert units_done(cache) >= 1
    assert not list(cache.glob("parts/*"))
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    kept = {p.name: p.stat().st_ino for p in cache.glob("tokens/*.building/0*.json")}
    done = subprocess.run(command(folder, cache), capture_output=True, text=True, check=True)
    final = Path(done.stdout.strip())
    assert tree(final) == expected
    assert all((final / name).stat().st_ino == inode for name, inode in kept.items())


def test_a_read_only_file_system_is_one_clear_error_but_a_finished_cache_on_it_serves(corpus, small_disk):
    folder, _ = corpus
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    done = subprocess.run(command(folder, small_disk / "cache"), capture_output=True, text=True, check=True)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    again = subprocess.run(command(folder, small_disk / "cache"), capture_output=True, text=True)
    assert again.stdout == done.stdout, again.stderr
    failed = subprocess.run(command(folder, small_disk / "other"), capture_output=True, text=True)
    assert failed.returncode == 1
    assert "the file system is read-only" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_a_file_where_the_cache_should_be_is_named(tmp_path, tokenizer):
    (tmp_path / "cache").touch()
    write_jsonl(tmp_path / "a.jsonl", [document(1)])
    with pytest.raises(ValueError, match="a file is where a folder should be"):
        prepare_data([f"{tmp_path}/a.jsonl"], seq_len=8, tokenizer=tokenizer, cache_dir=tmp_path / "cache")


def test_the_cache_is_under_hf_home(monkeypatch, tmp_path):
    from hf_mamba.data.cache import cache_root

    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    assert cache_root() == tmp_path / "home" / "hf_mamba"
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "huggingface" / "hf_mamba"
    monkeypatch.setenv("HF_HOME", "/proc/none")
    with pytest.raises(ValueError, match=r"Cannot write /proc/none/hf_mamba: no folder can be made there.*HF_HOME"):
        cache_root()


def test_large_vocabularies_take_four_bytes(tmp_path, tokenizer):
    from transformers import PreTrainedTokenizerFast

    from hf_mamba.data.tokenizer import backend

    wide = backend(tokenizer)
    wide.add_tokens([f"<extra{i}>" for i in range(66_000)])
    wide = PreTrainedTokenizerFast(tokenizer_object=wide, eos_token="<|endoftext|>")
    write_jsonl(tmp_path / "a.jsonl", ["one <extra65999> two", "three"])
    shards = tokenize_source(
        parse_sources([f"{tmp_path}/a.jsonl"])[0], wide, cache_dir=tmp_path / "cache", progress=False
    )
    ids, _ = shards.read(0, 0, shards.tokens)
    assert ids.dtype == np.uint32
    assert wide.decode(ids) == "one <extra65999> two<|endoftext|>three<|endoftext|>"
