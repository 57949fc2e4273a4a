"""Whether a plan can continue from a checkpoint, from names and headers only.

DeepSpeed's ZeRO shards are bound to the number of ranks, the kind of stage and the precision that wrote them; each
mismatch ends in another error, after everything has been built (deepspeed/runtime/engine.py, load_checkpoint). All of
it can be seen beforehand in `latest`, the shards' names and their headers. Another number of ranks or another stage
loads a copy of the checkpoint (universal.py), which the start makes where there is none.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hf_mamba.dotted import get
from hf_mamba.family import family_of
from hf_mamba.files import json_or_none
from hf_mamba.findings import Findings
from hf_mamba.formats.torch_header import read_header, read_safetensors_header
from hf_mamba.names import BRANCH_OF, LATEST_UNIVERSAL, RUN_FILE
from hf_mamba.run.manifest import DamagedError, candidates, check_sizes

_SHARD = re.compile(r"(bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt$")
# What belongs to no tensor in a universal copy, as stages 1 and 2, and stage 3, look for it.
COMMON_STATES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt$")


@dataclass(frozen=True)
class Checkpoint:
    """What is in a checkpoint's folder."""

    folder: Path
    step: int | None = None
    deepspeed: bool = False
    tag: str | None = None
    universal: str | None = None  # the tag of a whole converted copy
    universal_damage: str = ""  # why there is none where one was made
    world_size: int | None = None
    stage: int | None = None
    dtype: str | None = None
    damage: list[str] = field(default_factory=list)  # "NAME: what is wrong with it"


def _tag(folder: Path, name: str) -> str | None:
    try:
        tag = (folder / name).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return tag if tag and (folder / tag).is_dir() else None


def _check(path: Path, damage: list[str]) -> Any:
    """The header of a file; None, with the damage noted, where it cannot be read."""
    try:
        return read_safetensors_header(path) if path.suffix == ".safetensors" else read_header(path)
    except ValueError as error:
        damage.append(f"{path.name}: {error}")
        return None


def _dtype(ds_config: Any) -> str:
    return next((d for d in ("bf16", "fp16") if get(ds_config or {}, f"{d}.enabled") is True), "fp32")


def inspect(folder: Path) -> Checkpoint:
    """Read a checkpoint's names and headers."""
    damage: list[str] = []
    state = json_or_none(folder / "trainer_state.json")
    step = state.get("global_step") if isinstance(state, Mapping) else None
    if not isinstance(step, int):
        step = None
        damage.append("trainer_state.json: no global_step in it")
    for file in sorted(folder.glob("*.safetensors")):
        _check(file, damage)
    folders = sorted(p.name for p in folder.glob("global_step*") if p.is_dir())
    if not folders and not (folder / "latest").exists():
        for name in ("optimizer.pt", "scheduler.pt"):
            if (folder / name).is_file():
                _check(folder / name, damage)
            else:
                damage.append(f"{name}: missing")
        return Checkpoint(folder, step, damage=damage)
    tag = _tag(folder, "latest")
    if tag is None:
        damage.append("latest: missing, or names a folder that is not there")
        return Checkpoint(folder, step, True, damage=damage)
    universal, why = find_universal(folder)
    return _inspect_shards(Checkpoint(folder, step, True, tag, universal, why, damage=damage))


def find_universal(folder: Path) -> tuple[str | None, str]:
    """(the tag of the checkpoint's universal copy, why one that was made is not to be used), from names and sizes."""
    tag = _tag(folder, LATEST_UNIVERSAL)
    if tag is None:
        return None, ""
    try:
        files = check_sizes(folder / tag).files
    except DamagedError as error:
        return None, f"{tag}: {error}"
    if not all(name in files for name in COMMON_STATES):
        return None, f"{tag}: an earlier version made it, for one kind of stage"
    return tag, ""


def conversion_bytes(folder: Path) -> int:
    """The most that a conversion has on the disk beside the checkpoint: the shards in pieces, and put together."""
    sizes = {file.name: file.stat().st_size for file in (folder / (_tag(folder, "latest") or "")).glob("*.pt")}
    return sum(size * (2 if name.endswith("_optim_states.pt") else 1) for name, size in sizes.items())


