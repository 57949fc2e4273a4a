"""A Mamba in llama.cpp's terms (its conversion/mamba.py, src/models/mamba.cpp)."""

from typing import Any

import torch
from torch import Tensor

from hf_mamba.family import Gguf
from hf_mamba.models.common.gguf import state_space_metadata
from hf_mamba.models.mamba.table import Geometry


def _metadata(config: Any) -> dict[str, Any]:
    g = Geometry.of(config)
    common = state_space_metadata(config, g, g.intermediate_size, "intermediate_size", g.time_step_rank)
    return common | {"ssm_dt_b_c_rms": False}


def _tensors(config: Any, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    if name.endswith("A_log"):
        tensor = -torch.exp(tensor.float())
    return [(name, tensor.squeeze(1) if name.endswith("conv1d.weight") else tensor)]


GGUF = Gguf("mamba", _metadata, _tensors)
