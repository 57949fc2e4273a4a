"""Whose folder a run writes to: its own, a continued one's, or nobody's. Never another run's."""

import json
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from hf_mamba.preflight.plan import Plan, write_json

RUN_FILE = "run.json"
MODEL_FOLDER = "model"


def identity(plan: Plan, data_fingerprint: Any) -> dict[str, Any]:
    """What makes two runs the same: model, data, batch and seed. The world and the number of steps may change."""
    same = {
        "model_config": plan.model_config,
        "seq_len": plan.seq_len,
        "global_batch_size": plan.global_batch_size,
        "seed": plan.training_arguments.get("seed"),
        "data": data_fingerprint,
    }
    return json.loads(json.dumps(same))  # as it will be read back


def claim(folder: Path, mine: dict[str, Any], resume: str) -> Path | None:
    """Decide what to continue from. Nothing is written.

    Args:
        folder: the run's output folder.
        mine: this run's `identity`.
        resume: "auto", "never" or a checkpoint folder.

    Returns:
        The checkpoint to continue from, or None for a fresh start.

    Raises:
        ValueError: when the folder holds another run, or the checkpoint is not there.
    """
    record = folder / RUN_FILE
    checkpoint = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if resume not in ("auto", "never"):
        if not Path(resume, "trainer_state.json").is_file():
            raise ValueError(f"--resume {resume}: that folder holds no trainer_state.json, so it is not a checkpoint.")
        return Path(resume)
    if record.is_file():
        differing = [key for key, value in json.loads(record.read_text()).items() if value != mine.get(key)]
        if differing:
            raise ValueError(
                f"{folder} belongs to another run: its {', '.join(differing)} differ from this one's. "
                "Write another --output_dir, or remove that folder."
            )
    elif folder.is_dir() and any(folder.iterdir()):
        raise ValueError(
            f"{folder} is not empty and holds no {RUN_FILE}: it is not a run's. Write another --output_dir."
        )
    if resume == "never" and checkpoint is not None:
        raise ValueError(
            f"{folder} holds {Path(checkpoint).name}, and --resume never was written. Write --resume auto."
        )
    return None if checkpoint is None else Path(checkpoint)


def record(folder: Path, mine: dict[str, Any], plan: Plan) -> None:
    """Write the run's identity and its plan into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RUN_FILE, mine)
    plan.save(folder)
