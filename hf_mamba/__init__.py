"""Pretrain Mamba language models with the Hugging Face stack.

Names are imported on first use, so that the presets and the memory planner start without torch.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "MambaConfig": "hf_mamba.models.mamba.configuration_mamba",
    "MambaModel": "hf_mamba.models.mamba.modeling_mamba",
    "MambaForCausalLM": "hf_mamba.models.mamba.modeling_mamba",
    "MambaForSequenceClassification": "hf_mamba.models.mamba.modeling_mamba",
    "Mamba2Config": "hf_mamba.models.mamba2.configuration_mamba2",
    "Mamba2Model": "hf_mamba.models.mamba2.modeling_mamba2",
    "Mamba2ForCausalLM": "hf_mamba.models.mamba2.modeling_mamba2",
    "Mamba2ForSequenceClassification": "hf_mamba.models.mamba2.modeling_mamba2",
    "GraniteMoeHybridConfig": "hf_mamba.models.hybrid.configuration_granitemoehybrid",
    "GraniteMoeHybridModel": "hf_mamba.models.hybrid.modeling_granitemoehybrid",
    "GraniteMoeHybridForCausalLM": "hf_mamba.models.hybrid.modeling_granitemoehybrid",
    "GraniteMoeHybridForSequenceClassification": "hf_mamba.models.hybrid.modeling_granitemoehybrid",
    "Mamba": "hf_mamba.models.mamba.layer",
    "count_parameters": "hf_mamba.family",
    "decay_groups": "hf_mamba.training.optimizer",
    "register": "hf_mamba.interop.register",
    "unregister": "hf_mamba.interop.register",
    "save_cache": "hf_mamba.interop.cache_file",
    "load_cache": "hf_mamba.interop.cache_file",
}
__all__ = [*_EXPORTS, "PRESETS", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "PRESETS":  # of all families
        return import_module("hf_mamba.family").all_presets()
    if name not in _EXPORTS:
        raise AttributeError(f"module 'hf_mamba' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
