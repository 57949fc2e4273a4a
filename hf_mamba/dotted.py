"""Dotted keys of nested dictionaries: read, write and remove them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def get(config: Mapping[str, Any], path: str, default: Any = None) -> Any:
    """The value at a dotted path, or `default` where any part is missing or not a block."""
    node: Any = config
    for part in path.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return default
        node = node[part]
    return node


def put(config: dict[str, Any], path: str, value: Any) -> bool:
    """Set a dotted path, making blocks on the way; False where something that is no block is in the way."""
    *parents, last = path.split(".")
    node = config
    for part in parents:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            return False
    node[last] = value
    return True


def pop(config: dict[str, Any], path: str) -> Any:
    """Remove and return the value at a dotted path; None where there is none."""
    parent, _, last = path.rpartition(".")
    node = get(config, parent) if parent else config
    return node.pop(last, None) if isinstance(node, dict) else None
