"""Fixtures of small models; see small.py."""

from collections.abc import Callable

import pytest
import torch
from small import FEWEST, SIZES, SMALL, lively, word

from hf_mamba.family import Family, get_family


@pytest.fixture(scope="session", params=SIZES)
def family(request: pytest.FixtureRequest) -> Family:
    return get_family(request.param)


@pytest.fixture(scope="session")
def fewest(family: Family) -> int:
    """Layers of the smallest model that has every kind of them."""
    return FEWEST.get(family.model_type, 1)


@pytest.fixture(scope="session")
def make(family: Family) -> Callable[..., torch.nn.Module]:
    """make(dtype=..., **config) -> a lively model in eval mode; fields have Mamba's names."""

    def build(dtype: torch.dtype = torch.float64, **config: object) -> torch.nn.Module:
        torch.manual_seed(0)
        sizes = SMALL | SIZES[family.model_type] | config
        if "hidden_size" in config and family.model_type != "mamba":
            sizes |= {"num_heads": "auto"}
        sizes = {word(family, name): value for name, value in sizes.items()}
        return lively(family.model_class(family.config_class(**sizes)).to(dtype)).eval()

    return build


@pytest.fixture(scope="session")
def model(make: Callable[..., torch.nn.Module]) -> torch.nn.Module:
    return make()
