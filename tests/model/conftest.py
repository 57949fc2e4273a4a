"""Small models shared by the model's tests."""

from collections.abc import Callable

import pytest
import torch

from hf_mamba import MambaConfig, MambaForCausalLM

SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "vocab_size": 61, "state_size": 5, "pad_token_id": 0}


def lively(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Move every weight off its initial value, so that no term of the model is invisible to a test."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


@pytest.fixture(scope="session")
def make() -> Callable[..., MambaForCausalLM]:
    """make(dtype=..., **config) -> a lively model in eval mode."""

    def build(dtype: torch.dtype = torch.float64, **config: object) -> MambaForCausalLM:
        torch.manual_seed(0)
        model = MambaForCausalLM(MambaConfig(**(SMALL | config))).to(dtype)
        return lively(model).eval()

    return build


@pytest.fixture(scope="session")
def model(make: Callable[..., MambaForCausalLM]) -> MambaForCausalLM:
    return make()
