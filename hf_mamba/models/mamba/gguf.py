"""A Mamba in llama.cpp's terms (its conversion/mamba.py, src/models/mamba.cpp)."""

from typing import Any

import torch
from torch import Tensor

from hf_mamba.family import Gguf
from hf_mamba.models.mamba.table import Geometry


def _metadata(config: Any) -> dict[str, Any]:
    g = Geometry.of(config)
    if g.intermediate_size != 2 * g.hidden_size:
        raise ValueError(f"intermediate_size is {g.intermediate_size}: llama.cpp takes twice hidden_size alone.")
    if config.use_bias:
        raise ValueError("use_bias is true: llama.cpp has no bias of in_proj and out_proj.")
    return {
        "context_length": 2**20,
        "embedding_length": g.hidden_size,
        "feed_forward_length": 0,
        "head_count": 0,
        "block_count": g.num_hidden_layers,
        "ssm_conv_kernel": g.conv_kernel,
        "ssm_inner_size": g.intermediate_size,
        "ssm_state_size": g.state_size,
        "ssm_time_step_rank": g.time_step_rank,
        "layer_norm_rms_eps": config.layer_norm_epsilon,
        "ssm_dt_b_c_rms": False,
    }


def _tensors(config: Any, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    if name.endswith("A_log"):
        tensor = -torch.exp(tensor.float())
    return [(name, tensor.squeeze(1) if name.endswith("conv1d.weight") else tensor)]


GGUF = Gguf("mamba", _metadata, _tensors)
