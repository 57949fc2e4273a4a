"""What `from_pretrained` does before and after transformers' own loading.

Stock folders go through transformers untouched, after their files were checked. Original state-spaces folders get their
configuration and names translated; DeepSpeed training folders are put together in memory. Every argument of
`from_pretrained` keeps its meaning.
"""

import inspect
import re
from pathlib import Path
from typing import Any

from transformers import GenerationConfig
from transformers.configuration_utils import PretrainedConfig
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, cached_file

from hf_mamba.family import Family
from hf_mamba.formats.folder import (
    ADAPTER_CONFIG,
    Tensors,
    backbone_names,
    check_counts,
    check_model_type,
    check_shapes,
    read_config,
    read_deepspeed,
    read_json,
    read_weights,
    refuse_other_paths,
    token_ids,
    weight_files,
)
from hf_mamba.formats.zero import find_step_folder

_DOWNLOAD = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")


def resolve(path: Any, kwargs: dict[str, Any], family: Family, incomplete: bool = False) -> tuple[Any, dict[str, Any]]:
    """Turn the arguments of `from_pretrained` into ones that transformers can serve.

    Args:
        path: a folder or a repository's name. kwargs: the keyword arguments. family: that of the class called.
        incomplete: the caller takes missing and unknown tensors, and is told of them.

    Raises:
        ValueError: for a checkpoint that is damaged, incomplete, unsafe or of another architecture; nothing was built.
    """
    kwargs = dict(kwargs)
    if path is None or kwargs.get("gguf_file") is not None:
        return path, _with_our_config(kwargs, family)
    raw = _json_file(path, CONFIG_NAME, kwargs)
    if raw is None:  # an adapter, which transformers loads; a configuration of the caller's; nothing
        folder = Path(path) / kwargs.get("subfolder", "")
        if folder.exists() and kwargs.get("config") is None and not (folder / ADAPTER_CONFIG).is_file():
            refuse_other_paths(folder)
        return path, _with_our_config(kwargs, family)
    where = f"{path}/{CONFIG_NAME}"
    original = family.original is not None and family.original.recognises(raw)
    if family.original is not None and original:
        ids = token_ids(_json_file(path, GENERATION_CONFIG_NAME, kwargs) or {})
        fields = family.original.config_from(raw, where) | ids
    else:
        check_model_type(raw, where, family)
        fields = raw
    # some stock folders have the original's names, too
    kwargs["key_mapping"] = _renamings(family) | (kwargs.get("key_mapping") or {})
    if kwargs.get("config") is None and (original or _is_training_folder(path, kwargs)):
        settable = {key: kwargs.pop(key) for key in list(kwargs) if _is_config_field(key, family)}
        kwargs["config"] = read_config(fields | settable, where, family)
    kwargs = _with_our_config(kwargs, family)
    if not Path(path).is_dir():
        return path, kwargs
    return _checked_folder(Path(path) / kwargs.get("subfolder", ""), path, fields, kwargs, family, incomplete)


def _checked_folder(
    folder: Path, path: Any, fields: dict[str, Any], kwargs: dict[str, Any], family: Family, incomplete: bool
) -> tuple[Any, dict]:
    """Check a local folder's weights by their headers; put a training folder together."""
    given = kwargs.get("config")
    ours = isinstance(given, family.config_class)
    files = weight_files(folder, kwargs.get("variant"), kwargs.get("use_safetensors"))
    if not ours:
        check_counts(fields, files or folder.rglob("*.pt"), str(folder / CONFIG_NAME))
    config = given if ours else read_config(fields, str(folder / CONFIG_NAME), family)
    if (folder / GENERATION_CONFIG_NAME).is_file():
        read_json(folder / GENERATION_CONFIG_NAME)  # transformers would stumble over what is none
    if files:
        quantised = hasattr(config, "quantization_config") or kwargs.get("quantization_config") is not None
        tensors = read_weights(files, family, quantised)
        if not quantised and not incomplete and not _is_mapped(kwargs, family):
            check_shapes(tensors.shapes, config, str(folder), family, complete=False)
        return path, kwargs
    step_folder = find_step_folder(folder)
    if step_folder is None:
        return path, kwargs
    tensors = read_deepspeed(step_folder)
    check_shapes(tensors.shapes, config, str(folder), family)
    return None, _in_memory(tensors, folder, kwargs)


def _in_memory(tensors: Tensors, folder: Path, kwargs: dict[str, Any]) -> dict[str, Any]:
    if (folder / GENERATION_CONFIG_NAME).is_file():
        kwargs.setdefault("generation_config", GenerationConfig.from_pretrained(folder))
    for name in (*_DOWNLOAD, "variant", "use_safetensors"):  # they choose files, which are chosen
        kwargs.pop(name, None)
    return kwargs | {"state_dict": {name: tensors.get(name) for name in tensors.shapes}}


def _renamings(family: Family) -> dict[str, str]:
    """Pattern of an original name -> transformers name, as `key_mapping` takes them."""
    return {f"^{re.escape(old)}": new for old, new in (family.original.names if family.original else {}).items()}


def _is_mapped(kwargs: dict[str, Any], family: Family) -> bool:
    return bool(set(kwargs.get("key_mapping") or {}) - set(_renamings(family)))


def _is_training_folder(path: Any, kwargs: dict[str, Any]) -> bool:
    folder = Path(path) / kwargs.get("subfolder", "")
    if not folder.is_dir() or weight_files(folder, kwargs.get("variant"), kwargs.get("use_safetensors")):
        return False
    return find_step_folder(folder) is not None


def _is_config_field(key: str, family: Family) -> bool:
    return key not in ("dtype", "torch_dtype") and key in inspect.signature(family.config_class).parameters


def _json_file(path: Any, name: str, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """A JSON file of a folder or repository, or None where there is none."""
    download = {key: kwargs[key] for key in _DOWNLOAD if kwargs.get(key) is not None}
    try:
        file = cached_file(path, name, **download)
    except (OSError, ValueError):
        return None
    return None if file is None else read_json(Path(file))


def _with_our_config(kwargs: dict[str, Any], family: Family) -> dict[str, Any]:
    config = kwargs.get("config")
    if isinstance(config, PretrainedConfig) and not isinstance(config, family.config_class):
        check_model_type(config.to_dict(), type(config).__name__, family)
        kwargs["config"] = family.config_class.from_dict(config.to_dict())
    return kwargs


def finish(model: Any, info: dict[str, Any], where: Any, family: Family, incomplete: bool = False) -> None:
    """After loading: refuse what transformers would have filled with random numbers.

    A head that a subclass adds may be missing: it is new. The backbone and the language-model head may not, unless
    the caller takes what is `incomplete`; transformers has warned of it.

    Raises:
        ValueError: naming the missing tensors.
    """
    own = (*backbone_names(family, model.config), family.head)
    missing = sorted(name for name in info["missing_keys"] if name.startswith(own))
    if missing and not incomplete:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise ValueError(
            f"{where} lacks {len(missing)} tensors of the model: {shown}. To begin with "
            "them drawn anew, write ignore_mismatched_sizes=True."
        )
    model.config.name_or_path = str(where or "")
