"""The largest moment of a training step: forward, loss, backward and optimizer step walked through in formulas.

A moment is what is alive at one point of the code, by component. Blocks are alike, and what is alive changes linearly
from block to block, so that the first and the last one hold the extremes.
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_mamba.models.common.cost import (
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
from hf_mamba.models.mamba.memory import BACKENDS, block_backward, block_forward, saved_by_block
from hf_mamba.models.mamba.table import table as parameters
from hf_mamba.preflight.cost.states import States, gradient_norm, gradients_made, optimizer_step, reduction


@dataclass(frozen=True)
class Peak:
    """The largest moment of a phase: where it is, and the bytes of each component then."""

    where: str
    parts: Bytes

    @property
    def bytes(self) -> int:
        return total(self.parts)


def gathered(states: States, device: str, block: int | None = None) -> Bytes:
    """Stage 3's full weights beside the persistent ones, at the turn from forward to backward or in a block's backward.

    At least the block in use and the head. What will be used again within `max_reuse` elements stays
    (zero/partitioned_param_coordinator.py, __params_to_release), and each module's call prefetches on, by whole
    parameters and so faster than they are used up, until `max_live` elements are there (fetch_sub_module). In the
    backward what is done does not come again: blocks later than `block`, and an untied head.
    """
    in_place = states.world == 1 and (states.zero.offload != "full" or device == "cpu")  # the partition is the weight
    if states.zero.stage != 3 or in_place:
        return {}
    own = [p for p in parameters(states.model) if p.size >= states.zero.persistence]
    ahead = sum(p.size for p in own if block is None or p.layer <= block)
    one_block = sum(p.size for p in own if p.layer == 0)
    head = states.model.vocab_size * states.model.hidden_size
    head = head if head >= states.zero.persistence else 0
    live = states.zero.max_live if states.zero.prefetch else 0
    near = states.zero.max_reuse // 2
    return {"gathered": states.weight_bytes * min(ahead, max(near + one_block + head, live))}


def walk(s: Shape, states: States, backend_name: str, checkpointing: bool) -> dict[str, Peak]:
    """The largest moment of each phase, "forward", "backward" and "step", of a micro-step after the first step."""
    backend, layers = BACKENDS[backend_name], s.model.num_hidden_layers
    block, batch, head = saved_by_block(s, backend), saved_by_batch(s), saved_by_head(s)
    vocabulary = s.model.vocab_size * s.model.hidden_size
    base = add(states.device, batch)
    accumulated = gradients_made(states, 0, 0) if states.accumulation > 1 else {}
    turn = gathered(states, s.device)
    # autocast keeps its casts until the forward ends, whoever still needs them
    cached = {"casts": (layers - 1) * block["casts"]} if checkpointing else {}
    phases: dict[str, Moments] = {"forward": [], "backward": [], "step": []}

    def left(count: int) -> Bytes:
        """What `count` finished blocks keep."""
        if checkpointing:
            inputs = [saved_by_checkpoint(s, first=i == 0) for i in range(min(count, 2))]
            later = {kind: size * max(count - 2, 0) for kind, size in saved_by_checkpoint(s, first=False).items()}
            return add(*inputs, later)
        return {kind: size * count for kind, size in block.items()}

    forward = block_forward(s, backend)
    for where, moment in forward:
        same = checkpointing and (layers > 1 or s.stored == s.residual_bytes)  # the checkpoint is the residual
        shared = {"residual": -moment["residual"]} if same else {}
        held = left(layers) if checkpointing else left(layers - 1)
        phases["forward"].append((f"block, {where}", add(base, accumulated, turn, held, moment, shared, cached)))
    everything = add(base, left(layers), head)
    casts = {"casts": layers * block["casts"]} if checkpointing else {}
    loss = add(everything, accumulated, turn, casts, {"logits": loss_forward(s)})
    phases["forward"].append(("loss", loss))

    tied = vocabulary if s.model.tie_word_embeddings else 0
    made_by_head = 0 if tied else vocabulary
    start = gradients_made(states, 0, 0) if states.accumulation > 1 else {}
    phases["backward"].append(("loss", add(everything, start, turn, {"logits": loss_backward(s)})))
    norm = {kind: head[kind] for kind in ("residual", "norm")} | {
        "workspace": s.narrow(s.stored) + norm_backward(s, backend)
    }
    of_head = gradients_made(states, made_by_head, tied)
    phases["backward"].append(
        ("final norm", add(base, left(layers), norm, of_head, gathered(states, s.device, layers - 1)))
    )
    inside = block_backward(s, backend)
    per_block = states.block()
    for i in {0, layers - 1}:
        later = made_by_head + (layers - 1 - i) * per_block
        weights = gathered(states, s.device, i)
        shared = left(i + 1) if checkpointing else left(i)
        again = (
            {"residual": -s.narrow(s.residual_bytes)} if checkpointing and (i or s.stored == s.residual_bytes) else {}
        )
        for where, moment in inside:
            made = later + moment["gradients"]
            own = {**moment, "gradients": 0}
            gradients = gradients_made(states, made, tied)
            phases["backward"].append((f"block {i}, {where}", add(base, weights, gradients, shared, again, own)))
        if checkpointing:
            stream = {"stream": s.narrow(s.residual_bytes)}
            gradients = gradients_made(states, later, tied)
            for where, moment in forward[:-1]:  # it stops before out_proj
                phases["backward"].append(
                    (f"block {i} again, {where}", add(base, weights, gradients, shared, again, moment, stream))
                )
    embedding = {"workspace": vocabulary * s.stored + s.narrow(s.residual_bytes)}
    last = gradients_made(states, states.count - vocabulary, tied)
    phases["backward"].append(("embeddings", add(base, gathered(states, s.device, -1), last, embedding)))
    phases["backward"].append(("reduction", add(base, reduction(states))))
    partitioned = {kind: size for kind, size in base.items() if kind != "gathered"}
    phases["step"].append(("gradient norm", add(partitioned, gradient_norm(states))))
    phases["step"].append(("optimizer", add(partitioned, optimizer_step(states))))
    if s.device == "cpu" and states.world > 1 and states.zero.stage in (1, 2):  # gloo gathers into a copy
        copy = {"step": s.weight_bytes * states.largest_group}
        phases["step"].append(("gathering weights", add(partitioned, copy)))
    return {name: _largest(moments) for name, moments in phases.items()}


def _largest(moments: Moments) -> Peak:
    where, parts = max(moments, key=lambda m: total(m[1]))
    return Peak(where, {kind: size for kind, size in parts.items() if size})
