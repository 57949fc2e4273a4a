"""Continued pretraining: from any folder, with its own, an extended or another tokenizer, tied or not."""

import math
from pathlib import Path

import pytest
import torch
from checkpoints import WORDS, make_model, make_tokenizer, same_weights, write_original

from hf_mamba import MambaForCausalLM
from hf_mamba.models.common.linear import LMHead
from hf_mamba.training.continuation import load_for_training


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def start(request, tokenizer, tmp_path: Path) -> tuple[MambaForCausalLM, Path]:
    """(model, folder) with 16 rows, all of which are tokens."""
    model = make_model(vocab_size=16, hidden_size=64, tie_word_embeddings=request.param, initializer_range=0.02)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert len(tokenizer) == 16
    return model, tmp_path / "model"


def _rows(model: MambaForCausalLM) -> list[torch.Tensor]:
    return [model.get_input_embeddings().weight.detach(), model.lm_head.weight.detach()]


def _trains(model: MambaForCausalLM, vocabulary: int) -> None:
    model.train()
    assert isinstance(model.lm_head, LMHead)
    ids = torch.arange(2 * 12).view(2, 12) % vocabulary
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    assert output.unread is not None  # nobody has read the logits
    assert model.get_input_embeddings().weight.grad.isfinite().all()


def test_the_own_tokenizer_changes_nothing(start, tokenizer):
    model, folder = start
    loaded = load_for_training(folder, tokenizer, torch.float32)
    assert same_weights(loaded, model)
    assert loaded.config.pad_token_id == loaded.generation_config.pad_token_id == tokenizer.pad_token_id
    _trains(loaded, 16)


def test_added_tokens_get_rows_as_in_a_fresh_model(start, tokenizer):
    model, folder = start
    tied = model.config.tie_word_embeddings
    longer = make_tokenizer([*WORDS, *(f"w{i}" for i in range(300))])
    torch.manual_seed(0)
    loaded = load_for_training(folder, longer, torch.float32)
    assert loaded.config.vocab_size == 320  # 316 tokens, and a multiple of 16
    for old, new in zip(_rows(model), _rows(loaded), strict=True):
        assert torch.equal(new[:16], old)
    embedding, head = (rows[16:] for rows in _rows(loaded))
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) is tied
    assert embedding.std().item() == pytest.approx(0.02, rel=0.05)
    if not tied:
        bound = 64**-0.5
        assert head.abs().max() <= bound
        assert head.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    _trains(loaded, 316)


def test_another_tokenizer_keeps_the_rows_of_the_tokens_it_shares(start, tokenizer):
    model, folder = start
    other = make_tokenizer([*reversed(WORDS), *(f"w{i}" for i in range(40))])
    loaded = load_for_training(folder, other, torch.bfloat16)
    assert loaded.config.vocab_size == 64
    before, after = tokenizer.get_vocab(), other.get_vocab()
    for old, new in zip(_rows(model), _rows(loaded), strict=True):
        assert new.dtype == torch.bfloat16
        for word in ["<pad>", *WORDS]:
            assert torch.equal(new[after[word]], old[before[word]].bfloat16()), word
        assert new[after["w3"]].abs().sum() > 0
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) is model.config.tie_word_embeddings
    _trains(loaded, 56)


def test_a_tokenizer_that_shares_nothing_is_refused(start):
    _, folder = start
    tokenizer = make_tokenizer(["x"])
    foreign = type(tokenizer)(
        tokenizer_object=_renamed(tokenizer), eos_token="<|e|>", pad_token="<|p|>", unk_token="<|u|>"
    )
    with pytest.raises(ValueError, match="shares no token"):
        load_for_training(folder, foreign, torch.float32)


def _renamed(tokenizer):
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({"<|e|>": 0, "<|p|>": 1, "<|u|>": 2, "y": 3}, unk_token="<|u|>"))


def test_original_and_training_folders_are_starting_points_too(zero_folder: Path, tmp_path: Path, tokenizer):
    model = make_model()
    write_original(model, tmp_path / "o")  # without a tokenizer: the one given is taken to be its own
    assert same_weights(load_for_training(tmp_path / "o", tokenizer, torch.float32), model)
    assert load_for_training(zero_folder / "zero3", tokenizer, torch.float32).config.vocab_size == 61


def test_under_zero3_the_partitioned_model_is_the_same(zero_folder: Path):
    from safetensors.torch import load_file

    start = load_file(zero_folder / "zero2.safetensors")
    name = "backbone.embeddings.weight"
    before = make_tokenizer(WORDS).get_vocab()
    longer = load_file(zero_folder / "longer.safetensors")
    assert longer[name].shape[0] == 128  # 115 tokens
    assert torch.equal(longer[name][:61], start[name])
    assert longer[name][61:].std().item() == pytest.approx(0.02, rel=0.1)
    other = load_file(zero_folder / "other.safetensors")
    after = make_tokenizer([*reversed(WORDS), "zebra"]).get_vocab()
    assert other[name].shape[0] == 32  # 17 tokens
    for word in WORDS:
        assert torch.equal(other[name][after[word]], start[name][before[word]]), word
    for weights in (longer, other):
        assert all(torch.equal(weights[n], start[n]) for n in weights if n != name)


def test_a_folder_that_cannot_be_loaded_says_why(tmp_path: Path, tokenizer):
    with pytest.raises(ValueError, match="has no config.json"):
        load_for_training(tmp_path, tokenizer, torch.float32)
