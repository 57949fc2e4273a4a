"""How fast text becomes tokens, and tokens become batches: `python -m benchmarks.data [--model]`.

The text is the standard library's sources, repeated with a number in front of each file up to 64 MB, so that no
two documents are equal. `--model` also times training steps of the 130m preset on this machine and says how many times
faster the loader is. Writes benchmarks/results/data.csv.
"""

import argparse
import csv
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from hf_mamba.data import (
    PreparedData,
    StreamedDataset,
    TokenShards,
    build_dataloader,
    load_tokenizer,
    parse_sources,
    prepare_data,
    tokenize_source,
    train_tokenizer,
)
from hf_mamba.data.sources import stdlib_files

REPEATS = 3
COLUMNS = [
    "what",
    "setting",
    "seconds",
    "cpu_seconds",
    "tokens_per_s",
    "tokens_per_cpu_s",
    "mb_per_s",
    "machine",
    "load",
]
RESULTS = Path(__file__).with_name("results") / "data.csv"


def write_corpus(path: Path, megabytes: int) -> None:
    """JSON lines of about `megabytes` MB."""
    texts = [text for file in stdlib_files() if (text := Path(file.path).read_text(errors="ignore")).strip()]
    size = number = 0
    with open(path, "w") as file:
        while size < megabytes * 1e6:
            line = json.dumps({"text": f"# {number}\n{texts[number % len(texts)]}"}) + "\n"
            file.write(line)
            size, number = size + len(line), number + 1


def measure(work: Callable[[], Any], repeats: int = REPEATS) -> dict[str, float]:
    """Median wall time and CPU time (all threads and finished children) of some calls, in seconds."""
    walls, cpus = [], []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), sum(os.times()[:4])
        work()
        walls.append(time.perf_counter() - wall)
        cpus.append(sum(os.times()[:4]) - cpu)
    return {"seconds": statistics.median(walls), "cpu_seconds": statistics.median(cpus)}


def figures(what: str, setting: str, times: dict[str, float], tokens: float = 0, size: float = 0) -> dict[str, Any]:
    """A row of the table; `size` in bytes."""
    row: dict[str, Any] = {"what": what, "setting": setting, **times}
    if tokens:
        row |= {"tokens_per_s": tokens / times["seconds"], "tokens_per_cpu_s": tokens / (times["cpu_seconds"] or 0.01)}
    return row | ({"mb_per_s": size / times["seconds"] / 1e6} if size else {})


def preparing(folder: Path) -> Iterator[dict[str, Any]]:
    """Training the tokenizer, tokenising by 1 and all processes, and opening the result again."""
    source = parse_sources([str(folder / "corpus.jsonl")])[0]
    train_tokenizer([parse_sources(["embedded"])[0]], 257, cache_dir=folder / "warm")  # imports are not measured
    times = measure(lambda: train_tokenizer([source], 4096, cache_dir=folder / "cache"), 1)
    yield figures("train a BPE", "vocabulary 4096", times)
    tokenizer = train_tokenizer([source], 4096, cache_dir=folder / "cache")
    tokenizer.save_pretrained(folder / "tokenizer")

    def tokenise(processes: int) -> TokenShards:
        return tokenize_source(
            source, tokenizer, cache_dir=folder / f"cache{processes}", num_proc=processes, progress=False
        )

    for processes in sorted({1, len(os.sched_getaffinity(0))}):
        times = measure(lambda n=processes: tokenise(n), 1)
        shards = tokenise(processes)
        yield figures("tokenise", f"{processes} worker(s)", times, shards.tokens, shards.text_bytes)
    yield figures("open the cache", "sizes compared", measure(lambda: tokenise(1)))
    yield figures("verify the cache", "checksums compared", measure(shards.verify), shards.tokens, 2 * shards.tokens)


def prepared(folder: Path, seq_len: int) -> PreparedData:
    """The corpus, from the cache."""
    return prepare_data(
        [str(folder / "corpus.jsonl")],
        seq_len=seq_len,
        tokenizer=load_tokenizer(folder / "tokenizer"),
        cache_dir=folder / "cache1",
        progress=False,
    )


def loading(folder: Path) -> Iterator[dict[str, Any]]:
    """Batches of 8 rows, as one rank takes them."""
    for seq_len, steps in ((256, 800), (2048, 400)):
        data = prepared(folder, seq_len)
        for workers in (0, 1):
            loader = build_dataloader(data.train, micro_batch_size=8, num_steps=steps, num_workers=workers)
            times = measure(lambda loader=loader: sum(1 for _ in loader))
            yield figures("load", f"seq_len {seq_len}, {workers} worker(s)", times, steps * 8 * seq_len)
    streamed = StreamedDataset([str(folder / "corpus.jsonl")], data.tokenizer, seq_len=2048)
    streamed.open()
    stream = iter(build_dataloader(streamed, micro_batch_size=8))
    next(stream)
    times = measure(lambda: [next(stream) for _ in range(50)])  # most of them are not ready yet
    streamed.close()
    yield figures("stream", "seq_len 2048, tokenised on the way", times, 50 * 8 * 2048)


def training(folder: Path) -> dict[str, Any]:
    """Forward and backward of the 130m preset on one row of 2048 (an optimizer would only slow it)."""
    from hf_mamba import MambaConfig, MambaForCausalLM
    from hf_mamba.family import get_preset

    model = MambaForCausalLM(MambaConfig(**get_preset("130m_mamba").config)).train()
    batch = next(iter(build_dataloader(prepared(folder, 2048).train, micro_batch_size=1)))

    def step() -> None:
        model(**batch).loss.backward()
        model.zero_grad()

    step()
    setting = f"130m_mamba, 1 x 2048, fp32, {torch.get_num_threads()} thread(s)"
    return figures("train", setting, measure(step, 1), 2048)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="store_true", help="also time training steps of the 130m preset")
    parser.add_argument("--megabytes", type=int, default=64, help="size of the text")
    options = parser.parse_args()
    rows = []
    load = f"{os.getloadavg()[0]:.1f}"  # of the machine before we began: what else wanted the cores
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder / "corpus.jsonl", options.megabytes)
        for row in (*preparing(folder), *loading(folder), *([training(folder)] if options.model else [])):
            rows.append(row)
            print(
                {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}, flush=True
            )
    if options.model:
        loader = next(r for r in rows if r["setting"] == "seq_len 2048, 0 worker(s)")
        print(f"the loader is {loader['tokens_per_s'] / rows[-1]['tokens_per_s']:,.0f} times as fast as the step")
    RESULTS.parent.mkdir(exist_ok=True)
    with open(RESULTS, "w", newline="") as file:
        machine = f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores"
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in rows:
            cells = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}
            writer.writerow({**cells, "machine": machine, "load": load})
    print(f"wrote {RESULTS}")


if __name__ == "__main__":
    main()
