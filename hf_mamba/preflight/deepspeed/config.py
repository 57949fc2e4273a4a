"""The DeepSpeed configuration: read and checked against the table of keys, then written out without any "auto"."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hf_mamba.dotted import get, pop, put
from hf_mamba.findings import Findings
from hf_mamba.preflight.arguments import ALIASES
from hf_mamba.preflight.arguments import kinds as argument_kinds
from hf_mamba.preflight.batch import Batch
from hf_mamba.preflight.deepspeed.file import read_deepspeed
from hf_mamba.preflight.deepspeed.inert import INERT, LENIENT, is_commentary, leave_out, say_left_out
from hf_mamba.preflight.deepspeed.keys import AUTO, AUTO_IS_A_VALUE, KINDS, OPEN_BLOCKS
from hf_mamba.preflight.deepspeed.migrations import MIGRATIONS, migrate
from hf_mamba.preflight.deepspeed.optimizer import take_optimizer
from hf_mamba.preflight.deepspeed.rates import Block, take_scheduler
from hf_mamba.preflight.deepspeed.templates import TEMPLATES, template
from hf_mamba.preflight.kinds import KindError, near, show
from hf_mamba.preflight.kinds import read as read_kind
from hf_mamba.preflight.launch.environment import Launcher
from hf_mamba.preflight.settings import Settings

# What a misspelt key can have meant: only what passes. An old name means the new one.
_RENAMED = {row.old: row.new for row in MIGRATIONS if row.action == "move"}
_MEANT = [*KINDS, "optimizer", "scheduler", *(row.old for row in MIGRATIONS if row.action != "removed")]
# Arguments of a run that people write into a DeepSpeed file, beside those of arguments.py.
_RUN = {"num_train_epochs", "output_dir", "logging_steps", "save_steps", "eval_steps", "per_device_eval_batch_size"}
_RUN |= {"warmup_ratio", "optim", "lr_scheduler_type", "dataloader_num_workers", "save_total_limit", "report_to"}
AUTO_ENGINE, NONE = "auto", "none"  # values of --deepspeed that are no file
MOST = 50  # unknown keys that are looked at one by one


def walk(block: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every (dotted key, value) of a configuration, blocks before what is in them; open blocks are not entered."""
    for key, value in block.items():
        path = f"{prefix}{key}"
        yield path, value
        if isinstance(value, Mapping) and path not in OPEN_BLOCKS:
            yield from walk(value, f"{path}.")


def suggest(path: str) -> str:
    """The known key that a misspelt one of the same block means, or a misplaced one of ZeRO's; else ""."""
    parent, _, last = path.rpartition(".")
    beside = {key.rpartition(".")[2]: key for key in _MEANT if key.rpartition(".")[0] == parent}
    if guess := near(last, beside):
        return _RENAMED.get(beside[guess], beside[guess])
    misplaced = [key for key in _MEANT if key.rpartition(".")[2] == last and key.startswith("zero_optimization.")]
    return " or ".join(dict.fromkeys(_RENAMED.get(key, key) for key in misplaced))


def _run_argument(path: str, value: Any, settings: Settings | None, out: Findings) -> None:
    """Refuse an argument of the run in a DeepSpeed file, where the run has another value."""
    leave_out(out, path, "an argument of the run, which DeepSpeed does not read")
    name = ALIASES.get(path, path)
    if settings is None or value in (None, "auto") or settings.get(name) == value:
        return
    own = "" if settings.get(name) is None else f", and the run's is {show(settings.get(name))}"
    why = f"It is an argument of the run: DeepSpeed does not read it{own}."
    fix = f"Write --{path} {show(value)}, and take it out of the file."
    out.problem(path, show(value), why, fix, id="run-argument-in-deepspeed-file")


