"""Stopping on request, and the loss of a process or a node."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launching import free_port
from runs import ROOT, SETTINGS, Launcher, _flag, at, curve, log_lines, same_bytes, wait_for

from hf_mamba.run.manifest import published, verify


def signalled(part: str, step: int, rank: int, number: int = signal.SIGTERM) -> str:
    return at(part, step, f"os.kill(os.getpid(), {int(number)})", rank)


def status(folder: Path) -> dict:
    return json.loads((folder / "status.json").read_text())


@pytest.fixture(scope="module")
def undisturbed(launcher: Launcher) -> Path:
    launcher.run("calm", 2, eval_strategy="steps", eval_steps=4, per_device_eval_batch_size=1)
    return launcher.folder / "calm"


EVALUATING = {"eval_strategy": "steps", "eval_steps": 4, "per_device_eval_batch_size": 1}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_to_one_rank_stops_both_at_the_same_step(launcher: Launcher, undisturbed: Path, number: int):
    folder = launcher.folder / f"stopped-{number}"
    launch = launcher.run(folder, 2, expect=85, patch=signalled("training_step", 2, 1, number), **EVALUATING)
    assert f"{signal.Signals(number).name}: stopping after step 3" in launch.ranks[1].text()
    (path, manifest), *more = published(folder)
    assert manifest is not None
    assert (manifest.step, more) == (3, [])
    assert status(folder)["status"] == "requeue"
    assert status(folder)["exit_code"] == 85
    assert status(folder)["step"] == manifest.step == verify(path).step
    assert not (folder / "model").exists()
    if number == signal.SIGTERM:
        launcher.run(folder, 2, **EVALUATING)
        assert curve(folder) == curve(undisturbed)
        assert not same_bytes(undisturbed / "checkpoint-12", folder / "checkpoint-12")
        assert not same_bytes(undisturbed / "model", folder / "model")


def test_a_signal_in_evaluation_gives_it_up_saves_and_starts_with_it_again(launcher: Launcher, undisturbed: Path):
    folder = launcher.folder / "evaluating"
    launch = launcher.run(folder, 2, expect=85, patch=signalled("prediction_step", 4, 0), **EVALUATING)
    assert "leaving the evaluation at step 4" in launch.text()
    assert verify(folder / "checkpoint-4").run["evaluation_due"]
    assert not log_lines(folder, "eval_loss")
    launcher.run(folder, 2, **EVALUATING)
    assert log_lines(folder, "eval_loss") == log_lines(undisturbed, "eval_loss")
    assert curve(folder) == curve(undisturbed)


def test_a_signal_in_the_last_evaluation_keeps_the_run(launcher: Launcher, undisturbed: Path):
    folder = launcher.folder / "last"
    settings = {"per_device_eval_batch_size": 1, "save_strategy": "no"}
    launcher.run(folder, 2, expect=85, patch=signalled("prediction_step", 12, 1), **settings)
    assert (folder / "checkpoint-12").is_dir()
    launcher.run(folder, 2, **settings)
    assert not same_bytes(undisturbed / "model", folder / "model")


def test_a_folder_has_one_run_at_a_time_and_a_signal_before_the_first_step_ends_it_at_once(launcher: Launcher):
    folder = launcher.folder / "early"
    patch = "import time, hf_mamba.training.build as b\nbuild = b.build_model\n"
    patch += "b.build_model = lambda *a, **k: (time.sleep(600), build(*a, **k))[1]\n"
    launch = launcher.start(folder, patch=patch)
    wait_for(lambda: (folder / "plan.json").exists())  # the last file before the model is built
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    second = launcher.run(folder, expect=2)
    assert f"early is being written by process {launch.ranks[0].pid} on" in second.text()
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    launch.signal(signal.SIGTERM)
    assert launch.wait() == [85]
    assert "nothing to save" in launch.text()


# ---- torchrun, which starts lost processes again ----


TORCHRUN, ACCELERATE, DEEPSPEED = (
    str(Path(sys.executable).with_name(name)) for name in ("torchrun", "accelerate", "deepspeed")
)


def torchrun(folder: Path, launcher: Launcher, *options: str, **settings: object) -> list[str]:
    """A command whose ranks are forks of the fork server."""
    chosen = {**SETTINGS, "dataset": str(launcher.corpus), "output_dir": str(folder), "save_steps": 2, **settings}
    argv = [word for name, value in chosen.items() for word in _flag(name, value)]
    return [
        TORCHRUN,
        *options,
        "--no-python",
        sys.executable,
        str(ROOT / "tests" / "forked.py"),
        launcher.address,
        *argv,
    ]


def environment(launcher: Launcher) -> dict[str, str]:
    own = {"HF_HOME": str(launcher.folder / "hf"), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    # else torchrun keeps one store over all restarts, and ranks find the addresses of dead ones in it (torch 2.13)
    own["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    return os.environ | own | {"DS_ACCELERATOR": "cpu"}


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_torchrun_recovers_from_a_killed_rank_by_itself(launcher: Launcher):
    folder = launcher.folder / "restarted"
    options = ["--nproc_per_node=2", "--max_restarts=3", "--monitor_interval=0.1", "--standalone"]
    with open(launcher.folder / "torchrun.txt", "w") as output:
        agent = subprocess.Popen(
            torchrun(folder, launcher, *options, max_steps=30, save_steps=2),
            env=environment(launcher),
            stdout=output,
            stderr=output,
        )
        try:
            wait_for(lambda: (folder / "checkpoint-2").exists(), timeout=180)
            os.kill(children(agent.pid)[-1], signal.SIGKILL)
            assert agent.wait(240) == 0, (launcher.folder / "torchrun.txt").read_text()[-4000:]
        finally:
            if agent.poll() is None:
                agent.terminate()
                agent.wait(40)
    assert status(folder)["status"] == "finished"
    assert sorted(log_lines(folder)) == list(range(1, 31))
    resumed = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines() if "resumed_at" in line]
    assert len(resumed) >= 2
    assert all(row["resumed_at"] >= 2 for row in resumed[1:])


NUMBERS = ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
AGENTS = {  # launcher -> what comes before the port, and the recipe
    "torchrun": [TORCHRUN, "--nproc_per_node=2", "--master_port"],
    "accelerate": [ACCELERATE, "launch", "--multi_gpu", *NUMBERS, "--main_process_port"],
    "hf-mamba": [sys.executable, "-m", "hf_mamba.cli", "launch", "--num_gpus", "2", "--main_process_port"],
    "deepspeed": [DEEPSPEED, "--num_gpus", "2", "--master_port"],
}


@pytest.mark.parametrize(
    "name", ["torchrun", *(pytest.param(name, marks=pytest.mark.slow) for name in AGENTS if name != "torchrun")]
)
def test_a_signal_to_a_launcher_reaches_the_ranks(launcher: Launcher, name: str):
    """Its own exit code says nothing, status.json does. deepspeed passes nothing on: its process group is told."""
    folder = launcher.folder / f"agent-{name}"
    chosen = {**SETTINGS, "dataset": str(launcher.corpus), "output_dir": str(folder), "max_steps": 2000}
    argv = [word for key, value in chosen.items() for word in _flag(key, value)]
    script = ["--script"] if name == "hf-mamba" else []
    command = [*AGENTS[name], str(free_port()), *script, str(ROOT / "recipes" / "pretrain.py"), *argv]
    with open(launcher.folder / f"agent-{name}.txt", "w") as output:
        agent = subprocess.Popen(
            [*command, "--save_steps", "1000"],
            env=environment(launcher),
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            wait_for(lambda: 3 in log_lines(folder), timeout=180)
            assert (status(folder)["status"], status(folder)["step"] >= 3) == ("running", True)
            if name == "deepspeed":
                os.killpg(agent.pid, signal.SIGTERM)
            else:
                agent.terminate()
            assert agent.wait(60) != 0
            wait_for(lambda: status(folder)["status"] != "running")
        finally:
            if agent.poll() is None:
                agent.kill()
                agent.wait()
    assert (status(folder)["status"], status(folder)["exit_code"]) == ("requeue", 85)
    (path, manifest), *more = published(folder)
    assert not more
    assert manifest is not None
    assert verify(path).step == status(folder)["step"]
    if name == "hf-mamba":
        assert agent.returncode == 128 + signal.SIGTERM
        assert "Traceback" not in (launcher.folder / f"agent-{name}.txt").read_text()


# ---- two nodes ----


def test_two_nodes_of_which_one_is_lost_and_comes_back(launcher: Launcher, namespaces: list[tuple[str, str]]):
    """Node 1 dies with its agent; started again, both go on from the last whole checkpoint."""
    folder = launcher.folder / "nodes"
    agents: list[subprocess.Popen[bytes]] = []
    output = open(launcher.folder / "nodes.txt", "wb")  # noqa: SIM115

    def start(node: int) -> subprocess.Popen[bytes]:
        name, link = namespaces[node]
        options = ["--nnodes=2", "--nproc_per_node=1", "--max_restarts=3", "--monitor_interval=0.1"]
        options += ["--rdzv_backend=c10d", "--rdzv_endpoint=10.213.7.1:29400", "--rdzv_id=1"]
        options += [f"--local_addr=10.213.7.{node + 1}", f"--rdzv_conf=is_host={1 - node},timeout=120"]
        command = ["ip", "netns", "exec", name, *torchrun(folder, launcher, *options, max_steps=40)]
        env = environment(launcher) | {"GLOO_SOCKET_IFNAME": link}
        agents.append(subprocess.Popen(command, env=env, stdout=output, stderr=output, start_new_session=True))
        return agents[-1]

    try:
        first, second = start(0), start(1)
        wait_for(lambda: (folder / "checkpoint-2").exists(), timeout=200)
        os.killpg(second.pid, signal.SIGKILL)  # the agent; its worker is alone now
        for worker in subprocess.check_output(["ip", "netns", "pids", namespaces[1][0]], text=True).split():
            os.kill(int(worker), signal.SIGKILL)
        second.wait()
        second = start(1)
        assert [first.wait(300), second.wait(60)] == [0, 0], (launcher.folder / "nodes.txt").read_text()[-5000:]
    finally:
        for agent in agents:
            if agent.poll() is None:
                agent.terminate()
                agent.wait(60)
        output.close()
    assert status(folder)["status"] == "finished"
    assert sorted(log_lines(folder)) == list(range(1, 41))
    resumed = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines() if "resumed_at" in line]
    assert resumed[-1]["resumed_at"] >= 2
