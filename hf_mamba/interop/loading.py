"""A model and its tokenizer by name, whatever the family: what a command loads that is not told the class."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load_model(name: str, dtype: str = "auto", device: str | None = None) -> Any:
    """The language model of a folder (stock, original or DeepSpeed's) or of a repository of the Hub.

    Args:
        device: "cuda" or "cpu"; what there is by default.

    Raises:
        ValueError: it is damaged, of another architecture, or not there.
    """
    import torch

    from hf_mamba.formats.folder import family_in, read_json

    found = _file(name, "config.json")
    if found is None:
        raise ValueError(f"{name} holds no config.json: it is no model's folder.")
    family = family_in(read_json(found), name)
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return family.model_class.from_pretrained(name, dtype=dtype).to(place)


def load_tokenizer(name: str) -> Any:
    """The tokenizer beside a model.

    Raises:
        ValueError: there is none.
    """
    from transformers import AutoTokenizer

    if _file(name, "tokenizer_config.json") is None and _file(name, "tokenizer.json") is None:
        raise ValueError(f"{name} holds no tokenizer: neither tokenizer_config.json nor tokenizer.json.")
    return AutoTokenizer.from_pretrained(name)


def _file(name: str, file: str) -> Path | None:
    """The path of a file of a local folder, or of the Hub's cache after fetching it; None where it is missing.

    Raises:
        ValueError: there is neither such a folder nor such a repository.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    if Path(name).is_dir():
        return found if (found := Path(name) / file).is_file() else None
    try:
        return Path(hf_hub_download(name, file))
    except (OSError, ValueError) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        reason = " ".join(str(error).split())
        raise ValueError(f"{name} is no folder, and no repository that can be reached: {reason}") from None
