"""--report_to: a tracker is told what the log has, nothing leaves the machine, a missing package is said early."""

import json
import sqlite3
from importlib.util import find_spec
from pathlib import Path

import pytest
from launching import recipe
from runs import Launcher, at
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from hf_mamba.preflight import resolve
from hf_mamba.preflight.command_line import read_arguments
from hf_mamba.preflight.trackers import TRACKERS
from hf_mamba.run.log import read_log

SETTINGS = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no"}
AT_THE_END = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos"}
STEP = {"loss", "learning_rate", "grad_norm", "tokens_per_second", "data_wait_share", "memory_gb"}


def two_sources(launcher: Launcher) -> list[str]:
    other = launcher.folder / "trackers.jsonl"
    other.write_text(
        "\n".join(json.dumps({"text": f"{i} plus {j} is {i + j}. " * 6}) for i in range(20) for j in range(9))
    )
    return [f"{launcher.corpus}:0.6", f"{other}:0.4"]


def expected(folder: Path) -> dict[str, dict[int, float]]:
    """tag -> step -> value, from the run's own log, by the names that transformers gives to trackers."""
    found: dict[str, dict[int, float]] = {}
    for row in read_log(folder):
        for key, value in row.items():
            if key not in ("step", "time"):
                tag = f"eval/{key[5:]}" if key.startswith("eval_") else f"train/{key}"
                found.setdefault(tag, {})[row["step"]] = value
    assert {f"train/{key}" for key in STEP} <= found.keys()
    assert len([tag for tag in found if tag.startswith("eval/loss/")]) == 2
    return found


def test_tensorboard_has_what_the_log_has(launcher: Launcher):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = launcher.folder / "tensorboard"
    launcher.run(folder, report_to="tensorboard", dataset=two_sources(launcher), **SETTINGS)
    found: dict[str, dict[int, float]] = {}
    for events in sorted(folder.rglob("events.out.tfevents.*")):  # the evaluation at the end has one of its own
        reader = EventAccumulator(str(events))
        reader.Reload()
        for tag in reader.Tags()["scalars"]:
            found.setdefault(tag, {}).update({event.step: event.value for event in reader.Scalars(tag)})
    for tag, values in expected(folder).items():
        assert found[tag] == pytest.approx(values, rel=1e-6), tag


def test_nothing_is_reported_by_default(launcher: Launcher):
    folder = launcher.folder / "untracked"
    launcher.run(folder, **{**SETTINGS, "max_steps": 1})
    assert not list(folder.rglob("events.out.*"))
    assert json.loads((folder / "plan.json").read_text())["training_arguments"]["report_to"] == "none"


