"""The model's configuration as plain fields, from a preset, a mapping or a model's folder, without importing torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_mamba.family import FAMILIES, family_of, family_of_original
from hf_mamba.files import load_config_json, read_small
from hf_mamba.findings import Findings
from hf_mamba.preflight.kinds import Count, KindError, check, show
from hf_mamba.preflight.settings import Settings


def _folder_config(name: str, out: Findings) -> dict[str, Any] | None:
    """config.json of a local folder, or of a model on the Hub (in the local cache, or downloaded)."""
    folder = Path(os.path.expanduser(name))
    file = folder / "config.json"
    try:
        if name and file.exists():
            data = load_config_json(read_small(file))
        elif folder.exists() or name.startswith((".", "/", "~")):
            out.problem(
                "model_name_or_path",
                show(name),
                "There is no config.json in it.",
                "Give a model's folder.",
                id="model-config-missing",
            )
            return None
        else:
            from huggingface_hub import hf_hub_download

            data = load_config_json(Path(hf_hub_download(name, "config.json")).read_text(encoding="utf-8"))
    except (ValueError, OSError, ImportError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        out.problem(
            "model_name_or_path",
            show(name),
            f"Its configuration cannot be read: {reason}",
            "Check the name.",
            id="model-config-unreadable",
        )
        return None
    if not isinstance(data, Mapping):
        out.problem(
            "model_name_or_path",
            show(name),
            "Its config.json is not a block.",
            "Give a model's folder.",
            id="model-config-is-no-block",
        )
        return None
    if "hidden_size" not in data and family_of_original({k: v for k, v in data.items() if k != "model_type"}):
        out.problem(
            "model_name_or_path",
            f"{show(name)} with d_model, n_layer",
            "It is in the original state-spaces format, whose keys transformers would ignore.",
            "Convert it first: `hf-mamba convert`.",
            id="model-in-original-format",
        )
        return None
    return dict(data)


def read_model(settings: Settings, out: Findings) -> dict[str, Any] | None:
    """Configuration fields, of which those that are missing have the family's defaults; None with a problem."""
    config: dict[str, Any] | None = None
    if isinstance(settings.get("model_config"), Mapping):
        config = dict(settings.get("model_config"))
        out.provenance["model_config"] = settings.source("model_config")
    elif settings.get("model_name_or_path") is not None:
        config = _folder_config(str(settings.get("model_name_or_path")), out)
        out.provenance["model_config"] = settings.source("model_name_or_path")
    elif settings.preset is not None:
        config = dict(settings.preset.config)
        out.provenance["model_config"] = f"preset {settings.preset.name}"
    if config is None:
        return None
    if config.get("model_type", "mamba") not in FAMILIES:
        known = " or ".join(f'"{name}"' for name in FAMILIES)
        key = "model_config" if isinstance(settings.get("model_config"), Mapping) else "model_name_or_path"
        out.problem(
            key,
            f"model_type {show(config['model_type'])}",
            "It is no Mamba.",
            f"Give a {known} model.",
            id="model-of-another-kind",
        )
        return None
    if settings.get("vocab_size"):
        config["vocab_size"] = settings.get("vocab_size")
        out.provenance["model_config.vocab_size"] = settings.source("vocab_size")
    return config if _sizes_are_numbers(config, out) else None


def _sizes_are_numbers(config: Mapping[str, Any], out: Findings) -> bool:
    ok = True
    family = family_of(config)
    for name, default in vars(family.geometry({})).items():
        value = config.get(name)
        if type(default) is not int or value is None or (name in family.auto_sizes and value == "auto"):
            continue
        try:
            check(Count, value)
        except KindError as expected:
            out.problem(
                name, show(value), "It is a size of the model.", f"Write {expected}.", id="model-size-of-the-wrong-kind"
            )
            ok = False
    return ok
