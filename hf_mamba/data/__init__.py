"""Text -> tokens -> packed rows, in an order that is a function of (seed, step).

    data = prepare_data(["corpus/*.jsonl.zst:0.7", "books.parquet:0.3"], tokenizer="my_tokenizer/", seq_len=2048)
    loader = build_dataloader(data.train, micro_batch_size=8, accumulation=4, world_size=2, rank=0, start_step=1000)

What the rooms within are for:
    sources     `parse_sources`: files, folders, globs, hub names, "embedded"; what is wrong with them, said early
    records     a file -> units of work -> documents; broken and empty records are counted
    cache       where results live: locks that survive a kill, publication by rename, checksums, full disks
    tokenizer   byte-level BPE trained on the spot, or any fast tokenizer
    tokenize    documents -> memory-mapped shards, by worker processes; killed and run again it goes on where it was
    shards      reading the shards: the held-out split and the streams of tokens
    order       sample number -> (stream, row): arithmetic, no stored permutation
    dataset     rows: input_ids, labels, seq_idx
    loader      which samples a rank sees at a step
    stream_rows one source as a stream: records -> documents -> rows, with a state
    streaming   the same rows from a data set too large to tokenise first
    prepare     the front door, which calls the others

Every rank calls `prepare_data`; one of them builds, the others wait on a file lock and then find the result. Call it
before the first collective, since a lock knows no time limit and a collective does.

Names are imported on first use, because the worker processes must start in a fraction of a second.
"""

from importlib import import_module
from typing import Any

_EXPORTS = {
    "Source": "sources",
    "parse_sources": "sources",
    "load_tokenizer": "tokenizer",
    "train_tokenizer": "tokenizer",
    "TokenShards": "shards",
    "tokenize_source": "tokenize",
    "RowOrder": "order",
    "PackedDataset": "dataset",
    "EvalDataset": "dataset",
    "StepSampler": "loader",
    "build_dataloader": "loader",
    "StreamedDataset": "streaming",
    "stream_data": "prepare",
    "PreparedData": "prepared",
    "prepare_data": "prepare",
    "check_fingerprint": "fingerprint",
    "DataError": "segments",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'hf_mamba.data' has no attribute {name!r}")
    return getattr(import_module(f"hf_mamba.data.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return __all__
