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

from hf_mamba.family import FAMILIES, Family, family_of_original, get_family, why_not
from hf_mamba.files import Unreadable, load_config_json, read_small
from hf_mamba.formats.pickles import load_inert
from hf_mamba.formats.zero import find_step_folder, read_zero

ADAPTER_CONFIG = "adapter_config.json"
_MAX_LISTED = 5
_MAX_JSON = 50_000_000  # bytes; the index of a sharded model has a name for each tensor
_SMALL = 1_000_000  # a count that costs nothing, whatever is there
_COUNTS = ("num_hidden_layers", "hidden_size", "vocab_size", "intermediate_size", "num_labels", "n_layer", "d_model")
_FEW_LAYERS = 1_000
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
    family: Family
    config: Any
    tensors: Tensors


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: where it is none.
    """
    try:
        found = load_config_json(read_small(file, _MAX_JSON))
    except Unreadable as error:
        raise ValueError(f"{file}: {error}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{file} is not valid JSON: it is nested too deeply.") from None
    except ValueError as error:  # a number of 10,000 digits
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} is not a JSON object.")
    return found


def check_model_type(config: Mapping[str, Any], where: str, family: Family) -> None:
    """Refuse a configuration of another architecture than the family's.

    Raises:
        ValueError: with the reason.
    """
    found = config.get("model_type")
    if found == family.model_type:
        return
    other = get_family(found) if isinstance(found, str) and found in FAMILIES else family_of_original(config)
    reason = f"Load it with {other.model.split(':')[1]}: it is no {family.title}." if other else why_not(found)
    raise ValueError(f"{where}: model_type is {found!r}, which hf_mamba cannot load. {reason}")


def token_ids(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """The token ids of a generation_config.json: an original configuration has none of its own."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: generation_config[name] for name in names if generation_config.get(name) is not None}


def read_config(fields: Mapping[str, Any], where: str, family: Family) -> Any:
    """The family's configuration of parsed fields.

    Raises:
        ValueError: where a field is of the wrong kind, or dtype none of torch's; transformers' own errors are others.
    """
    dtype = fields.get("dtype", fields.get("torch_dtype"))
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not isinstance(named, torch.dtype):
        raise ValueError(f"{where} is not a {family.title}'s configuration: dtype is {dtype!r}, which torch has not.")
    try:
        return family.config_class.from_dict(dict(fields))
    except (
        StrictDataclassError,
        AttributeError,
        TypeError,
        LookupError,
        ArithmeticError,
        RecursionError,
        MemoryError,
    ) as error:
        raise ValueError(f"{where} is not a {family.title}'s configuration: {' '.join(str(error).split())}") from None


def check_counts(fields: Mapping[str, Any], files: Iterable[Path], where: str) -> None:
    """Refuse numbers that the weights cannot hold, before anything of that size is built.

    Every layer, row, channel and label has a number of its own, of at least a byte; lists are made of some of them.

    Raises:
        ValueError: naming the field.
    """
    room = sum(file.stat().st_size for file in files)
    for name in _COUNTS:
        count = fields.get(name)
        if isinstance(count, (int, float)) and not 0 <= count <= max(room, _SMALL):  # NaN, too
            raise ValueError(f"{where}: {name} is {count:,}, and the weights have {room:,} bytes in all.")
    layers = next((n for n in map(fields.get, ("num_hidden_layers", "n_layer")) if isinstance(n, int)), 0)
    width = next((n for n in map(fields.get, ("hidden_size", "d_model")) if isinstance(n, int)), 1)
    if layers > _FEW_LAYERS and layers * width**2 > 8 * room:  # a layer has a matrix of this size, of a bit at least
        raise ValueError(
            f"{where}: num_hidden_layers is {layers:,} of hidden_size {width:,}, and the weights have {room:,} bytes."
        )


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
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{index} names {name!r}, which is not a file beside it; nothing was read.")
    names = list(dict.fromkeys(weight_map.values()))
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise ValueError(f"{index} names files that are not there: {_listed(absent)}.")
    return [index.parent / name for name in names]


