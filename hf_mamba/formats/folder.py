"""Checkpoint folders, opened lazily and checked before anything is built: files, names, shapes.

Nothing here runs code from a checkpoint: safetensors, or pickles by `weights_only=True`.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from hf_mamba.formats.pickles import load_inert
from hf_mamba.formats.zero import find_step_folder, read_zero
from hf_mamba.models.mamba import original as formats
from hf_mamba.models.mamba.configuration_mamba import MambaConfig

ADAPTER_CONFIG = "adapter_config.json"
_MAX_LISTED = 5
_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Tensors:
    """The tensors of a checkpoint by their transformers names; `get` gives one.

    `mapped` tells whether it then is a memory-mapped part of a file, which costs no memory of its own.
    """

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    get: Callable[[str], Tensor]
    mapped: bool = True

    def size(self, name: str) -> int:
        """Bytes of one tensor."""
        return torch.Size(self.shapes[name]).numel() * self.dtypes[name].itemsize


@dataclass(frozen=True)
class Checkpoint:
    """An opened folder. `kind` is "transformers", "state-spaces" or "deepspeed"."""

    kind: str
    config: MambaConfig
    tensors: Tensors


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: where it is none.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} is not a JSON object.")
    return found


def read_config(fields: Mapping[str, Any], where: str) -> MambaConfig:
    """The MambaConfig of parsed fields.

    Raises:
        ValueError: where a field is of the wrong kind, or dtype none of torch's; transformers' own errors are others.
    """
    try:
        return MambaConfig.from_dict(dict(fields))
    except (StrictDataclassError, AttributeError) as error:
        raise ValueError(f"{where} is not a Mamba's configuration: {' '.join(str(error).split())}") from None


def weight_files(folder: Path, variant: str | None = None, safetensors: bool | None = None) -> list[Path]:
    """The files with weights of a folder, in transformers' order of preference; empty when there are none.

    Args:
        variant, safetensors: `from_pretrained`'s `variant` and `use_safetensors`.

    Raises:
        ValueError: for an index that names an absent file or a path outside the folder.
    """
    names = [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME] if safetensors is not False else []
    names += [WEIGHTS_NAME, WEIGHTS_INDEX_NAME] if not safetensors else []
    for name in names:
        stem, ending = name.rsplit(".", 1)
        file = folder / (name if variant is None else f"{stem}.{variant}.{ending}")
        if file.is_file():
            return _shards(file) if ending == "json" else [file]
    return []


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map.")
    names = list(dict.fromkeys(weight_map.values()))
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{index} names {name!r}, which is not a file beside it; nothing was read.")
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise ValueError(f"{index} names files that are not there: {_listed(absent)}.")
    return [index.parent / name for name in names]


def read_weights(files: Iterable[Path]) -> Tensors:
    """Open weight files without reading their tensors. Names become transformers'.

    Raises:
        ValueError: for a file that is truncated, is not what its name says, or holds pickled code.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, torch.dtype] = {}
    readers: dict[str, Callable[[], Tensor]] = {}
    for file in files:
        _refuse_pointer(file)
        opened = _open_safetensors(file) if file.suffix == ".safetensors" else _open_pickle(file)
        for stored, (shape, dtype, read) in opened.items():
            name = formats.to_stock_name(stored)
            if name in shapes:
                raise ValueError(f"{file} holds {name} a second time.")
            shapes[name], dtypes[name], readers[name] = shape, dtype, read
    return Tensors(shapes, dtypes, lambda name: readers[name]())


def _refuse_pointer(file: Path) -> None:
    with file.open("rb") as start:
        if start.read(len(_POINTER)) == _POINTER:
            raise ValueError(
                f"{file} is a Git LFS pointer, not the weights: the repository was cloned without them. "
                "Run `git lfs pull` in it, or fetch it with `hf download`."
            )


_Entry = tuple[tuple[int, ...], torch.dtype, Callable[[], Tensor]]


def _open_safetensors(file: Path) -> dict[str, _Entry]:
    try:
        opened = safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is truncated or not a safetensors file: {error}") from None
    entries: dict[str, _Entry] = {}
    for name in opened.keys():  # noqa: SIM118 (not a mapping)
        part = opened.get_slice(name)
        dtype = _SAFETENSORS_DTYPES.get(part.get_dtype())
        if dtype is None:
            raise ValueError(f"{file}: {name} has dtype {part.get_dtype()}, which is not a weight of a Mamba.")
        entries[name] = tuple(part.get_shape()), dtype, lambda name=name: opened.get_tensor(name)  # type: ignore[misc]
    return entries


_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def _open_pickle(file: Path) -> dict[str, _Entry]:
    state = load_inert(file)
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{file} is not a plain dictionary of tensors.")
    return {
        name: (tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor)  # type: ignore[misc]
        for name, tensor in state.items()
    }


def read_deepspeed(step_folder: Path) -> Tensors:
    """The fp32 parameters of one step of a ZeRO training folder; a tied head is left out."""
    shapes, get = read_zero(step_folder)
    dtypes = dict.fromkeys(shapes, torch.float32)
    return Tensors({name: tuple(shape) for name, shape in shapes.items()}, dtypes, get, mapped=False)


