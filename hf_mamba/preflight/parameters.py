"""The parameter check: the formula against the model itself on the meta device, component by component.

Imports torch and transformers, so it is called by commands and recipes, never by the resolver.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from hf_mamba.family import family_of
from hf_mamba.findings import Problem
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


def check_parameters(plan: Plan) -> Plan:
    """The plan with `actual` and `deviation` filled; a deviation is a problem that names the components."""
    if not plan.model_config or not plan.parameters.get("estimated"):
        return plan
    actual = count_on_meta(plan.model_config)
    estimated = plan.parameters["by_component"]
    total, expected = sum(actual.values()), sum(estimated.values())
    problems = plan.problems
    if actual != estimated:
        parts = [
            f"{name}: estimated {estimated.get(name, 0):,}, actual {actual.get(name, 0):,}"
            for name in sorted(actual.keys() | estimated.keys())
            if actual.get(name, 0) != estimated.get(name, 0)
        ]
        why = f"The model is not the one that was estimated: {'; '.join(parts)}."
        problems += (
            Problem(
                "parameters",
                f"{total:,}, estimated {expected:,}",
                why,
                "Correct the configuration.",
                id="parameters-differ",
            ),
        )
    parameters = {**plan.parameters, "actual": total, "deviation": (total - expected) / expected}
    return plan.replace(parameters=parameters, problems=problems)