def room_to_convert(folder: Path) -> str:
    """Why the disk cannot hold a conversion of the checkpoint, in a sentence; "" where it can."""
    needed, free = conversion_bytes(folder), shutil.disk_usage(folder).free
    if needed <= free:
        return ""
    return (
        f"{folder} cannot be converted: {needed / 1e9:.2f} GB are needed there while its copy is written, and "
        f"{free / 1e9:.2f} GB are free. Make room and run the same command again; the checkpoint stays as it is."
    )


def _inspect_shards(found: Checkpoint) -> Checkpoint:
    """World size, stage and precision of the shards under `latest`, and which of them are missing or truncated."""
    files = sorted((found.folder / str(found.tag)).iterdir())
    models = [_check(file, found.damage) for file in files if _MODEL.match(file.name)]
    shards = {int(m[2]): file for file in files if (m := _SHARD.match(file.name))}
    for file in shards.values():
        _check(file, found.damage)
    header = next((model for model in models if isinstance(model, Mapping)), {})
    world, ds_config = header.get("dp_world_size"), header.get("ds_config")
    stage = get(ds_config or {}, "zero_optimization.stage", 0)
    if not models:
        found.damage.append(f"{found.tag}: no *_model_states.pt")
    if isinstance(world, int) and stage:
        missing = sorted(set(range(world)) - set(shards))
        found.damage.extend(f"{found.tag}: the shard of rank {rank} is missing" for rank in missing)
    return replace(found, world_size=world, stage=stage, dtype=_dtype(ds_config))


def find_checkpoint(resume: Any, output_dir: str | None, out: Findings) -> Path | None:
    """What the run would continue from: the folder named; under "auto" the output folder's newest whole one.

    Under "never", such a one is a problem. A branch that has checkpoints of its own goes on from these.
    """
    if resume in (None, False):
        return None
    if resume not in ("auto", "never", True):
        named = Path(os.path.expanduser(str(resume)))
        if not output_dir or not branches(resume, Path(output_dir)):
            return named
        return _own_of_branch(named, Path(output_dir), out) or named
    for path, _, passed_over in candidates(Path(output_dir)) if output_dir else ():
        reason = passed_over or "; ".join(inspect(path).damage)
        if reason:
            out.note(f"{path} is passed over: {reason}.")
        elif resume == "never":
            why = "The run would begin anew beside checkpoints of its own."
            out.problem(
                "resume",
                f"never, and {path}",
                why,
                "Write --resume auto, or another --output_dir.",
                id="resume-never-over-checkpoints",
            )
            return None
        else:
            return path
    return None


def branches(resume: str, folder: Path) -> bool:
    """Whether the run begins from another run's checkpoint, in a folder of its own."""
    if resume in ("auto", "never"):
        return False
    return os.path.dirname(os.path.realpath(resume)) != os.path.realpath(folder)


def branch_of(folder: Path) -> str | None:
    """The checkpoint that the folder's run began from, where it is a branch."""
    record = json_or_none(folder / RUN_FILE)
    return record.get(BRANCH_OF) if isinstance(record, Mapping) else None


def _own_of_branch(named: Path, folder: Path, out: Findings) -> Path | None:
    """The newest whole checkpoint of a branch of `named`; a problem where the folder's run began elsewhere."""
    own = next((path for path, _, passed_over in candidates(folder) if not passed_over), None)
    if own is None:
        return None
    if branch_of(folder) == os.path.realpath(named):
        out.note(f"{folder} is a branch of {named} and goes on from its own {own.name}.")
        return own
    out.problem(
        "resume",
        f"{named}, and {own}",
        f"{folder} holds a run that did not begin from {named}.",
        "Write another --output_dir, or --resume auto to go on with that run.",
        id="branch-over-another-run",
    )
    return None


def _other_sizes(stored: Any, planned: Any) -> str:
    """The sizes in which a checkpoint's config.json and the plan's model differ: "hidden_size 32, now 192"."""
    if not isinstance(stored, Mapping) or not isinstance(planned, Mapping):
        return ""
    try:
        family = family_of(planned)
        old, new = vars(family.geometry(stored)), vars(family.geometry(planned))
    except (TypeError, ValueError):
        return "a config.json that describes no Mamba"
    return ", ".join(f"{name} {old[name]}, now {new[name]}" for name in old if old[name] != new[name])


def same_family(old: int, new: int) -> bool:
    """Stages 1 and 2 write the same shards; 0 and 3 read only their own."""
    return old == new or {old, new} == {1, 2}


