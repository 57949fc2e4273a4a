"""The parameter check: the formula against the model itself on the meta device, component by component.

Imports torch and transformers, so it is called by commands and recipes, never by the resolver.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from hf_mamba.family import family_of
from hf_mamba.findings import Findings
from hf_mamba.plan import Plan


def count(model: Any) -> dict[str, int]:
    """Parameters by component, tied weights once, whole under zero.Init too (a shard knows its `ds_numel`).

    A tensor that the family's table lacks is counted under its own name.
    """
    components = {row.name: row.component for row in family_of(model.config).parameters(model.config)}
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():  # yields a shared parameter once
        counts[components.get(name, name)] += getattr(parameter, "ds_numel", parameter.numel())
    return dict(counts)


def count_on_meta(model_config: Mapping[str, Any]) -> dict[str, int]:
    """Parameters by component of the model that this configuration builds; nothing is allocated."""
    import torch

    family = family_of(model_config)
    with torch.device("meta"):
        model = family.model_class(family.config_class(**model_config))
    return count(model)


def check_parameters(plan: Plan, built: dict[str, int], out: Findings) -> None:
    """A model that is not the one that was estimated is a problem, which names the components that differ."""
    estimated = plan.parameters["by_component"]
    if built == estimated:
        return
    parts = [
        f"{name}: estimated {estimated.get(name, 0):,}, actual {built.get(name, 0):,}"
        for name in sorted(built.keys() | estimated.keys())
        if built.get(name, 0) != estimated.get(name, 0)
    ]
    out.problem(
        "parameters",
        f"{sum(built.values()):,}, estimated {plan.parameters['estimated']:,}",
        f"The model is not the one that was estimated: {'; '.join(parts)}.",
        "Correct the configuration; where the embedding differs, write the rows that it has as --vocab_size.",
        id="parameters-differ",
    )
