"""Changing the world of a checkpoint: DeepSpeed's universal copy, made on request and verified against the model.

The copy lies beside the shards, as `global_stepN_universal`, and `latest_universal` names it; the original stays. It is
whole or absent as checkpoints are: written aside, verified, fsynced, described by a manifest of its own and renamed.
Imports torch, so it is called by commands, never by the resolver.
"""

from __future__ import annotations

import importlib.util
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from hf_mamba.files import disk_errors, fsync_path
from hf_mamba.formats.torch_header import Tensor, read_header, read_safetensors_header
from hf_mamba.names import LATEST_UNIVERSAL as LATEST
from hf_mamba.names import UNIVERSAL
from hf_mamba.run import manifest
from hf_mamba.run.resume import inspect

STAGING = ".universal"
STATES = ("fp32", "exp_avg", "exp_avg_sq")


def convert(folder: Path, workers: int = 2) -> Path:
    """Write and verify the universal copy of a checkpoint.

    Args:
        folder: checkpoint-N, with ZeRO shards of any number of ranks.
        workers: processes that extract shards, and that merge them.

    Returns:
        the folder of the copy.

    Raises:
        ValueError: the checkpoint is not whole, or DeepSpeed's converter fails, or the copy is not the same weights.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError("--convert needs DeepSpeed: pip install deepspeed.")
    found = inspect(folder)
    if not found.deepspeed or found.tag is None or not found.stage:
        raise ValueError(f"{folder} has no ZeRO shards that a change of the world would have to convert.")
    if found.damage:
        raise ValueError(f"{folder} is not whole ({'; '.join(found.damage)}). Convert an earlier checkpoint.")
    if found.tag.endswith(UNIVERSAL):
        raise ValueError(f"{folder} is a universal copy already.")
    if (folder / manifest.MANIFEST).exists():
        try:
            manifest.verify(folder)  # the converter unpickles the shards
        except manifest.DamagedError as error:
            raise ValueError(f"{folder} is not whole: {error}. Convert an earlier checkpoint.") from None
    target = folder / f"{found.tag}{UNIVERSAL}"
    staging = folder / STAGING
    with disk_errors(target):
        shutil.rmtree(staging, ignore_errors=True)  # of a conversion that was interrupted
        staging.mkdir()
        try:
            _run_converter(folder / found.tag, staging / target.name, workers)
            verify(folder, staging / target.name)
            _publish(staging, target, found.step or 0)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return target


def _run_converter(shards: Path, target: Path, workers: int) -> None:
    """DeepSpeed's converter, which also writes `latest_universal` beside the copy."""
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(shards), "--output_folder", str(target)]
    command += ["--num_extract_workers", str(workers), "--num_merge_workers", str(workers)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:] or ["no message"]
        raise ValueError(f"DeepSpeed's converter failed on {shards.parent}: {reason[0]}")


def _publish(staging: Path, target: Path, step: int) -> None:
    """Give the finished copy its name, and then `latest_universal`, without which nobody looks at the copy."""
    built, pointer = staging / target.name, target.parent / LATEST
    files = {}
    for path in sorted(built.rglob("*")):
        if path.is_file():
            files[str(path.relative_to(built))] = manifest.describe(path)
        fsync_path(path)
    manifest.Manifest(step, 0, 0, files).write(built)
    fsync_path(built)
    fsync_path(staging / LATEST)
    pointer.unlink(missing_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    built.rename(target)
    (staging / LATEST).rename(pointer)
    fsync_path(target.parent)


def verify(folder: Path, target: Path) -> int:
    """Compare a universal copy with the model beside it: every tensor's size, moments included, and every weight.

    Returns:
        the number of parameters compared.

    Raises:
        ValueError: a tensor is missing, of another size, or of another value than model.safetensors holds.
    """
    import torch
    from safetensors import safe_open

    compared = 0
    for file in sorted(folder.glob("*.safetensors")):
        shapes = {name: tuple(entry["shape"]) for name, entry in read_safetensors_header(file).items()}
        with safe_open(file, framework="pt") as stored:
            for name, shape in shapes.items():
                parts = target / "zero" / name
                if not parts.is_dir():
                    raise ValueError(f"the universal copy {target} has no {name}.")
                for state in STATES:
                    if _elements(parts / f"{state}.pt") != math.prod(shape):
                        raise ValueError(f"{state} of {name} in {target} has another size than the model's {shape}.")
                master = torch.load(parts / "fp32.pt", weights_only=True, map_location="cpu")
                weight = stored.get_tensor(name)
                master = master["param"] if isinstance(master, dict) else master  # stages 1 and 2, stage 3
                if not torch.equal(master.reshape(shape).to(weight.dtype), weight):
                    raise ValueError(f"{name} in {target} is not the model's: the copy is not used.")
                compared += weight.numel()
    if not compared:
        raise ValueError(f"{folder} has no model.safetensors to compare the universal copy with.")
    return compared


def _elements(path: Path) -> int:
    """The number of elements in a state's header; stage 3 keeps its tensors flat."""
    try:
        header: Any = read_header(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    tensor = header.get("param") if isinstance(header, dict) else header
    return math.prod(tensor.shape) if isinstance(tensor, Tensor) else -1
