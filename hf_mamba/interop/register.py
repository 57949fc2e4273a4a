"""`hf_mamba.register()`: transformers' Auto classes, and what is built on them, use these classes for `mamba`."""

import importlib.util
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hf_mamba.models.mamba.configuration_mamba import MambaConfig
from hf_mamba.models.mamba.modeling_mamba import MambaForCausalLM, MambaModel, MambaPreTrainedModel

LORA_TARGETS = ["in_proj", "x_proj", "out_proj"]

_restore: list[Any] = []  # what undoes peft's part, while registered


def register() -> None:
    """Make AutoConfig, AutoModel and AutoModelForCausalLM return this package's classes for model_type "mamba".

    Pipelines and lm-eval, which load by Auto classes, then use them too. trl's trainers load a name by the class that
    its config.json names, the stock one: hand them the model, not its name. Where peft is installed, LoRA without
    `target_modules` adapts in_proj, x_proj and out_proj, and out_proj is allowed: peft refuses it for every `mamba`,
    because the stock kernels read its weight directly; here every projection is called. The stock classes stay as they
    are when imported by name. Calling this again changes nothing; `unregister` takes it back.
    """
    AutoConfig.register("mamba", MambaConfig, exist_ok=True)
    AutoModel.register(MambaConfig, MambaModel, exist_ok=True)
    AutoModelForCausalLM.register(MambaConfig, MambaForCausalLM, exist_ok=True)
    if importlib.util.find_spec("peft") is not None and not _restore:
        _register_lora()


def unregister() -> None:
    """Give the Auto classes and peft back as they were."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    CONFIG_MAPPING._extra_content.pop("mamba", None)
    for auto in (AutoModel, AutoModelForCausalLM):
        auto._model_mapping._extra_content.pop(MambaConfig, None)
    while _restore:
        _restore.pop()()


def _register_lora() -> None:
    from peft.tuners.tuners_utils import BaseTuner
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TARGETS

    check = BaseTuner._check_target_module_compatiblity  # (sic)

    def check_others(self: Any, peft_config: Any, model: Any, target_name: str) -> None:
        if not (isinstance(model, MambaPreTrainedModel) and target_name == "out_proj"):
            check(self, peft_config, model, target_name)

    BaseTuner._check_target_module_compatiblity = check_others  # type: ignore[method-assign]
    _restore.append(lambda: setattr(BaseTuner, "_check_target_module_compatiblity", check))
    if "mamba" not in TARGETS:
        TARGETS["mamba"] = LORA_TARGETS
        _restore.append(lambda: TARGETS.pop("mamba", None))
