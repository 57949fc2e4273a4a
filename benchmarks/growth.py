"""What a run's costs are beside their limit, and how they grow: `python -m benchmarks.run data [--only limits,growth]`.

CPU seconds of this process and of the processes that it started; wall time says more of the machine than of the code.

limits: tokenising beside `tokenizers`' own batch encoding and `datasets.map`, rows beside slices of a plain memory map,
a checkpoint's settling (fsync, SHA-256) beside `cp`, contestants in turn. Writes benchmarks/results/limits.csv.
growth: each cost at growing sizes, with the exponent that a straight line through the logarithms has: 0 is a cost that
does not grow, 1 one in proportion. Writes benchmarks/results/growth.csv and growth.png. Takes about six minutes.
"""

import argparse
import csv
import json
import math
import os
import resource
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_mamba.data import PackedDataset, StepSampler, load_tokenizer, parse_sources, tokenize_source, train_tokenizer
from hf_mamba.data.cache import cache_root
from hf_mamba.data.order import Mixture
from hf_mamba.data.records import Unit, read_unit
from hf_mamba.data.segments import BadRecords
from hf_mamba.data.shards import TokenShards, TokenStream, forget_maps, seal
from hf_mamba.data.sources import DataFile
from hf_mamba.data.tokenizer import contents_of
from hf_mamba.files import settle
from hf_mamba.report import page
from hf_mamba.run.log import HISTORY
from hf_mamba.run.manifest import describe

from .data import write_corpus

RESULTS = Path(__file__).with_name("results")
SEQ_LEN, ROWS = 2048, 4000
LINE = dict.fromkeys(("loss", "grad_norm", "learning_rate", "tokens_per_second", "mfu", "memory_gb"), 1.2345678)


def cpu(work: Callable[[], Any]) -> float:
    """CPU seconds of a call, with those of the processes that it started and that have ended."""
    before = _spent()
    work()
    return _spent() - before


def _spent() -> float:
    usage = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(used.ru_utime + used.ru_stime for used in usage)


# ---- limits ----


