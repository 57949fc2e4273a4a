"""A Mamba-2 in llama.cpp's terms (its conversion/mamba.py, src/models/mamba2.cpp)."""

from typing import Any

import torch
from torch import Tensor

from hf_mamba.family import Gguf
from hf_mamba.models.common.gguf import state_space_metadata
from hf_mamba.models.mamba2.table import Geometry


def _metadata(config: Any) -> dict[str, Any]:
    g = Geometry.of(config)
    common = state_space_metadata(config, g, g.num_heads * g.head_dim, "num_heads x head_dim", g.num_heads)
    return common | {"ssm_group_count": g.n_groups}


def mixer_tensor(groups: int, name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """A tensor of a Mamba-2 mixer; those with a value a head get a dimension to be broadcast along."""
    if name.endswith(".dt_bias"):
        return name.removesuffix("dt_bias") + "dt_proj.bias", tensor
    if name.endswith(".A_log"):
        return name, -torch.exp(tensor.float())[:, None]
    if name.endswith(".D"):
        return name, tensor[:, None]
    if name.endswith("conv1d.weight"):
        return name, tensor.squeeze(1)
    return name, tensor.view(groups, -1) if name.endswith(("mixer.norm.weight", "mamba.norm.weight")) else tensor


def _tensors(config: Any, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    return [mixer_tensor(Geometry.of(config).n_groups, name, tensor)]


GGUF = Gguf("mamba2", _metadata, _tensors)
