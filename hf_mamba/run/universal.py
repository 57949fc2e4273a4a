"""Changing the world or the ZeRO stage of a checkpoint: DeepSpeed's universal copy, verified against the model.

The copy lies beside the shards, as `global_stepN_universal`, and `latest_universal` names it; the original stays. It is
whole or absent as checkpoints are: written aside, verified, fsynced, described by a manifest of its own and renamed.
Imports torch, so it is called where a run starts and by `hf-mamba preflight --convert`, never by the resolver.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hf_mamba.files import disk_errors, fsync_path, settle, usual_mode
from hf_mamba.formats.torch_header import Tensor, read_header, read_safetensors_header
from hf_mamba.names import LATEST_UNIVERSAL as LATEST
from hf_mamba.names import UNIVERSAL
from hf_mamba.run import manifest
from hf_mamba.run.resume import COMMON_STATES, Checkpoint, find_universal, inspect, ranks_of, room_to_convert

STAGING = ".universal"
STATES = ("fp32", "exp_avg", "exp_avg_sq")
PROGRESS_SECONDS = 20.0
# DeepSpeed's converter, which dies with all its workers when the process that waits for it does: a pipe tells it.
_CONVERTER = """
import os, signal, threading
def watch():
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)
threading.Thread(target=watch, daemon=True).start()
from deepspeed.checkpoint import ds_to_universal
ds_to_universal.main(ds_to_universal.parse_arguments())
"""


def convert(folder: Path, tell: Callable[[str], None] = lambda line: None, workers: int = 2) -> Path:
    """Write and verify the universal copy of a checkpoint, which any number of ranks loads at ZeRO stages 1 to 3.

    A whole copy that is there already stays. Another conversion of the same checkpoint is waited for.

    Args:
        folder: checkpoint-N, with ZeRO shards of any number of ranks.
        tell: is called with a line when the conversion begins, goes on and has ended.
        workers: processes that extract shards, and that merge them.

    Returns:
        the folder of the copy.

    Raises:
        ValueError: the checkpoint is not whole, the disk has no room for a copy, DeepSpeed's converter fails, or the
            copy is not the same weights.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError(f"{folder} cannot be converted without DeepSpeed: pip install deepspeed.")
    found = inspect(folder)
    if not found.deepspeed or found.tag is None or not found.stage:
        raise ValueError(f"{folder} has no ZeRO shards that a change of the world would have to convert.")
    if found.damage:
        raise ValueError(f"{folder} is not whole ({'; '.join(found.damage)}). Convert an earlier checkpoint.")
    if found.tag.endswith(UNIVERSAL):
        raise ValueError(f"{folder} is a universal copy already.")
    with disk_errors(folder), _alone(folder) as lock:
        if (there := find_universal(folder)[0]) is not None:
            return folder / there
        staging, target = folder / STAGING, folder / f"{found.tag}{UNIVERSAL}"
        shutil.rmtree(staging, ignore_errors=True)  # of a conversion that was interrupted
        if reason := room_to_convert(folder):
            raise ValueError(reason)
        if (folder / manifest.MANIFEST).exists():
            try:
                manifest.verify(folder)  # the converter unpickles the shards
            except manifest.DamagedError as error:
                raise ValueError(f"{folder} is not whole: {error}. Convert an earlier checkpoint.") from None
        tell(f"converting {folder}, which {ranks_of(found)} wrote at ZeRO stage {found.stage}, for any other")
        staging.mkdir()
        try:
            _run_converter(folder / found.tag, staging / target.name, workers, lock, tell)
            _serve_every_stage(found, staging / target.name)
            verify(folder, staging / target.name)
            _publish(staging, target, found.step or 0)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        tell(f"written and verified: {target}")
    return target


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[int]:
    """Keep others from converting the same checkpoint.

    The lock is inherited by the converter and its workers: where the process that waits for them is killed, the next
    one begins when all of them are gone.
    """
    lock = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock
    finally:
        os.close(lock)


def _run_converter(shards: Path, target: Path, workers: int, lock: int, tell: Callable[[str], None]) -> None:
    """DeepSpeed's converter, which also writes `latest_universal` beside the copy.

    It takes paths for patterns, and where one has a bracket in it, finds nothing: it gets those from here on alone.
    """
    command = [sys.executable, "-c", _CONVERTER, "--inject_missing_state"]
    command += ["--input_folder", f"../{shards.name}", "--output_folder", target.name]
    command += ["--num_extract_workers", str(workers), "--num_merge_workers", str(workers)]
    output = target.parent / "output.txt"
    waits, alive = os.pipe()
    try:
        with open(output, "wb") as file:
            process = subprocess.Popen(
                command,
                cwd=target.parent,
                stdin=waits,
                stdout=file,
                stderr=file,
                pass_fds=(lock,),
                start_new_session=True,
            )
        while process.returncode is None:
            try:
                process.wait(PROGRESS_SECONDS)
            except subprocess.TimeoutExpired:
                tell(f"converting: {_bytes_in(target) / 1e9:.1f} GB written")
    finally:
        os.close(waits)
        os.close(alive)
    if process.returncode != 0:
        lines = output.read_text(errors="replace").strip().splitlines()[-1:] or ["no message"]
        raise ValueError(f"DeepSpeed's converter failed on {shards.parent}: {lines[0]}")


