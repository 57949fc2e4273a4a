"""PyTorch's pickled files, read without running anything that they hold."""

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from hf_mamba.findings import first_line


def load_inert(file: Path, stand_ins: list[Any] | None = None) -> Any:
    """The tensors and plain values of a .bin or .pt file, on the CPU, memory-mapped where its format allows.

    Args:
        stand_ins: (object, "module.name") pairs: names that the file may hold, and what they are bound to instead.

    Raises:
        ValueError: where the file holds anything else, or is damaged.
    """
    # the format before torch 1.6 is no zip, cannot be memory-mapped, and is read whole
    mapped = zipfile.is_zipfile(file)
    try:
        with torch.serialization.safe_globals(stand_ins or []):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"pickled code ({found.group(1)})" if found else "pickled code or objects"
        raise ValueError(f"{file} holds {what}, not only tensors, and is not loaded.") from None
    except Exception as error:  # whatever a damaged pickle runs into
        raise ValueError(f"{file} is truncated or not a PyTorch file: {first_line(error)}") from None
