"""Data that is told apart at a glance."""

import json
from collections.abc import Iterable
from pathlib import Path

WORDS = "the state of a model is a vector that every token moves and no attention reads".split()  # noqa: SIM905 - a sentence


def document(number: int, words: int = 20) -> str:
    """A document whose text says its number, so that no two are equal."""
    return f"document {number}: " + " ".join(WORDS[(number + i * i) % len(WORDS)] for i in range(words))


def write_jsonl(path: Path, texts: Iterable[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path
