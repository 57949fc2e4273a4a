"""Run the recipe as a user would: real commands, real processes, files the test makes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECIPE = str(ROOT / "recipes" / "pretrain.py")
LAUNCHERS = {
    "plain": [sys.executable],
    "ddp": ["--multi_gpu"],
    "deepspeed": ["--use_deepspeed"],
    "fsdp": [
        *("--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"),
        *("--fsdp_state_dict_type", "FULL_STATE_DICT"),
    ],
}


def environment(cache: Path) -> dict[str, str]:
    """A user's environment without network; caches and builds in a folder of the test's."""
    own = {
        "HF_HOME": str(cache / "hf"),
        "HF_HUB_OFFLINE": "1",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "TQDM_DISABLE": "1",
    }
    return os.environ | own


def write_corpus(path: Path, documents: int = 150) -> Path:
    """Text in which a few words follow each other by rule, so that a model can learn from a few steps."""
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "wizards", "boil"]
    lines = []
    for i in range(documents):
        text = " ".join(words[(i * 3 + j * (1 + i % 3)) % len(words)] for j in range(40 + i % 23))
        lines.append(json.dumps({"text": text, "id": i}))
    path.write_text("\n".join(lines))
    return path


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def recipe(
    launcher: str, arguments: list[str], cache: Path, processes: int = 2, timeout: int = 400
) -> subprocess.CompletedProcess[str]:
    """Run recipes/pretrain.py to its end."""
    if launcher == "plain":
        command = [*LAUNCHERS["plain"], RECIPE]
    else:
        accelerate = str(Path(sys.executable).with_name("accelerate"))
        command = [accelerate, "launch", *LAUNCHERS[launcher], "--num_processes", str(processes)]
        command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        command += ["--main_process_port", str(free_port()), RECIPE]
    return subprocess.run(
        [*command, *arguments],
        env=environment(cache),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def logged(folder: Path, key: str = "loss") -> list[float]:
    """The values of `key` that a finished run logged, step by step."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [row[key] for row in history if key in row]
