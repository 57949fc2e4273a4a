"""The tokenizer trained on the spot, and others' tokenizers."""

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from texts import document, write_jsonl
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_mamba.data import load_tokenizer, parse_sources, tokenize_source, train_tokenizer
from hf_mamba.data.encoding import Encoding, prompt_ids
from hf_mamba.data.tokenizer_files import end_of_documents


@given(st.text())
def test_any_text_comes_back_exactly(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_it_is_saved_so_that_transformers_loads_it(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.is_fast
    assert len(loaded) == len(tokenizer) == 400
    for role in ("bos", "eos", "pad", "unk"):  # as in the published Mamba checkpoints
        assert getattr(loaded, f"{role}_token") == "<|endoftext|>"
        assert getattr(loaded, f"{role}_token_id") == 0
    text = document(3) + " déjà vu\n\n\t x"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert Encoding.of(loaded).fingerprint == Encoding.of(tokenizer).fingerprint


TRAIN = """
import sys
from hf_mamba.data import parse_sources, train_tokenizer
from hf_mamba.data.encoding import Encoding
print(Encoding.of(train_tokenizer(parse_sources([sys.argv[1]]), 600, cache_dir=sys.argv[2])).fingerprint)
"""


def test_training_is_deterministic_and_rivals_agree(tmp_path):
    """Two processes on one cache at once, with several threads and other hash seeds; and this one, on another cache."""
    path = write_jsonl(tmp_path / "a.jsonl", [document(i) for i in range(500)])
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", TRAIN, str(path), str(tmp_path / "x")],
            env={**os.environ, "TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": "4", "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    mine = Encoding.of(train_tokenizer(parse_sources([str(path)]), 600, cache_dir=tmp_path / "y")).fingerprint
    assert {run.communicate(timeout=120)[0].strip() for run in runs} == {mine}
    assert not list((tmp_path / "x" / "parts").iterdir())


def test_special_tokens_inside_a_text_are_text(tokenizer, tmp_path):
    """A document cannot forge the end of a document."""
    write_jsonl(tmp_path / "a.jsonl", ["before <|endoftext|> after"])
    shards = tokenize_source(
        parse_sources([f"{tmp_path}/a.jsonl"])[0], tokenizer, cache_dir=tmp_path / "cache", progress=False
    )
    ids, _ = shards.read(0, 0, shards.tokens)
    assert (ids == 0).nonzero()[0].tolist() == [len(ids) - 1]
    assert tokenizer.decode(ids[:-1]) == "before <|endoftext|> after"


def test_truncation_and_padding_of_a_tokenizer_do_not_apply(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    cutting = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    cutting("x" * 100, truncation=True, max_length=4, padding="max_length")  # leaves its mark inside
    write_jsonl(tmp_path / "a.jsonl", [document(1, 50), "short"])
    source, options = parse_sources([f"{tmp_path}/a.jsonl"])[0], {"cache_dir": tmp_path / "cache", "progress": False}
    assert tokenize_source(source, cutting, **options).path == tokenize_source(source, tokenizer, **options).path


def test_small_data_gives_a_smaller_vocabulary(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["ab ab ab"])
    assert 257 < len(train_tokenizer(parse_sources([f"{tmp_path}/a.jsonl"]), 5000, cache_dir=tmp_path)) < 270


@pytest.mark.parametrize("size", [0, 256, 1000.0, True, "300"])
def test_bad_sizes_are_named(tmp_path, size):
    with pytest.raises(ValueError, match="at least 257"):
        train_tokenizer(parse_sources(["embedded"]), size, cache_dir=tmp_path)


def test_tokenizers_that_cannot_serve_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"cannot be loaded: it holds no tokenizer\.json.*vocab_size to train one"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="there is no such folder"):
        load_tokenizer(tmp_path / "absent")
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(tmp_path / "no_eos")
    with pytest.raises(ValueError, match="has no token that ends documents"):
        load_tokenizer(tmp_path / "no_eos")


def test_any_tokenizers_file_serves_and_its_end_token_is_found(tokenizer, tmp_path):
    """A bare tokenizer.json, as a file and as a folder; the pre-flight names the token that loading takes."""
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    for name in (tmp_path, tmp_path / "tokenizer.json"):
        assert load_tokenizer(name).eos_token == "<|endoftext|>"
        assert end_of_documents(str(name), None).token == "<|endoftext|>"
        assert load_tokenizer(name, eos_token="e").eos_token == end_of_documents(str(name), "e").token == "e"
        with pytest.raises(ValueError, match="has no such token"):
            load_tokenizer(name, eos_token="<none>")
        with pytest.raises(ValueError, match="no token '<none>'"):
            end_of_documents(str(name), "<none>")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "e"}}')
    assert end_of_documents(str(tmp_path), None) == ("e", f"tokenizer_config.json of {tmp_path}")
    words = Tokenizer(models.WordLevel({"a": 0, "</s>": 1, "[UNK]": 2}, unk_token="[UNK]"))
    words.save(str(tmp_path / "words.json"))
    assert load_tokenizer(tmp_path / "words.json").eos_token == "</s>"
    assert end_of_documents(str(tmp_path / "words.json"), None).token == "</s>"
    assert end_of_documents("owner/name", None) is None
    with pytest.raises(ValueError, match="no such folder"):
        end_of_documents("./nothing", None)


def test_a_prompt_is_continued(tokenizer):
    """What the tokenizer puts behind a text is not behind a prompt; what it puts before it is."""
    inner = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    inner.post_processor = processors.TemplateProcessing(
        "<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    both = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>")
    assert prompt_ids(both, "hello") == [0, *prompt_ids(tokenizer, "hello")] == both("hello")["input_ids"][:-1]
    assert prompt_ids(tokenizer, "hello") == tokenizer("hello")["input_ids"]