def limits(folder: Path, megabytes: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Rows of (what, contestant, CPU seconds of the rounds); the first contestant of each is ours."""
    for what, unit, build in (
        ("tokenise", f"{megabytes} MB of text", lambda: tokenising(folder, megabytes)),
        ("load", f"{ROWS} rows of {SEQ_LEN}", lambda: loading(folder)),  # of what was tokenised
        ("settle", "a checkpoint of 512 MB", lambda: settling(folder)),
    ):
        contestants = build()
        seconds: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(rounds):
            for name, work in contestants.items():
                seconds[name].append(cpu(work))
        ours = statistics.median(next(iter(seconds.values())))
        for name, found in seconds.items():
            median = statistics.median(found)
            yield {"what": what, "of": unit, "contestant": name, "cpu_s": median, "share_of_ours": median / ours}


def tokenising(folder: Path, megabytes: int) -> dict[str, Callable[[], Any]]:
    from datasets import load_dataset
    from tokenizers import Tokenizer

    path = folder / "corpus.jsonl"
    write_corpus(path, megabytes)
    source = parse_sources([str(path)])[0]
    train_tokenizer([source], 4096, cache_dir=folder / "cache").save_pretrained(folder / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer")
    inner = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    cores = len(os.sched_getaffinity(0))

    def ours() -> None:
        shutil.rmtree(folder / "fresh", ignore_errors=True)
        tokenize_source(source, tokenizer, cache_dir=folder / "fresh", num_proc=cores, progress=False)

    def batches() -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        for begin in range(0, len(texts), 256):
            inner.encode_batch_fast(texts[begin : begin + 256], add_special_tokens=False)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def mapped() -> None:
        cache = folder / "datasets"
        shutil.rmtree(cache, ignore_errors=True)
        rows = load_dataset("json", data_files=str(path), split="train", cache_dir=str(cache))
        rows.map(
            lambda batch: {"input_ids": tokenizer(batch["text"])["input_ids"]},
            batched=True,
            num_proc=cores,
            remove_columns=rows.column_names,
        )

    return {"ours": ours, "tokenizers' batches, texts in memory": batches, "datasets.map": mapped}


def loading(folder: Path) -> dict[str, Callable[[], Any]]:
    shards = TokenShards(next((folder / "fresh" / "tokens").glob("*/manifest.json")).parent)
    data = PackedDataset([TokenStream([(0, shards, shards.runs(0, held_out=False))])], SEQ_LEN, 0)
    whole = folder / "whole.bin"
    whole.write_bytes(b"".join(path.read_bytes() for path in sorted(shards.path.glob("*.bin"))))
    tokens = np.memmap(whole, np.dtype(shards.manifest["dtype"]), mode="r")
    places = np.random.default_rng(0).integers(0, len(tokens) // SEQ_LEN, ROWS)

    def plain() -> None:
        for place in places.tolist():
            ids = torch.from_numpy(tokens[place * SEQ_LEN : (place + 1) * SEQ_LEN].astype(np.int64))
            ids.clone()  # labels

    return {
        "ours (documents told apart, own order)": lambda: [data[i] for i in range(ROWS)],
        "slices of one memory map (neither)": plain,
    }


def settling(folder: Path) -> dict[str, Callable[[], Any]]:
    path = folder / "model.safetensors"
    path.write_bytes(np.random.default_rng(0).bytes(1 << 29))

    def ours() -> None:
        settle(path, 0o644)
        describe(path)

    return {"ours (fsync and SHA-256)": ours, "cp": lambda: shutil.copyfile(path, folder / "copy")}


# ---- growth ----


def files(folder: Path, count: int) -> float:
    """Listing and fingerprinting a folder of small files, the first time."""
    data = folder / f"files-{count}"
    data.mkdir()
    for number in range(count):
        (data / f"{number}.txt").write_text(f"text {number} " * 40)
    source = parse_sources([str(data)])
    return cpu(lambda: contents_of(source, cache_root(folder / f"cache-{count}")))


def named_files(folder: Path, count: int) -> float:
    """Reading as many names of sources, as a shell writes them."""
    names = [f"/data/part-{number:06d}.jsonl" for number in range(count)]
    return cpu(lambda: parse_sources(names))


def row_groups(folder: Path, count: int) -> float:
    """Reading a Parquet file of row groups of one row each."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / f"{count}.parquet"
    pq.write_table(pa.table({"text": [f"text {n}" for n in range(count)]}), path, row_group_size=1)
    unit = Unit((DataFile(str(path), path.name, "parquet"),))
    return cpu(lambda: sum(1 for _ in read_unit(unit, "text", BadRecords())))


def synthetic(folder: Path, documents: int, units: int = 16) -> TokenShards:
    """A source of documents of 20 tokens."""
    path = folder / "tokens" / f"{documents}-{units}"
    path.mkdir(parents=True)
    (folder / "files").mkdir(exist_ok=True)
    each, made = documents // units, []
    for number in range(units):
        starts = np.arange(each, dtype=np.uint64) * np.uint64(20)
        hashes = np.random.default_rng(number).integers(0, 1 << 63, each, np.uint64) * np.uint64(2) | np.uint64(1)
        (path / f"{number:06d}.idx").write_bytes(np.stack([starts, hashes]).tobytes())
        with open(path / f"{number:06d}.bin", "wb") as file:
            file.truncate(each * 40)
        sizes = {f"{number:06d}.bin": {"size": each * 40}, f"{number:06d}.idx": {"size": each * 16}}
        counts = {"tokens": each * 20, "segments": each, "documents": each, "text_bytes": each * 80}
        made.append({**counts, "files": sizes})
    manifest = {"content": "", "tokenizer": "", "dtype": "<u2", "units": made}
    (path / "manifest.json").write_bytes(seal(manifest))
    return TokenShards(path)


def documents(folder: Path, count: int) -> float:
    """Opening the stream of a finished cache as every process but the first does."""
    shards = synthetic(folder, count)
    threshold = 1 << 57

    def start() -> None:
        shards.hash_range()
        for held_out in (False, True):
            TokenStream([(0, shards, shards.runs(threshold, held_out=held_out))])

    start()
    forget_maps()
    return cpu(start)


def shard_files(folder: Path, count: int) -> float:
    """2,000 rows from as many shards, of which each has been opened."""
    shards = synthetic(folder, 400 * count, count)
    data = PackedDataset([TokenStream([(0, shards, shards.runs(0, held_out=False))])], 256, 0)
    for unit in range(count):
        shards.read(unit, 0, 1)
    return cpu(lambda: [data[i] for i in range(2000)])


def resumed_step(folder: Path, step: int) -> float:
    """100 first steps of a run that goes on at a step, with ten skipped ranges."""
    sampler = StepSampler(
        micro_batch_size=32, num_steps=step + 100, skip=[(n * 1000, n * 1000 + 32) for n in range(10)]
    )
    sampler.first_step = step
    return cpu(lambda: list(sampler))


def skipped_ranges(folder: Path, count: int) -> float:
    """1,000 steps of 32 samples behind as many ranges that are left out."""
    sampler = StepSampler(micro_batch_size=32, num_steps=1000, skip=[(n * 10, n * 10 + 2) for n in range(count)])
    return cpu(lambda: list(sampler))


def weighted_sources(folder: Path, count: int) -> float:
    """The table in which weighted sources are interleaved."""
    return cpu(lambda: Mixture([1 + n % 7 for n in range(count)], 0))


def logged_lines(folder: Path, count: int) -> float:
    """A report of a log."""
    run = folder / f"run-{count}"
    run.mkdir()
    (run / "run.json").write_text("{}")
    with open(run / "log.jsonl", "w") as file:
        file.writelines(json.dumps({**LINE, "step": step, "time": step}) + "\n" for step in range(1, count + 1))
    return cpu(lambda: page.main([str(run)]))


def saved_lines(folder: Path, count: int) -> float:
    """Writing trainer_state.json after as many logged lines."""
    from transformers import TrainerState

    state = TrainerState(log_history=[{**LINE, "step": step} for step in range(count)][-HISTORY:])
    return cpu(lambda: state.save_to_json(str(folder / "trainer_state.json")))


GROWTH: dict[str, tuple[Callable[[Path, int], float], list[int]]] = {
    "files, first fingerprint": (files, [1000, 2000, 4000, 8000, 20_000]),
    "names of sources": (named_files, [1000, 3000, 10_000, 20_000]),
    "row groups": (row_groups, [500, 1000, 2000, 4000]),
    "documents, start of a later process": (documents, [200_000, 1_000_000, 5_000_000, 20_000_000]),
    "shards, 2,000 rows": (shard_files, [16, 64, 256, 1024]),
    "step that a run goes on at": (resumed_step, [100, 10_000, 1_000_000, 1_000_000_000]),
    "skipped ranges": (skipped_ranges, [10, 100, 1000, 10_000]),
    "weighted sources": (weighted_sources, [2, 10, 100, 1000, 10_000]),
    "logged lines, report": (logged_lines, [1000, 10_000, 100_000, 1_000_000]),
    "logged lines, a checkpoint's state": (saved_lines, [1000, 10_000, 100_000, 1_000_000]),
}


def exponent(sizes: list[int], seconds: list[float]) -> float:
    """The slope of the logarithms; less than a hundredth of a second counts as one."""
    return float(np.polyfit([math.log(n) for n in sizes], [math.log(max(s, 0.01)) for s in seconds], 1)[0])


def growth(folder: Path, only: str | None = None) -> Iterator[dict[str, Any]]:
    for what, (work, sizes) in GROWTH.items():
        if only and only not in what:
            continue
        seconds = []
        for size in sizes:
            with tempfile.TemporaryDirectory(dir=folder) as name:
                seconds.append(work(Path(name), size))
        slope = exponent(sizes, seconds)
        for size, spent in zip(sizes, seconds, strict=True):
            yield {"what": what, "size": size, "cpu_s": spent, "exponent": slope}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots()
    for what in dict.fromkeys(row["what"] for row in rows):
        own = [row for row in rows if row["what"] == what]
        label = f"{what}: exponent {own[0]['exponent']:.2f}"
        axes.loglog([row["size"] for row in own], [max(row["cpu_s"], 0.01) for row in own], "o-", label=label)
    axes.set_xlabel("how many")
    axes.set_ylabel("CPU seconds (0.01 and less: 0.01)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def write(rows: list[dict[str, Any]], path: Path) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{v:.4g}" if isinstance(v, float) else v for key, v in row.items()})


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run data", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="limits,growth", help="limits, growth, or growth of one thing by its name")
    parser.add_argument("--megabytes", type=int, default=30, help="of text")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contestant")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        parts = {
            "limits": lambda: limits(Path(name), options.megabytes, options.rounds),
            "growth": lambda: growth(Path(name)),
        }
        for part in options.only.split(","):
            rows = []
            for row in parts.get(part, lambda part=part: growth(Path(name), part))():
                rows.append(row)
                print({key: round(v, 3) if isinstance(v, float) else v for key, v in row.items()}, flush=True)
            if part in parts:
                write(rows, options.out / f"{part}.csv")
            if part == "growth":
                plot(rows, options.out / "growth.png")
    return 0
