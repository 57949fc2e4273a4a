"""Reading what a user wrote: a DeepSpeed configuration as a file, a dictionary or a JSON string.

DeepSpeed's reader takes comments and refuses duplicate keys, Trainer's takes duplicates (the last wins) and refuses
comments: a file is good only if both agree on it, so it is read strictly here.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_mamba.findings import Findings
from hf_mamba.preflight.kinds import show

MAX_BYTES = 1_000_000
MAX_DEPTH = 20


class _Reader:
    """Collects duplicate keys and non-finite numbers while json parses."""

    def __init__(self) -> None:
        self.duplicates: list[str] = []
        self.constants: list[str] = []

    def pairs(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        block: dict[str, Any] = {}
        for key, value in pairs:
            if key in block:
                self.duplicates.append(key)
            block[key] = value
        return block

    def constant(self, name: str) -> float:
        self.constants.append(name)
        return float(name)


def parse_json(text: str, where: str, out: Findings) -> Any:
    """The value of a JSON text, or None with a problem that names the line."""
    reader = _Reader()
    try:
        data = json.loads(text, object_pairs_hook=reader.pairs, parse_constant=reader.constant)
    except json.JSONDecodeError as error:
        lines = text.splitlines()
        line = lines[error.lineno - 1].strip() if error.lineno <= len(lines) else ""
        before = text[: error.pos].rstrip()
        why, fix = f"It is not JSON: {error.msg}.", "Correct the line."
        if line.startswith(("//", "#", "/*")) or "//" in line or "/*" in line:
            why, fix = "JSON has no comments: DeepSpeed reads them, Trainer does not.", "Remove the comment."
        elif before.endswith(",") and text[error.pos : error.pos + 1] in ("}", "]", ""):
            why, fix = "A comma before a closing bracket: DeepSpeed reads it, Trainer does not.", "Remove the comma."
        out.problem("deepspeed", f"{where}, line {error.lineno}: {line[:60]}", why, fix, id="file-not-json")
        return None
    except RecursionError:
        out.problem(
            "deepspeed",
            where,
            "It is nested too deeply to be a configuration.",
            "Remove the extra levels.",
            id="file-too-deep",
        )
        return None
    except ValueError as error:  # an integer with more digits than Python converts
        out.problem(
            "deepspeed", where, f"It cannot be read: {error}.", "Correct the number.", id="file-number-too-long"
        )
        return None
    for key in dict.fromkeys(reader.duplicates):
        out.problem(
            key,
            f'"{key}" more than once in one block of {where}',
            "DeepSpeed refuses duplicates; Trainer silently keeps the last.",
            "Keep one of them.",
            id="duplicate-key",
        )
    return data


def _depth(value: Any) -> int:
    """Nesting depth, counted without recursion."""
    deepest, stack = 0, [(value, 1)]
    while stack:
        node, level = stack.pop()
        deepest = max(deepest, level)
        if level > MAX_DEPTH:
            break
        children = node.values() if isinstance(node, Mapping) else node if isinstance(node, list | tuple) else ()
        stack += [(child, level + 1) for child in children]
    return deepest


def _tidy(block: Mapping[Any, Any], prefix: str, out: Findings) -> dict[str, Any]:
    """Drop nulls, name what is not finite or not a string key."""
    tidy: dict[str, Any] = {}
    for key, value in block.items():
        path = f"{prefix}{key}"
        if not isinstance(key, str):
            out.problem(path, show(key), "A key must be a string.", f'Write "{key}".', id="key-is-no-text")
        elif value is None:
            out.migrated(f"{path}: null", "(dropped)", "null means not set", id="null-means-not-set")
        elif isinstance(value, float) and not math.isfinite(value) and path != "steps_per_print":
            out.problem(
                path,
                repr(value),
                "It is not a finite number.",
                "Write a finite number, or remove the key.",
                id="number-not-finite",
            )
        else:
            tidy[key] = _tidy(value, f"{path}.", out) if isinstance(value, Mapping) else value
    return tidy


def _read_file(path: Path, out: Findings) -> str | None:
    why, fix = "", ""
    try:
        if not path.exists():
            why, fix = (
                "There is no such file.",
                "Give the path of a DeepSpeed JSON file, for example ds_configs/zero2.json.",
            )
        elif not path.is_file():
            why, fix = "It is not a file.", "Give the path of a DeepSpeed JSON file."
        elif path.stat().st_size > MAX_BYTES:
            why, fix = f"It has {path.stat().st_size:,} bytes: too large for a configuration.", "Give another file."
        else:
            return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        why, fix = "It is not text (UTF-8).", "Save it as UTF-8 JSON."
    except OSError as error:
        why, fix = f"It cannot be read: {error.strerror or error}.", "Check the path and its permissions."
    except ValueError:  # a null byte in the name
        why, fix = "It is not a path.", "Give the path of a DeepSpeed JSON file."
    out.problem("deepspeed", str(path)[:200], why, fix, id="file-unreadable")
    return None


def read_deepspeed(value: Any, out: Findings) -> tuple[dict[str, Any] | None, str]:
    """A private copy of the configuration in `value`, and the name it goes by in messages.

    Args:
        value: None, a mapping, a path, or a JSON text.

    Returns:
        (configuration, name); the configuration is None where there is none or it cannot be read (then named).
    """
    if value is None or value == "":
        return None, ""
    data: Any
    if isinstance(value, Mapping):
        name, data = "the deepspeed dictionary", dict(value)
    elif isinstance(value, str | Path):
        text = str(value)
        inline = text.lstrip().startswith("{")
        name = "the deepspeed JSON" if inline else text
        content = text if inline else _read_file(Path(text).expanduser(), out)
        data = None if content is None else parse_json(content, name, out)
        if data is None:
            if content is not None and not out.problems:
                out.problem(
                    "deepspeed", "null", "The file holds no configuration.", "Write a block {...}.", id="file-is-empty"
                )
            return None, name
    else:
        out.problem(
            "deepspeed",
            show(value),
            "It is neither a path nor a dictionary.",
            "Give a path or a dictionary.",
            id="deepspeed-is-no-path",
        )
        return None, ""
    if not isinstance(data, Mapping):
        out.problem(
            "deepspeed",
            f"{show(data)} in {name}",
            "A configuration is a block {...}.",
            "Write a block.",
            id="file-is-no-block",
        )
        return None, name
    if not data:
        why = "Trainer takes an empty configuration for none, and would run without DeepSpeed."
        out.problem(
            "deepspeed",
            f"{{}} in {name}",
            why,
            'Write at least {"zero_optimization": {"stage": 0}}.',
            id="file-is-empty",
        )
        return None, name
    if _depth(data) > MAX_DEPTH:
        out.problem(
            "deepspeed",
            name,
            f"It is nested more than {MAX_DEPTH} levels deep.",
            "Remove the extra levels.",
            id="file-too-deep",
        )
        return None, name
    return _tidy(copy.deepcopy(dict(data)), "", out), name
