"""Every kind of line that `hf-mamba launch` prints for two CPU processes is run as it is printed, word for word."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT, free_port
from runs import SETTINGS, Launcher, _flag, curve

from hf_mamba import cli

TWO = "num_processes: 2\nmixed_precision: 'no'\n"
MACHINES = "num_machines: 2\nmain_process_ip: 127.0.0.1\nmain_process_port: PORT\n"
KEYS = "deepspeed_config: {zero_stage: 2, deepspeed_multinode_launcher: standard}\n"
FSDP = "fsdp_config: {fsdp_version: 2, fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP}\n"
# name -> (flags, accelerate's own file, the stage that trains)
WAYS: dict[str, tuple[str, str, int | None]] = {
    "plain": ("--num_gpus 2", "", None),
    "a name": ("--num_gpus 2 --deepspeed zero2", "", 2),
    "a file": (f"--num_gpus 2 --deepspeed {ROOT}/ds_configs/zero3.json", "", 3),
    "two machines": ("--num_gpus 1 --num_nodes 2 --main_process_ip 127.0.0.1 --main_process_port PORT", "", None),
    "DeepSpeed on two machines": (
        "--num_gpus=1 --num-nodes 2 --deepspeed zero1 --main_process_ip 127.0.0.1 --main_process_port PORT",
        "",
        1,
    ),
    "MULTI_GPU": ("", f"distributed_type: MULTI_GPU\n{TWO}", None),
    "NO, and two processes": ("--num_gpus 2", "distributed_type: 'NO'\nuse_cpu: true\nnum_processes: 1", None),
    "FSDP, left out on CPUs": ("", f"distributed_type: FSDP\n{TWO}{FSDP}", None),
    "DEEPSPEED by keys": ("", f"distributed_type: DEEPSPEED\n{TWO}{KEYS}", 2),
    "DEEPSPEED by file": (
        "",
        f"distributed_type: DEEPSPEED\n{TWO}deepspeed_config: {{deepspeed_config_file: {ROOT}/ds_configs/zero1.json}}",
        1,
    ),
    "DEEPSPEED on two machines": ("", f"distributed_type: DEEPSPEED\n{TWO}{MACHINES}{KEYS}", 2),
}
# What stands in the place of recipes/pretrain.py: the recipe, as a fork of a process that has imported all
RANK = """
import sys
sys.path.insert(0, {tests!r})
from forked import main
sys.exit(main({address!r}, sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def alone(launcher: Launcher) -> list[tuple[float, ...]]:
    """The curve of one process."""
    launcher.run("printed-alone", max_steps=3, save_strategy="no")
    return curve(launcher.folder / "printed-alone")


@pytest.mark.parametrize("name", WAYS)
def test_a_printed_line_runs(
    name: str, launcher: Launcher, alone, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    flags, text, stage = WAYS[name]
    port, output = str(free_port()), launcher.folder / f"printed-{name}"
    script, file = tmp_path / "rank.py", tmp_path / "a file.yaml"
    script.write_text(RANK.format(tests=str(ROOT / "tests"), address=launcher.address))
    settings = {**SETTINGS, "dataset": str(launcher.corpus), "output_dir": str(output), "max_steps": 3}
    argv = [word for key, value in (settings | {"save_strategy": "no"}).items() for word in _flag(key, value)]
    argv += [*flags.replace("PORT", port).split(), "--script", str(script)]
    if text:
        file.write_text(text.replace("PORT", port))
        argv += ["--accelerate_config", str(file)]
    home = {"HF_HOME": str(launcher.folder / "hf")}
    monkeypatch.setenv("HF_HOME", home["HF_HOME"])
    assert cli.main(["launch", *argv, "--dry_run"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("accelerate launch")]
    assert len(lines) == 1 + ("machines" in name)

    own = home | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TQDM_DISABLE": "1", "PYTHONPATH": str(ROOT)}
    own["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if "port" not in lines[0] and not text.count("PORT"):
        lines = [line.replace("accelerate launch", f"accelerate launch --main_process_port {port}") for line in lines]
    with (tmp_path / "out.txt").open("w") as out:
        started = [
            subprocess.Popen(shlex.split(line), env=os.environ | own, cwd=tmp_path, stdout=out, stderr=out)
            for line in lines
        ]
        try:
            codes = [process.wait(240) for process in started]
        finally:
            for process in started:
                process.kill()
    assert codes == [0] * len(lines), (tmp_path / "out.txt").read_text()[-5000:]
    plan = json.loads((output / "plan.json").read_text())
    assert (plan["num_processes"], plan["num_nodes"]) == (2, len(lines))
    assert (plan["ds_config"] or {}).get("zero_optimization", {}).get("stage") == stage
    for ours, theirs in zip(curve(output), alone, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
