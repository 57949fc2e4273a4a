"""A small tokenizer, made once."""

import pytest
from texts import document, write_jsonl

from hf_mamba.data import parse_sources, train_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_jsonl(folder / "texts.jsonl", [document(i) for i in range(200)])
    return train_tokenizer(parse_sources([str(folder / "texts.jsonl")]), 400, cache_dir=folder / "cache")
