"""Reading what a user wrote: a DeepSpeed configuration as a file, a dictionary, a JSON text or its base64.

DeepSpeed's reader is hjson (comments, trailing commas, keys without quotation marks) and refuses duplicate keys;
Trainer's is JSON, and keeps the last of them without a word. Every form that one of them reads is read here, because
DeepSpeed gets the resolved configuration and never the file; duplicates are named.
"""

from __future__ import annotations

import base64
import binascii
import copy
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hf_mamba.files import Unreadable, load_yaml, read_small, too_large
from hf_mamba.findings import Findings
from hf_mamba.preflight.arguments import OURS, TRAINER_KINDS
from hf_mamba.preflight.deepspeed.inert import is_commentary, leave_out
from hf_mamba.preflight.deepspeed.keys import KINDS
from hf_mamba.preflight.kinds import show

_STRINGS_AND_REMARKS = re.compile(r'("(?:\\.|[^"\\\n])*")|//[^\n]*|/\*.*?\*/|#[^\n]*', re.DOTALL)
_LAST_COMMA = re.compile(r'("(?:\\.|[^"\\\n])*")|,(?=\s*[}\]])')
# What a DeepSpeed file is known by; a trainer's own file has gradient_accumulation_steps, too.
_OWN = frozenset(key for key in KINDS if "." not in key and key != "gradient_accumulation_steps") | {
    "optimizer", "scheduler", "bfloat16", "activation_checkpointing", "autotuning", "data_efficiency", "elasticity",
    "sparse_attention", "curriculum_learning", "compression_training", "amp", "cpu_offload", "offload_optimizer",
    "offload_param", "zero_optimisation", "pipeline", "nebula",
}  # fmt: skip

# What a run's own YAML file is known by.
_OF_A_RUN = (OURS | TRAINER_KINDS.keys() | {"output_dir", "model_name_or_path"}) - _OWN - KINDS.keys()

_KNOWN = frozenset(key.rpartition(".")[2] for key in KINDS) | {"optimizer", "scheduler", "type", "params"}


