"""What FSDP2 keeps on a rank and what its phases add: read from torch 2.13 and accelerate 1.15, then measured.

accelerate makes a unit of each block, one of the final norm and the head (with tied weights the embedding, too), and
where the head is its own the embedding (utils/fsdp_utils.py, fsdp2_prepare_model). A parameter is cut along its first
dimension, so a rank holds ceil(rows / W) rows of it: S elements of a unit, always fp32, with its moments and, once
reduced, its gradient. c is bytes of a gathered weight: 4 in fp32, 2 in bf16 and fp16.

    gathering a unit   c W S for the collective, c S beside it in 16 bits, then c W S for the weights themselves
    forward            a block's weights and its collective's buffer, which the next one's frees; the head's stay
    backward           a block's weights, the buffer of the one before it, which is prefetched, and the head's weights
    reducing a unit    its gradients, c N, beside c W S for the collective; then the last of them, c S and, in 16 bits,
                       4 S
    step               AdamW's foreach way: the square roots of its larger group's second moments

A collective's input for reducing stays until the next unit is reduced (_fsdp_param_group.py, post_backward). With
accumulation all gradients stay whole until the last micro-step, c N: Trainer's no_sync.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from hf_mamba.family import Parameter
from hf_mamba.models.common.cost import Bytes, Moments, Shape, add, total
from hf_mamba.plan import FsdpPlan
from hf_mamba.preflight.cost.states import States, Zero
from hf_mamba.sizes import ceil_div


@dataclass(frozen=True)
class Fsdp2:
    """The part of FSDP2's settings that decides memory."""

    reshard: bool = True  # a block's weights are freed between its forward and its backward

    @classmethod
    def of(cls, plan: FsdpPlan | None) -> Fsdp2 | None:
        """The settings of a plan; None where it has no FSDP, or `without_formula` says why it is not predicted."""
        return None if plan is None or without_formula(plan) else cls(plan.sharding == "FULL_SHARD")

    @property
    def label(self) -> str:
        return "FSDP2" if self.reshard else "FSDP2, SHARD_GRAD_OP"


def without_formula(plan: FsdpPlan) -> str:
    """What of a plan's FSDP no formula is for, or ""."""
    if plan.version == 1:
        return "FSDP 1"
    if plan.offload:
        return "FSDP's offloading"
    return "" if plan.wrapping == "TRANSFORMER_BASED_WRAP" else f"FSDP's {plan.wrapping}"