def _unknown(path: str, value: Any, settings: Settings | None, out: Findings) -> None:
    """A key that has no row: a remark, a misspelling, one that DeepSpeed ignores, or one that it refuses."""
    parent, _, last = path.rpartition(".")
    if is_commentary(last):
        leave_out(out, path, "a remark")
    elif path in _RUN or path in argument_kinds():
        _run_argument(path, value, settings, out)
    elif guess := suggest(path):
        why = "DeepSpeed does not know it" + (", and ignores it without a word." if parent in LENIENT else ".")
        out.problem(path, show(value), why, f"Did you mean {guess}?", id="misspelt-key")
    elif parent in LENIENT:
        leave_out(out, path, "DeepSpeed does not know it, and ignores it")
    else:
        out.problem(path, show(value), f'DeepSpeed has no such key in "{parent}".', "Remove it.", id="unknown-key")


def check_keys(config: dict[str, Any], out: Findings, settings: Settings | None = None) -> dict[str, Any]:
    """Name misspelt keys and values of the wrong kind, leave out what has no effect, and canonicalise the rest.

    Args:
        settings: of the run that the file is for, where there is one.
    """
    unknown = 0
    for path, value in list(walk(config)):
        parent = path.rpartition(".")[0]
        if parent and not isinstance(get(config, parent), dict):
            continue  # the block was already taken out
        if path in INERT:
            pop(config, path)
            leave_out(out, path, INERT[path])
        elif path not in KINDS:
            pop(config, path)
            unknown += 1
            if unknown <= MOST:
                _unknown(path, value, settings, out)
        elif value == "auto" and isinstance(value, str):
            if path not in AUTO and path not in AUTO_IS_A_VALUE:
                pop(config, path)
                out.migrated(f'{path}: "auto"', "(DeepSpeed's default)", "nobody fills this one", id="auto-is-default")
        else:
            _canonical(config, path, value, out)
    if unknown > MOST:
        found = f"{unknown - MOST} more that DeepSpeed does not know"
        out.problem("deepspeed", found, "It has no such keys.", "Give a DeepSpeed file.", id="too-many-unknown-keys")
    return config


def _canonical(config: dict[str, Any], path: str, value: Any, out: Findings) -> None:
    """Put the value in its canonical form, or take it out with a problem."""
    if path == "fp16.min_loss_scale" and isinstance(value, int | float) and 0 <= value < 1 and value is not False:
        out.migrated(f"{path}: {show(value)}", "1", "DeepSpeed refuses a floor below 1", id="loss-scale-floor")
        value = 1
    try:
        canonical = read_kind(KINDS[path], value)
    except KindError as expected:
        pop(config, path)
        out.problem(path, show(value), expected.why, f"Write {expected}.", id="value-of-the-wrong-kind")
        return
    put(config, path, canonical)
    if isinstance(value, str) and canonical != value:
        out.migrated(f"{path}: {show(value)}", show(canonical), "text in quotation marks", id="text-read-as-a-value")


def _from_launcher(launcher: Launcher) -> dict[str, Any]:
    """What DeepSpeedPlugin builds from accelerate's own flags, where no DeepSpeed file is given."""
    config: dict[str, Any] = {"zero_optimization": {"stage": "auto"}}
    for key, value in launcher.deepspeed_keys.items():
        put(config, key, value)
    return config