def read_weights(files: Iterable[Path], family: Family, quantised: bool = False) -> Tensors:
    """Open weight files without reading their tensors. The original's names become transformers'.

    Args:
        quantised: transformers' quantiser will read them, so that integers and fp8 are weights, too.

    Raises:
        ValueError: for a file that is truncated, is not what its name says, or holds pickled code.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, torch.dtype] = {}
    readers: dict[str, Callable[[], Tensor]] = {}
    renamed = family.original.names if family.original else {}
    for file in files:
        _refuse_pointer(file)
        opened = _open_safetensors(file, quantised) if file.suffix == ".safetensors" else _open_pickle(file)
        for stored, (shape, dtype, read) in opened.items():
            name = renamed.get(stored, stored)
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


def _open_safetensors(file: Path, quantised: bool) -> dict[str, _Entry]:
    try:
        opened = safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is truncated or not a safetensors file: {error}") from None
    entries: dict[str, _Entry] = {}
    for name in opened.keys():  # noqa: SIM118 (not a mapping)
        part = opened.get_slice(name)
        dtype = _SAFETENSORS_DTYPES.get(part.get_dtype(), torch.uint8 if quantised else None)
        if dtype is None:
            raise ValueError(f"{file}: {name} has dtype {part.get_dtype()}, which is not a weight of a model.")
        entries[name] = tuple(part.get_shape()), dtype, lambda name=name: opened.get_tensor(name)  # type: ignore[misc]
    return entries


_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    # numbers, which transformers casts; in 8 bits they would be codes whose scales are elsewhere
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
}


def _open_pickle(file: Path) -> dict[str, _Entry]:
    state = load_inert(file)
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{file} is not a plain dictionary of tensors.")
    for name, tensor in state.items():
        if not isinstance(name, str):
            raise ValueError(f"{file} has a tensor named {name!r}, which is not text.")
        if reason := _not_a_weight(tensor):
            raise ValueError(f"{file}: {name} {reason}.")
    return {
        name: (tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor)  # type: ignore[misc]
        for name, tensor in state.items()
    }


def _not_a_weight(tensor: Tensor) -> str | None:
    if tensor.is_meta or tensor.is_quantized or tensor.is_nested or tensor.layout is not torch.strided:
        return "is not a plain tensor"
    if tensor.dtype not in _SAFETENSORS_DTYPES.values():
        return f"has dtype {tensor.dtype}, which is not a weight of a model"
    if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        return f"is {tuple(tensor.shape)} and has only {tensor.untyped_storage().nbytes():,} bytes"
    return None


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


def family_in(raw: Mapping[str, Any], where: str) -> Family:
    """The family that a parsed config.json belongs to, in its stock or its authors' own format.

    Raises:
        ValueError: none here has it.
    """
    if (original := family_of_original(raw)) is not None:
        return original
    found = raw.get("model_type")
    if not isinstance(found, str) or found not in FAMILIES:
        raise ValueError(f"{where}: model_type is {found!r}, which hf_mamba cannot load. {why_not(found)}")
    return get_family(found)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a local folder of any of the three kinds and check it whole: nothing missing, nothing of another shape.

    Raises:
        ValueError: naming what is wrong.
    """
    refuse_other_paths(folder)
    raw = read_json(folder / CONFIG_NAME)
    where = str(folder / CONFIG_NAME)
    family = family_in(raw, where)
    original = family.original if family.original is not None and family.original.recognises(raw) else None
    if original is not None:
        beside = folder / GENERATION_CONFIG_NAME
        ids = token_ids(read_json(beside)) if beside.is_file() else {}
        raw = original.config_from(raw, where) | ids
    files = weight_files(folder)
    check_counts(raw, files or folder.rglob("*.pt"), where)
    config = read_config(raw, where, family)
    if files:
        tensors = read_weights(files, family)
        kind = "transformers" if original is None else "state-spaces"
    else:
        step_folder = find_step_folder(folder)
        if step_folder is None:
            raise ValueError(f"{folder} holds no weights: no {SAFE_WEIGHTS_NAME}, {WEIGHTS_NAME} or DeepSpeed step.")
        tensors, kind = read_deepspeed(step_folder), "deepspeed"
    check_shapes(tensors.shapes, config, str(folder), family)
    return Checkpoint(kind, family, config, _with_prefix(tensors, family.prefix))


def _with_prefix(tensors: Tensors, prefix: str) -> Tensors:
    """The full model's names for a checkpoint of the bare model."""
    if any(name.startswith(prefix) for name in tensors.shapes):
        return tensors
    return Tensors(
        {prefix + name: shape for name, shape in tensors.shapes.items()},
        {prefix + name: dtype for name, dtype in tensors.dtypes.items()},
        lambda name: tensors.get(name.removeprefix(prefix)),
        tensors.mapped,
    )


def backbone_names(family: Family, config: Any) -> tuple[str, ...]:
    """What the names of the backbone's tensors begin with, in the full model and in the bare one."""
    inside = (row.name.removeprefix(family.prefix) for row in family.parameters(config) if row.name != family.head)
    return (family.prefix, *{name.split(".")[0] + ".": None for name in inside})


def check_shapes(
    found: dict[str, tuple[int, ...]], config: Any, where: str, family: Family, complete: bool = True
) -> None:
    """Compare names and shapes with those of the model that the configuration describes.

    Args:
        complete: also refuse missing tensors.

    Raises:
        ValueError: listing what is missing, of another shape, or inside the backbone and unknown.
    """
    rows = family.parameters(config)
    expected = {row.name: row.shape for row in rows}
    if found and not any(name.startswith(family.prefix) for name in found):  # saved from the bare model
        expected = {name.removeprefix(family.prefix): shape for name, shape in expected.items()}
    if found and not any(name in found for name in expected):
        norm = next(row.name for row in rows if row.layer == config.num_hidden_layers)
        raise ValueError(f"{where} holds no tensor of a {family.title}: {_foreign_names(found, norm, family.prefix)}")
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
    unknown = [name for name in found if name not in expected and name.startswith(backbone_names(family, config))]
    layers = 1 + max((int(number) for name in unknown for number in re.findall(r"\.(\d+)\.", name)[:1]), default=-1)
    if layers > config.num_hidden_layers:
        raise ValueError(
            f"{where} holds {layers} layers, and the configuration says num_hidden_layers {config.num_hidden_layers}. "
            "One of the two is another model's."
        )
    if unknown:
        raise ValueError(f"{where} holds tensors that a {family.title} does not have: {_listed(unknown)}.")


def _foreign_names(found: Iterable[str], final_norm: str, backbone: str) -> str:
    """What the names are, where none is expected; a wrapper's prefix is recognised by the final norm after it."""
    end = final_norm.removeprefix(backbone)
    norm = next((name for name in found if name.endswith(f".{end}")), None)
    if norm is None:
        return f"its names are such as {next(iter(found))!r}."
    prefix = norm.removesuffix(end).removesuffix(backbone)
    return (
        f"its names begin with {prefix!r}, as a wrapped model (torch.compile, DDP) writes them. Save the model inside "
        f"the wrapper, or load with key_mapping={{{'^' + re.escape(prefix)!r}: ''}}."
    )


def _listed(items: list[str], separator: str = ", ") -> str:
    more = f"{separator}and {len(items) - _MAX_LISTED} more" if len(items) > _MAX_LISTED else ""
    return separator.join(items[:_MAX_LISTED]) + more
