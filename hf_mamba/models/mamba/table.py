"""Parameters and FLOPs of a Mamba by formula, without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from hf_mamba.family import Parameter
from hf_mamba.models.common.cost import TokenFlops
from hf_mamba.models.common.table import whole_table

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


@lru_cache(maxsize=32)
def table(g: Geometry) -> tuple[Parameter, ...]:
    """Every parameter in the order of `named_parameters()`: A_log and D before the mixer's own modules."""
    return whole_table(g, lambda layer: _block(g, layer))


def _block(g: Geometry, layer: int) -> list[Parameter]:
    """The parameters of one block. Matrices decay; the state space's own parameters, biases and norms do not."""
    d, E, N, k, R = g.hidden_size, g.intermediate_size, g.state_size, g.conv_kernel, g.time_step_rank

    def row(
        name: str, shape: tuple[int, ...], decays: bool = False, fp32: bool = False, matrices: tuple[int, ...] = ()
    ) -> Parameter:
        component = name.removesuffix(".weight").removesuffix(".bias").removeprefix("mixer.")
        return Parameter(f"backbone.layers.{layer}.{name}", shape, component, layer, decays, fp32, matrices)

    rows = [
        row("norm.weight", (d,)),
        row("mixer.A_log", (E, N), fp32=True),
        row("mixer.D", (E,), fp32=True),
        row("mixer.conv1d.weight", (E, 1, k), decays=True),
        row("mixer.conv1d.bias", (E,)),
        row("mixer.in_proj.weight", (2 * E, d), decays=True, matrices=(E, E)),
        row("mixer.in_proj.bias", (2 * E,)),
        row("mixer.x_proj.weight", (R + 2 * N, E), decays=True, matrices=(R, N, N)),
        row("mixer.dt_proj.weight", (E, R), decays=True, matrices=(E,)),
        row("mixer.dt_proj.bias", (E,), fp32=True),
        row("mixer.out_proj.weight", (d, E), decays=True, matrices=(d,)),
        row("mixer.out_proj.bias", (d,)),
    ]
    absent = set() if g.use_bias else {"in_proj.bias", "out_proj.bias"}
    absent |= set() if g.use_conv_bias else {"conv1d.bias"}
    return [r for r in rows if not r.name.endswith(tuple(absent))] if absent else rows


@dataclass(frozen=True)
class MambaFlops(TokenFlops):
    """The forward operations of one token, by kind."""

    gemm: int  # in_proj, x_proj, dt_proj, out_proj of all blocks
    scan: int  # 9·E·N + 6·E a block: exp(Δ A), its product, h, C·h; Δ x, D x and the gate
    conv: int  # 2·E·k a block
    head: int  # d·V
    out_proj: int  # the part of gemm that closes a block

    @property
    def forward(self) -> int:
        return self.gemm + self.scan + self.conv + self.head

    @property
    def recomputed(self) -> int:
        """Neither the head, nor out_proj: checkpointing stops at the last tensor that the backward needs."""
        return self.forward - self.head - self.out_proj


def token_flops(g: Geometry, seq_len: int = 0) -> MambaFlops:
    """Operations of one token, whatever the length of its row.

    The scan's 9·E·N follows the count of Mamba's own kernels (Δ·A, exp, Δ·B·x, h, C·h).
    """
    d, E, N, R = g.hidden_size, g.intermediate_size, g.state_size, g.time_step_rank
    block = d * 2 * E + E * (R + 2 * N) + R * E + E * d
    layers = g.num_hidden_layers
    return MambaFlops(
        gemm=2 * layers * block,
        scan=layers * (9 * E * N + 6 * E),
        conv=layers * 2 * E * g.conv_kernel,
        head=2 * d * g.vocab_size,
        out_proj=2 * layers * E * d,
    )
