"""`hf-mamba memory`: the memory of every ZeRO stage and offload, what fits, and how long the run takes.

Answers at once: nothing here imports torch.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NoReturn

from hf_mamba.family import Preset, all_presets, count_parameters, family_of, get_preset
from hf_mamba.plan import FsdpPlan
from hf_mamba.preflight.cost import disk, duration
from hf_mamba.preflight.cost.capacity import without_formula
from hf_mamba.preflight.cost.fsdp import Fsdp2
from hf_mamba.preflight.cost.fsdp import without_formula as fsdp_without_formula
from hf_mamba.preflight.cost.gpus import memory_of
from hf_mamba.preflight.cost.memory import (
    ASSUMED,
    CONTEXT,
    FRAGMENTATION,
    NCCL,
    Estimate,
    Job,
    compare,
    job_of,
    parse_capacity,
    recommend,
    saved_by_layers,
    show,
)
from hf_mamba.terminal import put

KINDS = {
    "weights": ("weights", "gathered", "casts"),
    "gradients": ("gradients", "accumulators", "buckets", "ddp_buckets", "transfer_buffers"),
    "optimizer": ("master_weights", "moments"),
    "activations": (),  # all that has no other column: what a family's layers keep has names of its own
    "loss": ("logits", "loss"),
    "step": ("step",),
    "allowances": ("allocator_and_context",),
}


ALLOWANCES = (
    "allowances: the CUDA context, NCCL's buffers and the allocator's fragmentation, which no formula knows: chosen, "
    "not measured"
)
MEGABYTES = f"{CONTEXT / 1e6:.0f} MB, {NCCL / 1e6:.0f} MB between GPUs, {FRAGMENTATION:.0%} of the peak"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb; the names are those of recipes/pretrain.py where it has them."""
    parser.add_argument(
        "--preset", metavar="NAME", help=f"one of {', '.join(all_presets())}; by default a line for each"
    )
    parser.add_argument(
        "--accelerate_config",
        metavar="FILE",
        help="accelerate's own file: its processes, precision, ZeRO stage or FSDP",
    )
    parser.add_argument("--num_gpus", type=_whole, help="GPUs of one node; 1, or the file's, by default")
    parser.add_argument("--num_nodes", type=_whole, help="1, or the file's, by default")
    parser.add_argument("--seq_len", type=_whole, help="tokens per row; the preset's by default")
    parser.add_argument(
        *("--micro_batch_size", "--per_device_train_batch_size"), type=_whole, help="rows; the preset's by default"
    )
    parser.add_argument("--gradient_accumulation_steps", type=_whole, help="the preset's by default")
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], help="the DeepSpeed file's; bf16 by default")
    parser.add_argument(
        "--deepspeed",
        metavar="FILE",
        help="buckets, thresholds, batch as in this file or name; its own rows are marked",
    )
    parser.add_argument("--gradient_checkpointing", action="store_true", help="only the rows with checkpointing")
    parser.add_argument("--gpu_memory", metavar="SIZE", help="80GB is 80·10^9 bytes, 80GiB 80·2^30; less leaves room")
    parser.add_argument("--backend", help="the kernels; by default the model's fastest")
    parser.add_argument("--tokens_per_second", type=float, help="of all GPUs together, if known: steps, hours, the end")
    parser.add_argument(
        *("--gpu", "--device"), metavar="NAME", help='a card, such as "H100 SXM": its memory, MFU, what was recorded'
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")


def _whole(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if not 1 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"{value} is not between 1 and 2^31 - 1")
    return value


class _Parser(argparse.ArgumentParser):
    """One line for a wrong flag, as for everything else that is wrong; argparse's own has the whole usage before it."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}. `{self.prog} --help` lists the flags.")


def main(argv: list[str]) -> int:
    """`hf-mamba memory [--preset NAME] [--num_gpus N] [--gpu_memory 80GB] [--json]`"""
    parser = _Parser(prog="hf-mamba memory", allow_abbrev=False, description=__doc__.splitlines()[0])
    add_arguments(parser)
    return run(parser.parse_args(argv))


def run(args: argparse.Namespace) -> int:
    """Print the table, or the JSON object; ValueError for what cannot be."""
    template, fsdp = read_engine(args)
    named = _capacity(args)
    args.capacity = parse_capacity(ASSUMED) if named is None else named
    if args.preset is None:
        return print_presets(args, named is None)
    preset = get_preset(args.preset)
    kernels = family_of(preset.config).backends_on("cuda")
    if args.backend not in (None, *kernels):
        raise ValueError(f"--backend is {args.backend!r}, which no GPU runs: write one of {', '.join(kernels)}.")
    capacity = args.capacity
    micro, accumulation, dtype = agreed(args, template or {})
    job = job_of(
        preset.config,
        seq_len=args.seq_len or preset.seq_len,
        world_size=args.num_gpus * args.num_nodes,
        dtype=dtype or "bf16",
        ds_config=template,
        gradient_checkpointing=args.gradient_checkpointing or bool(fsdp and fsdp.activation_checkpointing),
        gradient_accumulation_steps=accumulation or preset.gradient_accumulation_steps,
        backend=args.backend,
        fsdp=Fsdp2.of(fsdp),
    )
    micro = micro or preset.micro_batch_size
    rows = compare(job, micro, capacity)
    if args.gradient_checkpointing:
        rows = [row for row in rows if row.job.gradient_checkpointing]
    chosen, reason = recommend(rows)
    unknown = without_formula(template, job.dtype)
    unknown += [missing] if fsdp and (missing := fsdp_without_formula(fsdp)) else []
    again = bool(chosen and chosen.job.gradient_checkpointing) or args.gradient_checkpointing
    tokens = micro * job.seq_len * job.gradient_accumulation_steps * job.world_size
    forecast = duration.forecast(
        job.family,
        job.model,
        seq_len=job.seq_len,
        world_size=job.world_size,
        tokens_per_step=tokens,
        total_tokens=preset.max_tokens,
        gradient_checkpointing=again,
        dtype=job.dtype,
        tokens_per_second=args.tokens_per_second,
        device=args.gpu,
        backend=args.backend,
    )
    if args.json:
        document = _document(preset.name, job, micro, capacity, rows, chosen, reason, forecast)
        document |= {"capacity_is_assumed": named is None, "disk": _disk(chosen.job if chosen else job, preset)}
        print(json.dumps(document | {"without_formula": unknown}, indent=2))
        return 0
    print_table(preset.name, job, micro, capacity, rows, chosen, reason)
    if named is None:
        put(f'No card is named: {ASSUMED} is assumed. --gpu "H100 SXM", or --gpu_memory 40GB, says another.')
    for name in unknown:
        put(
            f"Not in these numbers: {name} of {args.deepspeed or args.accelerate_config}, which no formula here is for."
        )
    put(_disk_line(_disk(chosen.job if chosen else job, preset), preset.max_tokens))
    for line in forecast.lines():
        put(line)
    return 0


def _disk(job: Job, preset: Preset) -> dict[str, int]:
    """Bytes on disk of a run of the preset with this engine, and what is free in this folder."""
    count = sum(count_parameters(preset.config).values())
    weight = 2 if job.zero is not None and job.dtype != "fp32" else 4
    stage = None if job.zero is None else job.zero.stage
    return {
        "checkpoint_bytes": count * disk.bytes_per_parameter(weight, 8, stage),
        "model_bytes": count * weight,
        "token_bytes": preset.max_tokens * (2 if job.model.vocab_size <= 1 << 16 else 4),
        "free_bytes": disk.disk_of(Path.cwd()).free,
    }


def _disk_line(sizes: dict[str, int], tokens: int) -> str:
    one, model, data, free = (disk.gigabytes(size) for size in sizes.values())
    return (
        f"Disk: {one} a checkpoint, of which save_total_limit + 1 lie there at once; {model} the model; "
        f"{data} the {tokens / 1e9:,.1f}B tokens where each is seen once. {free} are free in this folder."
    )


def print_presets(args: argparse.Namespace, assumed: bool) -> int:
    """One line a preset: bytes of a GPU without offloading, and with all of it, at the preset's own rows."""
    capacity = args.capacity
    world = args.num_gpus * args.num_nodes
    lines: list[dict[str, Any]] = []
    for name, preset in all_presets().items():
        job = job_of(
            preset.config,
            seq_len=args.seq_len or preset.seq_len,
            world_size=world,
            dtype=args.dtype or "bf16",
            gradient_accumulation_steps=args.gradient_accumulation_steps or preset.gradient_accumulation_steps,
        )
        rows = compare(job, args.micro_batch_size or preset.micro_batch_size, capacity, largest=False)
        rows = [row for row in rows if row.job.gradient_checkpointing == args.gradient_checkpointing]
        count = sum(count_parameters(preset.config).values())
        fits = next((row.job.label for row in rows if row.fits), "nothing")
        sizes = {row.job.label: row.device_bytes for row in rows}
        lines.append({"preset": name, "parameters": count, "bytes": sizes, "cheapest": fits})
    if args.json:
        print(json.dumps({"world_size": world, "presets": lines}, indent=2))
        return 0
    labels = [label for label in lines[0]["bytes"] if label != "ZeRO 0"]
    put(
        f"GB of 10^9 bytes per GPU, of {world}. fits: the first that has room in {show(capacity)}"
        f"{' (assumed: --gpu and --gpu_memory say another)' if assumed else ''}. Z1 is ZeRO 1, +opt the optimizer "
        "offloaded, +all the parameters, too; plain is no DeepSpeed. --preset NAME shows all of one.\n"
    )
    print(f"{'preset':<12}" + "".join(f"{_brief(label):>7}" for label in labels) + "  fits")
    for line in lines:
        cells = "".join(f"{line['bytes'][label] / 1e9:>7.1f}" for label in labels)
        print(f"{line['preset']:<12}{cells}  {_brief(line['cheapest'])}")
    return 0


def _brief(label: str) -> str:
    """A setting's name in at most six letters."""
    for long, short in (("no DeepSpeed", "plain"), ("ZeRO ", "Z"), (" + optimizer offload", "+opt")):
        label = label.replace(long, short)
    return label.replace(" + full offload", "+all")


def _capacity(args: argparse.Namespace) -> int | None:
    """Bytes of a card: --gpu_memory, else those of --gpu; None where neither says it."""
    if args.gpu_memory is not None:
        return parse_capacity(args.gpu_memory)
    return None if args.gpu is None else memory_of(args.gpu)


def read_engine(args: argparse.Namespace) -> tuple[dict[str, Any] | None, FsdpPlan | None]:
    """(the DeepSpeed configuration, FSDP); accelerate's file completes the flags.

    Raises:
        ValueError: for a file that a run could not start with, or that starts no GPU.
    """
    if args.accelerate_config is None:
        args.num_gpus, args.num_nodes = args.num_gpus or 1, args.num_nodes or 1
        return read_template(args.deepspeed), None
    from hf_mamba.findings import Findings, PlanError
    from hf_mamba.preflight.deepspeed import config as dsconfig
    from hf_mamba.preflight.launch.accelerate_config import planned_launcher
    from hf_mamba.preflight.launch.fsdp import decide_fsdp
    from hf_mamba.preflight.precision import decide_precision
    from hf_mamba.preflight.settings import Settings
    from hf_mamba.preflight.world import decide_world

    out, words = Findings(), ("preset", "accelerate_config", "num_gpus", "num_nodes", "deepspeed")
    settings = Settings({name: value for name in words if (value := getattr(args, name)) is not None}, out)
    launcher = planned_launcher(settings, {}, out)
    if launcher.device == "cpu":
        raise ValueError(f"--accelerate_config {args.accelerate_config} starts CPUs, and the table is for GPUs.")
    config, name, _ = dsconfig.read(settings, launcher, out)
    world = decide_world(settings, launcher, config, None, "gpu", out)
    dtype = decide_precision(settings, launcher, config, name, world, out)
    fsdp = decide_fsdp(settings, launcher, world, None, out)
    if out.problems or world.processes is None:
        raise PlanError(tuple(out.problems))
    args.num_gpus, args.num_nodes = world.processes // world.nodes, world.nodes
    args.dtype = args.dtype or dtype
    if args.gradient_accumulation_steps is None and launcher.accumulation:
        args.gradient_accumulation_steps = launcher.accumulation[0].value
    return config, fsdp


def read_template(path: str | None) -> dict[str, Any] | None:
    """A DeepSpeed file or name with its legacy keys moved; ValueError with every problem of it."""
    from hf_mamba.preflight.deepspeed.config import AUTO_ENGINE, NONE, check_keys

    if path in (None, AUTO_ENGINE, NONE):
        return None
    from hf_mamba.findings import Findings, PlanError
    from hf_mamba.preflight.deepspeed.file import read_deepspeed
    from hf_mamba.preflight.deepspeed.migrations import migrate
    from hf_mamba.preflight.deepspeed.templates import TEMPLATES, template

    out = Findings()
    config, _ = read_deepspeed(template(path) if path in TEMPLATES else path, out)
    config = check_keys(migrate(config, out), out) if config is not None else None
    if out.problems:
        raise PlanError(tuple(out.problems))
    return config


def agreed(args: argparse.Namespace, template: dict[str, Any]) -> tuple[int | None, int | None, str | None]:
    """(micro-batch, accumulation, dtype) of the flags or the DeepSpeed file; ValueError where both have one."""
    halves = [name for name in ("bf16", "fp16") if template.get(name, {}).get("enabled") is True]
    own: dict[str, Any] = {
        "micro_batch_size": template.get("train_micro_batch_size_per_gpu"),
        "gradient_accumulation_steps": template.get("gradient_accumulation_steps"),
        "dtype": halves[0] if halves else None,
    }
    for name, value in own.items():
        flag = getattr(args, name)
        if value in (None, "auto"):
            own[name] = flag
        elif flag not in (None, value):
            raise ValueError(f"--{name} is {flag}, and {value} in {args.deepspeed}: write it once.")
    return own["micro_batch_size"], own["gradient_accumulation_steps"], own["dtype"]


def _document(
    name: str,
    job: Job,
    micro: int,
    capacity: int,
    rows: list[Estimate],
    chosen: Estimate | None,
    reason: str,
    forecast: duration.Forecast,
) -> dict[str, Any]:
    return {
        "preset": name,
        "parameters": sum(count_parameters(get_preset(name).config).values()),
        "world_size": job.world_size,
        "seq_len": job.seq_len,
        "micro_batch_size": micro,
        "gradient_accumulation_steps": job.gradient_accumulation_steps,
        "dtype": job.dtype,
        "backend": job.backend,
        "capacity_bytes": capacity,
        "allowances": {
            "measured": False,
            "context_bytes": CONTEXT,
            "nccl_bytes": NCCL if job.world_size > 1 else 0,
            "fragmentation_of_peak": FRAGMENTATION,
        },
        "saved_by_layers": saved_by_layers(job, micro),
        "rows": [row.to_dict() | {"of_the_deepspeed_file": _asked(row, job)} for row in rows],
        "recommendation": None
        if chosen is None
        else {"setting": chosen.job.label, "gradient_checkpointing": chosen.job.gradient_checkpointing},
        "reason": reason,
        "time": forecast.to_dict(),
    }


def by_kind(row: Estimate) -> dict[str, int]:
    """The columns of the table: bytes at the row's largest moment."""
    parts = {**row.peak.parts, "allocator_and_context": row.allowance}
    columns = {title: sum(parts.pop(kind, 0) for kind in kinds) for title, kinds in KINDS.items()}
    return columns | {"activations": sum(parts.values())}


def _asked(row: Estimate, job: Job) -> bool:
    """Whether a row is the setting of the DeepSpeed file, or of accelerate's."""
    return (job.zero or job.fsdp) is not None and (row.job.zero, row.job.fsdp) == (job.zero, job.fsdp)


def print_table(
    name: str,
    job: Job,
    micro: int,
    capacity: int,
    rows: list[Estimate],
    chosen: Estimate | None,
    reason: str,
) -> None:
    """Rich on a terminal, plain columns where piped."""
    count = sum(count_parameters(get_preset(name).config).values())
    put(
        f"{name}: {count:,} parameters, {job.world_size} x {show(capacity)} ({capacity / 2**30:.1f} GiB), "
        f"micro-batch {micro} x {job.seq_len} tokens, {job.dtype}, {job.backend} kernels\n"
        "Per GPU at the largest moment of a step, in GB of 10^9 bytes (in step: the optimizer's own peak; host: of a "
        f"node; rows: the largest micro-batch{'; *: as the file says' if job.zero or job.fsdp else ''}):\n"
    )
    titles = ["setting", "ckpt", *KINDS, "in step", "total", "host", "peak in", "fits", "rows"]
    lines = []
    for row in rows:
        cells = [row.job.label + " *" * _asked(row, job), "on" if row.job.gradient_checkpointing else "off"]
        cells += [f"{size / 1e9:.2f}" if size else "" for size in by_kind(row).values()]
        host = f"{row.host_bytes_per_node / 1e9:.0f}" if row.host else ""
        fits = {"fits": "yes", "tight": "tight", "does not fit": "no"}[row.verdict]
        most = str(row.largest_micro_batch_size or "-")
        step = f"{row.phases['step'].bytes / 1e9:.2f}"
        lines.append([*cells, step, f"{row.device_bytes / 1e9:.1f}", host, row.phase, fits, most])
    marked = [row is chosen for row in rows]
    if sys.stdout.isatty():
        _rich(titles, lines, marked)
    else:
        widths = [max(len(line[i]) for line in [titles, *lines]) for i in range(len(titles))]
        for line, mark in zip([titles, *lines], [False, *marked], strict=True):
            cells = [
                cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            ]
            print(("> " if mark else "  ") + "  ".join(cells).rstrip())
    put(f"\n{ALLOWANCES}: {MEGABYTES}.\n")
    saved = saved_by_layers(job, micro)
    if len(saved) > 1:
        sizes = ", ".join(f"{name} {show(size)}" for name, size in saved.items())
        put(f"Saved by the layers of a micro-batch, without checkpointing: {sizes}.")
    put(f"Recommended: {reason}" if chosen else reason)
    if note := job.family.backends[job.backend].note:
        put(f"Kernels: {note}.")


def _rich(titles: list[str], lines: list[list[str]], marked: list[bool]) -> None:
    """The whole table where the terminal is wide enough, else without the components; never cut."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table

    def table(columns: list[int]) -> Table:
        out = Table(box=SIMPLE_HEAD, row_styles=["", "dim"], pad_edge=False)
        for i in columns:
            out.add_column(titles[i], justify="left" if i < 2 else "right", no_wrap=True)
        for line, mark in zip(lines, marked, strict=True):
            style = "bold green" if mark else "red" if line[-2] == "no" else None
            out.add_row(*(line[i] for i in columns), style=style)
        return out

    console = Console()
    whole = table(list(range(len(titles))))
    few = table([i for i, title in enumerate(titles) if title not in (*KINDS, "in step")])
    needs = [Measurement.get(console, console.options.update_width(1000), each).maximum for each in (whole, few)]
    if needs[0] <= console.width:
        console.print(whole)
        return
    Console(width=max(needs[1], console.width)).print(few)
    put(f"By component ({', '.join(KINDS)}): in a wider terminal, with --json, or through a pipe.")


def _gpus(job: Job) -> str:
    return f"{job.world_size} GPU{'s' * (job.world_size > 1)}"
