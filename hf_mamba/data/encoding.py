"""How a tokenizer's ids of a document are made: what is put around it, and what special tokens in its text become.

Streams and tokenised data use the same `Encoding`, and so give the same tokens.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_mamba.data.cache import digest
from hf_mamba.data.segments import Segment, cut_ids

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_PROBE = "a"


@dataclass(frozen=True)
class Encoding:
    """Text -> ids.

    Attributes:
        json: the tokenizer as it encodes: of its added tokens, those are special that stay text.
        eos: the token that ends a document; in a text it stays text.
        prefix, suffix: what the tokenizer itself puts around a text; the suffix ends with `eos`.
        special: id -> name of the special tokens that a text may hold as such.
        fingerprint: a name for all that decides which ids a text becomes.
    """

    json: str
    eos: int
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    special: dict[int, str] = field(default_factory=dict)
    fingerprint: str = ""

    @classmethod
    def of(cls, tokenizer: Any, *, template: bool = True, split_special_tokens: bool | None = None) -> "Encoding":
        """The encoding of a fast tokenizer.

        Args:
            template: put around each document what the tokenizer puts around a text.
            split_special_tokens: read special tokens in a text as text; as the tokenizer itself does when None.

        Raises:
            ValueError: it is no fast tokenizer, or has no eos_token.
        """
        from hf_mamba.data.tokenizer import backend

        inner, eos = backend(tokenizer), int(tokenizer.eos_token_id)
        if split_special_tokens is None:
            split_special_tokens = bool(getattr(tokenizer, "split_special_tokens", False))
        described = json.loads(inner.to_str())
        before, after = around(inner) if template else ((), ())
        suffix = after if after[-1:] == (eos,) else (*after, eos)
        special = {}
        if not split_special_tokens:
            special = {t["id"]: t["content"] for t in described["added_tokens"] if t["special"] and t["id"] != eos}
        parts: list[Any] = [described, eos]
        if before or after not in ((), (eos,)) or special:  # else a text becomes what it always became
            parts.append({"prefix": before, "suffix": suffix, "special": sorted(special)})
        fingerprint = digest(parts)
        if special:
            for token in described["added_tokens"]:
                token["special"] = token["id"] == eos
        return cls(json.dumps(described), eos, before, suffix, special, fingerprint)

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        plain = {"json": self.json, "eos": self.eos, "prefix": list(self.prefix), "suffix": list(self.suffix)}
        return {**plain, "special": [[i, name] for i, name in self.special.items()]}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "Encoding":
        return cls(value["json"], value["eos"], tuple(value["prefix"]), tuple(value["suffix"]), dict(value["special"]))

    @cached_property
    def tokenizer(self) -> "Tokenizer":
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(self.json)
        tokenizer.encode_special_tokens = True  # those that are marked as special stay text
        return tokenizer

    @cached_property
    def largest(self) -> int:
        """The largest id; ids may have holes."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values())

    @cached_property
    def dtype(self) -> str:
        """Of the ids on disk."""
        return "<u2" if self.largest < 1 << 16 else "<u4"

    def encode(self, segments: Sequence[Segment]) -> list[list[int]]:
        """The ids of each segment, with what belongs to a document's begin and end."""
        texts = [s.text for s in segments if s.ids is None]
        encoded = iter(self.tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        return [
            [*(self.prefix if s.first else ()), *next(encoded).ids, *(self.suffix if s.last else ())]
            if s.ids is None
            else s.ids
            for s in segments
        ]

    def take(self, value: Any, where: str, packed: bool) -> Iterator[Segment]:
        """A record of ids in segments; within it, each token that ends documents ends one.

        A document gets what the tokenizer puts around one where it lacks it; a row that was packed stays as it is.

        Raises:
            ValueError: an id that the tokenizer does not have.
        """
        ids = self.check_ids(value, where)
        for document in np.split(ids, np.flatnonzero(ids == self.eos) + 1):
            whole = document.tolist() if packed else self._completed(document.tolist())
            yield from cut_ids(whole)

    def check_ids(self, value: Any, where: str) -> np.ndarray:
        """A record of ids as an array.

        Raises:
            ValueError: an id that the tokenizer does not have.
        """
        ids = np.asarray(value)
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high > self.largest:
            raise ValueError(
                f"{where}: id {low if low < 0 else high} is not one of the tokenizer's, which end at {self.largest}; "
                "name the tokenizer that made these ids with --tokenizer_name"
            )
        return ids

    def _completed(self, ids: list[int]) -> list[int]:
        """A document's ids with what belongs to its begin and end; nothing for an end alone."""
        before, after = list(self.prefix), list(self.suffix)
        if ids in ([], [self.eos]):
            return []
        if ids[: len(before)] != before:
            ids = before + ids
        if ids[-1] == self.eos:
            return ids
        there = next(n for n in range(len(after), -1, -1) if ids[len(ids) - n :] == after[:n])
        return ids + after[there:]

    def count_special(self, ids: Sequence[int], segment: Segment) -> Counter[str]:
        """The special tokens in a segment's text, by name."""
        if not self.special or segment.ids is not None:
            return Counter()
        begin = len(self.prefix) if segment.first else 0
        end = len(ids) - (len(self.suffix) if segment.last else 0)
        found = np.array(ids[begin:end], np.int64)
        return Counter(self.special[i] for i in found[np.isin(found, self._special_ids)].tolist())

    @cached_property
    def _special_ids(self) -> np.ndarray:
        return np.array(sorted(self.special), np.int64)


def around(tokenizer: "Tokenizer") -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What a tokenizer puts before and after a text."""
    with_all = tokenizer.encode(_PROBE).ids
    plain = tokenizer.encode(_PROBE, add_special_tokens=False).ids
    for begin in range(len(with_all) - len(plain) + 1):
        if with_all[begin : begin + len(plain)] == plain:
            return tuple(with_all[:begin]), tuple(with_all[begin + len(plain) :])
    return (), ()


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """The ids of a prompt that is to be continued: nothing that ends a text stands behind it."""
    ids: list[int] = tokenizer(prompt)["input_ids"]
    after = around(tokenizer.backend_tokenizer)[1]
    return ids[: len(ids) - len(after)] if after and tuple(ids[-len(after) :]) == after else ids
