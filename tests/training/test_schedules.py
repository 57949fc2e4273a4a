"""The learning rate of every step, through the command line, against the formula."""

import math

import pytest
from runs import ROOT, Launcher, log_lines

PEAK, TOTAL = 0.004, 20


def cosine(step: int, warmup: int, floor: float) -> float:
    if step < warmup:
        return PEAK * step / warmup
    share = (step - warmup) / (TOTAL - warmup)
    return floor + (PEAK - floor) * 0.5 * (1 + math.cos(math.pi * share))


def stable(step: int, warmup: int, decay: int, floor: float) -> float:
    """WSD with transformers' cosine-shaped decay."""
    if step < warmup:
        return floor + (PEAK - floor) * step / warmup
    if step < TOTAL - decay:
        return PEAK
    share = (step - (TOTAL - decay)) / decay
    return floor + (PEAK - floor) * 0.5 * (1 + math.cos(math.pi * share))


CASES = {
    "cosine to a floor": (
        {"lr_scheduler_type": "cosine", "min_lr": 4e-4, "warmup_steps": 4},
        lambda step: cosine(step, 4, 4e-4),
    ),
    "cosine, warm-up by ratio": (
        {"lr_scheduler_type": "cosine", "min_lr": 0.0, "warmup_steps": None, "warmup_ratio": 0.25},
        lambda step: cosine(step, 5, 0.0),
    ),
    "cosine, warm-up by tokens": (
        {"lr_scheduler_type": "cosine", "min_lr": 0.0, "warmup_steps": None, "warmup_tokens": 500},
        lambda step: cosine(step, 4, 0.0),  # 500 tokens are begun in the 4th step of 8 x 16
    ),
    "WSD": (
        {"lr_scheduler_type": "warmup_stable_decay", "min_lr": 4e-4, "warmup_steps": 4, "decay_ratio": 0.3},
        lambda step: stable(step, 4, 6, 4e-4),
    ),
    "constant": (
        {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 4},
        lambda step: PEAK * min(step / 4, 1),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_rate_of_every_step(launcher: Launcher, name: str):
    settings, expected = CASES[name]
    folder = launcher.folder / name.replace(" ", "-").replace(",", "")
    launcher.run(folder, max_steps=TOTAL, save_strategy="no", seq_len=16, eval_fraction=0, **settings)
    rates = log_lines(folder, "learning_rate")
    # Trainer logs the rate of the update that a step has made, which counts steps from 0
    assert rates == pytest.approx({step: expected(step - 1) for step in range(1, TOTAL + 1)}, rel=1e-9, abs=1e-15)


def test_the_floor_survives_deepspeed(launcher: Launcher):
    settings, expected = CASES["cosine to a floor"]
    folder = launcher.folder / "floor-deepspeed"
    template = str(ROOT / "ds_configs" / "zero2.json")
    more = {"save_strategy": "no", "seq_len": 16, "eval_fraction": 0, "deepspeed": template}
    launcher.run(folder, 2, max_steps=TOTAL, **more, **settings)
    rates = log_lines(folder, "learning_rate")
    assert rates == pytest.approx({step: expected(step - 1) for step in range(1, TOTAL + 1)}, rel=1e-9, abs=1e-15)