def refuse_other_paths(path: Path) -> None:
    """Refuse what is not the folder of a model, and say what it is where that is known.

    Raises:
        ValueError: where there is no config.json in it.
    """
    if (path / CONFIG_NAME).is_file():
        return
    if path.is_file():
        raise ValueError(f"{path} is a file. Write its folder, which holds {CONFIG_NAME}, too: {path.parent}")
    if (path / ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"{path} holds an adapter, not a model: load it with peft's AutoPeftModelForCausalLM, and write "
            "model.merge_and_unload().save_pretrained(FOLDER)."
        )
    inside = path / "model"  # where a run keeps it
    hint = f" Write {inside}" if (inside / CONFIG_NAME).is_file() else ""
    raise ValueError(f"{path} has no {CONFIG_NAME}: it is not a model's folder.{hint}")


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a local folder of any of the three kinds and check it whole: nothing missing, nothing of another shape.

    Raises:
        ValueError: naming what is wrong.
    """
    refuse_other_paths(folder)
    raw = read_json(folder / CONFIG_NAME)
    original = formats.is_original(raw)
    if original:
        beside = folder / GENERATION_CONFIG_NAME
        ids = formats.token_ids(read_json(beside)) if beside.is_file() else {}
        raw = formats.config_from_original(raw, str(folder / CONFIG_NAME)) | ids
    else:
        formats.check_model_type(raw, str(folder / CONFIG_NAME))
    config = read_config(raw, str(folder / CONFIG_NAME))
    files = weight_files(folder)
    if files:
        tensors = read_weights(files)
        kind = "state-spaces" if original else "transformers"
    else:
        step_folder = find_step_folder(folder)
        if step_folder is None:
            raise ValueError(f"{folder} holds no weights: no {SAFE_WEIGHTS_NAME}, {WEIGHTS_NAME} or DeepSpeed step.")
        tensors, kind = read_deepspeed(step_folder), "deepspeed"
    check_shapes(tensors.shapes, config, str(folder))
    return Checkpoint(kind, config, _with_prefix(tensors))


def _with_prefix(tensors: Tensors) -> Tensors:
    """The full model's names for a checkpoint of the bare MambaModel."""
    if any(name.startswith("backbone.") for name in tensors.shapes):
        return tensors
    return Tensors(
        {f"backbone.{name}": shape for name, shape in tensors.shapes.items()},
        {f"backbone.{name}": dtype for name, dtype in tensors.dtypes.items()},
        lambda name: tensors.get(name.removeprefix("backbone.")),
        tensors.mapped,
    )


def check_shapes(found: dict[str, tuple[int, ...]], config: MambaConfig, where: str, complete: bool = True) -> None:
    """Compare names and shapes with those of the model that the configuration describes.

    Args:
        complete: also refuse missing tensors.

    Raises:
        ValueError: listing what is missing, of another shape, or inside the backbone and unknown.
    """
    expected = formats.tensor_shapes(config)
    if found and not any(name.startswith("backbone.") for name in found):  # saved from the bare MambaModel
        expected = {name.removeprefix("backbone."): shape for name, shape in expected.items()}
    if found and not any(name in found for name in expected):
        raise ValueError(f"{where} holds no tensor of a Mamba: {_foreign_names(found)}")
    wrong = [
        f"{name} is {tuple(found[name])}, the configuration says {shape}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != shape
    ]
    if wrong:
        raise ValueError(f"{where} holds tensors of another shape: {_listed(wrong, '; ')}.")
    missing = [name for name in expected if name not in found]
    if missing and complete:
        raise ValueError(f"{where} lacks {len(missing)} of {len(expected)} tensors: {_listed(missing)}.")
    unknown = [name for name in found if name not in expected and name.startswith(("backbone.", "layers."))]
    layers = 1 + max((int(number) for name in unknown for number in re.findall(r"layers\.(\d+)\.", name)), default=-1)
    if layers > config.num_hidden_layers:
        raise ValueError(
            f"{where} holds {layers} layers, and the configuration says num_hidden_layers {config.num_hidden_layers}. "
            "One of the two is another model's."
        )
    if unknown:
        raise ValueError(f"{where} holds tensors that a Mamba-1 does not have: {_listed(unknown)}.")


def _foreign_names(found: Iterable[str]) -> str:
    """What the names are, where none is expected; a wrapper's prefix is recognised by the final norm after it."""
    end = "norm_f.weight"
    norm = next((name for name in found if name.endswith(f".{end}")), None)
    if norm is None:
        return f"its names are such as {next(iter(found))!r}."
    prefix = norm.removesuffix(end).removesuffix("backbone.")
    return (
        f"its names begin with {prefix!r}, as a wrapped model (torch.compile, DDP) writes them. Save the model inside "
        f"the wrapper, or load with key_mapping={{{'^' + re.escape(prefix)!r}: ''}}."
    )


def _listed(items: list[str], separator: str = ", ") -> str:
    more = f"{separator}and {len(items) - _MAX_LISTED} more" if len(items) > _MAX_LISTED else ""
    return separator.join(items[:_MAX_LISTED]) + more
