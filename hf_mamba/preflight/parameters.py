"""The parameter check: the formula against the model itself on the meta device, component by component.

Imports torch and transformers, so it is called by commands and recipes, never by the resolver.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from hf_mamba.findings import Problem
from hf_mamba.plan import Plan

_OUTSIDE = {"backbone.embeddings": "embeddings", "backbone.norm_f": "norm_f", "lm_head": "lm_head"}


def component(name: str) -> str:
    """The component of a tensor, by the formula's names: "backbone.layers.3.mixer.in_proj.weight" -> "in_proj"."""
    for prefix, outside in _OUTSIDE.items():
        if name.startswith(prefix):
            return outside
    parts = name.split(".")
    return parts[-1] if parts[-1] in ("A_log", "D") else parts[-2] if len(parts) > 1 else name


def count(model: Any) -> dict[str, int]:
    """Parameters by component, tied weights once, whole under zero.Init too (a shard knows its `ds_numel`)."""
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():  # yields a shared parameter once
        counts[component(name)] += getattr(parameter, "ds_numel", parameter.numel())
    return dict(counts)


def count_on_meta(model_config: Mapping[str, Any]) -> dict[str, int]:
    """Parameters by component of the model that this configuration builds; nothing is allocated."""
    import torch

    from hf_mamba.models.mamba.configuration_mamba import MambaConfig
    from hf_mamba.models.mamba.modeling_mamba import MambaForCausalLM

    with torch.device("meta"):
        model = MambaForCausalLM(MambaConfig(**model_config))
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
