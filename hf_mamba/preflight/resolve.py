"""`resolve(arguments) -> Plan | Refused`: every number of the run, decided once, in the order of dependence.

    read      the arguments, the preset or model, the DeepSpeed file, the launcher's environment
    migrate   legacy DeepSpeed keys                                   (deepspeed/migrations.py)
    check     every key is known and of its kind                      (deepspeed/config.py)
    decide    world -> precision -> batch -> steps -> schedule        (here, world.py, batch.py)
    write     the ds_config without "auto", the TrainingArguments     (deepspeed/config.py, training.py)
    combine   what fails later or is ignored                          (combinations.py, deepspeed/rules.py)
    resume    whether the checkpoint fits                             (run/resume.py)

Nothing here imports torch, transformers or deepspeed, and nothing is allocated.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_mamba.dotted import get, put
from hf_mamba.family import Preset, count_parameters, recipe_for
from hf_mamba.findings import Findings, Problem
from hf_mamba.plan import Plan, Refused
from hf_mamba.preflight import combinations, engine, schedule
from hf_mamba.preflight.batch import Batch, Given, nearest_multiples, solve
from hf_mamba.preflight.command_line import Arguments
from hf_mamba.preflight.consumers import check_consumers
from hf_mamba.preflight.cost import capacity
from hf_mamba.preflight.data import check_data, check_stream_resume
from hf_mamba.preflight.deepspeed import config as dsconfig
from hf_mamba.preflight.deepspeed.templates import template
from hf_mamba.preflight.fields import check_fields
from hf_mamba.preflight.launch.accelerate_config import planned_launcher
from hf_mamba.preflight.launch.environment import Launcher, agreeing_environment
from hf_mamba.preflight.launch.fsdp import agreeing_arguments, agreeing_variables, decide_fsdp
from hf_mamba.preflight.model import begun_without_recipe, own_model, read_model
from hf_mamba.preflight.precision import decide_precision
from hf_mamba.preflight.settings import Settings
from hf_mamba.preflight.stored import arguments_to_keep, go_on
from hf_mamba.preflight.trackers import check_trackers
from hf_mamba.preflight.training import card_plan, data_plan, hub_plan, plan_before, run_plan, trainer_arguments
from hf_mamba.preflight.world import World, decide_world, planned_elsewhere
from hf_mamba.run import resume
from hf_mamba.run.changes import note_changes
from hf_mamba.run.owner import check_output


def resolve(
    arguments: Arguments | Mapping[str, Any],
    *,
    world_size: int | None = None,
    environ: Mapping[str, str] | None = None,
    device: str | None = None,
    problems: Iterable[Problem] = (),
    epoch_tokens: int | None = None,
) -> Plan | Refused:
    """The plan of a run; or why it cannot start, all problems at once.

    Args:
        arguments: a command line as it was read, for which an engine is chosen where nothing names one; or values by
            TrainingArguments' names, plus ours (preset, seq_len, global_batch_size, num_gpus, ...: see arguments.py).
            `model_config` may hold a mapping of MambaConfig fields; `deepspeed` a path, a name, a mapping or None.
        world_size: number of processes; by default num_gpus x num_nodes, or what the launcher's environment says.
        environ: the environment to read instead of os.environ.
        device: "gpu" or "cpu", where the run will be; found out by default.
        problems: what was already found elsewhere; shown together with the rest.
        epoch_tokens: tokens of a pass over the data, for num_train_epochs. Without it such a run is a Refused with the
            problem epochs-not-measured and all else that is known (training/inputs.py finds it out).

    Raises:
        nothing for what a user can write: that is in `Refused.problems`. See Refused.require().
    """
    out = Findings()
    from_command_line = isinstance(arguments, Arguments)
    if not isinstance(arguments, Arguments):
        arguments = Arguments(dict(arguments))
    arguments = go_on(arguments)
    out.problems += [*arguments.problems, *problems]
    settings = Settings(arguments.written, out)
    launcher = planned_launcher(settings, os.environ if environ is None else environ, out)
    if from_command_line and not launcher.started and settings.get("accelerate_config") is None:
        settings.fill("deepspeed", dsconfig.AUTO_ENGINE)
    elsewhere = planned_elsewhere(settings, launcher, device)
    check_consumers(settings, elsewhere, out)
    check_data(settings, elsewhere, out)
    check_trackers(settings, elsewhere, out)
    check_fields(settings, out)
    model_config = read_model(settings, out)
    parameters = _count(model_config, out)
    before = plan_before(settings)
    recipe = settings.preset if settings.get("config_overrides") is None else None
    if model_config is not None and parameters and not begun_without_recipe(before):
        by_size = recipe_for(model_config)
        settings.follow(by_size, by_size.source)
        recipe = recipe or by_size
    ds_config, ds_name, block = dsconfig.read(settings, launcher, out)
    if ds_config is not None:
        dsconfig.take_clipping(ds_config, ds_name, settings, out)
    world = decide_world(settings, launcher, ds_config, world_size, device, out)
    dtype = decide_precision(settings, launcher, ds_config, ds_name, world, out, before.get("dtype"))
    fsdp = decide_fsdp(settings, launcher, world, model_config, out)
    if before.get("fsdp") and fsdp is None and world.device == "gpu":
        why, fix = "FSDP keeps the optimizer's state in a form of its own.", "Give --fsdp or --accelerate_config again."
        out.problem("fsdp", "none, and FSDP in the run's plan", why, fix, id="checkpoint-of-another-engine")
    memory = capacity.Request(settings, model_config, world, dtype, ds_config, fsdp, before)
    if settings.get("deepspeed") == dsconfig.AUTO_ENGINE and ds_config is None:
        ds_name = engine.choose(memory, out)
        if ds_name != engine.PLAIN:
            ds_config = template(ds_name)
            out.provenance["ds_config"] = ds_name
            dsconfig.take_clipping(ds_config, ds_name, settings, out)
            memory = replace(memory, ds_config=ds_config)
    engine.replace_muon(settings, ds_config, fsdp, out)
    batch = _batch(settings, launcher, ds_config, ds_name, world, memory, out)
    _note_rate(settings, recipe, batch, out)
    seq_len = settings.get("seq_len")
    steps = schedule.decide_steps(settings, batch, block, epoch_tokens, out)
    if ds_config is not None:
        ds_config = dsconfig.write(ds_config, ds_name, settings, launcher, model_config, batch, dtype, out)
    combinations.check(settings, launcher, ds_config, world, dtype, steps, fsdp, elsewhere, out)
    capacity.check_fits(memory, batch, ds_config, out)
    numbers = {
        "preset": settings.preset.name if settings.preset and not own_model(settings) else None,
        "model_config": model_config,
        "start_from": settings.get("model_name_or_path"),
        "parameters": {"estimated": sum(parameters.values()), "by_component": parameters} if parameters else None,
        "data": data_plan(settings, model_config),
        "seed": settings.get("seed"),
        "seq_len": seq_len,
        **_counts(world, batch, seq_len, steps),
        "rates": steps.rates,
        "z_loss": settings.get("z_loss"),
        "dtype": dtype,
        "device": world.device,
        "optim": settings.get("optim"),
        "gradient_checkpointing": settings.get("gradient_checkpointing"),
        "fsdp": fsdp,
        "run": run_plan(settings, arguments_to_keep(arguments)),
        "hub": hub_plan(settings),
        "card": card_plan(settings),
    }
    checkpoint = _resume(settings, elsewhere, ds_config, steps, numbers, out)
    numbers |= {
        "ds_config": ds_config,
        "training_arguments": trainer_arguments(settings, world, batch, dtype, steps, ds_config, out)
        | agreeing_arguments(fsdp, settings),
        "environment": agreeing_environment(launcher, dtype, ds_config is not None)
        | agreeing_variables(fsdp, launcher),
    }
    if checkpoint is not None:
        note_changes(checkpoint, numbers, out)
    _provenance(settings, world, out)
    findings: dict[str, Any] = {
        "migrations": tuple(out.migrations),
        "notes": tuple(out.notes),
        "provenance": dict(sorted(out.provenance.items())),
    }
    if out.problems:
        known = {name: value for name, value in numbers.items() if value is not None}
        others = [
            problem for problem in out.problems if problem.id != schedule.EPOCHS_NOT_MEASURED
        ]  # which no user can mend
        return Refused(problems=tuple(others or out.problems), known=known, **findings)
    return Plan(**numbers, **findings)


def _counts(world: World, batch: Batch | None, seq_len: int | None, steps: schedule.Steps) -> dict[str, int | None]:
    """Processes, rows, tokens and steps; None where a problem keeps a number from being known."""
    tokens = batch.total * seq_len if batch and seq_len else None
    return {
        "micro_batch_size": batch.micro if batch else None,
        "gradient_accumulation_steps": batch.accumulation if batch else None,
        "world_size": world.data_parallel,
        "num_processes": world.processes,
        "num_nodes": world.nodes,
        "global_batch_size": batch.total if batch else None,
        "tokens_per_step": tokens,
        "total_steps": steps.total,
        "total_tokens": steps.total * tokens if steps.total and tokens else None,
        "warmup_steps": steps.warmup,
    }


def _count(model_config: dict[str, Any] | None, out: Findings) -> dict[str, int]:
    """Parameters by component, tied weights once; empty where the model is not known."""
    if model_config is None:
        return {}
    try:
        return dict(count_parameters(model_config))
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        out.problem(
            "model",
            "its configuration",
            f"Its parameters cannot be counted: {error}.",
            "Correct config.json.",
            id="parameters-uncountable",
        )
        return {}


def _one_truth(places: list[Given], what: str, out: Findings) -> Given | None:
    """The one number that all places give; a problem that names two places where they differ."""
    for other in places[1:]:
        if other.value != places[0].value:
            out.problem(
                other.key,
                f"{places[0]} and {other}",
                f"The {what} is written in two places, with different values.",
                "Write it in one place.",
                id="batch-written-twice",
            )
    return places[0] if places else None


def _written(settings: Settings, argument: str, ds_config: Any, ds_name: str, key: str) -> list[Given]:
    """Where the user wrote a batch number: as an argument, in the DeepSpeed file."""
    places = []
    value = settings.get(argument)
    if settings.given(argument) and value != "auto":
        places.append(Given(value, settings.source(argument), settings.key(argument)))
    ds_value = get(ds_config or {}, key)
    if isinstance(ds_value, int):
        places.append(Given(ds_value, f"{key} in {ds_name}", key))
    return places


def _batch(
    settings: Settings,
    launcher: Launcher,
    ds_config: dict[str, Any] | None,
    ds_name: str,
    world: World,
    memory: capacity.Request,
    out: Findings,
) -> Batch | None:
    """The triad from what was written where, the preset's numbers where nothing was, the planner's where asked."""
    before = len(out.problems)
    totals = _written(settings, "global_batch_size", ds_config, ds_name, "train_batch_size")
    if settings.given("global_batch_tokens") and (seq_len := settings.get("seq_len")):
        tokens = settings.get("global_batch_tokens")
        if tokens % seq_len:
            out.problem(
                "global_batch_tokens",
                tokens,
                f"It is not a whole number of sequences of {seq_len} tokens.",
                f"Write {nearest_multiples(tokens, seq_len)}.",
                id="batch-tokens-do-not-divide",
            )
        else:
            source = f"{settings.source('global_batch_tokens')} / {seq_len} tokens"
            totals.append(Given(tokens // seq_len, source, "global_batch_tokens"))
    micros = _written(settings, "per_device_train_batch_size", ds_config, ds_name, "train_micro_batch_size_per_gpu")
    accumulations = _written(settings, "gradient_accumulation_steps", ds_config, ds_name, "gradient_accumulation_steps")
    accumulations += launcher.accumulation
    total = _one_truth(totals, "global batch size", out)
    micro = _one_truth(micros, "micro-batch size", out)
    accumulation = _one_truth(accumulations, "gradient accumulation", out)
    if len(out.problems) > before or world.data_parallel is None:
        return None
    default_micro, micro_source = capacity.default_micro_batch(memory, out)
    default_accumulation = settings.get("gradient_accumulation_steps", 1)
    batch = solve(total, micro, accumulation, world.data_parallel, default_micro, default_accumulation, out)
    if batch is not None:
        arithmetic = f"{batch.total} = {batch.micro} x {batch.accumulation} x {batch.world}"
        out.provenance["global_batch_size"] = total.source if total else arithmetic
        out.provenance["micro_batch_size"] = (
            micro.source if micro else f"{arithmetic}" if total and accumulation else micro_source
        )
        out.provenance["gradient_accumulation_steps"] = (
            accumulation.source
            if accumulation
            else arithmetic
            if total
            else settings.source("gradient_accumulation_steps")
        )
    return batch


def _note_rate(settings: Settings, recipe: Preset | None, batch: Batch | None, out: Findings) -> None:
    """Say for which batch a preset's rate is, where the number of ranks alone has made it another."""
    batches = ("global_batch_size", "global_batch_tokens", "per_device_train_batch_size", "gradient_accumulation_steps")
    if recipe is None or batch is None or any(map(settings.given, ("learning_rate", *batches))):
        return
    own = batch.micro * batch.accumulation
    if batch.world != recipe.ranks and own * recipe.ranks == recipe.rows:
        keep = f": --global_batch_size {recipe.rows} keeps it" if recipe.rows % batch.world == 0 else ""
        out.note(
            f"The rate {settings.get('learning_rate'):g} is for {recipe.rows} rows a step, as on "
            f"{recipe.ranks} rank{'s' * (recipe.ranks != 1)}; "
            f"{batch.world} make {batch.total}{keep}."
        )


