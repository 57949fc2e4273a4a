"""What a torch checkpoint says about itself, without loading a tensor or running its code.

A .pt file is a zip archive: its table of contents is at the end, so that a truncated file has none, and `data.pkl`
describes the content. It is unpickled here with stand-ins for every class, so that nothing in it is executed.
"""

from __future__ import annotations

import collections
import io
import json
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

MAX_HEADER = 100_000_000


class Tensor(NamedTuple):
    """A tensor's place in the description: its shape; its numbers stay on disk."""

    shape: tuple[int, ...]


class Unknown:
    """A stand-in for an object of the file's own classes; `state` is what it was made from."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.state: Any = args

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __call__(self, *args: Any, **kwargs: Any) -> Unknown:
        return Unknown(*args)

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass


def _tensor(storage: Any, offset: int, shape: tuple[int, ...], *rest: Any) -> Tensor:
    return Tensor(tuple(shape))


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if name in ("_rebuild_tensor_v2", "_rebuild_tensor"):
            return _tensor
        if name == "_rebuild_parameter":
            return lambda data, *rest: data
        return type(name, (Unknown,), {})

    def persistent_load(self, pid: Any) -> Any:
        return None


def read_header(path: Path) -> Any:
    """The description of a .pt file; ValueError where it is truncated or no such file."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [info for info in archive.infolist() if info.filename.endswith("data.pkl")]
            if not names or names[0].file_size > MAX_HEADER:
                raise ValueError("it has no description of its content")
            return _Reader(io.BytesIO(archive.read(names[0]))).load()
    except zipfile.BadZipFile:
        raise ValueError("it is truncated, or no torch file") from None
    except OSError as error:
        raise ValueError(f"it cannot be read: {error.strerror or error}") from None
    except ValueError:
        raise
    except Exception as error:  # whatever a damaged pickle runs into
        raise ValueError(f"its description is damaged ({type(error).__name__})") from None


def read_safetensors_header(path: Path) -> dict[str, Any]:
    """Tensor name -> {"dtype", "shape", "data_offsets"}; ValueError where the file is shorter than it says."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > MAX_HEADER:
                raise ValueError("it is no safetensors file")
            header = json.loads(file.read(length))
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        if path.stat().st_size != 8 + length + end:
            raise ValueError(f"it has {path.stat().st_size:,} bytes instead of {8 + length + end:,}")
    except OSError as error:
        raise ValueError(f"it cannot be read: {error.strerror or error}") from None
    except (struct.error, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        raise ValueError("it is truncated, or no safetensors file") from None
    header.pop("__metadata__", None)
    return header
