"""Small models of every family, shared by the model's tests."""

from collections.abc import Callable

import pytest
import torch

from hf_mamba.family import Family, get_family

SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "vocab_size": 61, "state_size": 5, "pad_token_id": 0}
# A test that asks for `family`, `make` or `model` runs with each of these.
SIZES = {
    "mamba": {},
    "mamba2": {"num_heads": 6, "head_dim": 8, "n_groups": 2, "tie_word_embeddings": True},
}


def lively(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Move every weight off its initial value, so that no term of the model is invisible to a test."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


@pytest.fixture(scope="session", params=SIZES)
def family(request: pytest.FixtureRequest) -> Family:
    return get_family(request.param)


@pytest.fixture(scope="session")
def make(family: Family) -> Callable[..., torch.nn.Module]:
    """make(dtype=..., **config) -> a lively model in eval mode."""

    def build(dtype: torch.dtype = torch.float64, **config: object) -> torch.nn.Module:
        torch.manual_seed(0)
        sizes = SMALL | SIZES[family.model_type] | config
        if "hidden_size" in config and "num_heads" in sizes:
            sizes["num_heads"] = "auto"
        return lively(family.model_class(family.config_class(**sizes)).to(dtype)).eval()

    return build


@pytest.fixture(scope="session")
def model(make: Callable[..., torch.nn.Module]) -> torch.nn.Module:
    return make()
