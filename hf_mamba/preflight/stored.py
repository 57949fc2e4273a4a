"""`--resume RUN`: a run is gone on with as it was begun, from what its plan.json keeps of the arguments.

What is written beside it wins. The global batch is the run's on any number of devices, and the micro-batch follows it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from hf_mamba.files import json_or_none
from hf_mamba.findings import Problem
from hf_mamba.names import PLAN_FILE, RUN_FILE
from hf_mamba.preflight.command_line import Arguments
from hf_mamba.preflight.settings import DEFAULT_PRESET, MODELS, Origin, Value

# The batch is kept as it was decided. The others belong to one start, to its machine, or to nobody else's eyes.
_BATCH = ("global_batch_size", "global_batch_tokens", "per_device_train_batch_size", "gradient_accumulation_steps")
_NOT_KEPT = frozenset(
    {*_BATCH, "config", "resume", "resume_from_checkpoint", "output_dir", "dry_run", "hub_token"}
    | {"num_gpus", "num_nodes", "accelerate_config", "gpu", "gpu_memory"}
)
_FIRST_DEFAULT = "tiny_mamba"  # the preset of runs whose plan names none
# Of each row, what is written now stands in the place of all that was written then.
_ONE_OF = (
    ("max_steps", "max_tokens", "num_train_epochs"),
    ("warmup_steps", "warmup_tokens", "warmup_ratio"),
    ("eval_dataset", "eval_fraction"),
    ("bf16", "fp16"),
    ("global_batch_size", "global_batch_tokens"),
)


def arguments_to_keep(arguments: Arguments) -> dict[str, Any]:
    """The arguments that another start of the run needs, JSON-ready."""
    written = {name: _value(own) for name, own in arguments.written.items() if name not in _NOT_KEPT}
    if not any(written.get(name) for name in ("preset", *MODELS)):
        written["preset"] = DEFAULT_PRESET  # another version may have another
    return json.loads(json.dumps(written, default=str), parse_constant=str)  # NaN and Infinity are no JSON


def _value(own: Any) -> Any:
    return own.value if isinstance(own, Value) else own


def go_on(arguments: Arguments) -> Arguments:
    """The arguments, completed by the run's own where --resume names a run's folder; else as they are."""
    resume, old_name, output = (
        _value(arguments.written.get(name)) for name in ("resume", "resume_from_checkpoint", "output_dir")
    )
    resume = old_name or resume
    folder = Path(os.path.expanduser(str(resume)))
    if not isinstance(resume, str) or resume in ("auto", "never") or json_or_none(folder / RUN_FILE) is None:
        return arguments
    where, problems = f"run {folder}", list(arguments.problems)
    if output is not None and os.path.realpath(os.path.expanduser(str(output))) != os.path.realpath(folder):
        why = "A run goes on in its own folder."
        fix = f"Remove --output_dir, or begin another run from a checkpoint: --resume {folder}/checkpoint-N."
        problems.append(Problem("output_dir", output, why, fix, id="run-goes-on-elsewhere"))
    plan: Any = json_or_none(folder / PLAN_FILE)
    stored: dict[str, Value] = {}
    try:
        stored = {name: Value(value, Origin.USER, name, where) for name, value in plan["run"]["written"].items()}
        if not any(name in stored for name in ("preset", *MODELS)):
            stored["preset"] = Value(_FIRST_DEFAULT, Origin.USER, "preset", where)
        total, micro = "global_batch_size", "per_device_train_batch_size"
        stored[total] = Value(plan["global_batch_size"], Origin.USER, total, where)
        stored[micro] = Value(plan["micro_batch_size"], Origin.PRESET, "micro_batch_size", where)  # an upper bound
    except (TypeError, KeyError, AttributeError):  # also of a file that is damaged
        why = "Its plan.json does not keep the arguments: an earlier version wrote it."
        fix = f"Write all arguments of the run, with --output_dir {folder} in place of --resume {folder}."
        problems.append(Problem("resume", str(folder), why, fix, id="run-without-arguments"))
    replaced = {name for row in _ONE_OF if any(name in arguments.written for name in row) for name in row}
    written = {name: value for name, value in stored.items() if name not in replaced} | arguments.written
    written.pop("resume_from_checkpoint", None)
    written["output_dir"] = Value(str(folder), Origin.USER, "output_dir", where)
    written["resume"] = Value("auto", Origin.USER, "resume", where)
    return Arguments(written, tuple(problems))
