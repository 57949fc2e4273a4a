"""DeepSpeed ZeRO training folders, read one parameter at a time.

The fp32 master weights lie in the ranks' `*_optim_states.pt`, flattened. Stages 1 and 2 cut the whole flat group into
one piece a rank; stage 3 cuts every parameter into one piece a rank. The layout is that of
deepspeed/utils/zero_to_fp32.py, of which nothing is imported.

The files are unpickled with `weights_only=True`. They name a few DeepSpeed classes beside the tensors; those names are
bound to inert stand-ins, so no DeepSpeed code and no code from the file runs. Any other name is refused.
"""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_mamba.formats.pickles import load_inert

_MODEL_STATES = "*model_states.pt"
_OPTIMIZER_STATES = "*_optim_states.pt"


class _Inert:
    """Stands in for a DeepSpeed object whose content is not needed."""

    def __new__(cls, *args: Any) -> "_Inert":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


_STAND_INS: list[Any] = [
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_Inert, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Inert, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Inert, "deepspeed.utils.tensor_fragment.fragment_address"),
]


def find_step_folder(folder: Path) -> Path | None:
    """The folder of the newest step in a DeepSpeed training folder, or None if it is none."""
    latest = folder / "latest"
    if latest.is_file():
        tag = latest.read_text().strip()
        if Path(tag).name != tag:
            raise ValueError(f"{latest} names {tag!r}, which is not a folder beside it.")
        if not (folder / tag).is_dir():
            raise ValueError(f"{latest} names {tag!r}, and there is no such folder: the checkpoint is incomplete.")
        return folder / tag
    steps = [step for step in folder.glob("global_step*") if step.is_dir() and any(step.glob(_MODEL_STATES))]
    return max(steps, key=lambda step: int(re.sub(r"\D", "", step.name) or 0), default=None)


def _cut(pieces: Sequence[Tensor], start: int, length: int) -> list[Tensor]:
    """`length` elements from `start` of the concatenation of flat tensors, as the parts they lie in."""
    parts = []
    for piece in pieces:
        if start < piece.numel() and length > 0:
            parts.append(piece[start : start + length])
            length -= parts[-1].numel()
        start = max(0, start - piece.numel())
    if length > 0:
        raise ValueError(f"the ranks' flat parameters end {length} elements early.")
    return parts


def read_zero(step_folder: Path) -> tuple[dict[str, torch.Size], Callable[[str], Tensor]]:
    """The fp32 parameters of one step of a ZeRO-1, -2 or -3 run.

    Returns:
        shapes by name, and a function that puts one parameter together. A shared parameter has its first name only.

    Raises:
        ValueError: where ranks are missing, a file is damaged or holds code, or tensors were cut by tensor parallelism.
    """
    models = sorted(step_folder.glob(_MODEL_STATES))
    optimizers = sorted(step_folder.glob(_OPTIMIZER_STATES), key=_rank)
    if not models or not optimizers:
        raise ValueError(f"{step_folder} lacks {_OPTIMIZER_STATES if models else _MODEL_STATES}: it is incomplete.")
    if any("_mp_rank_00_" not in f"_{file.name}" for file in models + optimizers):
        raise ValueError(f"{step_folder} was written with tensor parallelism, which is not put together here.")
    model = load_inert(models[0], _STAND_INS)
    states = [load_inert(file, _STAND_INS) for file in optimizers]
    try:
        return _put_together(step_folder, model, [state["optimizer_state_dict"] for state in states])
    except (KeyError, TypeError, AttributeError, IndexError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{step_folder} holds files that are not what DeepSpeed writes ({error!r}).") from None


def _put_together(
    step_folder: Path, model: Any, states: list[Any]
) -> tuple[dict[str, torch.Size], Callable[[str], Tensor]]:
    stage, ranks = int(states[0]["zero_stage"]), states[0]["partition_count"]
    ranks = max(ranks) if isinstance(ranks, list) else ranks
    if ranks != len(states):
        raise ValueError(f"{step_folder} was written by {ranks} ranks and holds the files of {len(states)}.")
    if model.get("frozen_param_shapes"):
        raise ValueError(f"{step_folder} holds frozen parameters; run DeepSpeed's zero_to_fp32.py in its folder first.")
    groups = [state["fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"] for state in states]

    places: dict[str, tuple[int, int]] = {}  # name -> (group, offset)
    shapes: dict[str, torch.Size] = {}
    paddings = states[0].get("param_alignment_paddings")
    offset = 0
    for index, group in enumerate(model["param_shapes"]):
        offset = 0 if stage < 3 else offset
        for position, (name, shape) in enumerate(group.items()):
            places[name], shapes[name] = (index, offset), shape
            if stage < 3:
                offset += shape.numel() + (paddings[index][position] if paddings else 0)
            else:
                offset += math.ceil(shape.numel() / ranks)

    def get(name: str) -> Tensor:
        (index, offset), shape = places[name], shapes[name]
        if stage < 3:
            parts = _cut([rank[index] for rank in groups], offset, shape.numel())
        else:
            share = math.ceil(shape.numel() / ranks)
            parts = [part for rank in groups for part in _cut(rank, offset, share)]
        return torch.cat(parts)[: shape.numel()].view(shape)

    return shapes, get


def _rank(file: Path) -> int:
    found = re.search(r"zero_pp_rank_(\d+)_", file.name)
    return int(found.group(1)) if found else 0