def _resume(
    settings: Settings,
    elsewhere: bool,
    ds_config: dict[str, Any] | None,
    steps: schedule.Steps,
    numbers: dict[str, Any],
    out: Findings,
) -> Path | None:
    """Check that output_dir belongs to this run and that its checkpoint fits; load its universal copy if need be.

    Returns the checkpoint that the run continues from.
    """
    run, world = numbers["run"], numbers["world_size"]
    known = {name: numbers[name] for name in run.identity if numbers[name] is not None}
    folder = resume.find_checkpoint(run.resume, run.output_dir, out)
    if not elsewhere:
        check_output(run.output_dir, known, folder is not None and folder.parent == Path(run.output_dir), out)
    if folder is None:
        return None
    if settings.get("streaming"):
        check_stream_resume(folder, world, out)
    reason = resume.check_resume(folder, ds_config, world, numbers["dtype"], steps.total, known, out)
    if reason and ds_config is not None:
        put(ds_config, "checkpoint.load_universal", True)
        out.provenance["ds_config.checkpoint.load_universal"] = reason
    return folder


def _provenance(settings: Settings, world: World, out: Findings) -> None:
    out.provenance["world_size"] = world.source
    shown = "seq_len learning_rate weight_decay max_grad_norm lr_scheduler_type seed min_lr z_loss"
    for name in shown.split():
        if name in settings:
            out.provenance.setdefault(name, settings.source(name))
