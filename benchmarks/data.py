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
    StreamingLoader,
    build_dataloader,
    load_tokenizer,
    parse_sources,
    prepare_data,
    tokenize_source,
    train_tokenizer,
)
from hf_mamba.data.sources import stdlib_files

REPEATS = 3
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


def median_seconds(work: Callable[[], Any], repeats: int = REPEATS) -> float:
    """The median time of some calls."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def preparing(folder: Path) -> Iterator[dict[str, Any]]:
    """Training the tokenizer, tokenising by 1 and all processes, and opening the result again."""
    corpus = str(folder / "corpus.jsonl")
    source = parse_sources([corpus])[0]
    began = time.perf_counter()
    tokenizer = train_tokenizer([source], 4096, cache_dir=folder / "cache")
    yield {"what": "train a BPE", "setting": "vocab 4096", "seconds": time.perf_counter() - began}
    tokenizer.save_pretrained(folder / "tokenizer")
    for processes in sorted({1, len(os.sched_getaffinity(0))}):
        began = time.perf_counter()
        shards = tokenize_source(
            source, tokenizer, cache_dir=folder / f"cache{processes}", num_proc=processes, progress=False
        )
        seconds = time.perf_counter() - began
        yield {
            "what": "tokenise",
            "setting": f"{processes} processes",
            "seconds": seconds,
            "tokens_per_s": shards.tokens / seconds,
            "mb_per_s": shards.text_bytes / seconds / 1e6,
        }
    again = median_seconds(lambda: tokenize_source(source, tokenizer, cache_dir=folder / "cache1", progress=False))
    yield {"what": "open the cache", "setting": "sizes checked", "seconds": again}
    again = median_seconds(shards.verify)
    yield {
        "what": "verify the cache",
        "setting": "checksums",
        "seconds": again,
        "mb_per_s": shards.tokens * 2 / again / 1e6,
    }


def loading(folder: Path) -> Iterator[dict[str, Any]]:
    """Batches of 8 rows, as one rank takes them."""
    tokenizer = load_tokenizer(folder / "tokenizer")
    for seq_len in (256, 2048):
        data = prepare_data(
            [str(folder / "corpus.jsonl")],
            seq_len=seq_len,
            tokenizer=tokenizer,
            cache_dir=folder / "cache1",
            progress=False,
        )
        for workers in (0, 1):
            steps = 800 if seq_len == 256 else 400
            loader = build_dataloader(data.train, micro_batch_size=8, num_steps=steps, num_workers=workers)
            seconds = median_seconds(lambda loader=loader: sum(1 for _ in loader))
            yield {
                "what": "load",
                "setting": f"seq_len {seq_len}, {workers} workers",
                "seconds": seconds,
                "tokens_per_s": steps * 8 * seq_len / seconds,
            }
    stream = iter(StreamingLoader([str(folder / "corpus.jsonl")], tokenizer, seq_len=2048, micro_batch_size=8))
    next(stream)
    seconds = median_seconds(lambda: [next(stream) for _ in range(50)])
    yield {
        "what": "stream",
        "setting": "seq_len 2048, tokenised on the way",
        "seconds": seconds,
        "tokens_per_s": 50 * 8 * 2048 / seconds,
    }


def training(folder: Path) -> dict[str, Any]:
    """Forward and backward of the 130m preset on one row of 2048 (an optimizer would only slow it)."""
    from hf_mamba import MambaConfig, MambaForCausalLM
    from hf_mamba.presets import get_preset

    model = MambaForCausalLM(MambaConfig(**get_preset("130m_mamba").config)).train()
    tokenizer = load_tokenizer(folder / "tokenizer")
    data = prepare_data(
        [str(folder / "corpus.jsonl")], seq_len=2048, tokenizer=tokenizer, cache_dir=folder / "cache1", progress=False
    )
    batch = next(iter(build_dataloader(data.train, micro_batch_size=1)))

    def step() -> None:
        model(**batch).loss.backward()
        model.zero_grad()

    step()
    seconds = median_seconds(step)
    setting = f"130m_mamba, 1 x 2048, fp32, {torch.get_num_threads()} threads"
    return {"what": "train", "setting": setting, "seconds": seconds, "tokens_per_s": 2048 / seconds}


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
            print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()})
    if options.model:
        loader = next(r for r in rows if r["setting"] == "seq_len 2048, 0 workers")
        print(f"the loader is {loader['tokens_per_s'] / rows[-1]['tokens_per_s']:,.0f} times as fast as the step")
    RESULTS.parent.mkdir(exist_ok=True)
    with open(RESULTS, "w", newline="") as file:
        machine = f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores"
        writer = csv.DictWriter(file, ["what", "setting", "seconds", "tokens_per_s", "mb_per_s", "machine", "load"])
        writer.writeheader()
        for row in rows:
            figures = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}
            writer.writerow({**figures, "machine": machine, "load": load})
    print(f"wrote {RESULTS}")


if __name__ == "__main__":
    main()
