"""Each family's logits from its papers' formulas alone, one token after another: plain PyTorch, nothing of the package.

`weights` are by name; `ids` is (B, L). Every function returns logits (B, L, V).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


def rms_norm(x: Tensor, weight: Tensor, eps: float, groups: int = 1) -> Tensor:
    parts = x.reshape(*x.shape[:-1], groups, -1)
    return (parts / (parts.square().mean(-1, keepdim=True) + eps).sqrt()).reshape(x.shape) * weight


def below(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}


def window(x: Tensor, w: Weights, t: int) -> Tensor:
    """The causal depthwise convolution (B, E) at token t of x (B, L, E), and its SiLU."""
    taps = w["conv1d.weight"][:, 0]
    k = taps.shape[1]
    return F.silu(sum(taps[:, j] * x[:, t - k + 1 + j] for j in range(k) if t - k + 1 + j >= 0) + w["conv1d.bias"])


def selective_ssm(u: Tensor, w: Weights) -> Tensor:
    """Gu & Dao 2023, figure 3 and algorithm 2: (B, L, d) -> (B, L, d)."""
    x, z = (u @ w["in_proj.weight"].T).chunk(2, -1)
    A, D = -torch.exp(w["A_log"]), w["D"]
    E, N = A.shape
    rank = w["dt_proj.weight"].shape[1]
    state, outputs = u.new_zeros(len(u), E, N), []
    for t in range(u.shape[1]):
        v = window(x, w, t)
        low, B, C = (v @ w["x_proj.weight"].T).split([rank, N, N], -1)
        dt = F.softplus(low @ w["dt_proj.weight"].T + w["dt_proj.bias"])
        state = torch.exp(dt[..., None] * A) * state + (dt * v)[..., None] * B[:, None]
        outputs.append((state * C[:, None]).sum(-1) + D * v)
    return (torch.stack(outputs, 1) * F.silu(z)) @ w["out_proj.weight"].T


def ssd(u: Tensor, w: Weights, c: Any) -> Tensor:
    """Dao & Gu 2024, section 7: (B, L, d) -> (B, L, d)."""
    H, P, N, G = c.num_heads, c.head_dim, c.state_size, c.n_groups
    E = H * P
    z, mixed, dt = (u @ w["in_proj.weight"].T).split([E, E + 2 * G * N, H], -1)
    dt = F.softplus(dt + w["dt_bias"]).clamp(*c.time_step_limit)
    A, group = -torch.exp(w["A_log"]), torch.arange(H) // (H // G)
    state, outputs = u.new_zeros(len(u), H, P, N), []
    for t in range(u.shape[1]):
        x, B, C = window(mixed, w, t).split([E, G * N, G * N], -1)
        x, B, C = x.view(-1, H, P), B.view(-1, G, N)[:, group], C.view(-1, G, N)[:, group]
        step = dt[:, t]
        decayed = torch.exp(A * step)[..., None, None] * state
        state = decayed + step[..., None, None] * x[..., None] * B[:, :, None]
        outputs.append(((state * C[:, :, None]).sum(-1) + w["D"][:, None] * x).flatten(1))
    y = rms_norm(torch.stack(outputs, 1) * F.silu(z), w["norm.weight"], c.layer_norm_epsilon, G)
    return y @ w["out_proj.weight"].T


def attention(u: Tensor, w: Weights, heads: int, scale: float) -> Tensor:
    """Causal attention in which groups of heads share keys and values (Ainslie et al. 2023): (B, L, d) -> (B, L, d)."""
    width = u.shape[-1] // heads
    q, k, v = ((u @ w[f"{name}_proj.weight"].T).unflatten(-1, (-1, width)).transpose(1, 2) for name in "qkv")
    k, v = (t.repeat_interleave(heads // t.shape[1], 1) for t in (k, v))
    later = torch.ones(u.shape[1], u.shape[1], dtype=torch.bool).triu(1)
    weight = (scale * q @ k.mT).masked_fill(later, -math.inf).softmax(-1)
    return (weight @ v).transpose(1, 2).flatten(2) @ w["o_proj.weight"].T


def mamba(weights: Weights, c: Any, ids: Tensor) -> Tensor:
    stream = weights["backbone.embeddings.weight"][ids]
    for i in range(c.num_hidden_layers):
        w = below(weights, f"backbone.layers.{i}.")
        stream = stream + selective_ssm(rms_norm(stream, w["norm.weight"], c.layer_norm_epsilon), below(w, "mixer."))
    final = rms_norm(stream, weights["backbone.norm_f.weight"], c.layer_norm_epsilon)
    return final @ weights.get("lm_head.weight", weights["backbone.embeddings.weight"]).T


def mamba2(weights: Weights, c: Any, ids: Tensor) -> Tensor:
    stream = weights["backbone.embeddings.weight"][ids]
    for i in range(c.num_hidden_layers):
        w = below(weights, f"backbone.layers.{i}.")
        stream = stream + ssd(rms_norm(stream, w["norm.weight"], c.layer_norm_epsilon), below(w, "mixer."), c)
    final = rms_norm(stream, weights["backbone.norm_f.weight"], c.layer_norm_epsilon)
    return final @ weights.get("lm_head.weight", weights["backbone.embeddings.weight"]).T


def granitemoehybrid(weights: Weights, c: Any, ids: Tensor) -> Tensor:
    """Granite 4's dense hybrid: a mixer and a SwiGLU (Shazeer 2020) in each layer, and its four multipliers."""
    eps = c.rms_norm_eps
    stream = weights["model.embed_tokens.weight"][ids] * c.embedding_multiplier
    for i in range(c.num_hidden_layers):
        w = below(weights, f"model.layers.{i}.")
        u = rms_norm(stream, w["input_layernorm.weight"], eps)
        if "self_attn.q_proj.weight" in w:
            update = attention(u, below(w, "self_attn."), c.num_attention_heads, c.attention_multiplier)
        else:
            update = ssd(u, below(w, "mamba."), c.mixer_config())
        stream = stream + c.residual_multiplier * update
        u = rms_norm(stream, w["post_attention_layernorm.weight"], eps)
        gate, up = (u @ w["shared_mlp.input_linear.weight"].T).chunk(2, -1)
        stream = stream + c.residual_multiplier * (F.silu(gate) * up) @ w["shared_mlp.output_linear.weight"].T
    final = rms_norm(stream, weights["model.norm.weight"], eps) / c.logits_scaling
    return final @ weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).T
