"""The largest moment of a training step: forward, loss, backward and optimizer step walked through, layer by layer.

A moment is what is alive at one point of the code, by component. The family says what each of its layers saves and
needs; layers may differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hf_mamba.family import Family
from hf_mamba.models.common.cost import (
    Backend,
    Block,
    Bytes,
    Moments,
    Shape,
    add,
    loss_backward,
    loss_forward,
    norm_backward,
    saved_by_batch,
    saved_by_checkpoint,
    saved_by_head,
    total,
)
from hf_mamba.preflight.cost.states import States


@dataclass(frozen=True)
class Peak:
    """The largest moment of a phase: where it is, and the bytes of each component then."""

    where: str
    parts: Bytes

    @property
    def bytes(self) -> int:
        return total(self.parts)


class Timeline:
    """What is alive as a step goes on, by component, and the largest moment of each phase so far."""

    def __init__(self, alive: Bytes) -> None:
        self.alive = alive
        self._size = total(alive)
        self.peaks: dict[str, Peak] = {}
        self._largest: dict[str, int] = {}

    def keep(self, parts: Bytes) -> None:
        """Count these bytes from now on."""
        self.alive = add(self.alive, parts)
        self._size += total(parts)

    def free(self, parts: Bytes) -> None:
        """Count these bytes no longer."""
        self.keep({kind: -size for kind, size in parts.items()})

    def moment(self, phase: str, where: str, *temporary: Bytes) -> None:
        """Remember this moment, if its phase has had no larger one."""
        size = self._size + total(*temporary)
        if size > self._largest.get(phase, -1):
            self._largest[phase] = size
            parts = add(self.alive, *temporary)
            self.peaks[phase] = Peak(where, {kind: size for kind, size in parts.items() if size})


@dataclass(frozen=True)
class _Layer:
    """A layer's memory in one micro-batch, evaluated once for all layers that are alike."""

    saved: Bytes
    forward: Moments
    backward: Moments

    @property
    def casts(self) -> Bytes:
        """What autocast keeps until the forward ends, with checkpointing too."""
        return {"casts": self.saved.get("casts", 0)}


def _layers(s: Shape, family: Family, backend: Backend) -> list[_Layer]:
    known: dict[Block, _Layer] = {}
    blocks = [family.block(s.model, i) for i in range(s.model.num_hidden_layers)]
    for block in blocks:
        if block not in known:
            known[block] = _Layer(block.saved(s, backend), block.forward(s, backend), block.backward(s, backend))
    return [known[block] for block in blocks]


def walk(s: Shape, states: States, family: Family, backend_name: str, checkpointing: bool) -> dict[str, Peak]:
    """The largest moment of each phase, "forward", "backward" and "step", of a micro-step after the first step."""
    backend = family.backends[backend_name]
    layers = _layers(s, family, backend)
    timeline = Timeline(add(states.device, saved_by_batch(s)))
    _forward(timeline, s, states, layers, checkpointing)
    _backward(timeline, s, states, layers, backend, checkpointing)
    _step(timeline, s, states)
    return timeline.peaks


def _same(s: Shape, layer: int, checkpointing: bool) -> Bytes:
    """The residual that a block saves, once less where its checkpoint is the same tensor."""
    same = checkpointing and (layer > 0 or s.stored == s.residual_bytes)
    return {"residual": -s.narrow(s.residual_bytes)} if same else {}


def _forward(t: Timeline, s: Shape, states: States, layers: Sequence[_Layer], checkpointing: bool) -> None:
    """All blocks, then the loss; ends with what the backward needs alive."""
    before = _accumulated(states)
    for i, layer in enumerate(layers):
        for where, moment in states.before_forward(i):
            t.moment("forward", f"block {i}, {where}", before, moment)
        beside = add(before, states.in_forward(s, i))
        if checkpointing:
            t.keep(saved_by_checkpoint(s, first=i == 0))
        same = _same(s, i, checkpointing)
        for where, moment in layer.forward:
            t.moment("forward", f"block, {where}", beside, moment, same)
        t.keep(layer.casts if checkpointing else layer.saved)
    t.keep(saved_by_head(s))
    t.moment("forward", "loss", before, states.in_forward(s, len(layers)), {"logits": loss_forward(s)})
    if checkpointing:
        t.free(add(*(layer.casts for layer in layers)))


def _accumulated(states: States) -> Bytes:
    """The gradients of earlier micro-steps."""
    return states.gradients_made(0, 0) if states.accumulation > 1 else {}


def _backward(
    t: Timeline, s: Shape, states: States, layers: Sequence[_Layer], backend: Backend, checkpointing: bool
) -> None:
    """The loss, the final norm, the blocks from the last to the first, the embedding; ends with the forward's freed."""
    vocabulary = s.model.vocab_size * s.model.hidden_size
    tied, made = (vocabulary, 0) if s.model.tie_word_embeddings else (0, vocabulary)
    head, stream = saved_by_head(s), {"stream": s.narrow(s.residual_bytes)}
    turn = states.in_backward(s, len(layers))
    t.moment("backward", "loss", _accumulated(states), turn, {"logits": loss_backward(s)})
    t.free(head)
    norm = {kind: head[kind] for kind in ("residual", "norm")}
    norm["workspace"] = s.narrow(s.stored) + norm_backward(s, backend)
    weights = states.after_head(s)
    t.moment("backward", "final norm", norm, states.gradients_made(made, tied), weights)
    for i in reversed(range(len(layers))):
        layer = layers[i]
        for where, moment in states.before_backward(i):
            t.moment("backward", f"block {i}, {where}", states.gradients_made(made, tied), stream, moment)
        if not checkpointing:
            t.free(layer.saved)
        beside = add(states.in_backward(s, i), _same(s, i, checkpointing))
        for where, moment in layer.backward:
            gradients = states.gradients_made(made, tied, moment["gradients"])
            t.moment("backward", f"block {i}, {where}", beside, gradients, {**moment, "gradients": 0})
        if checkpointing:
            cast = {"stream": s.narrow() if s.weight_bytes != s.residual_bytes else 0}  # the mixer's share of it
            beside = add(beside, states.gradients_made(made, tied), stream, cast)
            for where, moment in layer.forward[:-1]:  # nothing needs what the last one computes
                t.moment("backward", f"block {i} again, {where}", beside, moment)
            t.free(saved_by_checkpoint(s, first=i == 0))
        for where, moment in states.after_backward(i):
            t.moment("backward", f"block {i}, {where}", states.gradients_made(made, tied), stream, moment)
        made += states.by_layer.get(i, 0)
    embedding = {"workspace": vocabulary * s.stored + s.narrow(s.residual_bytes)}
    last = states.gradients_made(states.count - vocabulary, tied)
    t.moment("backward", "embeddings", states.in_backward(s, -1), last, embedding)
    t.moment("backward", "reduction", states.reduction())


def _step(t: Timeline, s: Shape, states: States) -> None:
    """The norm of the gradients and the optimizer's step, stage 3's parameters partitioned again."""
    t.free({"gathered": t.alive.get("gathered", 0)})
    t.moment("step", "gradient norm", states.gradient_norm())
    t.moment("step", "optimizer", states.optimizer_step())
    if s.device == "cpu" and states.world > 1 and states.zero.stage in (1, 2):  # gloo gathers into a copy
        t.moment("step", "gathering weights", {"step": s.weight_bytes * states.largest_group})