@dataclass(frozen=True)
class ShardedStates(States):
    """The states of one rank under FSDP2; its units by layer: -1 (an embedding of its own), the blocks, the head.

    Attributes:
        reshard: whether a block's weights are freed after its forward.
        gloo: whether the collectives are gloo's, on CPUs, which work in a copy.
    """

    reshard: bool = True
    gloo: bool = False

    @cached_property
    def head(self) -> int:
        return max(p.layer for p in self.table)

    @cached_property
    def tied(self) -> bool:
        return sum(p.layer == self.head for p in self.table) == 1  # the final norm alone

    @cached_property
    def units(self) -> dict[int, list[Parameter]]:
        """Parameters by layer in the order in which torch reduces them; a tied embedding is the head's."""
        out: dict[int, list[Parameter]] = {}
        for p in sorted(self.table, key=lambda p: p.layer if p.layer >= 0 else self.head + 1):
            out.setdefault(self.head if self.tied and p.layer < 0 else p.layer, []).append(p)
        return out

    @cached_property
    def held(self) -> dict[int, int]:
        """Elements of each unit on this rank."""
        return {layer: sum(map(self._part, unit)) for layer, unit in self.units.items()}

    def _part(self, parameter: Parameter) -> int:
        return ceil_div(parameter.shape[0], self.world) * (parameter.size // parameter.shape[0])

    def _whole(self, layer: int) -> int:
        """Bytes of a unit's gathered weights, padding included; 0 where there is no such unit."""
        return self.weight_bytes * self.world * self.held.get(layer, 0)

    def _kept(self, below: int) -> int:
        """Bytes of the weights that stay gathered beside the blocks from `below` on."""
        blocks = 0 if self.reshard else sum(self._whole(layer) for layer in range(-1, below))
        return blocks + (self._whole(self.head) if self.tied else 0)

    def _gathering(self, layer: int) -> int:
        """Bytes of a collective that gathers a unit, and of what is beside it."""
        cast = self.weight_bytes * self.held.get(layer, 0) if self.weight_bytes < 4 else 0
        return (2 if self.gloo else 1) * self._whole(layer) + cast

    def in_forward(self, s: Shape, layer: int) -> Bytes:
        if layer == self.head and self.tied:  # its weights are there from the embedding on
            return {"gathered": self._kept(layer) + self._whole(layer - 1)}
        return {"gathered": self._kept(layer) + 2 * self._whole(layer)}

    def before_forward(self, layer: int) -> Moments:
        before = layer - 1 if layer else self.head if self.tied else -1
        size = self._kept(layer) + self._whole(before) + self._gathering(layer)
        return [("gathering", {"gathered": size})]

    def in_backward(self, s: Shape, layer: int) -> Bytes:
        return self._backward(layer, self._whole(layer - 1))

    def before_backward(self, layer: int) -> Moments:
        return [("gathering", self._backward(layer, self._gathering(layer - 1)))]

    def _backward(self, layer: int, before: int) -> Bytes:
        """Weights beside a unit's backward with what the unit before takes, and the last collective's input."""
        own = 0 if layer == self.head and self.tied else self._whole(layer)
        reduced = 0 if layer + 1 == self.head and self.tied else self._whole(layer + 1)
        if not self.reshard:  # all are there from the forward
            own, before = own if layer == self.head else 0, 0
        return {"gathered": self._kept(min(layer + 1, self.head)) + own + before, "buckets": reduced}

    def after_head(self, s: Shape) -> Bytes:
        return self.in_backward(s, self.head)

    def gradients_made(self, made: int, tied_head: int, fresh: int = 0) -> Bytes:
        held, made = self._reduced(made)
        whole = tied_head + (self.count - made if self.accumulation > 1 else fresh)
        return {"gradients": 4 * held + self.weight_bytes * whole}

    def _reduced(self, made: int) -> tuple[int, int]:
        """(elements on this rank, elements) of the units that are reduced once so many are made, the last first."""
        held = size = 0
        for layer in sorted(self.units, reverse=True):
            if layer == self.head and self.tied:
                continue
            size += sum(p.size for p in self.units[layer] if layer < self.head or p is self.units[layer][-1])
            if made < size:
                return held, made
            held += self.held[layer]
        return held, made

    def after_backward(self, layer: int) -> Moments:
        c, own, unit = self.weight_bytes, self.held[layer], self.units[layer]
        whole, beside = self._whole(layer), self._kept(layer) + (self._whole(layer - 1) if self.reshard else 0)
        made = 0 if self.accumulation > 1 else sum(p.size for p in unit)
        last = c * unit[-1].size  # torch lets it go late
        reduced = {"gradients": last + c * own, "buckets": whole + max(whole * self.gloo, 4 * own if c < 4 else 0)}
        return [
            ("reducing", {"gathered": beside, "gradients": c * made, "buckets": whole}),
            ("reduced", {"gathered": beside, **reduced}),
        ]

    def reduction(self) -> Bytes:
        last = self.head if self.tied else -1
        moments = [add(moment, {"gathered": -moment["gathered"]}) for _, moment in self.after_backward(last)]
        rest = 4 * sum(own for layer, own in self.held.items() if layer != last)
        return add(max(moments, key=total), {"gradients": rest})

    def gradient_norm(self) -> Bytes:
        return {"gradients": 4 * sum(self.held.values())}

    def optimizer_step(self) -> Bytes:
        roots = 4 * sum(self._part(p) for p in self.table if p.decays) if self.foreach else 0
        return {"gradients": 4 * sum(self.held.values()), "step": roots}


def fsdp_states(
    table: tuple[Parameter, ...],
    fsdp: Fsdp2,
    world: int,
    weight_bytes: int,
    accumulation: int = 1,
    foreach: bool = False,
    gloo: bool = False,
) -> ShardedStates:
    """The persistent bytes of one rank under FSDP2: the table at the top of this file."""
    out = ShardedStates(table, Zero(), world, weight_bytes, accumulation, foreach, reshard=fsdp.reshard, gloo=gloo)
    held = sum(out.held.values())
    out.device.update(weights=4 * held, moments=8 * held)
    return out