def read(settings: Settings, launcher: Launcher, out: Findings) -> tuple[dict[str, Any] | None, str, Block | None]:
    """The checked configuration, its name, and its schedule; None where the run does not use DeepSpeed.

    An optimizer block has become arguments.

    One that cannot be read counts as an empty one, so that the rest of the run is still checked.
    """
    value = settings.get("deepspeed")
    if launcher.config_file is not None:
        if value and str(value) != launcher.config_file:
            out.problem(
                "deepspeed",
                f"{show(value)} ({settings.source('deepspeed')}) and {launcher.config_file} (accelerate launch)",
                "Two DeepSpeed files are given.",
                "Give it once: --deepspeed FILE, and no --deepspeed_config_file.",
                id="two-deepspeed-files",
            )
        value = value or launcher.config_file
    if value == NONE and launcher.use_deepspeed:
        why, fix = "accelerate starts DeepSpeed.", "Launch without --use_deepspeed, or remove --deepspeed none."
        out.problem("deepspeed", NONE, why, fix, id="deepspeed-none-under-its-launcher")
    if value in (None, "", AUTO_ENGINE, NONE):
        if not launcher.use_deepspeed or launcher.use_cpu:
            return None, "", None
        return _from_launcher(launcher), "accelerate launch", None
    before = len(out.problems)
    named = isinstance(value, str) and value in TEMPLATES
    config, name = read_deepspeed(template(value) if named else value, out)
    name = value if named else name
    if config is None:
        unread = {"gradient_clipping": "auto", "zero_optimization": {"stage": 0}}
        return (unread if len(out.problems) > before else None), name, None
    config = migrate(config, out)
    take_optimizer(config, name, settings, out)
    schedule = take_scheduler(config, name, settings, out)
    config = check_keys(config, out, settings)
    _agree_with_launcher(config, name, launcher, out)
    return config, name, schedule


def _agree_with_launcher(config: dict[str, Any], name: str, launcher: Launcher, out: Findings) -> None:
    """Where a DeepSpeed file is given, accelerate ignores its own flags: a difference is named with both places."""
    for key, value in launcher.deepspeed_keys.items():
        own = get(config, key)
        if own == "auto":
            put(config, key, value)
            out.provenance[f"ds_config.{key}"] = "accelerate launch"
        elif (own is None and value not in ("none", False)) or (own is not None and own != value):
            out.problem(
                key,
                f"{show(own) if own is not None else 'nothing'} in {name} and {show(value)} of accelerate launch",
                "accelerate ignores its own flags where a DeepSpeed file is given.",
                f"Write it in {name} only.",
                id="launcher-disagrees-with-file",
            )


def _zero_autos(hidden: int | None) -> dict[str, Any]:
    """What Trainer and accelerate put in place of "auto"; None where the hidden size is not known."""
    square = hidden * hidden if hidden else None
    return {
        "zero_optimization.stage": 2,
        "zero_optimization.offload_optimizer.device": "none",
        "zero_optimization.offload_param.device": "none",
        "zero_optimization.offload_optimizer.nvme_path": None,
        "zero_optimization.offload_param.nvme_path": None,
        "zero_optimization.stage3_gather_16bit_weights_on_model_save": True,
        "zero_optimization.reduce_bucket_size": square,
        "zero_optimization.stage3_prefetch_bucket_size": int(0.9 * square) if square else None,
        "zero_optimization.stage3_param_persistence_threshold": 10 * hidden if hidden else None,
    }


def _stage(config: dict[str, Any], name: str, out: Findings) -> None:
    """A stage that is written: DeepSpeed and accelerate have different ideas of a missing one."""
    if "zero_optimization" not in config:
        config["zero_optimization"] = {"stage": 0}
        out.note(f"{name} has no zero_optimization block: stage 0 is written (accelerate refuses a file without one).")
        out.provenance["ds_config.zero_optimization.stage"] = "default"
    elif get(config, "zero_optimization.stage") is None and not any(
        problem.key.startswith("zero_optimization") for problem in out.problems
    ):
        config["zero_optimization"]["stage"] = 0
        out.note(f"zero_optimization in {name} has no stage: DeepSpeed's 0 is written (accelerate would say 2).")
        out.provenance["ds_config.zero_optimization.stage"] = "DeepSpeed's default"


