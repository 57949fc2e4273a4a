"""Values of arguments, held against whoever will read them: transformers' optimizers, schedules and file names.

What passes here is accepted when the run is built; what does not is a problem and is taken out, so that nothing after
it meets such a value. tests/preflight/test_argument_readers.py compares the tables with the installed transformers.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from importlib.util import find_spec

from hf_mamba.findings import Findings
from hf_mamba.preflight.kinds import near, show
from hf_mamba.preflight.optimizers import INSTEAD
from hf_mamba.preflight.settings import Settings

_BNB, _GALORE, _FREE = "bitsandbytes", "galore_torch", "schedulefree"
# transformers' --optim -> the package that it needs besides torch and transformers
OPTIMIZERS: dict[str, str] = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"), ""),
    **dict.fromkeys(("adamw_torch_4bit", "adamw_torch_8bit"), "torchao"),
    **dict.fromkeys(("lomo", "adalomo"), "lomo_optim"),
    **dict.fromkeys(("apollo_adamw", "apollo_adamw_layerwise"), "apollo_torch"),
    **dict.fromkeys(("schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"), _FREE),
    **dict.fromkeys((f"galore_{kind}" for kind in ("adamw", "adamw_8bit", "adafactor")), _GALORE),
    **dict.fromkeys((f"galore_{kind}_layerwise" for kind in ("adamw", "adamw_8bit", "adafactor")), _GALORE),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "lion_8bit", "lion_32bit", "ademamix", "ademamix_8bit"), _BNB),
    **dict.fromkeys((f"paged_{kind}_32bit" for kind in ("adamw", "ademamix", "lion")), _BNB),
    **dict.fromkeys((f"paged_{kind}_8bit" for kind in ("adamw", "ademamix", "lion")), _BNB),
    **dict.fromkeys(("rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"), _BNB),
    "adamw_torch_xla": "torch_xla",
    "adamw_torch_npu_fused": "torch_npu",
    "adamw_anyprecision": "torchdistx",
    "grokadamw": "grokadamw",
    "stable_adamw": "optimi",
}
# --lr_scheduler_type -> what --lr_scheduler_kwargs may hold; None: anything
SCHEDULES: dict[str, tuple[str, ...] | None] = {
    "linear": (),
    "cosine": ("num_cycles",),
    "cosine_with_restarts": ("num_cycles",),
    "polynomial": ("lr_end", "power"),
    "constant": (),
    "constant_with_warmup": (),
    "inverse_sqrt": ("timescale",),
    "reduce_lr_on_plateau": None,
    "greedy": None,
    "cosine_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate", "warmup_lr_rate"),
    "warmup_stable_decay": (
        "num_decay_steps", "num_stable_steps", "warmup_type", "decay_type", "min_lr_ratio", "num_cycles",
    ),
}  # fmt: skip
ACCELERATOR = (
    "split_batches", "dispatch_batches", "even_batches", "use_seedable_sampler", "non_blocking",
    "gradient_accumulation_kwargs", "use_configured_state",
)  # fmt: skip
_PATHS = ("output_dir", "logging_dir", "resume", "resume_from_checkpoint", "model_name_or_path", "tokenizer_name")
_NUMBERS = ("save_steps", "logging_steps", "eval_steps", "save_total_limit", "eval_delay")
MAX_SEED = 2**32 - 1  # numpy's


def check_consumers(settings: Settings, elsewhere: bool, out: Findings) -> None:
    """Name every value that its reader would refuse; what only another machine must have installed is a note."""
    _paths(settings, out)
    _numbers(settings, out)
    _optimizer(settings, elsewhere, out)
    for name in ("lr_scheduler_kwargs", "accelerator_config"):
        _block(settings, name, out)
    _schedule(settings, out)
    for key in settings.get("accelerator_config") or ():
        if key not in ACCELERATOR:
            fix = f"It has {', '.join(ACCELERATOR)}."
            _refuse(settings, "accelerator_config", show(key), "accelerate has no such option.", fix, out)
            break


def _refuse(settings: Settings, name: str, found: str, why: str, fix: str, out: Findings) -> None:
    """Report a value and take it out."""
    out.problem(settings.key(name), f"{found} ({settings.source(name)})", why, fix, id="refused-by-its-reader")
    settings.remove(name)


def _paths(settings: Settings, out: Findings) -> None:
    for name in _PATHS:
        value = settings.get(name)
        if value is None or (name == "resume_from_checkpoint" and isinstance(value, bool)):
            continue
        if not isinstance(value, str | os.PathLike):
            _refuse(settings, name, show(value), "It is no path.", "Write a path.", out)
            continue
        try:
            os.lstat(os.path.expanduser(value))
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            pass  # what is missing or closed is another check's
        except (OSError, ValueError) as error:  # too long, a null byte, a lone surrogate
            reason = getattr(error, "strerror", None) or str(error)
            _refuse(settings, name, show(str(value)), f"It is no path: {reason}.", "Write another one.", out)


def _numbers(settings: Settings, out: Findings) -> None:
    for name, own in list(settings.items()):
        if isinstance(own.value, float) and not math.isfinite(own.value):
            _refuse(settings, name, repr(own.value), "It is not a finite number.", "Write another value.", out)
    for name in _NUMBERS:
        value = settings.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            _refuse(settings, name, show(value), "It is no number.", "Write a number of steps.", out)
        elif isinstance(value, int | float) and abs(value) >= 2**63:
            _refuse(settings, name, show(value), "It is too large.", "Write a smaller number.", out)
    for name in ("seed", "data_seed"):
        value = settings.get(name)
        if isinstance(value, int) and value > MAX_SEED:
            fix = f"Write a whole number from 0 to {MAX_SEED}."
            _refuse(settings, name, show(value), "numpy's seeds have 32 bits.", fix, out)
    for name in ("adam_beta1", "adam_beta2"):
        if settings.get(name) == 1:
            why = "The average would never move, and torch refuses it."
            _refuse(settings, name, "1", why, "Write a number below 1, for example 0.95.", out)


def _optimizer(settings: Settings, elsewhere: bool, out: Findings) -> None:
    name = settings.get("optim")
    name = INSTEAD.get(name := getattr(name, "value", name), name)
    if name is not None and name not in OPTIMIZERS:
        fix = f"Did you mean {guess}?" if (guess := near(str(name), [*OPTIMIZERS, *INSTEAD])) else "Write adamw_torch."
        _refuse(settings, "optim", show(name), "transformers has no such optimizer.", fix, out)
    elif name and (package := OPTIMIZERS[name]) and find_spec(package) is None:
        if elsewhere:
            out.note(f"Not on this machine: {package}, which --optim {name} needs.")
        else:
            fix = f"Install {package}, or use --optim adamw_torch."
            _refuse(settings, "optim", name, f"It needs {package}, which is not installed.", fix, out)
    options = settings.get("optim_args")
    if options is not None and not (isinstance(options, str) and all("=" in part for part in options.split(","))):
        fix = "Write name=value, several with commas."
        _refuse(settings, "optim_args", show(options), "It is read as name=value.", fix, out)


def _block(settings: Settings, name: str, out: Findings) -> None:
    """Read a flag's JSON as a YAML file's block; Trainer reads the text itself, and later."""
    value = settings.get(name)
    if value is None or isinstance(value, Mapping):
        return
    try:
        read = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        read = None
    if isinstance(read, dict):
        settings.rewrite(name, read)
    else:
        _refuse(settings, name, show(value), "It is no block.", 'Write JSON, for example {"num_cycles": 2}.', out)


def _schedule(settings: Settings, out: Findings) -> None:
    kind = settings.get("lr_scheduler_type")
    kind = getattr(kind, "value", kind)
    if kind is None:
        return
    if kind not in SCHEDULES:
        fix = f"Did you mean {guess}?" if (guess := near(str(kind), SCHEDULES)) else "Write cosine."
        _refuse(settings, "lr_scheduler_type", show(kind), "transformers has no such schedule.", fix, out)
        return
    own, takes = settings.get("lr_scheduler_kwargs") or {}, SCHEDULES[kind]
    unknown = [str(key) for key in own if takes is not None and key not in takes]
    if unknown:
        fix = f"It takes {', '.join(takes or ())}." if takes else "It takes none: remove --lr_scheduler_kwargs."
        _refuse(
            settings, "lr_scheduler_kwargs", ", ".join(unknown), f"The schedule {kind} has no such argument.", fix, out
        )