@pytest.mark.skipif(find_spec("trackio") is None, reason="trackio is not installed")
def test_trackio_stays_on_the_machine(launcher: Launcher):
    folder, store = launcher.folder / "trackio", launcher.folder / "trackio-store"
    patch = f"import os\nos.environ['TRACKIO_DIR'] = {str(store)!r}\n" + NO_NETWORK
    launcher.run(folder, report_to="trackio", dataset=two_sources(launcher), patch=patch, **SETTINGS)
    (database,) = store.rglob("*.db")
    rows = [json.loads(row[0]) for row in sqlite3.connect(database).execute("select metrics from metrics order by id")]
    for tag, values in expected(folder).items():
        got = {row["train/global_step"]: row[tag] for row in rows if tag in row}
        if got:  # transformers keeps the totals of the end to itself
            assert got == pytest.approx(values), tag
    assert {"train/loss", "train/tokens_per_second", "eval/loss"} <= set().union(*rows)


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_offline(launcher: Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As a process of its own, since wandb writes when it exits."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    flags = {**SETTINGS, "use_cpu": "true", "vocab_size": 320, "seq_len": 48, "report_to": "wandb", "logging_steps": 1}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    words += ["--dataset", *two_sources(launcher), "--output_dir", str(tmp_path / "run"), "--eval_fraction", "0.05"]
    done = recipe("plain", words, launcher.folder)
    assert done.returncode == 0, done.stderr[-3000:]
    (stored,) = tmp_path.rglob("*.wandb")
    content = stored.read_bytes()
    missing = [tag for tag in expected(tmp_path / "run") if tag.encode() not in content]
    assert not [tag for tag in missing if tag.split("/")[1] not in AT_THE_END]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--report_to", "tensorboard", "mlflow"], ["tensorboard", "mlflow"]),
        (["--report_to", "tensorboard,mlflow"], ["tensorboard", "mlflow"]),
        (["--report_to", "tensorboard, mlflow,"], ["tensorboard", "mlflow"]),
        (["--config", "list.yaml"], ["tensorboard", "mlflow"]),
        (["--config", "text.yaml"], ["tensorboard", "mlflow"]),
        (["--report_to", "tensorboard"], ["tensorboard"]),
        (["--report_to", "none"], "none"),
        ([], "none"),
    ],
)
def test_several_trackers_in_every_spelling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], expected: list[str] | str
):
    """Only that a package of this name can be imported is made up."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mlflow.py").touch()
    (tmp_path / "list.yaml").write_text("report_to: [tensorboard, mlflow]\n")
    (tmp_path / "text.yaml").write_text("report_to: tensorboard,mlflow\n")
    plan = resolve(read_arguments([*flags, "--use_cpu", "true"]))
    assert plan.known["training_arguments"]["report_to"] == expected
    every = resolve(read_arguments(["--report_to", "all", "--use_cpu", "true"])).known["training_arguments"]
    assert set(every["report_to"]) >= {"tensorboard", "mlflow"}


LATER = """
from torch.utils.tensorboard import SummaryWriter
add = SummaryWriter.add_scalar
def full(self, name, value, step, *more):
    if step == 3:
        raise OSError(28, "No space left on device")
    return add(self, name, value, step, *more)
