"""Updates that are not finite, or spikes, are not applied; the batch may be divided in any way."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import ROOT, Launcher, curve, log_lines, same_bytes, stop_in

from hf_mamba.run.skips import read_skips
from hf_mamba.training.guard import WINDOW, BadStep, Guard, poison, withhold

ENGINES = {
    "plain": (1, {}),
    "not fused": (1, {"optim": "adamw_torch"}),
    "muon": (1, {"optim": "muon"}),
    "ddp": (2, {}),
    "stage 0": (2, {"deepspeed": {"zero_optimization": {"stage": 0}}}),
    "zero2": (2, {"deepspeed": str(ROOT / "ds_configs" / "zero2.json")}),
    "zero3": (2, {"deepspeed": str(ROOT / "ds_configs" / "zero3.json")}),
}

# the loss of some steps is not a number, or its gradient is not, on the last rank only
BREAK = """
import functools
import torch
from hf_mamba.models.mamba.modeling_mamba import MambaForCausalLM
from hf_mamba.training.trainer import MambaTrainer
bad_steps, kind, step = {bad}, {kind!r}, [0]
training_step, forward = MambaTrainer.training_step, MambaForCausalLM.forward
def counting(self, *args, **kwargs):
    step[0] = self.state.global_step + 1
    return training_step(self, *args, **kwargs)
class Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()
    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")
@functools.wraps(forward)
def breaking(self, *args, **kwargs):
    out = forward(self, *args, **kwargs)
    import os
    if self.training and step[0] in bad_steps and os.environ.get("RANK", "0") == os.environ.get("LAST", "0"):
        if kind == "loss":
            out.loss = out.loss + float("inf")
        elif kind == "gradient":
            out.loss = Broken.apply(out.loss)
        else:
            out.loss = out.loss * 1e4
    return out
