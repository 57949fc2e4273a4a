"""Which files of a model folder may be copied or leave this machine: known names, no link to elsewhere, no secrets.

A folder may be a stranger's. A link in it named `tokenizer.model` can point to a private key, and a pattern such as
`tokenizer*` would take whatever somebody put there.
"""

import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from hf_mamba.formats.torch_header import MAX_HEADER
from hf_mamba.redaction import without_known_secrets

MODEL_FILES = ("config.json", "generation_config.json")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
TEXTS = ("README.md", "LICENSE", "LICENSE.md", "LICENSE.txt")
_WEIGHTS = re.compile(r"model(\.safetensors(\.index\.json)?|-\d{5}-of-\d{5}\.safetensors)")


def is_weights(name: str) -> bool:
    """Tell whether transformers writes weights, or their index, under this name."""
    return _WEIGHTS.fullmatch(name) is not None


def files_of(folder: Path, names: Iterable[str], weights: bool = False) -> dict[str, Path]:
    """Find those of the named files that are in `folder`: each name with the regular file behind it.

    Args:
        weights: also the safetensors files and their index.

    Raises:
        ValueError: one is a link out of the folder, or no file at all. Links of a Hub cache's snapshot to its blobs are
            the folder's own.
    """
    wanted = set(names)
    found = sorted(name for name in os.listdir(folder) if name in wanted or (weights and is_weights(name)))
    return {name: _regular(folder, name) for name in found}


def _regular(folder: Path, name: str) -> Path:
    home = folder.resolve()
    homes = [home, *([home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [])]
    file = Path(os.path.realpath(folder / name))  # without an exception where links go in a circle
    if not any(file.is_relative_to(place) for place in homes):
        raise ValueError(
            f"{folder / name} is a link to {file}, outside the folder; nothing was copied. If it belongs to the model, "
            "put a copy in the link's place."
        )
    if not file.exists() or not stat.S_ISREG(file.stat().st_mode):
        raise ValueError(f"{folder / name} is not a file; nothing was copied. Remove it.")
    return file


def refuse_secrets(files: Iterable[Path], folder: Path) -> None:
    """Look for access tokens and passwords in every file; of weights, in the header.

    Raises:
        ValueError: a file holds one; the message does not show it.
    """
    for file in files:
        with open(file, "rb") as opened:
            weights = file.suffix == ".safetensors"
            size = min(int.from_bytes(opened.read(8), "little"), MAX_HEADER) if weights else -1
            text = opened.read(size).decode("latin-1")
        if without_known_secrets(text) != text:
            raise ValueError(f"{folder / file.name} holds an access token; nothing was uploaded. Remove it first.")
