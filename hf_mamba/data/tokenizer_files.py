"""What a tokenizer's files say about the end of a document, without loading it: for the pre-flight."""

import importlib.util
import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from hf_mamba.files import Unreadable, read_small

# The one special token of those trained here, as in the published Mamba checkpoints (GPT-NeoX's): id 0 is end, begin,
# padding and unknown.
END_OF_TEXT = "<|endoftext|>"
# How tokenizers call it that do not say which it is.
END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<end_of_text>")

MOST_BYTES = 256 << 20


NEEDS_SENTENCEPIECE = (
    "its tokenizer.model is read by the packages sentencepiece and protobuf, which are not both installed "
    "(pip install sentencepiece protobuf)"
)


def without_sentencepiece(reason: str = "sentencepiece") -> bool:
    """Whether sentencepiece models cannot be read here, and `reason` is an error that transformers then gives."""
    installed = all(importlib.util.find_spec(name) for name in ("sentencepiece", "google.protobuf"))
    return not installed and any(word in reason.lower() for word in ("sentencepiece", "tiktoken", "protobuf"))


class End(NamedTuple):
    """The token that ends a document, None where there is none; and who says it."""

    token: str | None
    source: str


def end_of_documents(name: str, chosen: str | None) -> End | None:
    """The token that `load_tokenizer` will take; None where the files are not on this machine, or cannot be read here.

    Raises:
        ValueError: a folder or file that is not there or holds no tokenizer, or a chosen token that it lacks.
    """
    path = os.path.expanduser(name)
    if not os.path.exists(path):
        if name.startswith((".", "/", "~")) or name.endswith(".json") or name.count("/") > 1:
            raise ValueError("there is no such folder or file")
        return None
    if not os.path.isfile(path) and not os.path.isdir(path):
        raise ValueError("it is neither a file nor a folder")
    file = path if os.path.isfile(path) else os.path.join(path, "tokenizer.json")
    if not os.path.exists(file):
        if os.path.exists(os.path.join(path, "tokenizer.model")) and without_sentencepiece():
            raise ValueError(NEEDS_SENTENCEPIECE)
        if any(entry.endswith((".model", ".txt")) or entry == "vocab.json" for entry in os.listdir(path)):
            return None  # transformers makes one of these
        raise ValueError("it holds no tokenizer.json")
    vocabulary = _vocabulary(_read(file))
    if chosen is not None:
        if chosen not in vocabulary:
            raise ValueError(f"it has no token {chosen!r}")
        return End(chosen, "--eos_token")
    for other in ("tokenizer_config.json", "special_tokens_map.json") if os.path.isdir(path) else ():
        beside = os.path.join(path, other)
        own = _read(beside).get("eos_token") if os.path.exists(beside) else None
        if own := own.get("content") if isinstance(own, dict) else own:
            return End(str(own), f"{other} of {name}")
    usual = next((token for token in END_NAMES if token in vocabulary), None)
    return End(usual, f"a usual name in the vocabulary of {name}" if usual else "")


MULTIPLE = 16  # what llama.cpp, vLLM and tensor cores like in a vocabulary


def padded_vocabulary(size: int) -> int:
    """Rows for `size` tokens: the next multiple of 16."""
    return -(-size // MULTIPLE) * MULTIPLE


def rows_to_train(own: Mapping[str, int] | None, new: Mapping[str, int], rows: int) -> int:
    """Rows of a model of `rows` rows and the tokenizer `own`, once it is trained with the tokenizer `new`.

    Both are ids by token. A tokenizer that `own` does not begin gets rows for its tokens alone.
    """
    if own is not None and any(new.get(token) != i for token, i in own.items()):
        return padded_vocabulary(len(new))
    return padded_vocabulary(len(new)) if len(new) > rows else rows


def token_ids(name: str) -> dict[str, int] | None:
    """Every token's id; None where there is no tokenizer.json on this machine, or none that can be read here."""
    path = os.path.expanduser(name)
    file = os.path.join(path, "tokenizer.json") if os.path.isdir(path) else path
    try:
        tokenizer = _read(file) if os.path.isfile(file) else {}
        ids = _vocabulary(tokenizer)
    except (ValueError, TypeError):
        return None
    return ids or None


def _read(file: str) -> dict[str, Any]:
    try:
        found = json.loads(read_small(file, MOST_BYTES))
    except (Unreadable, OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{os.path.basename(file)} cannot be read: {error}") from None
    return found if isinstance(found, dict) else {}


def _vocabulary(tokenizer: dict[str, Any]) -> dict[str, int]:
    """Each token's id by its name, of any of the formats of a model."""
    added, model = tokenizer.get("added_tokens"), tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids: dict[str, int] = {}
    if isinstance(vocabulary, dict):
        ids |= vocabulary
    elif isinstance(vocabulary, list):  # Unigram: (token, score)
        ids |= {entry[0]: i for i, entry in enumerate(vocabulary) if isinstance(entry, list) and entry}
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict):
            ids[str(token.get("content"))] = token.get("id", -1)
    return ids