MambaTrainer.training_step, MambaForCausalLM.forward = counting, breaking
"""


def broken(bad: list[int], kind: str, world: int = 1) -> str:
    return f"import os\nos.environ['LAST'] = '{world - 1}'\n" + BREAK.format(bad=bad, kind=kind)


def bad_steps(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "bad_steps.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("engine", "kind"),
    [
        *((engine, "loss") for engine in ENGINES),
        ("plain", "gradient"),
        ("not fused", "gradient"),
        ("zero3", "gradient"),
    ],
)
def test_an_update_that_is_not_finite_is_not_applied(launcher: Launcher, engine: str, kind: str):
    """Step 5 leaves weights and moments as step 4 left them, on every rank and engine; the next steps go on."""
    world, settings = ENGINES[engine]
    if isinstance(settings.get("deepspeed"), dict):
        file = launcher.folder / "stage0.json"
        file.write_text(json.dumps(settings["deepspeed"]))
        settings = {**settings, "deepspeed": str(file)}
    folder = launcher.folder / f"bad-{engine}-{kind}"
    done = launcher.run(folder, world, patch=broken([5], kind, world), save_steps=1, max_steps=7, **settings)
    before, after = folder / "checkpoint-4", folder / "checkpoint-5"
    changed = [name for name in same_bytes(before, after) if "model.safetensors" in name or "optimizer.pt" in name]
    assert not changed
    assert same_bytes(after, folder / "checkpoint-6")
    assert "step 5: not finite" in done.text()
    (bad,) = bad_steps(folder)
    assert bad["step"] == 5
    assert bad["samples"] == list(range(32, 40))
    assert not np.isfinite(log_lines(folder, "loss" if kind == "loss" else "grad_norm")[5])
    assert log_lines(folder, "bad_steps")[7] == 1
    assert all(np.isfinite(loss) for step, loss in log_lines(folder).items() if step != 5)
    # the rate stays a function of the step
    assert len(set(log_lines(folder, "learning_rate").values())) == 7


def test_several_in_a_row_end_the_run_with_their_samples(launcher: Launcher):
    folder = launcher.folder / "ended"
    done = launcher.run(
        folder, 2, expect=86, patch=broken([6, 7, 8, 9], "loss", 2), save_steps=4, max_bad_steps=3, max_steps=12
    )
    assert [bad["step"] for bad in bad_steps(folder)] == [6, 7, 8]
    assert bad_steps(folder)[-1]["samples"] == list(range(56, 64))
    assert sum(bad_steps(folder)[-1]["sources"].values()) == 8
    assert "3 updates in a row could not be applied" in done.ranks[0].text()
    status = json.loads((folder / "status.json").read_text())
    assert (status["status"], status["exit_code"]) == ("bad numbers", 86)
    assert not (folder / "model").exists()


def test_rewinding_leaves_the_samples_out_and_does_not_go_in_circles(launcher: Launcher):
    folder = launcher.folder / "rewound"
    settings = {"save_steps": 4, "max_bad_steps": 2, "rewind": True}
    first = launcher.run(folder, expect=85, patch=broken([6, 7], "loss"), **settings)
    assert "going back to checkpoint-4 without 16 samples" in first.text()
    assert read_skips(folder) == ([(40, 56)], "checkpoint-4")
    # the same again from the same place: the data was not the reason
    launcher.run(folder, expect=86, patch=broken([6, 7], "loss"), **settings)
    assert [bad["samples"][0] for bad in bad_steps(folder)] == [40, 48, 56, 64]
    launcher.run(folder, **settings)
    losses = log_lines(folder)
    assert sorted(losses) == list(range(1, 13))
    assert all(np.isfinite(loss) for loss in losses.values())
    manifest = json.loads((folder / "checkpoint-12" / "manifest.json").read_text())
    assert manifest["run"]["skip"] == [[40, 56]]


def test_a_spike_is_withheld(launcher: Launcher):
    folder = launcher.folder / "spike"
    settings = {"max_steps": 70, "save_steps": 1000, "logging_steps": 1, "seq_len": 16, "global_batch_size": 2}
    done = launcher.run(folder, patch=broken([68], "spike"), spike_sigma=20, learning_rate=1e-4, **settings)
    assert "step 68: spike" in done.text()
    (bad,) = bad_steps(folder)
    assert (bad["kind"], bad["step"]) == ("spike", 68)


SHORT = "import hf_mamba.training.guard as g\ng.WINDOW = 8\n"  # four steps are enough to know what is usual
BF16 = {"bf16": True}


@pytest.mark.parametrize(
    ("engine", "precision"),
    [
        ("zero2", BF16),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("zero3", BF16), ("zero1", BF16), ("zero2_offload", BF16), ("zero3", {}))
        ),
    ],
)
def test_a_spike_is_withheld_by_deepspeed_on_all_ranks(launcher: Launcher, engine: str, precision: dict):
    """Step 8 leaves weights and moments as step 7 left them, also in a run that was stopped between the two."""
    settings = {"deepspeed": str(ROOT / "ds_configs" / f"{engine}.json"), "spike_sigma": 20, "learning_rate": 1e-4}
    settings |= {"max_steps": 9, "save_steps": 1, "micro_batch_size": 2, **precision}  # two micro-batches a step
    whole, parts = (launcher.folder / f"spike-{engine}-{len(precision)}-{name}" for name in ("whole", "parts"))
    done = launcher.run(whole, 2, patch=SHORT + broken([8], "spike", 2), **settings)
    assert done.text().count("step 8: spike") == 1
    (bad,) = bad_steps(whole)
    assert (bad["kind"], bad["samples"]) == ("spike", list(range(56, 64)))
    assert bad["loss"] > 1e3
    assert log_lines(whole, "bad_steps") == {8: 1, 9: 1}
    assert not state_changes(whole, 7, 8)
    assert state_changes(whole, 8, 9)
    launcher.run(parts, 2, expect=85, patch=SHORT + stop_in(7), **settings)
    launcher.run(parts, 2, patch=SHORT + broken([8], "spike", 2), **settings)
    assert curve(parts) == curve(whole)
    assert not same_bytes(whole / "checkpoint-9", parts / "checkpoint-9")


def state_changes(folder: Path, one: int, other: int) -> list[str]:
    """The weights, moments and master weights that differ between two checkpoints."""
    changed = same_bytes(folder / f"checkpoint-{one}", folder / f"checkpoint-{other}")
    parts = ("model.safetensors", "optim_states.pt/optimizer_state_dict/base_optimizer_state", "fp32")
    return [name for name in changed if any(part in name for part in parts)]


def test_spikes_in_a_row_rewind_a_deepspeed_run(launcher: Launcher):
    folder = launcher.folder / "spike-rewound"
    settings = {"deepspeed": str(ROOT / "ds_configs" / "zero2.json"), "spike_sigma": 20, "learning_rate": 1e-4, **BF16}
    settings |= {"max_steps": 10, "save_steps": 3, "max_bad_steps": 2, "rewind": True}
    first = launcher.run(folder, 2, expect=85, patch=SHORT + broken([7, 8], "spike", 2), **settings)
    assert "going back to checkpoint-6 without 16 samples" in first.text()
    assert read_skips(folder) == ([(48, 64)], "checkpoint-6")
    launcher.run(folder, 2, patch=SHORT, **settings)
    assert sorted(log_lines(folder)) == list(range(1, 11))
    assert len(bad_steps(folder)) == 2


# ---- the batch, divided ----


@pytest.mark.parametrize(("world", "micro", "steps"), [(1, 1, 8), (1, 4, 2), (2, 1, 4), (2, 4, 1)])
def test_a_divided_batch_is_the_batch(launcher: Launcher, world: int, micro: int, steps: int):
    """Losses and norms of micro 1 x 8, 8 x 1 and 2 processes x 4, through the command line, on ragged labels."""
    whole = launcher.folder / "undivided"
    if not (whole / "model").exists():
        launcher.run(whole, per_device_train_batch_size=8, max_steps=6)
    folder = launcher.folder / f"divided-{world}-{micro}-{steps}"
    launcher.run(
        folder,
        world,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=steps,
        global_batch_size=None,
        max_steps=6,
    )
    for ours, theirs in zip(curve(folder), curve(whole), strict=True):
        assert ours[0] == theirs[0]
        assert ours[1] == pytest.approx(theirs[1], rel=2e-5)  # fp32 sums in another order
        assert ours[2] == pytest.approx(theirs[2], rel=2e-4)
        assert ours[3] == theirs[3]


# ---- the parts ----


def test_poison_changes_no_bit_of_a_finite_loss_and_spoils_every_gradient_of_another():
    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    (plain,) = torch.autograd.grad((x.sin() * 3).sum(), x)
    (same,) = torch.autograd.grad(poison((x.sin() * 3).sum()), x)
    assert torch.equal(plain, same)
    (spoilt,) = torch.autograd.grad(poison(x.sum() + float("inf")), x)
    assert torch.isnan(spoilt).all()


@pytest.mark.parametrize("fused", [True, False])
def test_withheld_means_as_if_the_step_had_not_been(fused: bool):
    torch.manual_seed(0)
    ours, theirs = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1, weight_decay=0.1, fused=fused) for m in (ours, theirs)]
    skip = [torch.tensor(False)]
    withhold(optimizers[0], lambda: skip[0])
    for step in range(4):
        inputs = torch.randn(5, 3)
        skip[0] = torch.tensor(step == 2)
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            if step == 2 and model is theirs:
                continue
            optimizer.zero_grad()
            (model(inputs).square().sum() * (float("nan") if step == 2 else 1)).backward()
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
    steps = [float(state["step"]) for state in optimizers[0].state.values()]
    assert steps == [3.0, 3.0]


def test_spikes_against_numpy_and_a_resume_decides_the_same():
    seen: list[BadStep] = []
    arguments = (torch.device("cpu"), 1, 4.0, True, seen.append)
    guard = Guard(*arguments)
    rng = np.random.default_rng(0)
    accepted: list[float] = []
    expected = []
    for step in range(1, 401):
        loss = 3 + rng.normal() * 0.1 + (2.0 if step in (50, 90, 300) else 0)
        recent = np.array(accepted[-WINDOW:])
        spike = len(recent) >= WINDOW // 2 and loss > recent.mean() + 4 * recent.std()
        if spike:
            expected.append(step)
        else:
            accepted.append(loss)
        if step == 200:
            state = json.loads(json.dumps(guard.state_dict()))
            guard = Guard(*arguments)
            guard.load_state_dict(state)
        skip = guard.judge(step, torch.tensor(loss, dtype=torch.float64), torch.tensor(1.0))
        assert bool(skip) == spike
    assert expected == [90, 300]  # at 50 too little is known
    assert [bad.step for bad in seen] == expected
