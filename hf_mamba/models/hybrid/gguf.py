"""A hybrid in llama.cpp's terms (its conversion/granite.py, src/models/granite-hybrid.cpp)."""

from typing import Any

from torch import Tensor

from hf_mamba.family import Gguf
from hf_mamba.models.hybrid.table import Geometry
from hf_mamba.models.mamba2.gguf import mixer_tensor


def _metadata(config: Any) -> dict[str, Any]:
    attends = [kind == "attention" for kind in Geometry.of(config).layer_types]
    if all(attends) or not any(attends):
        raise ValueError("layer_types has one kind of layer alone: llama.cpp has another architecture for it.")
    return {
        "context_length": 2**20,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.shared_intermediate_size,
        "block_count": config.num_hidden_layers,
        "head_count": config.num_attention_heads,
        "head_count_kv": [config.num_key_value_heads * kind for kind in attends],
        "layer_norm_rms_eps": config.rms_norm_eps,
        "attention_scale": config.attention_multiplier,
        "embedding_scale": config.embedding_multiplier,
        "residual_scale": config.residual_multiplier,
        "logit_scale": config.logits_scaling,
        "rope_scaling_finetuned": False,  # no positions
        "ssm_conv_kernel": config.mamba_d_conv,
        "ssm_inner_size": config.mamba_n_heads * config.mamba_d_head,
        "ssm_state_size": config.mamba_d_state,
        "ssm_time_step_rank": config.mamba_n_heads,
        "ssm_group_count": config.mamba_n_groups,
    }


def _permuted(weight: Tensor, heads: int) -> Tensor:
    """The halves of each head interleaved, as every architecture of llama.cpp's has its queries and keys."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _tensors(config: Any, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    if "shared_mlp.input_linear" in name:
        stem = name.split("shared_mlp")[0]
        halves = zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True)
        return [(f"{stem}mlp.{part}.weight", half) for part, half in halves]
    if "shared_mlp.output_linear" in name:
        return [(name.replace("shared_mlp.output_linear", "mlp.down_proj"), tensor)]
    if name.endswith("q_proj.weight"):
        return [(name, _permuted(tensor, config.num_attention_heads))]
    if name.endswith("k_proj.weight"):
        return [(name, _permuted(tensor, config.num_key_value_heads))]
    return [mixer_tensor(config.mamba_n_groups, name, tensor)]


GGUF = Gguf("granitehybrid", _metadata, _tensors)
