"""The batch file runs itself again as long as that helps: the real file and real runs, with stand-ins for a cluster.

`srun` is a shell script that starts the task on each node as a session of its own, to which the tests send what Slurm's
--signal would; `scontrol` writes down what it is asked. Two nodes are two network namespaces.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from launching import ROOT, environment, write_corpus
from runs import SETTINGS, _flag, log_lines, wait_for

from hf_mamba.run.manifest import Manifest, published
from hf_mamba.run.requeue import should_run_again

STAND_INS = {
    "scontrol": 'if [ "$1" = show ]; then echo "$SLURM_JOB_NODELIST"; else echo "$*" >> "$HERE/scontrol.txt"; fi',
    "srun": """
shift; export SLURM_NODEID=0; code=0; tasks=()
for node in $NODES_HERE; do
    on=(); [ "$node" = here ] || on=(ip netns exec "${node%,*}" env "GLOO_SOCKET_IFNAME=${node#*,}")
    setsid "${on[@]}" "$@" & tasks+=($!); echo $! >> "$HERE/tasks.txt"; SLURM_NODEID=$((SLURM_NODEID + 1))
done
for task in "${tasks[@]}"; do wait "$task" || code=$?; done
exit $code""",
    "hf-mamba": f'exec {sys.executable} -m hf_mamba.cli "$@"',
    "python": f'exec {sys.executable} "$@"',
}


class Cluster:
    """A folder with the stand-ins, in which jobs run."""

    def __init__(self, folder: Path, nodes: list[tuple[str, str]] | None = None) -> None:
        self.folder = folder
        self.nodes = nodes or []
        for name, text in STAND_INS.items():
            self.stand_in(name, text)
        write_corpus(folder / "corpus.jsonl")

    def stand_in(self, name: str, text: str) -> None:
        (self.folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (self.folder / name).chmod(0o755)

    def submit(self, gpus: int, **settings: Any) -> subprocess.Popen[str]:
        chosen = {**SETTINGS, "dataset": str(self.folder / "corpus.jsonl"), "output_dir": "run", **settings}
        flags = [word for name, value in chosen.items() for word in _flag(name, value)]
        here = " ".join(",".join(node) for node in self.nodes) or "here"
        job = {"SLURM_JOB_NUM_NODES": str(len(self.nodes) or 1), "SLURM_GPUS_ON_NODE": str(gpus), "NODES_HERE": here}
        job |= {"SLURM_JOB_NODELIST": "10.213.7.1" if self.nodes else "127.0.0.1"}
        job |= {"SLURM_JOB_ID": str(os.getpid()), "SLURM_SUBMIT_DIR": str(self.folder), "HERE": str(self.folder)}
        env = environment(self.folder) | job
        env["PATH"] = f"{self.folder}{os.pathsep}{env['PATH']}"
        env["PYTHONPATH"] = str(ROOT)
        with open(self.folder / "job.txt", "a") as output:
            script = str(ROOT / "recipes" / "slurm" / "pretrain.sbatch")
            return subprocess.Popen(["bash", script, *flags], env=env, stdout=output, stderr=output, text=True)

    def requeued(self) -> list[str]:
        file = self.folder / "scontrol.txt"
        return file.read_text().splitlines() if file.exists() else []

    def text(self) -> str:
        return (self.folder / "job.txt").read_text()[-5000:]


@pytest.mark.parametrize("nodes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_told_to_stop_it_requeues_itself_and_the_next_start_finishes(
    tmp_path: Path, nodes: int, request: pytest.FixtureRequest
):
    cluster = Cluster(tmp_path, request.getfixturevalue("namespaces") if nodes > 1 else None)
    run = tmp_path / "run"
    job = cluster.submit(1, max_steps=400, save_steps=1000)
    wait_for(lambda: 3 in log_lines(run) or job.poll() is not None, timeout=400)
    for task in (tmp_path / "tasks.txt").read_text().split():
        os.killpg(int(task), signal.SIGUSR1)
    assert job.wait(400) == 85, cluster.text()
    assert "Traceback" not in (tmp_path / "job.txt").read_text()
    assert cluster.requeued() == [f"requeue {os.getpid()}"], cluster.text()
    ((_, manifest),) = published(run)
    assert manifest is not None
    assert json.loads((run / "status.json").read_text())["status"] == "requeue"
    job = cluster.submit(1, max_steps=manifest.step + 5, save_steps=1000)
    assert job.wait(400) == 0, cluster.text()
    assert sorted(log_lines(run)) == list(range(1, manifest.step + 6))
    assert (run / "model" / "model.safetensors").is_file()
    assert len(cluster.requeued()) == 1
    assert f"processes        {nodes}, data-parallel {nodes}" in (tmp_path / "job.txt").read_text()


def test_a_run_that_ended_for_bad_numbers_stays_ended(tmp_path: Path):
    """What such a run leaves (test_guard.py has a real one) is read by the real batch file."""
    cluster = Cluster(tmp_path)
    left = {"status": "bad numbers", "exit_code": 86, "resumed_at": 0, "time": time.time() + 600}
    cluster.stand_in("srun", f"mkdir run; echo '{json.dumps(left)}' > run/status.json; exit 86")
    job = cluster.submit(1, max_steps=50)
    assert job.wait(400) == 86, cluster.text()
    assert not cluster.requeued()
    assert "not run again: its status is bad numbers" in cluster.text()


@pytest.mark.parametrize(
    ("status", "began", "reached", "expected"),
    [
        ({"status": "requeue"}, 4, 7, "stopped and has come from step 4 to 7"),
        ({"status": "running"}, 0, 2, "lost and has come from step 0 to 2"),
        ({"status": "requeue", "rewound": True}, 4, 4, "goes back"),
        ({"status": "requeue"}, 4, 4, "nothing beyond step 4"),
        ({"status": "running"}, 0, None, "nothing beyond step 0"),
        ({"status": "requeue", "time": 5.0}, 0, 4, "did not come to its first step"),
        (None, 0, 4, "did not come to its first step"),
        ({"status": "finished"}, 0, 4, "its status is finished"),
    ],
)
def test_it_does_not_go_in_circles(tmp_path: Path, status: Any, began: int, reached: int | None, expected: str):
    if status is not None:
        row = {"time": time.time(), "resumed_at": began, **status}
        (tmp_path / "status.json").write_text(json.dumps(row))
    if reached is not None:
        (tmp_path / f"checkpoint-{reached}").mkdir()
        Manifest(reached, 1, 1, {}).write(tmp_path / f"checkpoint-{reached}")
    again, why = should_run_again(tmp_path, 10.0)
    assert expected in why
    assert again == ("come from" in why or "goes back" in why)
