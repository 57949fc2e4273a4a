"""What DeepSpeed keeps on a rank and what its phases add, by ZeRO stage: read from deepspeed 0.19.8, then measured.

And what PyTorch keeps without it, in "plain" states.

N parameters, W ranks, w bytes of a weight (4 in fp32, 2 in bf16 and fp16), G the largest optimizer group (the decayed
matrices). Bytes per parameter of a rank, after its first step:

    stage 0   w + 8 (fp32: the weights are the masters), w + 4 + 8 (16 bits)     fp16/unfused_optimizer.py
    stage 1,2 w + (4 + 8) / W                                                   zero/stage_1_and_2.py, __init__
    stage 3   (w + 4 + 8 + w) / W + gathered                                     zero/stage3.py, __init__

    while gradients are made
    stage 0   w N                      stage 1   w N, then w P beside it, once reduced
    stage 2   w P + buckets            stage 3   buckets (w P counted above)

P is the elements of the parameters that overlap the rank's partition: N/W and one parameter cut in two. A reduce bucket
is `reduce_bucket_size` elements, two with `overlap_comm`.

    the step  stage 0   16 bits: every gradient in fp32, 4 N, beside the 16-bit ones (fp16/unfused_optimizer.py)
              stage 1,2 w P + w G/W, and 4 G/W in 16 bits
              stage 3   w G/W, and 4 G/W in 16 bits

    plain     4 N weights, 8 N moments, 4 N gradients (fp32 also under autocast), and with W > 1 the buckets of
              DistributedDataParallel, 4 N: all gradients once more, since they are no views of them by default

Muon keeps one momentum, 4 bytes, of a matrix's element, and works on the matrices of one shape together
(optimizers.py).

AdamW's foreach way adds the square roots of a group's second moments, 4 G/W (4 G in stage 0 and plain), to the flat
gradient in fp32, 4 G/W; the fused one nothing. The w P of stages 1 and 2 are one buffer, which stays until the step
ends. Before the step the norm is taken of one gradient after another, each in fp64: of a rank's own pieces of them.

Optimizer offload moves masters, moments and fp32 gradients (16 N/W together) and a 16-bit copy of the partition to the
host; parameter offload (stage 3) also moves the partition itself.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

from hf_mamba.family import Parameter
from hf_mamba.models.common.cost import Bytes, Moments, Shape
from hf_mamba.preflight.optimizers import moment_bytes, muon_step_bytes
from hf_mamba.sizes import ceil_div

# DeepSpeed's own defaults (zero/config.py); transformers fills "auto" with the functions of d in `Zero.auto`
REDUCE_BUCKET = 500_000_000
FALLBACK_BUCKET = 500_000_000  # elements of stage 0's all-reduce (engine.py, buffered_allreduce_fallback)
OFFLOADS = ("none", "optimizer", "full")


@dataclass(frozen=True)
class Zero:
    """The parts of `zero_optimization` that decide memory."""

    stage: int = 0
    offload: str = "none"  # "optimizer": offload_optimizer; "full": offload_param too (stage 3)
    reduce_bucket: int = REDUCE_BUCKET  # elements
    overlap_comm: bool | None = None  # None: by stage (zero/config.py)
    prefetch: int = 50_000_000  # elements
    persistence: int = 100_000  # elements: smaller parameters stay gathered
    max_reuse: int = 1_000_000_000  # elements: nearer uses stay gathered
    max_live: int = 1_000_000_000  # elements: no more are prefetched

    @classmethod
    def auto(cls, stage: int, offload: str, hidden: int) -> Zero:
        """What transformers writes for "auto" (integrations/deepspeed.py, trainer_config_finalize)."""
        return cls(stage, offload, hidden * hidden, None, int(0.9 * hidden * hidden), 10 * hidden)

    @property
    def overlaps(self) -> bool:
        """Whether reductions below stage 3 are made beside the backward, which takes a second bucket."""
        return bool(self.overlap_comm) and self.stage < 3


@dataclass(frozen=True)
class States:
    """Persistent bytes of one rank, `device` and `host`, by component; and the additions of the phases."""

    table: tuple[Parameter, ...]
    zero: Zero
    world: int
    weight_bytes: int
    accumulation: int = 1
    foreach: bool = False  # AdamW's way; fused otherwise
    plain: bool = False  # without DeepSpeed
    muon: bool = False  # in AdamW's place
    gpu: bool = True
    device: Bytes = field(default_factory=dict)
    host: Bytes = field(default_factory=dict)

    @cached_property
    def groups(self) -> list[list[int]]:
        """Sizes of the decayed and of the other parameters: the optimizer's two groups."""
        return [[p.size for p in self.table if p.decays], [p.size for p in self.table if not p.decays]]

    @cached_property
    def count(self) -> int:
        return sum(map(sum, self.groups))

    @cached_property
    def largest_group(self) -> int:
        return sum(self.groups[0])

    def shard(self, elements: int) -> int:
        return ceil_div(elements, self.world)

    @cached_property
    def partition(self) -> int:
        """P of the rank that has most: elements of the parameters that overlap its share of each group."""
        return max(held for held, _ in self.shares)

    @cached_property
    def shares(self) -> list[tuple[int, int]]:
        """P of the first ranks and the last, each with the largest piece of one parameter in the rank's share."""
        out = []
        for rank in {*range(min(self.world, 8)), self.world - 1}:
            held = piece = 0
            for sizes in self.groups:
                share = self.shard(sum(sizes))
                ends = list(accumulate(sizes))
                begin, end = rank * share, (rank + 1) * share
                first = bisect_right(ends, begin)
                last = min(bisect_right(ends, end - 1), len(sizes) - 1)
                held += sum(sizes[first : last + 1])
                inside = (min(ends[i], end) - max(ends[i] - sizes[i], begin) for i in range(first, last + 1))
                piece = max(piece, *inside, 0)
            out.append((held, piece))
        return out

    @cached_property
    def buckets(self) -> int:
        return self.zero.reduce_bucket * self.weight_bytes * (2 if self.zero.overlaps else 1)

    @cached_property
    def persistent_parameters(self) -> int:
        """Elements that stage 3 never partitions away."""
        return sum(p.size for p in self.table if p.size < self.zero.persistence)

    @cached_property
    def by_layer(self) -> dict[int, int]:
        """Elements of each layer's parameters."""
        return _by_layer(self.table)

    @cached_property
    def partitioned_by_layer(self) -> dict[int, int]:
        """Of these, the elements that stage 3 partitions and gathers again."""
        return _by_layer([p for p in self.table if p.size >= self.zero.persistence])

    def gathered(self, s: Shape, block: int | None = None) -> Bytes:
        """Stage 3's full weights beside the persistent ones, at the turn to the backward or in a block's backward.

        At least the largest block and the head. What will be used again within `max_reuse` elements stays
        (zero/partitioned_param_coordinator.py, __params_to_release), and each module's call prefetches on, by whole
        parameters and so faster than they are used up, until `max_live` elements are there (fetch_sub_module). In the
        backward what is done does not come again: blocks later than `block`, and an untied head.
        """
        zero, layers = self.zero, s.model.num_hidden_layers
        in_place = self.world == 1 and (zero.offload != "full" or s.device == "cpu")  # the partition is the weight
        if zero.stage != 3 or in_place:
            return {}
        own = self.partitioned_by_layer
        ahead = sum(size for layer, size in own.items() if block is None or layer <= block)
        one_block = max(own.get(layer, 0) for layer in range(layers))
        head = s.model.vocab_size * s.model.hidden_size
        head = head if head >= zero.persistence else 0
        live = zero.max_live if zero.prefetch else 0
        near = zero.max_reuse // 2
        return {"gathered": self.weight_bytes * min(ahead, max(near + one_block + head, live))}

    def in_forward(self, s: Shape, layer: int) -> Bytes:
        """Weights gathered beside a layer's forward; that of the number of blocks is the head's."""
        return self.gathered(s)

    def in_backward(self, s: Shape, layer: int) -> Bytes:
        """Weights gathered beside a layer's backward, and buffers of what was reduced before it."""
        return self.gathered(s, layer)

    def after_head(self, s: Shape) -> Bytes:
        """Weights gathered once the loss's backward is done."""
        return self.gathered(s, s.model.num_hidden_layers - 1)

    def before_forward(self, layer: int) -> Moments:
        """What gathering a layer's weights takes; none where others' take as much."""
        return []

    def before_backward(self, layer: int) -> Moments:
        """What gathering the weights for a layer's backward takes; none where others' take as much."""
        return []

    def after_backward(self, layer: int) -> Moments:
        """What reducing a layer's gradients takes; none where others take as much."""
        return []

    def gradients_made(self, made: int, tied_head: int, fresh: int = 0) -> Bytes:
        """Bytes of the gradients held once `made` elements of gradients have been computed.

        `tied_head`: elements of the head's gradient, which waits for the embedding's before it is handed over.
        `fresh`: of a block whose backward is not done.
        """
        made += fresh
        w, stage = self.weight_bytes, self.zero.stage
        if stage == 0 or (stage == 1 and not self.zero.overlaps):
            held = self.count if self.accumulation > 1 else made
            extra = {} if stage == 0 or not made else {"buckets": self.buckets}
            return {"gradients": w * (held + tied_head), **extra}
        if stage == 3:
            return {"gradients": w * tied_head}
        buckets = {"buckets": self.buckets if made else 0}
        if self.zero.offload != "none":
            waiting = w * (self.count - made) if stage == 1 and self.accumulation > 1 else 0
            return {"gradients": w * tied_head + waiting, **buckets}
        kept = w * self.partition if made > self.zero.reduce_bucket else 0  # allocated when the first bucket is full
        accumulators = 0
        if self.accumulation > 1:  # stage 1 reduces at the end of the last micro-step only
            accumulators = w * (self.partition if stage == 2 else self.count - made)
        return {"gradients": w * tied_head + kept, "accumulators": accumulators, **buckets}

    def reduction(self) -> Bytes:
        """The end of the backward: gradients all made, none freed yet."""
        w = self.weight_bytes
        out = self.gradients_made(self.count, 0)
        if self.zero.stage == 0 and not self.plain:  # the all-reduce's flat copy, made for one rank too
            out["buckets"] = w * min(self.count, FALLBACK_BUCKET)
        if self.zero.stage == 1 and not self.zero.overlaps and self.zero.offload == "none":
            out["gradients"] += w * self.partition
        return out

    def gradient_norm(self) -> Bytes:
        """What the norm of the gradients adds: the rank's largest piece of one in fp64 (stages 1 to 3, get_norm_dtype).

        The rank that holds most gradients need not be the one with the largest piece: the peak is that of their sum.
        """
        w, stage = self.weight_bytes, self.zero.stage
        if stage == 0 or self.zero.offload != "none":
            return {}
        if stage == 3:
            return {"step": 8 * self.shard(max(max(sizes) for sizes in self.groups))}
        held, piece = max(self.shares, key=lambda own: w * own[0] + 8 * own[1])
        return {"gradients": w * held, "step": 8 * piece}

    def optimizer_step(self) -> Bytes:
        """What the step adds to the persistent bytes (the states beside it are counted there)."""
        w, stage = self.weight_bytes, self.zero.stage
        half = w < 4
        if self.zero.offload != "none":
            return {}
        if self.muon:
            return {"gradients": w * self.count, "step": muon_step_bytes(self.table, self.gpu)}
        if stage == 0:
            roots = 4 * self.largest_group if self.foreach else 0
            return {"gradients": w * self.count, "step": (4 * self.count if half else 0) + roots}
        per_share = 8 if self.foreach else w + 4 * half  # flat in fp32 and the roots; flat in w and in fp32
        return {
            "gradients": w * self.partition if stage < 3 else 0,
            "step": per_share * self.shard(self.largest_group),
        }


