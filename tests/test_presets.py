"""Every preset: the formula equals the model, to the unit, and the published totals."""

import re

import pytest
import torch

from hf_mamba import MambaConfig, MambaForCausalLM
from hf_mamba.family import all_presets, count_parameters, family_of, get_preset

PRESETS = all_presets()

COUNTS = {
    "130m_mamba": 129_135_360,
    "370m_mamba": 371_516_416,
    "790m_mamba": 793_204_224,
    "1.4b_mamba": 1_372_178_432,
    "2.8b_mamba": 2_768_345_600,
    "7b_mamba": 6_893_552_640,
    "130m_mamba2": 128_989_632,
    "370m_mamba2": 368_346_624,
    "780m_mamba2": 780_161_280,
    "1.3b_mamba2": 1_343_757_312,
    "2.7b_mamba2": 2_702_599_680,
    "350m_hybrid": 340_332_224,
    "1b_hybrid": 1_461_538_368,
    "7b_hybrid": 7_066_994_176,
}


def by_component(model: torch.nn.Module) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        name = re.sub(r"(mixer|mamba)\.norm", "gated_norm", name).replace("model.norm", "norm_f")
        part = name.replace("embed_tokens", "embeddings").removesuffix(".weight").removesuffix(".bias").split(".")[-1]
        counts[part] = counts.get(part, 0) + parameter.numel()
    return counts


@pytest.mark.parametrize("name", PRESETS)
def test_formula_equals_the_model(name: str):
    family = family_of(PRESETS[name].config)
    with torch.device("meta"):
        model = family.model_class(family.config_class(**PRESETS[name].config))
    counts = count_parameters(PRESETS[name].config)
    assert sum(counts.values()) == model.num_parameters()
    assert counts == by_component(model)
    assert sum(counts.values()) == COUNTS.get(name, sum(counts.values()))


@pytest.mark.parametrize(
    "extra",
    [
        {"tie_word_embeddings": False},
        {"use_bias": True, "use_conv_bias": False},
        {"intermediate_size": 40, "time_step_rank": 5, "conv_kernel": 2},
        {"expand": 3, "state_size": 7},
    ],
    ids=str,
)
def test_formula_knows_every_option(extra):
    config = MambaConfig(hidden_size=24, num_hidden_layers=3, vocab_size=50, **extra)
    assert count_parameters(config) == by_component(MambaForCausalLM(config))


def test_the_7b_batch():
    preset = get_preset("7b_mamba")
    assert (preset.micro_batch_size, preset.gradient_accumulation_steps) == (4, 8)


def test_unknown_presets_name_the_nearest():
    with pytest.raises(ValueError, match="'7b_mamab'.*did you mean 7b_mamba"):
        get_preset("7b_mamab")
    with pytest.raises(ValueError, match="the presets are tiny_mamba"):
        get_preset("#")