def take_clipping(config: dict[str, Any], name: str, settings: Settings, out: Findings) -> None:
    """One clipping norm. A missing key is DeepSpeed's 1.0, whatever max_grad_norm says."""
    wanted, own = settings.get("max_grad_norm", 1.0), config.get("gradient_clipping")
    if own not in (None, "auto") and own != wanted:
        if settings.given("max_grad_norm"):
            out.problem(
                "gradient_clipping",
                f"{own} in {name} and max_grad_norm={wanted} ({settings.source('max_grad_norm')})",
                "The clipping norm is written in two places, with different values.",
                'Write "gradient_clipping": "auto" and decide by --max_grad_norm.',
                id="clipping-written-twice",
            )
        else:
            settings.adopt("max_grad_norm", float(own), f"gradient_clipping in {name}")
            wanted = own
    elif own is None:
        out.note(
            f"gradient_clipping is not in {name}: max_grad_norm={wanted} is written (DeepSpeed would clip at 1.0)."
        )
    config["gradient_clipping"] = float(wanted)
    out.provenance["ds_config.gradient_clipping"] = settings.source("max_grad_norm")


def write(
    config: dict[str, Any],
    name: str,
    settings: Settings,
    launcher: Launcher,
    model_config: Mapping[str, Any] | None,
    batch: Batch | None,
    dtype: str,
    out: Findings,
) -> dict[str, Any]:
    """The configuration that is handed to DeepSpeed: every number written, no "auto", no train_batch_size."""
    for path, value in walk(config):
        if not isinstance(value, Mapping):
            out.provenance.setdefault(f"ds_config.{path}", name)
    config.pop("train_batch_size", None)
    for key, value, source in (
        ("train_micro_batch_size_per_gpu", batch.micro if batch else None, "micro_batch_size"),
        ("gradient_accumulation_steps", batch.accumulation if batch else None, "gradient_accumulation_steps"),
    ):
        if value is not None:
            if key not in config:
                out.note(f"{key} is not in {name}: {value} is written (DeepSpeed would derive its own).")
            config[key] = value
            out.provenance[f"ds_config.{key}"] = out.provenance.get(source, "derived")
        elif config.get(key) == "auto":
            del config[key]
    if dtype == "fp16" and "fp16" not in config:
        config["fp16"] = {"auto_cast": True}  # as accelerate does (DeepSpeedPlugin.set_mixed_precision)
        out.provenance["ds_config.fp16.auto_cast"] = "accelerate's own, where a file has no fp16"
    for block in ("bf16", "fp16"):
        config[block] = {**config.get(block, {}), "enabled": dtype == block}
        out.provenance[f"ds_config.{block}.enabled"] = out.provenance.get("dtype", "derived")
    _stage(config, name, out)
    hidden = None if model_config is None else model_config.get("hidden_size", 768)
    for key, value in _zero_autos(hidden).items():
        if get(config, key) == "auto":
            pop(config, key)
            if value is not None:
                put(config, key, value)
                out.provenance[f"ds_config.{key}"] = f'"auto" in {name}: {AUTO[key]}'
            else:
                leave_out(out, key, f'nothing fills this "auto": {AUTO[key]}')
    if get(config, "zero_optimization.stage") == 3:
        gather = "stage3_gather_16bit_weights_on_model_save"
        if not config["zero_optimization"].get(gather):
            config["zero_optimization"][gather] = True
            out.note(f"{gather} is written as true: without it, stage 3 saves shards only and no model.safetensors.")
            out.provenance[f"ds_config.zero_optimization.{gather}"] = "default of the pre-flight"
    for key, reason in (
        ("tensor_parallel", "one rank holds a whole layer"),
        ("sequence_parallel_size", "one rank holds a whole row"),
    ):
        if config.pop(key, None) is not None:
            leave_out(out, key, reason)
    if get(config, "zero_optimization.stage") != 3 and pop(config, "zero_optimization.offload_param") is not None:
        leave_out(out, "zero_optimization.offload_param", "parameters are offloaded at stage 3 only")
    say_left_out(out)
    for key in [key for key in out.provenance if key.startswith("ds_config.")]:
        if get(config, key.removeprefix("ds_config.")) is None:
            del out.provenance[key]
    return config
