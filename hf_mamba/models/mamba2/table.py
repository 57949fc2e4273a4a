"""Parameters and FLOPs of a Mamba-2 by formula, without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from hf_mamba.family import Parameter
from hf_mamba.models.common.cost import TokenFlops
from hf_mamba.models.common.table import whole_table
from hf_mamba.sizes import ssd_flops

UNLIMITED = (0.0, math.inf)
# transformers' Mamba2Config defaults, for keys that a configuration leaves out.
CONFIG_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32768,
    "hidden_size": 4096,
    "num_heads": 128,
    "head_dim": 64,
    "state_size": 128,
    "n_groups": 8,
    "expand": 2,
    "num_hidden_layers": 64,
    "conv_kernel": 4,
    "use_bias": False,
    "use_conv_bias": True,
    "tie_word_embeddings": False,
    "time_step_limit": UNLIMITED,
}


@dataclass(frozen=True)
class Geometry:
    """The sizes that decide a Mamba-2's parameters, activations and cost."""

    vocab_size: int
    hidden_size: int
    num_heads: int
    head_dim: int
    state_size: int
    n_groups: int
    num_hidden_layers: int
    conv_kernel: int
    use_bias: bool
    use_conv_bias: bool
    tie_word_embeddings: bool
    limited: bool  # Δ is clamped

    @classmethod
    def of(cls, config: Any) -> Geometry:
        """Read a configuration: a mapping of Mamba2Config fields or an object with those attributes.

        Raises:
            ValueError: where heads, groups and widths do not agree, naming the fields.
        """
        known = config if isinstance(config, Mapping) else vars(config)
        value = {key: known.get(key, default) for key, default in CONFIG_DEFAULTS.items()}
        expand, limit = value.pop("expand"), value.pop("time_step_limit")
        width = expand * value["hidden_size"]
        for name in ("hidden_size", "head_dim", "n_groups"):
            if value[name] < 1:
                raise ValueError(f"{name} is {value[name]}; it must be at least 1.")
        if value["num_heads"] == "auto":
            value["num_heads"] = width // value["head_dim"]
        heads, head_dim, groups = value["num_heads"], value["head_dim"], value["n_groups"]
        if heads * head_dim != width:
            raise ValueError(
                f"num_heads {heads} x head_dim {head_dim} is {heads * head_dim}, but hidden_size "
                f"{value['hidden_size']} x expand {expand} is {width}: they must be equal. "
                f"Write num_heads {_fitting(width, head_dim)}."
            )
        if heads % groups:
            raise ValueError(
                f"n_groups is {groups}, and {heads} heads cannot share B and C in as many groups: write a divisor."
            )
        return cls(**value, limited=tuple(float(bound) for bound in limit) != UNLIMITED)

    @property
    def intermediate_size(self) -> int:
        """E, the heads' width together."""
        return self.num_heads * self.head_dim

    @property
    def conv_width(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self.intermediate_size + 2 * self.n_groups * self.state_size

    @property
    def projected(self) -> int:
        """Rows of in_proj: z, x, B, C and Δ."""
        return self.intermediate_size + self.conv_width + self.num_heads


def _fitting(width: int, head_dim: int) -> str:
    return str(width // head_dim) if width % head_dim == 0 else f"and a head_dim that divides {width}"


@lru_cache(maxsize=32)
def table(g: Geometry) -> tuple[Parameter, ...]:
    """Every parameter in the order of `named_parameters()`: the state space's own before the mixer's modules."""
    return whole_table(g, lambda layer: _block(g, layer))


def _block(g: Geometry, layer: int) -> list[Parameter]:
    norm = Parameter(f"backbone.layers.{layer}.norm.weight", (g.hidden_size,), "norm", layer, False)
    return [norm, *mixer_rows(g, f"backbone.layers.{layer}.mixer.", layer)]


def mixer_rows(g: Geometry, prefix: str, layer: int) -> list[Parameter]:
    """The parameters of one mixer, whose names begin with `prefix`.

    Matrices decay; the state space's own parameters, biases and norms do not.
    """
    d, E, H, W = g.hidden_size, g.intermediate_size, g.num_heads, g.conv_width
    S = g.n_groups * g.state_size  # rows of B, and of C

    def row(
        name: str, shape: tuple[int, ...], decays: bool = False, fp32: bool = False, matrices: tuple[int, ...] = ()
    ) -> Parameter:
        component = name.removesuffix(".weight").removesuffix(".bias")
        component = "gated_norm" if component == "norm" else component
        return Parameter(prefix + name, shape, component, layer, decays, fp32, matrices)

    rows = [
        row("dt_bias", (H,), fp32=True),
        row("A_log", (H,), fp32=True),
        row("D", (H,), fp32=True),
        row("conv1d.weight", (W, 1, g.conv_kernel), decays=True),
        row("conv1d.bias", (W,)),
        row("in_proj.weight", (g.projected, d), decays=True, matrices=(E, E, S, S, H)),
        row("in_proj.bias", (g.projected,)),
        row("norm.weight", (E,)),
        row("out_proj.weight", (d, E), decays=True, matrices=(d,)),
        row("out_proj.bias", (d,)),
    ]
    absent = set() if g.use_bias else {"in_proj.bias", "out_proj.bias"}
    absent |= set() if g.use_conv_bias else {"conv1d.bias"}
    return [r for r in rows if not r.name.endswith(tuple(absent))] if absent else rows


@dataclass(frozen=True)
class Mamba2Flops(TokenFlops):
    """The forward operations of one token, by kind."""

    gemm: int  # in_proj and out_proj of all blocks
    ssd: int  # its matrix products, and 8·E a block: w x, D x, the gate and its norm
    conv: int  # 2·k a channel and block
    head: int  # d·V
    out_proj: int  # the part of gemm that closes a block

    @property
    def forward(self) -> int:
        return self.gemm + self.ssd + self.conv + self.head

    @property
    def recomputed(self) -> int:
        """Neither the head, nor out_proj: checkpointing stops at the last tensor that the backward needs."""
        return self.forward - self.head - self.out_proj


def token_flops(g: Geometry, seq_len: int = 2048) -> Mamba2Flops:
    """Operations of one token in rows of `seq_len`, whose last chunk may be short."""
    length = seq_len or 2048
    d, E, layers = g.hidden_size, g.intermediate_size, g.num_hidden_layers
    products = ssd_flops(length, g.num_heads, g.head_dim, g.n_groups, g.state_size)
    return Mamba2Flops(
        gemm=2 * layers * (d * g.projected + E * d),
        ssd=layers * (products // length + 8 * E),
        conv=layers * 2 * g.conv_width * g.conv_kernel,
        head=2 * d * g.vocab_size,
        out_proj=2 * layers * E * d,
    )
