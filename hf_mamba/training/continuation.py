"""Continue training from any checkpoint, with its tokenizer or with another."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import cached_file

from hf_mamba.data.tokenizer_files import rows_to_train
from hf_mamba.family import Family, get_family

logger = logging.getLogger(__name__)

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_for_training(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    family: Family | None = None,
    rows: int = 0,
) -> PreTrainedModel:
    """A checkpoint's model with an embedding row for every token of `tokenizer`.

    With the checkpoint's own tokenizer nothing changes. Tokens that were added to it get rows drawn as in a fresh
    model, and the vocabulary is rounded up to a multiple of 16. With another tokenizer, tokens that both have keep
    their row under their new id, and the others are drawn fresh.

    Args:
        path: anything that the family's `from_pretrained` takes. Its tokenizer is read from there, too; where there
            is none, `tokenizer` must be the one it was trained with, or an extension of it.
        dtype: of the parameters, those excepted that are always fp32. family: the checkpoint's; Mamba by default.
        rows: at least as many rows as this.

    Raises:
        ValueError: where the checkpoint cannot be used, or shares no token with `tokenizer`.
    """
    model = (family or get_family("mamba")).model_class.from_pretrained(path, dtype=dtype)
    old, new, before = _own_tokenizer(path), tokenizer.get_vocab(), model.config.vocab_size
    size = max(rows, rows_to_train(old.get_vocab() if old else None, new, before))
    moved = _moved_tokens(old, tokenizer, before)
    if moved is not None and not moved:
        raise ValueError(
            f"{path} was trained with a tokenizer that shares no token with the one given: no embedding could be kept. "
            "Use the checkpoint's own tokenizer, or train from scratch."
        )
    if moved is not None:
        logger.warning("another tokenizer: %d of its %d tokens keep their embedding", len(moved), len(new))
        _move_rows(model, moved, size)
    elif size != before:
        logger.info("the vocabulary grows from %d to %d rows for %d tokens", before, size, len(new))
        model.resize_token_embeddings(size, mean_resizing=False)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config, name, getattr(tokenizer, name))
        setattr(model.generation_config, name, getattr(tokenizer, name))
    return model


def _own_tokenizer(path: str | Path) -> PreTrainedTokenizerBase | None:
    # without files, AutoTokenizer would give an empty tokenizer of the configuration's model_type
    try:
        return AutoTokenizer.from_pretrained(path) if any(_has(path, name) for name in _TOKENIZER_FILES) else None
    except (OSError, ValueError, KeyError):
        return None


def _has(path: str | Path, name: str) -> bool:
    try:
        return cached_file(path, name) is not None
    except OSError:
        return False


def _moved_tokens(
    old: PreTrainedTokenizerBase | None, new: PreTrainedTokenizerBase, rows: int
) -> dict[int, int] | None:
    """New id -> old id of the tokens both tokenizers have; None where `new` is `old`, or `old` with tokens added."""
    if old is None:
        return None
    before, after = old.get_vocab(), new.get_vocab()
    if all(after.get(token) == i for token, i in before.items()):
        return None
    return {i: before[token] for token, i in after.items() if token in before and before[token] < rows}


@torch.no_grad()
def _move_rows(model: PreTrainedModel, moved: dict[int, int], size: int) -> None:
    """Draw the embedding and an untied head fresh, and put the rows that are kept at their new place."""
    layers: list[nn.Module] = [model.get_input_embeddings()]
    if not model.config.tie_word_embeddings:
        layers.append(model.get_output_embeddings())
    to, source = torch.tensor(list(moved)), torch.tensor(list(moved.values()))
    kept = []
    for layer in layers:
        weight: Any = layer.weight
        with _gathered(weight):
            kept.append(weight[source.to(weight.device)].clone())
    model.resize_token_embeddings(size, mean_resizing=False)
    layers = [model.get_input_embeddings(), model.get_output_embeddings()][: len(layers)]
    for layer, old_rows in zip(layers, kept, strict=True):
        weight = layer.weight
        with _gathered(weight):
            if isinstance(layer, nn.Embedding):
                weight.normal_(std=model.config.initializer_range)
            else:
                weight.uniform_(-(weight.shape[1] ** -0.5), weight.shape[1] ** -0.5)
            weight[to.to(weight.device)] = old_rows


@contextmanager
def _gathered(weight: Tensor) -> Iterator[None]:
    """The whole of a weight that ZeRO-3 may have partitioned; what rank 0 writes into it, all ranks get."""
    if is_deepspeed_zero3_enabled():
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
            yield
    else:
        yield
