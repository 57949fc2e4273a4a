"""The largest moment of a training step: forward, loss, backward and optimizer step walked through in formulas.

A moment is what is alive at one point of the code, by component. Blocks are alike, and what is alive changes linearly
from block to block, so that the first and the last one hold the extremes.
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_mamba.preflight.activations import (
    BACKENDS,
    CPU_LOSS_ROWS,
    GPU_LOSS_ROWS,
    LOSS_VOCABULARY_ROWS,
    Backend,
    Bytes,
    Shape,
    add,
    saved_by_batch,
    saved_by_block,
    saved_by_checkpoint,
    saved_by_head,
    total,
)
from hf_mamba.preflight.memory_states import (
    States,
    gradient_norm,
    gradients_made,
    optimizer_step,
    parameters,
    reduction,
)

Moments = list[tuple[str, Bytes]]


@dataclass(frozen=True)
class Peak:
    """The largest moment of a phase: where it is, and the bytes of each component then."""

    where: str
    parts: Bytes

    @property
    def bytes(self) -> int:
        return total(self.parts)


def block_forward(s: Shape, backend: Backend) -> Moments:
    """Moments of `MambaBlock.forward`, the block's own saved tensors included as they come."""
    saved = saved_by_block(s, backend)
    so_far: Bytes = {"residual": saved["residual"]}
    r = s.narrow(4)
    norm = s.narrow(s.stored) + (0 if backend.norm_in_kernel else 2 * r)
    normed = s.narrow(s.stored) if s.autocast else 0  # the mixer's argument, which in_proj has saved a cast of
    moments = [("norm", add(so_far, {"workspace": norm}))]
    so_far |= {kind: saved[kind] for kind in ("norm", "in_proj", "conv1d", "casts")}
    moments.append(("conv1d", add(so_far, {"workspace": normed + backend.conv_forward(s)})))
    moments.append(("scan", add(saved, {"workspace": normed + backend.scan_forward(s)})))
    moments.append(("out_proj", add(saved, {"workspace": s.narrow() + s.narrow(s.residual_bytes)})))
    return moments


def block_backward(s: Shape, backend: Backend) -> Moments:
    """Moments of a block's backward; saved tensors leave as their operation is done.

    `stream` is the residual's gradient. The block's own weight gradients are in "gradients", as they come, in the
    stored weight's dtype; under autocast one is a 16-bit one before, in the workspace.
    """
    m, w = s.model, s.weight_bytes
    saved = saved_by_block(s, backend)
    E, d, R, N = m.intermediate_size, m.hidden_size, m.time_step_rank, m.state_size
    stream = {"stream": s.narrow(s.residual_bytes)}
    thin, wide = s.narrow(), s.wide()

    def moment(keep: str, workspace: int, gradient: int) -> Bytes:
        kept = {kind: saved[kind] for kind in keep.split()}
        return add(kept, stream, {"workspace": workspace, "gradients": gradient})

    cast = thin if w != s.residual_bytes else 0
    bc = 2 * s.tokens * N * w
    out_proj_cast, in_proj_cast = s.casts("out_proj"), {"casts": s.casts("in_proj")}
    everything = " ".join(saved)
    before_scan = "residual norm in_proj conv1d x_proj dt_proj scan"
    out_proj, x_proj, in_proj = E * d, E * (2 * R + 2 * N + N + 3), 2 * E * d + E * (m.conv_kernel + 1)
    norm = norm_backward(s, backend)
    inner_casts = {"casts": s.casts("in_proj", "x_proj", "dt_proj")}
    conv1d = moment("residual norm in_proj", 3 * wide + backend.conv_backward(s), out_proj + x_proj)
    thin = s.narrow(s.stored)
    closing = thin + (thin if backend.norm_in_kernel else norm)
    return [
        ("out_proj", moment(everything, cast + wide + out_proj_cast, out_proj)),
        ("scan", add(moment(before_scan, 4 * wide + bc + backend.scan_backward(s), out_proj), inner_casts)),
        (
            "x_proj",
            add(moment("residual norm in_proj conv1d x_proj", 3 * wide + bc, out_proj + x_proj), inner_casts),
        ),
        ("conv1d", add(conv1d, in_proj_cast)),
        ("in_proj", add(moment("residual norm", 4 * wide, out_proj + x_proj), in_proj_cast, in_proj_cast)),
        ("norm", moment("residual norm", closing, out_proj + x_proj + in_proj)),
    ]


def norm_backward(s: Shape, backend: Backend) -> int:
    """ops/norm.py: the gradient and the normed input in fp32, three products; a kernel needs its output alone."""
    return s.narrow(s.stored) if backend.norm_in_kernel else (5 if s.stored < 4 else 4) * s.narrow(4)


def loss_forward(s: Shape) -> int:
    """ops/loss.py: a chunk's logits, softmax and gradient, beside the last chunk's, or its products.

    Beside them the normed hidden states and the shifted labels, twice.
    """
    V, d, w = s.model.vocab_size, s.model.hidden_size, s.weight_bytes
    limit = CPU_LOSS_ROWS if s.device == "cpu" else GPU_LOSS_ROWS
    first = min(limit, s.tokens)
    second = min(limit, s.tokens - first)
    if w < 4:
        chunk = max(10 * first, 6 * (first + second)) * V
        part = min(V, LOSS_VOCABULARY_ROWS) * d
        product = first * V * (4 + w) + w * part
        if second and s.device == "cpu":  # widened before it is added to the first chunk's
            product = max(product, second * V * (4 + w) + (w + 4) * part)
    else:
        chunk = (8 * first + 4 * second) * V
        product = 8 * first * V + 4 * first * d
    cast = w * (V + first) * d if s.autocast else 0  # of the head's weight and of a chunk's hidden states
    return max(chunk, product) + cast + s.narrow(s.stored) + 16 * s.tokens


def loss_backward(s: Shape) -> int:
    """ops/loss.py, `_gradient`: both gradients scaled out of place, the weight's in fp32 and then in its own dtype."""
    V, d, stored = s.model.vocab_size, s.model.hidden_size, s.stored
    return s.narrow(stored) + 4 * V * d + (stored * V * d if stored < 4 else 0)


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
    ahead = sum(p.size for p in own if block is None or p.place <= block)
    one_block = sum(p.size for p in own if p.place == 0)
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
