"""The fingerprint of prepared data, and its comparison with a run's."""

from collections.abc import Mapping, Sequence
from typing import Any


def check_fingerprint(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuse to resume a run on data that would give other rows. Names and places of the data may differ.

    Raises:
        ValueError: naming each part that differs.
    """
    differences = [
        f"{what}: the checkpoint has {saved.get(key, False)}, this run {current.get(key, False)}"
        for key, what in {
            "streamed": "whether it is streamed (--streaming)",
            "seq_len": "the row length",
            "seed": "the seed of the order",
            "tokenizer": "the tokenizer's fingerprint",
            "held_out": "the held-out part (eval_fraction)",
            "order": "the version of the order's arithmetic",
        }.items()
        if saved.get(key, False) != current.get(key, False)
    ]
    then, now = saved.get("sources", []), current.get("sources", [])
    if len(then) != len(now):
        differences.append(f"the sources: the checkpoint has {_names(then)}, this run {_names(now)}")
    for old, new in zip(then, now, strict=False):
        if "content" in old and "content" in new:
            what = f"{new['name']}: {new['tokens']:,} tokens now, {old['tokens']:,} of {old['name']} then"
            if old["content"] != new["content"]:
                differences.append(f"the content of {what}")
            elif old["tokens"] != new["tokens"]:  # a damaged file, of which another version read less
                differences.append(f"what could be read of {what}")
        if old["weight"] != new["weight"]:
            differences.append(f"the weight of {new['name']}: {new['weight']} now, {old['weight']} then")
    if differences:
        raise ValueError(
            "this run's data is not the checkpoint's, so tokens would be repeated or left out. Different are "
            + "; ".join(differences)
            + ". Give the same data, or start a new run from the checkpoint's weights."
        )


def _names(sources: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(source["name"] for source in sources) or "none"
