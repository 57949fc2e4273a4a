"""FSDP2 on two processes: what a run promises holds there, too."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import (
    SMALL_HYBRID,
    SMALL_MAMBA2,
    Launcher,
    curve,
    held,
    kill,
    log_lines,
    same_bytes,
    stop_in,
    wait_for,
    weights,
)
from test_guard import broken

from hf_mamba.run.manifest import published, verify

# What `accelerate launch --use_fsdp --fsdp_version 2 --fsdp_state_dict_type KIND` tells the processes. On CPUs
# accelerate would run plain data parallelism without a word (accelerate/state.py): that branch is taken for it here.
FSDP = """
import os
from accelerate.state import AcceleratorState, DistributedType, PartialState
start = AcceleratorState.__init__
def sharded(self, *args, fsdp_plugin=None, **kwargs):
    start(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
AcceleratorState.__init__ = sharded
from hf_mamba.preflight.launch import fsdp
fsdp.left_out = lambda world: False  # and the pre-flight, which knows what accelerate does
from hf_mamba.models.common.backbone import StatePreTrainedModel
save = StatePreTrainedModel.save_pretrained
def waited(self, *args, **kwargs):  # on CPUs the gathered tensors are still on their way, as a tensor subclass
    if kwargs.get("state_dict"):
        kwargs["state_dict"] = {{k: v.wait() if hasattr(v, "wait") else v for k, v in kwargs["state_dict"].items()}}
    save(self, *args, **kwargs)
StatePreTrainedModel.save_pretrained = waited
os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
                  FSDP_RESHARD_AFTER_FORWARD="true", FSDP_STATE_DICT_TYPE="{kind}")
"""
KINDS = {"FULL_STATE_DICT": SMALL_HYBRID, "SHARDED_STATE_DICT": SMALL_MAMBA2}  # and which model is trained with it


def fsdp(kind: str, more: str = "", model: dict[str, Any] | None = None) -> dict[str, Any]:
    model = KINDS[kind] if model is None else model
    return {"patch": FSDP.format(kind=kind) + more, "save_steps": 1, "max_steps": 7, **model}


@pytest.fixture(scope="module", params=KINDS)
def whole(request: pytest.FixtureRequest, launcher: Launcher) -> tuple[str, Path]:
    folder = launcher.folder / f"fsdp-{request.param}"
    launcher.run(folder, 2, sample_prompt="the", **fsdp(request.param))
    return request.param, folder


def test_stopped_by_a_signal_and_killed_it_is_bitwise_the_undisturbed_run(launcher: Launcher, whole):
    kind, undisturbed = whole
    folder = launcher.folder / f"fsdp-{kind}-parts"
    launcher.run(folder, 2, expect=85, **fsdp(kind, stop_in(3)))
    # the weights and moments of checkpoint-5 are written, the generators' states are not
    launch = launcher.start(folder, 2, **fsdp(kind, held("_save_rng_state", 5)))
    wait_for(lambda: (folder / ".saving" / "checkpoint-5" / "scheduler.pt").exists())
    kill(launch)
    assert {path.name for path, _ in published(folder)} == {f"checkpoint-{step}" for step in (1, 2, 3, 4)}
    for path, manifest in published(folder):
        assert manifest is not None
        verify(path)
    launcher.run(folder, 2, **fsdp(kind))
    assert curve(folder) == curve(undisturbed)
    assert not same_bytes(undisturbed / "model", folder / "model")
    assert not same_bytes(undisturbed / "checkpoint-7", folder / "checkpoint-7")
    names = set(json.loads((folder / "checkpoint-7" / "manifest.json").read_text())["files"])
    on_disk = {str(f.relative_to(folder / "checkpoint-7")) for f in (folder / "checkpoint-7").rglob("*") if f.is_file()}
    assert names == on_disk - {"manifest.json"}


@pytest.mark.core
def test_it_trains_as_one_process_does(launcher: Launcher, whole):
    """Losses and norms equal to rounding; its weights do lie in shards, and one file has all of them at the end."""
    kind, folder = whole
    assert list((folder / "checkpoint-7").glob("pytorch_model_fsdp*"))
    read_back, planned = (json.loads((folder / name).read_text())["fsdp"] for name in ("checked.json", "plan.json"))
    assert read_back == {**planned, "state_dict_type": kind}
    assert (folder / "samples.jsonl").read_text().count('"text": "the ') == 1  # all ranks took part
    plain = launcher.folder / f"fsdp-{kind}-plain"
    launcher.run(plain, save_strategy="no", max_steps=7, **KINDS[kind])
    for ours, theirs in zip(curve(folder), curve(plain), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    ours, theirs = weights(folder / "model"), weights(plain / "model")
    assert ours.keys() == theirs.keys()
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-4, err_msg=name)


def test_muon_orthogonalises_whole_matrices(launcher: Launcher):
    """Two processes that shard, or that do not, give the run of one; what is stopped while sharded goes on bitwise."""
    muon = {"save_steps": 4, "optim": "muon"}
    sharded, parts, ddp, plain = (launcher.folder / f"muon-{name}" for name in ("fsdp", "fsdp-parts", "ddp", "plain"))
    launcher.run(sharded, 2, **fsdp("FULL_STATE_DICT", model={}) | muon)
    launcher.run(parts, 2, expect=85, **fsdp("FULL_STATE_DICT", stop_in(3), model={}) | muon)
    launcher.run(parts, 2, **fsdp("FULL_STATE_DICT", model={}) | muon)
    for folder, world in ((ddp, 2), (plain, 1)):
        launcher.run(folder, world, save_strategy="no", max_steps=7, optim="muon")
    assert curve(parts) == curve(sharded)
    assert not same_bytes(sharded / "model", parts / "model")
    for folder in (sharded, ddp):
        for ours, theirs in zip(curve(folder), curve(plain), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)


def test_an_update_that_is_not_finite_is_not_applied(launcher: Launcher):
    folder = launcher.folder / "fsdp-bad"
    done = launcher.run(folder, 2, **fsdp("FULL_STATE_DICT", broken([5], "loss", 2), model={}))
    assert "step 5: not finite" in done.text()
    changed = same_bytes(folder / "checkpoint-4", folder / "checkpoint-5")
    assert not [name for name in changed if "optimizer" in name or "model" in name]
    assert [name for name in same_bytes(folder / "checkpoint-5", folder / "checkpoint-6") if "model" in name]
    assert [step for step, loss in log_lines(folder).items() if not np.isfinite(loss)] == [5]
