"""Constants that kernels and the planner share, and what an operation costs in them. No torch: plans run anywhere."""

SSD_CHUNK = 128  # steps between two states that `ssd` saves


def ssd_flops(length: int, heads: int, width: int, groups: int, states: int, backward: bool = False) -> int:
    """FLOPs of the matrix products of `ssd` for one row, as FlopCounterMode counts them on the torch backend.

    A chunk of T steps: C Bᵀ is 2 T² N per group; the T x T products 2 T² P per head; a product with a state 2 T N P per
    head. The backward repeats C Bᵀ, and gives two products back for each.
    """
    flops = 0
    for start in range(0, length, SSD_CHUNK):
        steps = min(SSD_CHUNK, length - start)
        pairs = steps * steps
        with_state = 2 * steps * states * width * heads
        if backward:
            flops += 2 * pairs * (3 * groups * states + 2 * heads * width + heads) + 6 * with_state
        else:
            flops += 2 * pairs * (groups * states + heads * width) + 2 * with_state
    return flops


def ssd_saved_bytes(length: int, heads: int, width: int, states: int) -> int:
    """Bytes of the fp32 states that `ssd` keeps for the backward of one row, beside its operands."""
    return 4 * -(-length // SSD_CHUNK) * heads * width * states


def gated_norm_saved_bytes(tokens: int, groups: int) -> int:
    """Bytes of the fp32 statistics that `gated_rms_norm` keeps, beside its operands."""
    return 4 * tokens * groups
