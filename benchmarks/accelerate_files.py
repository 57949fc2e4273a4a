"""accelerate files of public projects: which keep their meaning here, by kind, and what is refused and why.

    python -m benchmarks.run accelerate --folder FOLDER [--before CHECKOUT]

FOLDER holds the files and an INDEX.tsv (file, repository, path, kind, ...). Where a file names a DeepSpeed file,
ds_configs/zero3.json stands in for it.

accelerate's own meaning is read in a process of its own, with the environment that `accelerate launch --config_file`
makes: from its DeepSpeed and FSDP plugins. It is compared with the plan of both ways: of the file ("planned"), and
inside that environment ("launched"). CHECKOUT is an earlier version. Writes results/accelerate_files.md.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "accelerate_files.md"
WAYS = ("planned", "launched")
STAND_IN = Path(__file__).parents[1] / "ds_configs" / "zero3.json"
ARGUMENTS = {"preset": "7b_mamba", "resume": "never", "output_dir": "runs/none"}


def index(folder: Path) -> list[dict[str, str]]:
    with open(folder / "INDEX.tsv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def environment_of(file: Path) -> dict[str, str]:
    """The variables that `accelerate launch --config_file FILE` gives its processes; whatever it raises."""
    from accelerate.commands import launch
    from accelerate.utils import launch as prepare

    args = launch.launch_command_parser().parse_args(["--config_file", str(file), "script.py"])
    args, defaults, own_precision = launch._validate_launch_command(args)
    if args.use_deepspeed:
        fields = [*defaults.deepspeed_config, *(["mixed_precision"] if own_precision else [])]
        args.deepspeed_fields_from_accelerate_config = ",".join(fields)
        env, world = prepare.prepare_deepspeed_cmd_env(args)[1], True
    elif args.use_fsdp or args.use_megatron_lm or args.multi_gpu:
        env, world = prepare.prepare_multi_gpu_env(args), True
    elif args.tpu:
        return {"PJRT_DEVICE": "TPU", "WORLD_SIZE": str(args.num_processes)}
    else:
        env, world = prepare.prepare_simple_launcher_cmd_env(args)[1], args.mpirun_hostfile is not None
    each = args.num_processes // args.num_machines if world else 1
    return env | {"WORLD_SIZE": str(each * args.num_machines if world else 1), "LOCAL_WORLD_SIZE": str(each)}


def accelerates_meaning(env: Mapping[str, str]) -> dict[str, Any]:
    """What a process with this environment does, from accelerate's own plugins; whatever they raise."""
    from accelerate.utils import DeepSpeedPlugin

    # without a GPU the plugin cannot make ranks equal, which is no part of the meaning
    os.environ |= env | {"FSDP_SYNC_MODULE_STATES": "false", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
    meaning: dict[str, Any] = {"world": int(env["WORLD_SIZE"]), "dtype": env.get("ACCELERATE_MIXED_PRECISION", "no")}
    if env.get("ACCELERATE_USE_DEEPSPEED") == "true":
        config = DeepSpeedPlugin().deepspeed_config
        zero = config.get("zero_optimization", {})
        meaning |= {"engine": "DeepSpeed", "stage": zero.get("stage"), "clipping": config.get("gradient_clipping")}
        meaning["accumulation"] = config.get("gradient_accumulation_steps")
        for what in ("optimizer", "param") if zero.get("stage") == 3 else ("optimizer",):
            meaning[f"offload {what}"] = zero.get(f"offload_{what}", {}).get("device")
    elif env.get("ACCELERATE_USE_FSDP") == "true":
        meaning |= {"engine": "FSDP"} | plugin_fields()
    return {name: value for name, value in meaning.items() if value not in ("auto", "no", None)}


def plugin_fields() -> dict[str, Any]:
    """accelerate's FSDP plugin of this process's environment, by the names of a plan's `fsdp`."""
    from accelerate.utils import FullyShardedDataParallelPlugin

    from hf_mamba.training.sharding import read_plugin

    found = vars(read_plugin(FullyShardedDataParallelPlugin())).copy()
    if found["wrapping"] != "SIZE_BASED_WRAP":
        del found["min_num_params"]  # nobody reads it
    return found


def plans_meaning(plan: Mapping[str, Any]) -> dict[str, Any]:
    """The same of a plan.json."""
    dtype = {"fp32": "no"}.get(plan["dtype"], plan["dtype"])
    meaning: dict[str, Any] = {"world": plan["num_processes"], "dtype": dtype}
    config, fsdp = plan["ds_config"], plan.get("fsdp")
    if config:
        zero = config["zero_optimization"]
        meaning |= {"engine": "DeepSpeed", "stage": zero["stage"], "clipping": config["gradient_clipping"]}
        meaning["accumulation"] = config["gradient_accumulation_steps"]
        for what in ("optimizer", "param"):
            meaning[f"offload {what}"] = zero.get(f"offload_{what}", {}).get("device", "none")
    elif fsdp:
        own = fsdp if isinstance(fsdp, Mapping) else {}
        meaning |= {"engine": "FSDP", **own}
    return meaning


def verdict(file: Path) -> dict[str, dict[str, Any]]:
    """Of each way: {"accelerate": meaning or "error": ..., "ok": ..., "differs": [...], "problems": [...]}."""
    clean = {name: text for name, text in os.environ.items() if not name.startswith(("ACCELERATE_", "FSDP_"))}
    own: dict[str, Any] = {}
    env: dict[str, str] = {}
    try:
        env = environment_of(file)
        own["accelerate"] = accelerates_meaning(env)
    except (Exception, SystemExit) as error:
        own["error"] = f"{type(error).__name__}: {error}"
    found = {"planned": own | _compared(_planned(file, clean), own)}
    refused = {"ok": False, "problems": []}
    found["launched"] = own | (refused if "error" in own else _compared(_launched(env), own))
    return found


def _compared(plan: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """What a plan says, beside accelerate's meaning."""
    out: dict[str, Any] = {"ok": plan["ok"], "problems": [[p["id"], p["key"]] for p in plan["problems"]]}
    if plan["ok"] and "accelerate" in own:
        ours, theirs = plans_meaning(plan), own["accelerate"]
        foreign = "Mamba" in str(ours.get("wrapped")) and "Mamba" not in str(theirs.get("wrapped"))
        out["differs"] = [
            f"{name}: {value}, here {ours.get(name)}"
            for name, value in theirs.items()
            if ours.get(name) != value and not (name == "wrapped" and foreign)
        ]
    return out


def _planned(file: Path, environ: dict[str, str]) -> dict[str, Any]:
    """The plan of the file."""
    from hf_mamba.preflight import resolve
    from hf_mamba.preflight.launch import accelerate_config as reader

    if hasattr(reader, "planned_launcher"):
        return resolve({**ARGUMENTS, "accelerate_config": str(file)}, environ={}).to_dict()
    from hf_mamba.findings import Findings  # as `hf-mamba preflight` did before

    out = Findings()
    return resolve(ARGUMENTS, environ=reader.environment(file, out), problems=out.problems).to_dict()


def _launched(env: Mapping[str, str]) -> dict[str, Any]:
    """The plan inside a process that accelerate has started, with its FSDP plugin as it is built there afterwards."""
    from hf_mamba.preflight import resolve

    plan = resolve(ARGUMENTS, environ=env, device=None if env.get("ACCELERATE_USE_CPU") == "True" else "gpu").to_dict()
    if isinstance(plan.get("fsdp"), Mapping):
        os.environ |= plan["environment"]
        assert all(plan["fsdp"][key] == value for key, value in plugin_fields().items())
    return plan


def verdicts(folder: Path) -> dict[str, dict[str, Any]]:
    """Every file, each in a process of its own."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import torch.distributed.fsdp  # noqa: F401  all once, before the forks

    from hf_mamba.preflight import resolve

    resolve(ARGUMENTS, environ={})
    found: dict[str, dict[str, Any]] = {}
    for row in index(folder):
        with tempfile.TemporaryDirectory() as place:
            _put_deepspeed_file(folder / row["file"], Path(place))
            found[row["file"]] = _in_a_fork(folder.resolve() / row["file"], place)
    return found


def _put_deepspeed_file(file: Path, place: Path) -> None:
    """A DeepSpeed file where an accelerate file names one; its own is not in the folder."""
    from hf_mamba.files import Unreadable, load_yaml, read_small

    with contextlib.suppress(Unreadable, AttributeError):
        named = load_yaml(read_small(file))[0].get("deepspeed_config", {}).get("deepspeed_config_file")
        if named and not Path(named).is_absolute():
            (place / named).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(STAND_IN, place / named)


def _in_a_fork(file: Path, place: str) -> dict[str, Any]:
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        os.chdir(place)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            text = json.dumps(verdict(file), default=str)
        except BaseException as error:
            crash = {"ok": False, "problems": [], "crash": f"{type(error).__name__}: {error}"}
            text = json.dumps(dict.fromkeys(WAYS, crash))
        with open(writer, "w") as out:
            out.write(text)
        os._exit(0)
    os.close(writer)
    with open(reader) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return json.loads(text)


def judge(one: Mapping[str, Any]) -> str:
    """same, misreads, refuses or crashes; of a file that accelerate refuses: "refuses" or "accepts"."""
    if "crash" in one:
        return "crashes"
    if "error" in one:
        return "accepts" if one["ok"] else "refuses"
    return "refuses" if not one["ok"] else "misreads" if one["differs"] else "same"


def kind_of(row: Mapping[str, str], now: Mapping[str, Any]) -> str:
    """The row of the table that a file belongs to."""
    problems = {problem[0] for problem in now["planned"]["problems"]}
    if "error" in now["launched"] or "crash" in now["launched"]:
        missing = "file-unreadable" in problems and "deepspeed" in str(now["launched"]).lower()
        return "(its DeepSpeed file is not at hand)" if missing else "(accelerate refuses it)"
    if problems & {"megatron", "xla", "model-parallel"}:
        return "(Megatron, XLA, or a tp, cp or sp size above 1)"
    return row["kind"].split(",")[0]


def table(folder: Path, now: Mapping[str, Any], before: Mapping[str, Any] | None) -> str:
    """The counts by kind and way, and what is refused or read in another way."""
    rows = index(folder)
    lines = ["# accelerate files of public projects", ""]
    lines += [f"{len(rows)} files, `--preset 7b_mamba`; same/files, of those that accelerate takes.", ""]
    lines += [
        "| kind | files | planned before | launched before | planned | launched |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    kinds = Counter(kind_of(row, now[row["file"]]) for row in rows)
    total: Counter[str] = Counter()
    for kind, count in sorted(kinds.items()):
        names = [row["file"] for row in rows if kind_of(row, now[row["file"]]) == kind]
        good = "refuses" if kind.startswith("(") else "same"
        cells = []
        for label, found in (("before", before), ("now", now)):
            for way in WAYS:
                same = sum(judge(found[name][way]) == good for name in names) if found else None
                cells.append("" if same is None else f"{same}")
                if good == "same":
                    total[label + way] += same or 0
        lines.append(f"| {kind} | {count} | {' | '.join(cells)} |")
    taken = sum(count for kind, count in kinds.items() if not kind.startswith("("))
    sums = [f"{total[label + way] / taken:.1%}" for label in ("before", "now") for way in WAYS]
    lines += [f"| all kinds without brackets | {taken} | {' | '.join(sums)} |", "", "In brackets: rightly refused.", ""]
    lines += ["## Not the same", "", "| file | way | what |", "|---|---|---|"]
    for row in rows:
        for way in WAYS:
            one = now[row["file"]][way]
            said = judge(one)
            good = "refuses" if kind_of(row, now[row["file"]]).startswith("(") else "same"
            if said != good:
                what = one.get("crash") or one.get("differs") or one.get("problems") or one.get("error")
                lines.append(f"| {row['file']} | {way} | {said}: {str(what)[:200]} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    prog, text = "python -m benchmarks.run accelerate", (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog=prog, description=text)
    parser.add_argument("--folder", type=Path, default=os.environ.get("HF_MAMBA_REAL_ACCELERATE_FILES"))
    parser.add_argument("--before", type=Path, help="a checkout of an earlier version")
    parser.add_argument("--verdicts", action="store_true", help="print what is found of every file as JSON, and stop")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(argv)
    if options.folder is None:
        parser.error("--folder: where are the files?")
    if options.verdicts:
        print(json.dumps(verdicts(options.folder)))
        return 0
    before = None
    if options.before:
        command = [sys.executable, __file__, "--verdicts", "--folder", str(options.folder)]
        env = {**os.environ, "PYTHONPATH": str(options.before)}
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
        before = json.loads(done.stdout.splitlines()[-1])
    found = table(options.folder, verdicts(options.folder), before)
    options.out.write_text(found, encoding="utf-8")
    print(found)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
