"""Constants that kernels and the planner share, and what an operation costs in them. No torch: plans run anywhere."""

SSD_CHUNK = 128  # steps between two states that `ssd` saves
MAMBA_SSM_DUAL_CHUNK = 256  # steps of a chunk that mamba-ssm's kernels are given for `ssd`, their own default
SCAN_CHUNK = {"torch": 32, "cpu": 32, "triton": 64}  # steps between two states that the scan saves, by backend

LOSS_VOCABULARY_ROWS = 8192  # of the head's 16-bit gradient at a time, before it is added up in fp32

CPU_GROUP = 128  # channels of one unit of work of the C kernels, each with its own dB and dC
CPU_ROWS = 128  # steps of one unit of the C convolution, each with its own gradient of the taps
CPU_TAPS = 8  # of the C convolution at most

TRITON_CHANNELS = 128  # of one program of the scan's backward
TRITON_BLOCK = 4  # steps whose states the scan's backward holds in registers
TRITON_RESIDENT = 3  # backward programs per multiprocessor, at 168 registers a thread
TRITON_CONV_STEPS, TRITON_CONV_TILES = 4, 32  # of one program of the convolution's backward: steps, and tiles of them


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def loss_rows(device: str) -> int:
    """Rows of the head and its loss at a time; larger chunks gain nothing."""
    return 512 if device == "cpu" else 2048


def triton_padded(states: int) -> int:
    """States in whole sixteens, as the scan's kernels read B and C."""
    return 16 * ceil_div(states, 16)


def triton_scratch(states: int) -> int:
    """Numbers in fp32 that one program of the Triton scan's backward keeps in memory of its own, for a chunk.

    16 states before every block of steps, each warp's rows of dB and dC, Δ, and three sums over the states where there
    are more than 16.
    """
    chunk = SCAN_CHUNK["triton"]
    return (chunk // TRITON_BLOCK * 16 + (5 if states > 16 else 2) * chunk) * TRITON_CHANNELS


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
    return 4 * ceil_div(length, SSD_CHUNK) * heads * width * states


def gated_norm_saved_bytes(tokens: int, groups: int) -> int:
    """Bytes of the fp32 statistics that `gated_rms_norm` keeps, beside its operands."""
    return 4 * tokens * groups


MUON_ELEMENTS = 2**22  # of the matrices of one shape that Muon orthogonalises at once


def muon_batch(elements: int) -> int:
    """How many matrices of so many elements Muon orthogonalises at once."""
    return max(1, MUON_ELEMENTS // elements)