class _Reader:
    """Collects duplicate keys while json parses."""

    def __init__(self) -> None:
        self.duplicates: list[str] = []

    def pairs(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        block: dict[str, Any] = {}
        for key, value in pairs:
            if key in block:
                self.duplicates.append(key)
            block[key] = value
        return block

    def json(self, text: str) -> Any:
        return json.loads(text, object_pairs_hook=self.pairs)

    def relaxed(self, text: str) -> Any:
        """JSON with remarks and with commas before a closing bracket."""
        text = _STRINGS_AND_REMARKS.sub(lambda match: match[1] or " ", text)
        return self.json(_LAST_COMMA.sub(lambda match: match[1] or "", text))

    def hjson(self, text: str) -> Any:
        import hjson

        return hjson.loads(text, object_pairs_hook=self.pairs)


def _plain_reason(text: str, where: str) -> tuple[str, str, str] | None:
    """(found, why, fix) for a text that is plainly something else."""
    if not text.strip():
        return where, "The file is empty.", 'Write a block, for example {"zero_optimization": {"stage": 2}}.'
    if text.startswith("version https://git-lfs"):
        return where, "It is a Git LFS pointer, in place of the file.", "Run git lfs pull."
    if "\0" in text:
        return where, "It holds a character that is not text.", "Give a DeepSpeed JSON file."
    if text.lstrip()[:1] == "<":
        return where, "It is a web page.", "Download the file itself (the raw one)."
    return None


def parse(text: str, where: str, out: Findings) -> Any:
    """The value of a text in JSON, JSON with remarks, hjson or YAML; None with a problem that names the line."""
    if reason := _plain_reason(text, where):
        out.problem("deepspeed", *reason, id="file-of-another-kind")
        return None
    reader, first = _Reader(), None
    others: tuple[Callable[[str], Any], ...] = (reader.relaxed, lambda text: load_yaml(text)[0], reader.hjson)
    for way in (reader.json, *others):
        reader.duplicates.clear()
        try:
            data = way(text)
        except RecursionError:
            fix = "Remove the extra levels."
            out.problem("deepspeed", where, "It is nested too deeply to be a configuration.", fix, id="file-too-deep")
            return None
        except (ValueError, ImportError) as error:
            first = first or error
            continue
        own = isinstance(data, Mapping) and (_OWN & {str(key) for key in data} or is_a_run(data))
        if first is not None and not own:
            continue  # hjson and YAML make something of nearly every text
        for key in dict.fromkeys(reader.duplicates):
            why = "DeepSpeed refuses duplicates; Trainer silently keeps the last."
            found = f'"{key}" more than once in one block of {where}{_lines(text, key)}'
            out.problem(_place(data, key), found, why, "Keep one of them.", id="duplicate-key")
        return data
    _not_json(text, where, first, out)
    return None


def _place(data: Any, key: str) -> str:
    """The dotted name of a key, where the file has it in one block only."""
    blocks: list[tuple[str, Any]] = [("", data)]
    found = []
    for prefix, block in blocks:
        for name, value in block.items() if isinstance(block, Mapping) else ():
            if name == key:
                found.append(f"{prefix}{name}")
            blocks.append((f"{prefix}{name}.", value))
    return found[0] if len(found) == 1 else key


def _lines(text: str, key: str) -> str:
    """Where a key stands, for the message."""
    lines = [number for number, line in enumerate(text.splitlines(), 1) if f'"{key}"' in line]
    return f", lines {', '.join(map(str, lines[:10]))}" if len(lines) > 1 else ""


def _not_json(text: str, where: str, error: Exception | None, out: Findings) -> None:
    if not isinstance(error, json.JSONDecodeError):  # an integer with more digits than Python converts
        out.problem("deepspeed", where, f"It cannot be read: {error}.", "Correct the number.", id="file-not-json")
        return
    lines = text.splitlines()
    line = lines[error.lineno - 1].strip() if error.lineno <= len(lines) else ""
    found = f"{where}, line {error.lineno}: {line[:60]}"
    out.problem("deepspeed", found, f"It is not JSON: {error.msg}.", "Correct the line.", id="file-not-json")


def _tidy(block: Mapping[Any, Any], prefix: str, out: Findings) -> dict[str, Any]:
    """Leave nulls and remarks out; name what is not finite, or no key."""
    tidy: dict[str, Any] = {}
    for key, value in block.items():
        path = f"{prefix}{key}"
        if not isinstance(key, str):
            out.problem(path, show(key), "A key must be a string.", f'Write "{key}".', id="key-is-no-text")
        elif is_commentary(key):
            leave_out(out, path, "a remark")
        elif "." in key or key != key.strip() or not key:
            _bad_key(path, key, value, out)
        elif value is None:
            leave_out(out, path, "null means not set")
        elif isinstance(value, float) and not math.isfinite(value) and path != "steps_per_print":
            why, fix = "It is not a finite number.", "Write a finite number, or remove the key."
            out.problem(path, repr(value), why, fix, id="number-not-finite")
        else:
            tidy[key] = _tidy(value, f"{path}.", out) if isinstance(value, Mapping) else value
    return tidy


def _bad_key(path: str, key: str, value: Any, out: Findings) -> None:
    if "." not in key:
        fix = f"Write {show(key.strip())}." if key.strip() in _KNOWN else "Remove it."
        why = "A key neither begins nor ends in a blank." if key else "A key is empty."
        out.problem(show(path), show(value), why, fix, id="key-with-blanks")
        return
    *parents, last = key.split(".")
    nested = f'"{last}": {show(value)}'
    for parent in reversed(parents):
        nested = f'"{parent}": {{{nested}}}'
    out.problem(
        path, show(value), "A key has no dots: DeepSpeed does not know it.", f"Write {nested}.", id="key-with-dots"
    )


def _from_base64(text: str) -> str | None:
    """The JSON behind accelerate's base64; None where it is no such text."""
    if os.path.exists(text) or not re.fullmatch(r"[A-Za-z0-9+/_=-]{8,}", text):
        return None
    try:
        decoded = base64.b64decode(text.replace("-", "+").replace("_", "/"), validate=True).decode("utf-8")
    except (binascii.Error, UnicodeDecodeError):
        return None
    return decoded if decoded.lstrip().startswith("{") else None


def _content(text: str, out: Findings) -> tuple[str | None, str]:
    """(the text of the configuration, its name in messages)"""
    if text.lstrip().startswith("{"):
        return text, "the deepspeed JSON"
    try:
        decoded = _from_base64(text)
    except ValueError:  # a null byte in the name
        decoded = None
    if decoded is not None:
        return decoded, "the deepspeed JSON"
    if re.match(r"https?://", text):
        why, fix = "It is an address, not a file.", "Download the file first."
        out.problem("deepspeed", text, why, fix, id="file-unreadable")
        return None, text
    try:
        return read_small(text), text
    except Unreadable as error:
        fix = "Give the path of a DeepSpeed JSON file, for example ds_configs/zero2.json."
        out.problem("deepspeed", show(text, 200).strip('"'), f"{error}", fix, id="file-unreadable")
        return None, text


def read_deepspeed(value: Any, out: Findings) -> tuple[dict[str, Any] | None, str]:
    """A private copy of the configuration in `value`, and the name it goes by in messages.

    Args:
        value: None, a mapping, a path, a JSON text, or its base64.

    Returns:
        (configuration, name); the configuration is None where there is none or it cannot be read (then named).
    """
    if value is None or value == "":
        return None, ""
    data: Any
    if isinstance(value, Mapping):
        name, data = "the deepspeed dictionary", dict(value)
    elif isinstance(value, str | Path):
        content, name = _content(str(value), out)
        before = len(out.problems)
        data = None if content is None else parse(content, name, out)
        if data is None:
            if content is not None and len(out.problems) == before:
                fix = "Write a block {...}."
                out.problem("deepspeed", "null", "The file holds no configuration.", fix, id="file-is-empty")
            return None, name
    else:
        why, fix = "It is neither a path nor a dictionary.", "Give a path or a dictionary."
        out.problem("deepspeed", show(value), why, fix, id="deepspeed-is-no-path")
        return None, ""
    if not _is_one(data, name, out):
        return None, name
    return _tidy(copy.deepcopy(dict(data)), "", out), name


def is_a_run(data: Mapping[Any, Any]) -> bool:
    """Whether a file holds the arguments of a run: such names, and none of DeepSpeed's that an argument has not."""
    own = {key: value for key, value in data.items() if key in _OWN}
    alike = all(key in TRAINER_KINDS and not isinstance(value, Mapping) for key, value in own.items())
    return alike and any(key in _OF_A_RUN for key in data)


def _foreign(data: Mapping[Any, Any]) -> bool:
    """Whether a file has a key that is neither DeepSpeed's nor a remark."""
    return any(str(key) not in KINDS and not is_commentary(str(key)) for key in data)


def _is_one(data: Any, name: str, out: Findings) -> bool:
    """Whether the value is a DeepSpeed configuration at all; one problem where it is not."""
    if not isinstance(data, Mapping):
        why, fix = "A configuration is a block {...}.", "Write a block."
        out.problem("deepspeed", f"{show(data)} in {name}", why, fix, id="file-is-no-block")
    elif not data:
        why = "Trainer takes an empty configuration for none, and would run without DeepSpeed."
        fix = 'Write at least {"zero_optimization": {"stage": 0}}.'
        out.problem("deepspeed", f"{{}} in {name}", why, fix, id="file-is-empty")
    elif reason := too_large(data):
        out.problem("deepspeed", name, reason, "Give a DeepSpeed file.", id="file-too-deep")
    elif is_a_run(data) or (not _OWN & {str(key).strip().lower().partition(".")[0] for key in data} and _foreign(data)):
        keys = ", ".join(show(str(key), 20) for key in list(data)[:5])
        run = is_a_run(data)
        fix = "Give the arguments of a run with --config, and a DeepSpeed file here." if run else "Give another file."
        why = "It is no DeepSpeed configuration: not one of its keys is DeepSpeed's."
        out.problem("deepspeed", f"{name} with {keys}", why, fix, id="no-deepspeed-file")
    else:
        return True
    return False