def check_resume(
    folder: Path,
    ds_config: dict[str, Any] | None,
    world_size: int | None,
    dtype: str,
    total_steps: int | None,
    identity: Mapping[str, Any],
    out: Findings,
) -> str:
    """Name everything that keeps the run from continuing.

    Returns what the checkpoint's universal copy is loaded for, where the world or the stage has changed; else "".

    Args:
        identity: what must not have changed, by the names of run.json; where `data` is in it, the data's fingerprint.
    """
    where = str(folder)

    def problem(found: str, why: str, fix: str, *, id: str) -> None:
        out.problem("resume", f"{found} in {where}", why, fix, id=id)

    if not (folder / "trainer_state.json").is_file():
        problem(
            "no trainer_state.json",
            "It is not a checkpoint of Trainer.",
            "Give a folder checkpoint-N.",
            id="checkpoint-not-of-trainer",
        )
        return ""
    found = inspect(folder)
    for damage in found.damage:
        problem(damage, "The checkpoint is not whole.", "Resume from an earlier checkpoint.", id="checkpoint-damaged")
    if found.step is not None and total_steps is not None and found.step >= total_steps:
        out.note(f"{where} is at step {found.step} of {total_steps}: nothing is left to train.")
    before = json_or_none(folder.parent / RUN_FILE)
    for name, value in identity.items() if isinstance(before, Mapping) else ():
        if name in before and before[name] != value:
            why = "Another run wrote this checkpoint: the order of the data and the weights would not fit."
            problem(
                f"{name} {before[name]}, now {value}",
                why,
                f"Write the same {name}, or start a new run.",
                id="checkpoint-of-another-run",
            )
    if differing := _other_sizes(json_or_none(folder / "config.json"), identity.get("model_config")):
        problem(
            differing,
            "It is the checkpoint of another model.",
            "Use the model that it was written from.",
            id="checkpoint-of-another-model",
        )
    if found.damage:
        return ""
    if (ds_config is not None) != found.deepspeed:
        was, now = ("with", "without") if found.deepspeed else ("without", "with")
        why = f"It was written {was} DeepSpeed, and the run is {now}: the optimizer's state is in another form."
        problem("another form", why, f"Resume {was} DeepSpeed.", id="checkpoint-of-another-engine")
    elif found.deepspeed and ds_config is not None:
        return _check_shards(found, ds_config, world_size, dtype, out)
    return ""


def ranks_of(found: Checkpoint) -> str:
    return f"{found.world_size} rank" if found.world_size == 1 else f"{found.world_size} ranks"


def other_shards(found: Checkpoint, stage: int, world_size: int | None) -> str:
    """How the shards that were written differ from those that are to be loaded; "" where they are the same."""
    old = found.stage or 0
    if not same_family(old, stage):
        return f"ZeRO stage {old} wrote {found.folder}, and the run is at stage {stage}"
    if world_size is not None and found.world_size not in (None, world_size) and old > 0:
        return f"{ranks_of(found)} wrote {found.folder}, and the run has {world_size}"
    return ""


def _check_shards(
    found: Checkpoint, ds_config: Mapping[str, Any], world_size: int | None, dtype: str, out: Findings
) -> str:
    """Name what keeps the shards from being loaded; what their universal copy is loaded for, or ""."""
    stage, old, where = get(ds_config, "zero_optimization.stage", 0), found.stage or 0, str(found.folder)
    if not same_family(old, stage) and 0 in (old, stage):
        out.problem(
            "zero_optimization.stage",
            f"{stage}, and {old} in {where}",
            "Stage 0 keeps the optimizer's state in another form than stages 1 to 3, and nothing converts it.",
            f'Write "stage": {old}, or start from the model alone: --model_name_or_path {where}.',
            id="checkpoint-of-another-stage",
        )
    elif found.dtype != dtype:
        out.problem(
            "dtype",
            f"{dtype}, and {found.dtype} in {where}",
            "The shards are named and stored by precision.",
            f"Resume in {found.dtype}, or start from the model alone: --model_name_or_path {where}.",
            id="checkpoint-of-another-precision",
        )
    elif reason := other_shards(found, stage, world_size):
        if found.universal_damage:
            out.note(f"The universal copy of {where} is not used, and replaced: {found.universal_damage}.")
        how = "is loaded" if found.universal else "is made at the start, beside the original"
        out.note(f"{reason}: a copy that any number of ranks loads at stages 1 to 3 {how}.")
        return reason
    return ""
