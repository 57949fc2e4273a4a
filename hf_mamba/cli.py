"""The `hf-mamba` command: one verb per row, each imported when it is called.

A verb is a function that takes its own arguments and returns the exit code: 0, or 2 where what the user wrote cannot
work. To add one, add a row.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# verb -> (function, what it does)
VERBS: dict[str, tuple[str, str]] = {
    "preflight": ("hf_mamba.cli:preflight", "resolve a run, say what is wrong with it and what each number came from"),
    "launch": ("hf_mamba.cli:launch", "pre-flight, then become the `accelerate launch` command of the run"),
    "env": ("hf_mamba.cli:env", "what this machine can do"),
    "rules": ("hf_mamba.cli:rules", "what the pre-flight looks for: every rule, or the page of one"),
    "recipes": ("hf_mamba.cli:recipes", "where the recipes and templates are; copies them to be edited"),
    "memory": ("hf_mamba.preflight.cost.table:main", "will it fit, how large a batch, how long"),
    "presets": ("hf_mamba.cli:presets", "the named sizes"),
    "generate": ("hf_mamba.interop.generate:main", "see a model write"),
    "convert": ("hf_mamba.cli:convert", "a checkpoint in another format, bit for bit"),
    "report": ("hf_mamba.report.page:main", "one HTML page about runs, also while they go on"),
    "requeue": ("hf_mamba.run.requeue:main", "whether a run that has ended should be started again"),
    "push": ("hf_mamba.cli:push", "a run's models to the Hub, one commit a checkpoint"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; a user's mistake is a message on stderr and exit code 2, without a stack trace."""
    parser = argparse.ArgumentParser(
        prog="hf-mamba",
        description="Pretrain Mamba language models with the Hugging Face stack.",
        epilog="\n".join(f"  {verb:<10} {text}" for verb, (_, text) in VERBS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=VERBS, metavar="verb")
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = parser.parse_args(arguments[:1]).verb
    module, _, name = VERBS[verb][0].partition(":")
    function: Callable[[list[str]], int] = getattr(importlib.import_module(module), name)
    if argv is None:  # a command of its own: temporary files are removed on the way out
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return function(arguments[1:])
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # `hf-mamba ... | head`
        sys.stderr.close()
        return 0
    except (ValueError, OSError) as error:
        print(f"hf-mamba {verb}: {error}", file=sys.stderr)
        return 2


def _plan(argv: Sequence[str], launching: bool = False) -> tuple[Any, Any, Any]:
    """(Plan or Refused, Checked, Arguments) of a command line; accelerate's default file counts."""
    from hf_mamba.preflight import Checked, Plan, resolve, verify
    from hf_mamba.preflight.command_line import read_arguments
    from hf_mamba.preflight.launch.accelerate_config import default_file
    from hf_mamba.preflight.schedule import waits_for_data
    from hf_mamba.preflight.settings import Origin, Value
    from hf_mamba.preflight.stored import go_on
    from hf_mamba.preflight.world import gpu_here

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--convert", action="store_true")
    own, rest = parser.parse_known_args(list(argv))
    arguments = go_on(read_arguments(rest))
    if (file := default_file()) is not None:
        default = Value(str(file), Origin.DEFAULT, "accelerate_config", f"accelerate's default file {file}")
        arguments.written.setdefault("accelerate_config", default)
    here = launching and not arguments.get("dry_run")
    device = ("gpu" if gpu_here() else "cpu") if here else None
    plan = resolve(arguments, device=device)
    if own.convert:
        _convert(plan)
        plan = resolve(arguments, device=device)
    if waits_for_data(plan.problems):
        from hf_mamba.training.inputs import epoch_tokens

        plan = resolve(arguments, device=device, epoch_tokens=epoch_tokens(plan, build=False))
    checked = verify(plan) if isinstance(plan, Plan) else Checked()
    return plan.after(checked), checked, arguments


def _convert(plan: Any) -> None:
    """Make the universal copy of the checkpoint that the run continues from."""
    from hf_mamba.findings import Findings
    from hf_mamba.run import resume
    from hf_mamba.run.universal import convert

    run = plan.known["run"]
    folder = resume.find_checkpoint(run.resume, run.output_dir, Findings())
    if folder is None:
        raise ValueError(f"--convert: there is no checkpoint in {run.output_dir}. Write --resume RUN, a run's folder.")
    if tag := resume.find_universal(folder)[0]:
        print(f"converted already: {folder / tag}", file=sys.stderr, flush=True)
    convert(folder, lambda line: print(line, file=sys.stderr, flush=True))


def preflight(argv: list[str]) -> int:
    """`hf-mamba preflight [training flags] [--json] [--write DIR] [--provenance] [--convert]`"""
    from pathlib import Path

    from hf_mamba.files import write_json
    from hf_mamba.names import DS_CONFIG_FILE
    from hf_mamba.preflight.screen import print_report

    parser = argparse.ArgumentParser(
        prog="hf-mamba preflight",
        allow_abbrev=False,
        description="Resolve a run before it starts. Takes every flag of recipes/pretrain.py, and:",
        epilog="--accelerate_config is the file that `accelerate config` wrote, where none is given. "
        "--convert: make the copy of the checkpoint that another number of ranks or ZeRO stage loads now, not at the "
        "start.",
    )
    parser.add_argument("--json", action="store_true", help="print the plan, and what was checked, as one JSON object")
    parser.add_argument("--write", metavar="DIR", help="save plan.json, checked.json and ds_config.json there")
    parser.add_argument("--provenance", action="store_true", help="also print where every number comes from")
    own, rest = parser.parse_known_args(argv)
    plan, checked, _ = _plan(rest)
    if own.write:
        try:
            _check_target(Path(own.write))
            plan.save(own.write)
            if plan.ok:
                checked.save(own.write)
            if plan.ok and plan.ds_config is not None:
                write_json(Path(own.write) / DS_CONFIG_FILE, plan.ds_config)
        except OSError as error:
            raise ValueError(
                f"--write {own.write}: {error.strerror or error}. Give a folder that can be written."
            ) from None
    if own.json:
        print(json.dumps({**plan.to_dict(), "checked": checked.to_dict()}, indent=2))
    else:
        print_report(plan, provenance=own.provenance, checked=checked)
    return 0 if plan.ok else 2


def _check_target(target: Any) -> None:
    """Refuse a place whose files `--write` would replace, and which are no plan of ours."""
    from hf_mamba.names import DS_CONFIG_FILE, PLAN_FILE

    if target.is_file() or target.suffix == ".json":
        raise ValueError(f"--write {target}: it is a folder that gets {PLAN_FILE} and {DS_CONFIG_FILE}. Give a folder.")
    plan, theirs = target / PLAN_FILE, target / DS_CONFIG_FILE
    try:
        ours = plan.is_file() and bool(json.loads(plan.read_text(encoding="utf-8"))["provenance"])
    except (ValueError, TypeError, KeyError):  # not JSON, or another program's
        ours = False
    for file in (plan, theirs):
        if file.exists() and not ours:
            raise ValueError(f"--write {target}: {file} is there, and is no plan's of ours. Give another folder.")


def launch(argv: list[str]) -> int:
    """`hf-mamba launch [training flags] [--script FILE] [--machine_rank --main_process_ip --main_process_port]`"""
    from pathlib import Path

    from hf_mamba.findings import Findings, Problem
    from hf_mamba.preflight.launch import command as launching
    from hf_mamba.preflight.launch.accelerate_config import NO_FILE, read_file
    from hf_mamba.preflight.screen import print_report

    if "--help" in argv or "-h" in argv:
        print(f"usage: hf-mamba launch [training flags]\n\n{launch.__doc__}\n--dry_run prints the command and stops.")
        return 0
    options, rest = launching.split_launch_flags(argv)
    plan, checked, arguments = _plan(rest, launching=True)
    dry_run, config = bool(arguments.get("dry_run")), arguments.get("accelerate_config")
    file = NO_FILE if config is None else read_file(Path(os.path.expanduser(config)), Findings())
    problems = launching.rendezvous_problems(options, plan.known["num_nodes"], file, dry_run)
    script = Path(options.script or launching.default_script())
    if not script.is_file():
        problems.append(
            Problem("script", str(script), "There is no such file.", "Give --script FILE.", id="no-such-script")
        )
    plan = plan.with_problems(problems)
    if dry_run or options.script or not plan.ok:  # our recipe prints it when it starts
        print_report(plan, checked=checked)
    if not plan.ok:
        return 2
    if arguments.get("deepspeed", "auto") == "auto" and config is None:
        rest = launching.with_engine(plan, rest)
    command = launching.launch_command(plan, options, rest, file)
    every = options.machine_rank is None and not file.one_line
    commands = launching.launch_commands(plan, options, rest, file) if every else [command]
    for rank, command in enumerate(commands):
        print(f"# on machine {rank}:\n" * (len(commands) > 1) + launching.shell(command), flush=True)
    if dry_run:
        return 0
    launching.become(command, launching.child_environment(plan))
    raise AssertionError("execve does not return")


def env(argv: list[str]) -> int:
    """`hf-mamba env [--json]`"""
    from hf_mamba.preflight.launch import machine
    from hf_mamba.terminal import put

    parser = argparse.ArgumentParser(prog="hf-mamba env", description="What this machine can do.", allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    own = parser.parse_args(argv)
    facts = machine.describe()
    if own.json:
        print(json.dumps(facts, indent=2))
        return 0
    print(f"Python {facts['python']} on {facts['platform']}")
    for title, rows in (
        ("packages", facts["versions"]),
        ("scan backends", facts["backends"] | {"chosen": facts["scan"]}),
        ("tools", facts["tools"]),
    ):
        print(f"{title}:")
        for name, value in rows.items():
            print(f"  {name:<14} {value}")
    print("devices:")
    for device in facts["devices"]:
        memory = f"{device['memory'] / 2**30:.1f} GiB" if device["memory"] else "unknown memory"
        put(f"  {device['name']}, {memory}, {', '.join(device['dtypes'])}", 4)
    print(f"reached here, on {facts['devices'][0]['name'].split(' (')[0]} with {facts['threads']} CPU thread(s):")
    for row in facts["speed"]:
        print(f"  {row['what']:<26} {row['dtype']:<5} {row['value']:>12,} {row['unit']}")
    print(f"extensions: {facts['extensions_folder']}, {len(facts['build_locks'])} build lock(s)")
    for line in facts["advice"]:
        put(f"advice: {line}", 4)
    return 0


def rules(argv: list[str]) -> int:
    """`hf-mamba rules [ID]`"""
    from hf_mamba.preflight import catalogue
    from hf_mamba.terminal import put, put_names

    parser = argparse.ArgumentParser(prog="hf-mamba rules", description="What the pre-flight looks for.")
    parser.add_argument("id", nargs="?", metavar="ID", help="print the page of this rule; by default, list all")
    own = parser.parse_args(argv)
    if own.id:
        put(catalogue.describe(own.id))
    else:
        put_names((page.id, page.what) for page in sorted(catalogue.pages().values()))
    return 0


def recipes(argv: list[str]) -> int:
    """`hf-mamba recipes [--copy DIR]`"""
    from hf_mamba.preflight.launch import recipes as came_with

    parser = argparse.ArgumentParser(prog="hf-mamba recipes", description="The recipes and DeepSpeed templates.")
    parser.add_argument("--copy", metavar="DIR", type=Path, help="copy recipes/ and ds_configs/ into this folder")
    own = parser.parse_args(argv)
    folders = came_with.copy(own.copy) if own.copy else [came_with.home() / name for name in came_with.FOLDERS]
    print(*folders, sep="\n")
    return 0


def presets(argv: list[str]) -> int:
    """`hf-mamba presets [--json]`"""
    from hf_mamba.family import all_presets, count_parameters
    from hf_mamba.terminal import put

    parser = argparse.ArgumentParser(prog="hf-mamba presets", description="The named sizes.", allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    own = parser.parse_args(argv)
    rows = {
        name: {"parameters": sum(count_parameters(p.config).values()), **vars(p)} for name, p in all_presets().items()
    }
    if own.json:
        print(json.dumps(rows, indent=2))
        return 0
    print(f"{'name':<12} {'parameters':>14} {'d x layers':>10} {'row':>5} {'batch':>7} {'tokens':>16} {'rate':>8}")
    sources: dict[str, list[str]] = {}
    for name, row in rows.items():
        shape = f"{row['config']['hidden_size']}x{row['config']['num_hidden_layers']}"
        batch = f"{row['micro_batch_size']}x{row['gradient_accumulation_steps']}"
        numbers = f"{row['parameters']:>14,} {shape:>10} {row['seq_len']:>5} {batch:>7} {row['max_tokens']:>16,}"
        print(f"{name:<12} {numbers} {row['learning_rate']:>8g}")
        sources.setdefault(row["source"], []).append(name)
    put("\nrow: tokens in a row; batch: micro-batch x accumulation on each GPU. Where the numbers are from:\n")
    for source, names in sources.items():
        put(f"{', '.join(names)}: {source}", 4)
    return 0


def convert(argv: list[str]) -> int:
    """`hf-mamba convert SRC DST --to FORMAT [--pad_vocab_to N] [--max_shard_size 5GB] [--verify]`"""
    parser = argparse.ArgumentParser(
        prog="hf-mamba convert", description="Write a checkpoint in another format, bit for bit.", allow_abbrev=False
    )
    parser.add_argument("source", help="a transformers, state-spaces or DeepSpeed ZeRO folder")
    parser.add_argument("destination", help="a folder that does not exist yet; for gguf, a file")
    parser.add_argument("--to", required=True, choices=("transformers", "state-spaces", "gguf"), help="the format")
    parser.add_argument("--dtype", default="f32", choices=("f32", "f16", "bf16"), help="of a gguf file's matrices")
    parser.add_argument("--pad_vocab_to", type=int, metavar="N", help="round the vocabulary up to a multiple of N")
    parser.add_argument("--max_shard_size", default="5GB", help="largest file (default 5GB; the original has one file)")
    parser.add_argument("--verify", action="store_true", help="load both and compare their logits")
    args = parser.parse_args(argv)
    from safetensors import SafetensorError

    from hf_mamba.interop import convert as formats

    try:
        formats.convert(
            args.source,
            args.destination,
            args.to,
            pad_vocab_to=args.pad_vocab_to,
            max_shard_size=_bytes(args.max_shard_size),
            dtype=args.dtype,
            verify=args.verify,
        )
    except (OSError, SafetensorError) as error:  # a full disk, a folder without rights
        raise ValueError(f"{args.destination} could not be written, nothing was left: {error}") from None
    print(f"wrote {args.destination} ({args.to}{', verified' if args.verify else ''})")
    return 0


def _bytes(size: str) -> int:
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = size[:-2], size[-2:].upper()
    if unit not in units or not number.isdigit() or int(number) == 0:
        raise ValueError(f"max_shard_size is {size!r}; write a whole number with KB, MB or GB, such as 5GB.")
    return int(number) * units[unit]


def push(argv: list[str]) -> int:
    """`hf-mamba push RUN REPO [--public] [--revision BRANCH]`"""
    parser = argparse.ArgumentParser(
        prog="hf-mamba push",
        description="Upload a run's models to the Hub, one commit a checkpoint. Log in with `hf auth login` first.",
        allow_abbrev=False,
    )
    parser.add_argument("run", help="a run's folder, or a model's")
    parser.add_argument("repo", help="user/name, or a name of your account's; created where it is missing, private")
    parser.add_argument("--public", action="store_true", help="create a public repository")
    parser.add_argument("--revision", metavar="BRANCH", help="a branch other than main")
    parser.add_argument("--overwrite", action="store_true", help="replace files there that no run pushed")
    args = parser.parse_args(argv)
    from hf_mamba.interop import hub
    from hf_mamba.redaction import redact

    try:
        target = hub.Target(args.repo, private=not args.public, revision=args.revision, overwrite=args.overwrite)
        repo, made = hub.push(args.run, target)
    except OSError as error:  # a full disk, a folder without rights
        raise ValueError(f"{args.run} could not be prepared for the upload: {redact(str(error))}") from None
    for message in made:
        print(f"pushed to {repo}: {message}")
    if not made:
        print(f"{repo} has it all already")
    return 0


if __name__ == "__main__":
    sys.exit(main())