SummaryWriter.add_scalar = full
"""


@pytest.mark.parametrize(
    ("when", "reason"),
    [("at the start", "NotADirectoryError: "), ("later", "OSError: [Errno 28] No space left on device")],
)
def test_a_tracker_that_fails_ends_nothing(launcher: Launcher, tmp_path: Path, when: str, reason: str):
    (tmp_path / "file").touch()
    unwritable = f"import os; os.environ['TENSORBOARD_LOGGING_DIR'] = {str(tmp_path / 'file' / 'logs')!r}"
    folder = launcher.folder / f"failing {when}"
    launch = launcher.run(folder, patch=LATER if when == "later" else unwritable, report_to="tensorboard", **SETTINGS)
    said = [line for line in launch.text().splitlines() if "tensorboard failed" in line]
    assert len(said) == 1
    assert reason in said[0]
    assert "Traceback" not in launch.text()
    assert max(row["step"] for row in read_log(folder) if "loss" in row) == 4


@pytest.mark.skipif(find_spec("mlflow") is None, reason="mlflow is not installed")
def test_a_dead_server_ends_nothing(launcher: Launcher):
    dead = "import os; os.environ.update(MLFLOW_TRACKING_URI='http://127.0.0.1:9', MLFLOW_HTTP_REQUEST_MAX_RETRIES='0')"
    launch = launcher.run(launcher.folder / "dead", report_to="mlflow", patch=dead, **SETTINGS)
    assert launch.text().count("mlflow failed, training goes on without it") == 1


RESUMED = {"max_steps": 6, "save_steps": 3, "eval_strategy": "no"}


def resumed(launcher: Launcher, name: str, tracker: str, patch: str = "") -> Path:
    """A run that is killed in step 5 and goes on from its checkpoint of step 3."""
    folder = launcher.folder / name
    kill = at("training_step", 4, "time.sleep(1); os.kill(os.getpid(), signal.SIGKILL)")
    launcher.start(folder, report_to=tracker, patch=patch + "\n" + kill, **RESUMED).wait()
    launcher.run(folder, report_to=tracker, patch=patch, **RESUMED)
    return folder


def test_a_resumed_run_goes_on_in_tensorboards_folder(launcher: Launcher):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = resumed(launcher, "resumed tensorboard", "tensorboard")
    (place,) = {events.parent for events in folder.rglob("events.out.tfevents.*")}
    reader = EventAccumulator(str(place))
    reader.Reload()
    assert [event.step for event in reader.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.skipif(find_spec("mlflow") is None, reason="mlflow is not installed")
def test_a_resumed_run_goes_on_in_mlflows_run(launcher: Launcher, tmp_path: Path):
    import mlflow

    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    patch = f"import os; os.environ['MLFLOW_TRACKING_URI'] = {store!r}; os.chdir({str(tmp_path)!r})"
    folder = resumed(launcher, "resumed mlflow", "mlflow", patch)
    client = mlflow.MlflowClient(store)
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert run.info.status == "FINISHED"
    assert {metric.step for metric in client.get_metric_history(run.info.run_id, "loss")} == {1, 2, 3, 4, 5, 6}
    assert json.loads((folder / "trackers.json").read_text()) == {"mlflow": run.info.run_id}
    assert run.data.metrics["eval_loss"] > 0  # the last evaluation, after training


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_a_resumed_run_goes_on_in_wandbs_run(launcher: Launcher, tmp_path: Path):
    patch = f"import os; os.environ.update(WANDB_MODE='offline', WANDB_DIR={str(tmp_path)!r})"
    folder = resumed(launcher, "resumed wandb", "wandb", patch)
    starts = sorted(path.stem for path in tmp_path.rglob("run-*.wandb"))
    assert len(starts) == 2
    assert set(starts) == {"run-" + json.loads((folder / "trackers.json").read_text())["wandb"]}


@pytest.mark.skipif(find_spec("trackio") is None, reason="trackio is not installed")
def test_a_resumed_run_goes_on_in_trackios_run(launcher: Launcher, tmp_path: Path):
    folder = resumed(
        launcher, "resumed trackio", "trackio", f"import os; os.environ['TRACKIO_DIR'] = {str(tmp_path)!r}"
    )
    (database,) = tmp_path.rglob("*.db")
    rows = sqlite3.connect(database).execute("select run_name, metrics from metrics").fetchall()
    assert {name for name, _ in rows} == {json.loads((folder / "trackers.json").read_text())["trackio"]}
    steps = {json.loads(metrics).get("train/global_step") for _, metrics in rows}
    assert steps >= {1, 2, 3, 4, 5, 6}


# any connection that leaves the machine ends the run
NO_NETWORK = """
import socket
connect = socket.socket.connect
def local(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
        os._exit(99)
    return connect(self, address)
socket.socket.connect = local
"""


@pytest.mark.parametrize(
    ("report_to", "message"),
    [("neptune", "pip install neptune"), ("tensorbord", "Write tensorboard")],
)
def test_a_tracker_that_cannot_be_used_is_one_message(launcher: Launcher, report_to: str, message: str):
    said = launcher.recipe(["--report_to", report_to, "--dry_run"], expect=2)
    assert message in " ".join(said.split())
    assert "1 problem" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("environment", "problems"),
    [
        ({}, 1),
        ({"WANDB_MODE": "offline"}, 0),
        ({"WANDB_API_KEY": "x" * 40}, 0),
        ({"NETRC": "netrc"}, 0),
        ({"NETRC": "netrc", "WANDB_BASE_URL": "https://elsewhere.example"}, 1),
    ],
)
def test_wandb_without_a_login_is_said_before_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], problems: int
):
    """Only that a package of this name can be imported is made up."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "wandb.py").touch()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password " + "x" * 40)
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = [problem for problem in resolve({"report_to": "wandb"}).problems if problem.key == "report_to"]
    assert len(found) == problems
    assert all("wandb login" in problem.fix for problem in found)


def test_every_tracker_of_transformers_is_known():
    assert TRACKERS.keys() == INTEGRATION_TO_CALLBACK.keys()


def test_a_space_is_private_unless_public_was_written():
    values = {"report_to": ["trackio"], "trackio_space_id": "a/b"}
    assert resolve(values).known["training_arguments"]["hub_private_repo"] is True
    assert resolve({**values, "hub_private_repo": False}).known["training_arguments"]["hub_private_repo"] is False
    assert "hub_private_repo" not in resolve({}).known["training_arguments"]