def _bytes_in(folder: Path) -> int:
    sizes = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # the converter removes its own
            sizes += path.stat().st_size if path.is_file() else 0
    return sizes


def _serve_every_stage(found: Checkpoint, target: Path) -> None:
    """Complete DeepSpeed's copy, which loads at the kind of stage that wrote it, for the other kind.

    Stage 3 leaves tensors flat, and the step counter with the optimizer's groups; stages 1 and 2 want shapes, and a
    counter beside each tensor (load_hp_checkpoint_state in deepspeed/checkpoint/universal_checkpoint.py and in
    runtime/zero/stage3.py). Each reads what belongs to no tensor from a file of another name.
    """
    import torch

    zero, shapes = target / "zero", _shapes(found.folder)
    common = torch.load(zero / "optimizer_state.pt", weights_only=False, map_location="cpu")
    rest = torch.load(next(target.glob("*_model_states.pt")), weights_only=False, map_location="cpu")
    if found.stage == 3:
        step = common["optimizer_state_dict"]["state"][0]["step"]
        for name, shape in shapes.items():
            for state in STATES:
                file = zero / name / f"{state}.pt"
                flat = torch.load(file, weights_only=True, map_location="cpu")
                if flat.numel() != math.prod(shape):
                    raise ValueError(f"{state} of {name} in {target} has another size than the model's {shape}.")
                torch.save({"param": flat.view(shape)}, file)
            torch.save(step, zero / name / "step.pt")
    else:
        step = torch.load(zero / next(iter(shapes)) / "step.pt", weights_only=True, map_location="cpu")
    kept = {name: value for name, value in common.items() if name not in ("fp32_flat_groups", "optimizer_state_dict")}
    kept["optimizer_state_dict"] = {"state": {0: {"step": step}}, "param_groups": kept["param_groups"]}
    torch.save({"ds_version": rest["ds_version"], **kept}, zero / "optimizer_state.pt")
    for file in target.glob("*_model_states.pt"):
        file.unlink()
    for name in COMMON_STATES:
        torch.save({key: value for key, value in rest.items() if key != "module"}, target / name)


def _publish(staging: Path, target: Path, step: int) -> None:
    """Give the finished copy its name, and then `latest_universal`, without which nobody looks at the copy."""
    built, pointer = staging / target.name, target.parent / LATEST
    files, mode = {}, usual_mode(staging)
    for path in sorted(built.rglob("*")):
        if path.is_file():
            settle(path, mode)
            files[str(path.relative_to(built))] = manifest.describe(path)
        else:
            fsync_path(path)
    manifest.Manifest(step, 0, 0, files).write(built)
    fsync_path(built)
    fsync_path(staging / LATEST)
    pointer.unlink(missing_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    built.rename(target)
    (staging / LATEST).rename(pointer)
    fsync_path(target.parent)


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of the model beside the shards."""
    found: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= {name: tuple(entry["shape"]) for name, entry in read_safetensors_header(file).items()}
    if not found:
        raise ValueError(f"{folder} has no model.safetensors to compare the universal copy with.")
    return found


def verify(folder: Path, target: Path) -> int:
    """Compare a universal copy with the model beside it: every tensor's size, moments included, and every weight.

    Returns:
        the number of parameters compared.

    Raises:
        ValueError: a tensor is missing, of another size, or of another value than model.safetensors holds.
    """
    import torch
    from safetensors import safe_open

    compared, shapes = 0, _shapes(folder)
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            for name in read_safetensors_header(file):
                shape, parts = shapes[name], target / "zero" / name
                if not parts.is_dir():
                    raise ValueError(f"the universal copy {target} has no {name}.")
                for state in STATES:
                    if _elements(parts / f"{state}.pt") != math.prod(shape):
                        raise ValueError(f"{state} of {name} in {target} has another size than the model's {shape}.")
                master = torch.load(parts / "fp32.pt", weights_only=True, map_location="cpu")["param"]
                weight = stored.get_tensor(name)
                if not torch.equal(master.reshape(shape).to(weight.dtype), weight):
                    raise ValueError(f"{name} in {target} is not the model's: the copy is not used.")
                compared += weight.numel()
    return compared


def _elements(path: Path) -> int:
    """The number of elements in a state's header."""
    try:
        header: Any = read_header(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    tensor = header.get("param") if isinstance(header, dict) else header
    return math.prod(tensor.shape) if isinstance(tensor, Tensor) else -1
