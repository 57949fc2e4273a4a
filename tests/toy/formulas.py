"""What is known of a toy without building it: sizes, parameters, operations, memory. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_mamba.family import Parameter
from hf_mamba.models.common.cost import Backend, Bytes, Moments, Shape, TokenFlops, add, norm_backward

DEFAULTS: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Geometry:
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    tie_word_embeddings: bool

    @classmethod
    def of(cls, config: Any) -> Geometry:
        """Read a mapping of ToyConfig's fields, or an object with those attributes."""
        known = config if isinstance(config, Mapping) else vars(config)
        return cls(**{name: known.get(name, default) for name, default in DEFAULTS.items()})

    def width(self, layer: int) -> int:
        """E: every second layer is twice as wide."""
        return self.hidden_size * (1 + layer % 2)


def table(g: Geometry) -> tuple[Parameter, ...]:
    """Every parameter in the order of `named_parameters()`."""
    d, V, layers = g.hidden_size, g.vocab_size, g.num_hidden_layers
    rows = [Parameter("body.tokens.weight", (V, d), "tokens", -1, True)]
    for i in range(layers):
        E = g.width(i)
        rows += [
            Parameter(f"body.blocks.{i}.norm.weight", (d,), "norms", i, False),
            Parameter(f"body.blocks.{i}.mixer.forget.weight", (E, d), "forget", i, True, matrices=(E,)),
            Parameter(f"body.blocks.{i}.mixer.forget.bias", (E,), "forget", i, False),
            Parameter(f"body.blocks.{i}.mixer.candidate.weight", (E, d), "candidate", i, True, matrices=(E,)),
            Parameter(f"body.blocks.{i}.mixer.back.weight", (d, E), "back", i, True, matrices=(d,)),
        ]
    rows.append(Parameter("body.last.weight", (d,), "norms", layers, False))
    if not g.tie_word_embeddings:
        rows.append(Parameter("readout.weight", (V, d), "readout", layers, True))
    return tuple(rows)


@dataclass(frozen=True)
class ToyFlops(TokenFlops):
    """The forward operations of one token; checkpointing repeats `inner`, all but the head and `back`."""

    inner: int
    back: int
    head: int

    @property
    def forward(self) -> int:
        return self.inner + self.back + self.head

    @property
    def recomputed(self) -> int:
        return self.inner


def token_flops(g: Geometry, seq_len: int = 0) -> ToyFlops:
    d, widths = g.hidden_size, sum(g.width(i) for i in range(g.num_hidden_layers))
    return ToyFlops(inner=4 * d * widths + 5 * widths, back=2 * d * widths, head=2 * d * g.vocab_size)


@dataclass(frozen=True)
class ToyBlockMemory:
    """What a layer keeps and needs, from the lines of `ToyMixer.forward`; layers of one width are equal."""

    model: Geometry
    layer: int = field(compare=False)
    width: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "width", self.model.width(self.layer))

    def _wide(self, s: Shape) -> int:
        """A tensor (B, L, E)."""
        return s.tokens * self.width * s.weight_bytes

    def _casts(self, s: Shape, matrices: int = 3) -> int:
        """Autocast's 16-bit copies of some of the three matrices."""
        return matrices * s.weight_bytes * self.width * self.model.hidden_size if s.autocast else 0

    def saved(self, s: Shape, backend: Backend) -> Bytes:
        wide = self._wide(s)
        return {
            "residual": s.narrow(s.residual_bytes),
            "norm": s.narrow() * (2 if s.autocast else 1) + 4 * s.tokens,  # both matrices' input (cast for each), 1/rms
            "gate": 2 * wide + (wide + s.tokens if s.packed else 0),  # f, 1 - f; with the starts, and where they are
            "candidate": wide,
            "states": wide,  # h before each token, which multiplies f
            "back": wide,  # the states, stacked
            "casts": self._casts(s),
        }

    def forward(self, s: Shape, backend: Backend) -> Moments:
        saved, wide = self.saved(s, backend), self._wide(s)
        norm = s.narrow(s.stored) + (0 if backend.norm_in_kernel else 2 * s.narrow(4))
        normed = s.narrow(s.stored) if s.autocast else 0  # the mixer's argument
        update = {"workspace": normed + wide}  # (1 - f) c lives until the loop ends
        return [
            ("norm", {"residual": saved["residual"], "workspace": norm}),
            ("recurrence", add(saved, update)),
            ("back", add(saved, {"workspace": normed + s.narrow() + s.narrow(s.residual_bytes)})),
        ]

    def backward(self, s: Shape, backend: Backend) -> Moments:
        saved, wide = self.saved(s, backend), self._wide(s)
        d, E = self.model.hidden_size, self.width
        stream = s.narrow(s.residual_bytes)

        def moment(keep: str, workspace: int, made: int) -> Bytes:
            kept = {name: saved[name] for name in keep.split()}
            return kept | {"stream": stream, "workspace": workspace, "gradients": made}

        thin = s.narrow(s.stored)
        closing = thin + (thin if backend.norm_in_kernel else norm_backward(s, backend))
        cast = s.narrow() if s.weight_bytes != s.residual_bytes else 0
        return [
            ("back", moment(" ".join(saved), cast + wide + self._casts(s, 1), E * d)),
            ("recurrence", moment("residual norm gate candidate", 3 * wide + self._casts(s, 2), E * d)),
            ("gate", moment("residual norm", 3 * wide + self._casts(s, 2), E * d)),
            ("norm", moment("residual norm", closing, 3 * E * d + E)),
        ]
