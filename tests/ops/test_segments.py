"""The number of segments against all numbers there are, in the same model; no GPU is asked."""

import pytest

from hf_mamba import segments
from hf_mamba.segments import Device
from hf_mamba.sizes import SCAN_CHUNK

DEVICES = {
    "H100": Device(132), "H200": Device(132), "A100": Device(108), "RTX 4090": Device(128, 48), "L4": Device(58, 48),
}  # fmt: skip
# rows, channels, steps: 130m to 2.8b from one row to many, long rows, and what is no power of two
SHAPES = [(b, e, n) for b in (1, 2, 4, 8, 16) for e in (1536, 3072, 5120) for n in (2048, 8192)] + [
    (1, 1536, 65_536), (1, 5120, 131_072), (2, 3072, 32_768), (1, 1536, 1000), (3, 4096, 1500),
    (1, 64, 4096), (32, 1536, 1024), (64, 768, 512), (5, 2560, 3333), (1, 8192, 16_384),
]  # fmt: skip
CHUNK = SCAN_CHUNK["triton"]


def every(length):
    return {segments.of_length(length, count) for count in range(1, -(-length // CHUNK) + 1)}


def older(channels, length):
    """The rule before: so many segments that 40,960 channels run at once, of at least 256 steps."""
    return segments.of_length(length, min(40_960 // channels, length // 256))


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_the_choice_is_within_5_percent_of_the_best(device, backward):
    assert len(SHAPES) == 40
    gains = []
    for batch, width, length in SHAPES:

        def cost(option, shape=(batch, width)):
            return segments.cycles(backward, *shape, 16, device, *option)

        chosen = segments.choose(backward, batch, width, length, 16, device)
        assert cost(chosen) <= 1.05 * min(map(cost, every(length))), (batch, width, length)
        gains.append(cost(older(batch * width, length)) / cost(chosen))
    assert min(gains) > 0.95
    assert max(gains) > 1.3  # the rule before lost so much somewhere on every device


@pytest.mark.parametrize("length", [1, 63, 64, 65, 255, 256, 1000, 1 << 20])
@pytest.mark.parametrize("states", [1, 16, 128])
def test_segments_cover_the_sequence(length, states):
    for backward in (False, True):
        steps, count = segments.choose(backward, 1, 64, length, states, Device(132))
        assert steps % CHUNK == 0
        assert (count - 1) * steps < length <= count * steps


def test_a_full_device_is_not_split():
    assert segments.choose(False, 64, 5120, 2048, 16, Device(58, 48)) == (2048, 1)


def test_programs_that_a_multiprocessor_holds():
    """65,536 registers, and where these do not bind, warps and programs."""
    assert segments.BACKWARD.resident(16, Device(132)) == 3
    assert segments.FORWARD.resident(16, Device(132)) == 19
    assert segments.FORWARD.resident(128, Device(132)) == 8
    assert segments.SUMMARY.resident(16, Device(58, 48)) == 24  # of 48 warps
