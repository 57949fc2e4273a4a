"""Stop and resume: bit for bit the run that was never stopped."""

import json

import pytest
from runs import ROOT, Launcher, curve, log_lines, same_bytes

ENGINES = {
    "fp32": (1, {}),
    "bf16": (1, {"bf16": True}),
    "ddp": (2, {}),
    "zero2": (2, {"deepspeed": str(ROOT / "ds_configs" / "zero2.json")}),
    "zero3-bf16": (2, {"deepspeed": str(ROOT / "ds_configs" / "zero3.json"), "bf16": True}),
}


@pytest.mark.parametrize("engine", ENGINES)
def test_stopped_twice_is_bitwise_the_undisturbed_run(launcher: Launcher, engine: str):
    """Losses, norms, rates, weights, moments and generators; the log lines fall between the saves."""
    world, settings = ENGINES[engine]
    settings = {**settings, "save_steps": 3, "max_steps": 10, "logging_steps": 2}
    whole, parts = launcher.folder / f"{engine}-whole", launcher.folder / f"{engine}-parts"
    launcher.run(whole, world, **settings)
    for stop in (3, 6):
        patch = f"import os\nos.environ['HF_MAMBA_TEST_STOP'] = '{stop}'\n" + STOP
        launcher.run(parts, world, expect=85, patch=patch, **settings)
    launcher.run(parts, world, **settings)
    assert curve(parts) == curve(whole)
    assert [row[0] for row in curve(whole)] == [2, 4, 6, 8, 10]
    assert not same_bytes(whole / "checkpoint-10", parts / "checkpoint-10")
    assert not same_bytes(whole / "model", parts / "model")
    assert log_lines(parts, "eval_loss") == log_lines(whole, "eval_loss")
    assert json.loads((parts / "status.json").read_text())["status"] == "finished"


# the process sends itself what Slurm would send, within the step that is to be the last
STOP = """
import os, signal
from hf_mamba.training.trainer import MambaTrainer
step = MambaTrainer.training_step
def stopping(self, *args, **kwargs):
    if self.state.global_step + 1 == int(os.environ["HF_MAMBA_TEST_STOP"]) and self.args.process_index == 0:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(self, *args, **kwargs)
MambaTrainer.training_step = stopping
"""
