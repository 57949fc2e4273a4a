"""`hf_mamba.register()`: transformers' Auto classes, and what is built on them, use these classes for its families."""

import importlib.util
from functools import partial
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_mamba.family import FAMILIES, family_of, get_family
from hf_mamba.models.common.backbone import StatePreTrainedModel
from hf_mamba.private.peft import allow_targets
from hf_mamba.private.transformers import forget_registered

_restore: list[Any] = []  # what undoes peft's part, while registered


def register() -> None:
    """Make the Auto classes return this package's for its families' model_types, a sequence classifier included.

    Pipelines and lm-eval, which load by Auto classes, then use them too. trl's trainers load a name by the class that
    its config.json names, the stock one: hand them the model, not its name. Where peft is installed, LoRA without
    `target_modules` adapts the family's projections, and all of them are allowed: peft refuses one for every `mamba`,
    because the stock kernels read its weight directly; here every projection is called. The stock classes stay as they
    are when imported by name. Calling this again changes nothing; `unregister` takes it back.
    """
    for family in map(get_family, FAMILIES):
        AutoConfig.register(family.model_type, family.config_class, exist_ok=True)
        AutoModel.register(family.config_class, family.base_class, exist_ok=True)
        AutoModelForCausalLM.register(family.config_class, family.model_class, exist_ok=True)
        if family.classifier_class is not None:
            AutoModelForSequenceClassification.register(family.config_class, family.classifier_class, exist_ok=True)
    if importlib.util.find_spec("peft") is not None and not _restore:
        _register_lora()


def unregister() -> None:
    """Give the Auto classes and peft back as they were."""
    from transformers import (
        CONFIG_MAPPING,
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        MODEL_MAPPING,
    )

    for family in map(get_family, FAMILIES):
        forget_registered(CONFIG_MAPPING, family.model_type)
        for mapping in (MODEL_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING):
            forget_registered(mapping, family.config_class)
    while _restore:
        _restore.pop()()


def _register_lora() -> None:
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TARGETS

    def allowed(model: Any, name: str) -> bool:
        return isinstance(model, StatePreTrainedModel) and name in family_of(model.config).lora_targets

    _restore.append(allow_targets(allowed))
    for name in FAMILIES:
        if name not in TARGETS and get_family(name).lora_targets:
            TARGETS[name] = list(get_family(name).lora_targets)
            _restore.append(partial(TARGETS.pop, name, None))