def _by_layer(table: Iterable[Parameter]) -> dict[int, int]:
    out: dict[int, int] = {}
    for parameter in table:
        out[parameter.layer] = out.get(parameter.layer, 0) + parameter.size
    return out


def plain_states(
    table: tuple[Parameter, ...],
    world: int,
    accumulation: int = 1,
    foreach: bool = False,
    muon: bool = False,
    gpu: bool = True,
) -> States:
    """The persistent bytes without DeepSpeed, on one device or under DistributedDataParallel."""
    out = States(table, Zero(), world, 4, accumulation, foreach, plain=True, muon=muon, gpu=gpu)
    out.device.update(weights=4 * out.count, moments=moment_bytes(table, muon))
    if world > 1:
        out.device["ddp_buckets"] = 4 * out.count
    return out


def states(
    table: tuple[Parameter, ...],
    zero: Zero,
    world: int,
    weight_bytes: int,
    accumulation: int = 1,
    foreach: bool = False,
) -> States:
    """The persistent bytes of one rank under DeepSpeed: the table at the top of this file."""
    out = States(table, zero, world, weight_bytes, accumulation, foreach)
    N, share, w = out.count, out.shard(out.count), weight_bytes
    device, host = out.device, out.host
    optimizer = host if zero.offload != "none" else device
    if zero.stage == 0:
        device["weights"] = w * N
        optimizer["master_weights"] = 4 * N if w < 4 else 0
        optimizer["moments"] = 8 * N
        return out
    optimizer["moments"] = 8 * share
    largest = max(max(sizes) for sizes in out.groups)
    if zero.stage < 3:
        device["weights"] = w * N
        optimizer["master_weights"] = 4 * share
        if zero.offload != "none":
            host["gradients"] = 4 * share
            host["transfer_buffers"] = w * share + w * largest
            device["transfer_buffers"] = w * largest
            if accumulation > 1 and zero.stage == 2:
                host["accumulators"] = w * out.partition
        return out
    (host if zero.offload == "full" else device)["weights"] = w * share
    optimizer["master_weights"] = 4 * share
    optimizer["gradients"] = w * share
    if zero.offload != "none":
        host["gradients"] = (w + 4) * share
    device["buckets"] = out.buckets
    if world > 1:  # one rank uses its partition as it is
        device["gathered"] = w * out.persistent_parameters
    return out
