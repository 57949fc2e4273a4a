"""A small tokenizer, made once; streams that end with their test."""

from collections.abc import Iterator
from typing import Any

import pytest
from texts import document, write_jsonl

from hf_mamba.data import StreamedDataset, parse_sources, train_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_jsonl(folder / "texts.jsonl", [document(i) for i in range(200)])
    return train_tokenizer(parse_sources([str(folder / "texts.jsonl")]), 400, cache_dir=folder / "cache")


@pytest.fixture(autouse=True)
def _streams_end(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A stream that a test has opened is closed after it: its thread would read on for as long as the tests run."""
    opened, begin = [], StreamedDataset.open

    def remembered(stream: StreamedDataset, *arguments: Any, **options: Any) -> None:
        opened.append(stream)
        begin(stream, *arguments, **options)

    monkeypatch.setattr(StreamedDataset, "open", remembered)
    yield
    for stream in opened:
        stream.close()
