"""The model's configuration as plain fields, from a preset, a mapping or a model's folder, without importing torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_mamba.data.tokenizer_files import rows_to_train, token_ids
from hf_mamba.family import FAMILIES, family_of, family_of_original
from hf_mamba.files import load_config_json, read_small
from hf_mamba.findings import Findings, first_line
from hf_mamba.preflight.kinds import Count, KindError, check, near, show
from hf_mamba.preflight.settings import MODELS, Settings

_WEIGHTS = ("*.safetensors", "*.bin", "latest")  # a DeepSpeed checkpoint's are under `latest`


def _folder_config(key: str, name: str, out: Findings) -> dict[str, Any] | None:
    """config.json of a local folder, or of a model on the Hub (in the local cache, or downloaded).

    `key` is the argument that names it; only a folder of --model_name_or_path must hold weights, and only --config_name
    may name the file itself.
    """
    folder = Path(os.path.expanduser(name))
    file = folder if key == "config_name" and folder.is_file() else folder / "config.json"
    try:
        if name and file.exists():
            data = load_config_json(read_small(file))
        elif folder.exists() or name.startswith((".", "/", "~")):
            out.problem(
                key,
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
        out.problem(
            key,
            show(name),
            f"Its configuration cannot be read: {first_line(error)}",
            "Check the name.",
            id="model-config-unreadable",
        )
        return None
    if not isinstance(data, Mapping):
        out.problem(
            key,
            show(name),
            "Its config.json is not a block.",
            "Give a model's folder.",
            id="model-config-is-no-block",
        )
        return None
    if "hidden_size" not in data and family_of_original({k: v for k, v in data.items() if k != "model_type"}):
        out.problem(
            key,
            f"{show(name)} with d_model, n_layer",
            "It is in the original state-spaces format, whose keys transformers would ignore.",
            "Convert it first: `hf-mamba convert`.",
            id="model-in-original-format",
        )
        return None
    if (
        key == "model_name_or_path"
        and folder.is_dir()
        and not any(file for pattern in _WEIGHTS for file in folder.glob(pattern))
    ):
        out.problem(
            key,
            show(name),
            "It holds a config.json and no weights.",
            f"Write --config_name {name} for fresh weights of this configuration.",
            id="model-without-weights",
        )
        return None
    return dict(data)


def own_model(settings: Settings) -> bool:
    """Whether the model is not a preset's as it stands."""
    return any(settings.get(name) is not None for name in (*MODELS, "config_overrides"))


def read_model(settings: Settings, out: Findings) -> dict[str, Any] | None:
    """Configuration fields, of which those that are missing have the family's defaults; None with a problem."""
    written = [name for name in MODELS if settings.get(name) is not None]
    key = written[0] if written else "preset"
    if len(written) > 1:
        out.problem(
            key,
            " and ".join(f"{settings.key(name)} ({settings.source(name)})" for name in written),
            "Each describes the model.",
            "Keep one: --model_name_or_path to go on from weights, --config_name for fresh ones.",
            id="two-models",
        )
    config: dict[str, Any] | None = None
    if key == "model_config":
        config = dict(settings.get(key))
    elif written:
        config = _folder_config(key, str(settings.get(key)), out)
    elif settings.preset is not None:
        config = dict(settings.preset.config)
    if config is None:
        return None
    preset = settings.preset.name if settings.preset else ""
    out.provenance["model_config"] = settings.source(key) if written else f"preset {preset}"
    if written and preset:
        out.note(f"The model is that of {settings.source(key)}; the preset {preset} gives its training numbers.")
    if config.get("model_type", "mamba") not in FAMILIES:
        known = " or ".join(f'"{name}"' for name in FAMILIES)
        out.problem(
            key,
            f"model_type {show(config['model_type'])}",
            "It is no Mamba.",
            f"Give a {known} model.",
            id="model-of-another-kind",
        )
        return None
    if settings.get("config_overrides") is not None:
        _override(config, key, settings, out)
    if key == "model_name_or_path":
        _rows_of_tokenizer(config, settings, out)
    elif settings.get("vocab_size"):
        config["vocab_size"] = settings.get("vocab_size")
        out.provenance["model_config.vocab_size"] = settings.source("vocab_size")
    return config if _sizes_are_numbers(config, out) and _sizes_agree(config, out) else None


