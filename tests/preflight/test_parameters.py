"""The estimate against the model on the meta device, component by component."""

from dataclasses import replace

import pytest

from hf_mamba.family import all_presets
from hf_mamba.preflight import Plan, resolve, verify
from hf_mamba.preflight.parameters import count_on_meta


def planned(preset: str) -> Plan:
    return resolve({"preset": preset, "resume": "never"}, world_size=1, environ={}, device="cpu").require()


@pytest.mark.parametrize("preset", all_presets())
def test_every_preset_to_the_unit(preset: str) -> None:
    found = planned(preset)
    assert count_on_meta(found.model_config) == found.parameters["by_component"]
    assert sum(found.parameters["by_component"].values()) == found.parameters["estimated"]


@pytest.mark.parametrize("change", [{"tie_word_embeddings": False}, {"use_bias": True}, {"use_conv_bias": False}])
def test_variants(change: dict[str, bool]) -> None:
    config = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, **change}
    values = {"preset": "tiny_mamba", "model_config": config, "resume": "never"}
    found = resolve(values, world_size=1, environ={}, device="cpu").require()
    assert count_on_meta(config) == found.parameters["by_component"]


def test_a_deviation_is_explained_by_component() -> None:
    found = planned("tiny_mamba")
    wrong = {**found.parameters["by_component"], "in_proj": 1}
    off = replace(found, parameters={**found.parameters, "by_component": wrong})
    (problem,) = verify(off).problems
    assert "in_proj: estimated 1, actual 589,824" in problem.why
    assert "x_proj" not in problem.why
