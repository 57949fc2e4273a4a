"""The starts of many ranks against one folder: `python -m benchmarks.run starts [--ranks 1000]`.

A run of `--ranks` ranks is resumed: its data is tokenised, and a checkpoint has two files of each rank. Two processes
do what half of the ranks do with the disk, one rank after the other, and strace records each call that names a path.
The counts are compared with the formulas that benchmarks/SCALE.md reckons with; a difference of over 2% ends with 1.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

FOLDERS = ("data", "cache", "run")
_CALL = re.compile(r"^(?:\d+ +)?(\w+)\(")
_KINDS = {"openat": "open", "open": "open"}


def one_start(rank: int, world: int, folder: Path, tokenizer: Any, contents: list[str]) -> None:
    """What a rank does with the disk until its first step."""
    from hf_mamba.data import prepare_data
    from hf_mamba.data.shards import forget_maps
    from hf_mamba.run.manifest import verify

    forget_maps()
    prepare_data(
        [str(folder / "data")],
        seq_len=64,
        tokenizer=tokenizer,
        cache_dir=folder / "cache",
        progress=False,
        contents=None if rank == 0 else contents,  # rank 0 looks at the files, and tells the others
    )
    verify(folder / "run" / "checkpoint-10", rank, world)


def child(begin: int, end: int, world: int, folder: Path) -> None:
    """The starts of ranks [begin, end)."""
    from hf_mamba.data import load_tokenizer

    tokenizer = load_tokenizer(folder / "tokenizer")
    contents = json.loads((folder / "contents.json").read_text())
    for rank in range(begin, end):
        one_start(rank, world, folder, tokenizer, contents)


def make(folder: Path, files: int, units: int, world: int) -> None:
    """The data, their tokens, and a checkpoint."""
    from hf_mamba.data import parse_sources, prepare_data, records, train_tokenizer
    from hf_mamba.data.tokenizer import contents_of
    from hf_mamba.run.manifest import Manifest, describe

    (folder / "data").mkdir()
    for number in range(files):
        (folder / "data" / f"{number:06d}.txt").write_text(f"The text with the number {number}. " * 12)
    size = sum(path.stat().st_size for path in (folder / "data").iterdir())
    records.MIN_UNIT_BYTES = -(-size // units)
    sources = parse_sources([str(folder / "data")])
    tokenizer = train_tokenizer(sources, 300, cache_dir=folder / "cache")
    tokenizer.save_pretrained(folder / "tokenizer")
    prepare_data([str(folder / "data")], seq_len=64, tokenizer=tokenizer, cache_dir=folder / "cache", progress=False)
    (folder / "contents.json").write_text(json.dumps(contents_of(sources, folder / "cache")))
    checkpoint = folder / "run" / "checkpoint-10"
    checkpoint.mkdir(parents=True)
    for rank in range(world):
        for name in (f"rng_state_{rank}.pth", f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"):
            (checkpoint / name).write_bytes(bytes(100))
    entries = {path.name: describe(path) for path in checkpoint.iterdir()}
    Manifest(10, 1, world, entries).write(checkpoint)


def counted(folder: Path, begin: int, end: int, world: int) -> subprocess.Popen[bytes]:
    """A process for ranks [begin, end) whose calls are recorded in folder/trace-BEGIN."""
    trace = ["strace", "-f", "-qq", "-s", "512", "-e", "trace=file", "-o", str(folder / f"trace-{begin}")]
    child = [sys.executable, "-m", "benchmarks.starts", str(begin), str(end), str(world), str(folder)]
    return subprocess.Popen([*trace, *child], cwd=Path(__file__).parents[1])


def tally(folder: Path, begin: int) -> Counter[str]:
    """Calls by folder and kind: "cache open", "data stat"."""
    counts: Counter[str] = Counter()
    for line in (folder / f"trace-{begin}").read_text(errors="replace").splitlines():
        call = _CALL.match(line)
        named = next((name for name in FOLDERS if f'"{folder / name}/' in line or f'"{folder / name}"' in line), None)
        if call and named:
            counts[f"{named} {_KINDS.get(call[1], 'stat')}"] += 1
    return counts


def formulas(files: int, units: int, world: int) -> dict[str, tuple[int, int]]:
    """kind -> (calls of rank 0, calls of each other rank); SCALE.md says why."""
    return {
        "data open": (files + 1, 0),  # can it be read; its size and date are those that were noted
        "data stat": (files + 10, 1),
        "cache open": (units + 3, units + 1),  # the manifest, and each index
        "cache stat": (2 * units + 7, 6),  # the size of each file
        "run open": (4, 3),  # the manifest, and its own two files
        "run stat": (2 * world, 0),
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run starts", description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=1000)
    parser.add_argument("--files", type=int, default=2000, help="of data")
    parser.add_argument("--units", type=int, default=64, help="of tokens")
    options = parser.parse_args(argv)
    if shutil.which("strace") is None:
        parser.error("this needs strace")
    world = options.ranks
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, options.files, options.units, world)
        units = len(list(folder.glob("cache/tokens/*/*.bin")))
        found = {}
        for begin, end in ((0, 1), (1, 1 + (world - 1) // 2), (1 + (world - 1) // 2, world)):
            found[begin, end] = counted(folder, begin, end, world)
            if begin == 0:
                found[begin, end].wait()
        for process in found.values():
            if process.wait():
                return 1
        first = tally(folder, 0)
        others = sum((tally(folder, begin) for begin, _ in list(found)[1:]), Counter())
    print(f"{world} ranks, {options.files} files, {units} units")
    wrong = False
    for kind, (expected, each) in formulas(options.files, units, world).items():
        per_rank = others[kind] / (world - 1)
        print(f"{kind:12} rank 0: {first[kind]:7,} ({expected:,} reckoned)  others, each: {per_rank:8.2f} ({each:,})")
        wrong |= abs(first[kind] - expected) > 0.02 * expected + 5 or abs(per_rank - each) > 0.02 * each + 5
    return int(wrong)


if __name__ == "__main__":
    child(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