def _sizes_agree(config: Mapping[str, Any], out: Findings) -> bool:
    """Whether the family can make a geometry of them; it names those that contradict each other."""
    try:
        family_of(config).geometry(config)
    except ValueError as error:
        fix = "Write sizes that agree."
        out.problem("model_config", "sizes that disagree", str(error), fix, id="model-sizes-disagree")
        return False
    return True


def _rows_of_tokenizer(config: dict[str, Any], settings: Settings, out: Findings) -> None:
    """Set the rows that the model will train with: its own, what the tokenizer needs, or more by --vocab_size."""
    name = str(settings.get("model_name_or_path"))
    tokenizer = settings.get("tokenizer_name") or name
    rows = config.get("vocab_size") or family_of(config).geometry({}).vocab_size
    if not isinstance(rows, int):
        return  # named with the other sizes
    new, wanted = token_ids(str(tokenizer)), settings.get("vocab_size")
    needed = rows if new is None else rows_to_train(token_ids(name), new, rows)
    if wanted and wanted < needed:
        why = f"The model has {rows:,} rows" + (f", and {tokenizer} has {len(new):,} tokens." if new else ".")
        fix = f"Write {needed} or more, or remove it."
        found = f"{wanted} ({settings.source('vocab_size')})"
        out.problem(settings.key("vocab_size"), found, why, fix, id="vocabulary-too-small")
    config["vocab_size"] = wanted or needed
    if config["vocab_size"] != rows:
        because = settings.source("vocab_size") if wanted else f"the {len(new or ()):,} tokens of {tokenizer}"
        out.note(f"The vocabulary of {name} goes from {rows:,} to {config['vocab_size']:,} rows, for {because}.")
        out.provenance["model_config.vocab_size"] = because


def _override(config: dict[str, Any], key: str, settings: Settings, out: Findings) -> None:
    """Change the fields that --config_overrides names; what it cannot change is a problem."""
    found = f"{show(settings.get('config_overrides'))} ({settings.source('config_overrides')})"
    if key == "model_name_or_path":
        why = "The weights have the sizes that their own configuration says."
        fix = f"Write --config_name {settings.get(key)} for fresh weights of another size, or remove it."
        out.problem("config_overrides", found, why, fix, id="overrides-beside-weights")
        return
    known = family_of(config).config_class().to_dict() | config
    for name, value in _fields(settings.get("config_overrides"), found, out).items():
        default = known.get(name)
        if name not in known:
            fix = f"Did you mean {guess}?" if (guess := near(name, known)) else "Remove it."
            out.problem(
                "config_overrides", f"{name} in {found}", "The model has no such field.", fix, id="unknown-field"
            )
        elif isinstance(default, bool) is not isinstance(value, bool) and default is not None:
            fix = f"Write a value such as {show(default)}."
            out.problem(
                "config_overrides", f"{name}={show(value)}", "It is of another kind.", fix, id="field-of-the-wrong-kind"
            )
        else:
            config[name] = value
            out.provenance[f"model_config.{name}"] = settings.source("config_overrides")


def _fields(written: Any, found: str, out: Findings) -> dict[str, Any]:
    """The fields of a block, or of "name=value,name=value", each value as JSON where it is JSON."""
    if isinstance(written, Mapping):
        return {str(name): value for name, value in written.items()}
    fields = {}
    for part in str(written).split(","):
        name, equals, text = part.partition("=")
        if not equals or not name.strip():
            why, fix = f"{show(part)} is no name=value.", "Write name=value, several with commas."
            out.problem("config_overrides", found, why, fix, id="overrides-unreadable")
            return {}
        try:
            fields[name.strip()] = json.loads(text)
        except ValueError:
            fields[name.strip()] = text.strip()
    return fields


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


def begun_without_recipe(before: Mapping[str, Any]) -> bool:
    """Whether a run goes on that an earlier version began with transformers' own numbers, since no preset gave any."""
    sources = before.get("provenance") if before.get("preset") is None else None
    return isinstance(sources, Mapping) and not any("presets (" in str(source) for source in sources.values())
