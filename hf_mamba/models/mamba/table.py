"""Parameters and FLOPs of a Mamba by formula, without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

# transformers' MambaConfig defaults, for keys that a configuration leaves out.
CONFIG_DEFAULTS: dict[str, Any] = {
    "vocab_size": 50280,
    "hidden_size": 768,
    "state_size": 16,
    "num_hidden_layers": 32,
    "expand": 2,
    "conv_kernel": 4,
    "use_bias": False,
    "use_conv_bias": True,
    "time_step_rank": "auto",
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Geometry:
    """The sizes that decide a Mamba's parameters, activations and cost."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    state_size: int
    conv_kernel: int
    time_step_rank: int
    num_hidden_layers: int
    use_bias: bool
    use_conv_bias: bool
    tie_word_embeddings: bool

    @classmethod
    def of(cls, config: Any) -> Geometry:
        """Read a configuration: a mapping of MambaConfig fields or an object with those attributes.

        `intermediate_size` wins over `expand`, and a `time_step_rank` of "auto" is ceil(d / 16).
        """
        known = config if isinstance(config, Mapping) else vars(config)
        value = {key: known.get(key, default) for key, default in CONFIG_DEFAULTS.items()}
        d = value["hidden_size"]
        rank = math.ceil(d / 16) if value["time_step_rank"] == "auto" else value["time_step_rank"]
        return cls(
            vocab_size=value["vocab_size"],
            hidden_size=d,
            intermediate_size=known.get("intermediate_size") or int(value["expand"] * d),
            state_size=value["state_size"],
            conv_kernel=value["conv_kernel"],
            time_step_rank=int(rank),
            num_hidden_layers=value["num_hidden_layers"],
            use_bias=value["use_bias"],
            use_conv_bias=value["use_conv_bias"],
            tie_word_embeddings=value["tie_word_embeddings"],
        )


def count_parameters(config: Any) -> dict[str, int]:
    """Parameters by component, tied weights counted once; their sum is `num_parameters()` of the model.

    Args:
        config: a mapping of MambaConfig fields, or a MambaConfig.

    Returns:
        component -> number of parameters, over all layers; a component that the model lacks is left out.
    """
    g = Geometry.of(config)
    V, d, E, N, k, R = (
        g.vocab_size,
        g.hidden_size,
        g.intermediate_size,
        g.state_size,
        g.conv_kernel,
        g.time_step_rank,
    )
    per_layer = {
        "norm": d,
        "in_proj": 2 * E * d + (2 * E if g.use_bias else 0),
        "conv1d": E * k + (E if g.use_conv_bias else 0),
        "x_proj": E * (R + 2 * N),
        "dt_proj": E * R + E,
        "A_log": E * N,
        "D": E,
        "out_proj": E * d + (d if g.use_bias else 0),
    }
    counts = {"embeddings": V * d}
    counts |= {name: g.num_hidden_layers * n for name, n in per_layer.items()}
    counts["norm_f"] = d
    if not g.tie_word_embeddings:
        counts["lm_head"] = V * d
    return counts


@dataclass(frozen=True)
class Parameter:
    size: int
    decays: bool
    place: int  # -1 embeddings, 0.. blocks, layers: final norm and untied head


@lru_cache(maxsize=32)
def parameters(g: Geometry) -> tuple[Parameter, ...]:
    """Every parameter in the order of `named_parameters()`: A_log and D before the mixer's own modules."""
    d, E, N, k, R = g.hidden_size, g.intermediate_size, g.state_size, g.conv_kernel, g.time_step_rank
    block: list[tuple[int, bool]] = [(d, False), (E * N, False), (E, False), (2 * E * d, True)]
    block += [(2 * E, False)] if g.use_bias else []
    block += [(E * k, True)] + ([(E, False)] if g.use_conv_bias else [])
    block += [(E * (R + 2 * N), True), (E * R, True), (E, False), (E * d, True)]
    block += [(d, False)] if g.use_bias else []
    out = [Parameter(g.vocab_size * d, True, -1)]
    for layer in range(g.num_hidden_layers):
        out += [Parameter(size, decays, layer) for size, decays in block]
    out.append(Parameter(d, False, g.num_hidden_layers))
    if not g.tie_word_embeddings:
        out.append(Parameter(g.vocab_size * d, True, g.num_hidden_layers))
    return tuple(out)


@dataclass(frozen=True)
class TokenFlops:
    """Operations of one token, forward; `total` and `recomputed` are those of a training step."""

    gemm: int  # in_proj, x_proj, dt_proj, out_proj of all blocks
    scan: int  # 9·E·N + 6·E a block: exp(Δ A), its product, h, C·h; Δ x, D x and the gate
    conv: int  # 2·E·k a block
    head: int  # d·V
    out_proj: int  # the part of gemm that closes a block

    @property
    def forward(self) -> int:
        return self.gemm + self.scan + self.conv + self.head

    @property
    def training(self) -> int:
        """Forward and backward: the model's own operations, which MFU counts."""
        return 3 * self.forward

    def executed(self, gradient_checkpointing: bool) -> int:
        """With the blocks' forward once more where they are recomputed.

        Neither the head, nor out_proj: checkpointing stops at the last tensor that the backward needs.
        """
        return self.training + (self.forward - self.head - self.out_proj if gradient_checkpointing else 0)


def token_flops(g: Geometry) -> TokenFlops:
    """Operations of one token. The scan's 9·E·N follows the count of Mamba's own kernels (Δ·A, exp, Δ·B·x, h, C·h)."""
    d, E, N, R = g.hidden_size, g.intermediate_size, g.state_size, g.time_step_rank
    block = d * 2 * E + E * (R + 2 * N) + R * E + E * d
    layers = g.num_hidden_layers
    return TokenFlops(
        gemm=2 * layers * block,
        scan=layers * (9 * E * N + 6 * E),
        conv=layers * 2 * E * g.conv_kernel,
        head=2 * d * g.vocab_size,
        out_proj=2 * layers * E * d,
    )
