"""Made what lies beside this file, with the package as it was at commit b25b921; tests/test_old_runs.py reads it.

    git worktree add --detach OLD b25b921
    PYTHONPATH=OLD OMP_NUM_THREADS=1 python tests/old_runs/make.py OLD

It is kept to say how the files were made, and runs with that commit only. Everything is made in a folder of its own
with relative paths, so that no path of the machine is in it. It leaves:

start/            a fresh model of 25,568 parameters and its tokenizer, from which the runs start
cache/            HF_HOME/hf_mamba: the tokenizer trained on corpus.jsonl and the corpus in tokens
plain/, zero2/    run folders that a signal ended at checkpoint-4 of 8 steps; zero2 is two ranks of ZeRO-2
plain-model/, zero2-model/    what the same runs exported when nothing disturbed them
recorded.json     the undisturbed runs' log, the logits of the models, and on what machine
"""

import hashlib
import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
CONFIG = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 320}
FLAGS = "--dataset corpus.jsonl --model_name_or_path start --seq_len 48 --max_steps 8 --save_steps 4 --logging_steps 1"
FLAGS += " --eval_fraction 0.05 --use_cpu --global_batch_size 4 --learning_rate 0.004 --warmup_steps 2"
NOT_KEPT = shutil.ignore_patterns("*.png", "README.md")  # the card names the folder of the recipe
LOGGED = ("loss", "grad_norm", "learning_rate", "eval_loss")
ZERO2 = "--deepspeed zero2.json --micro_batch_size 2"


def corpus(path: Path) -> None:
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "wizards", "boil"]
    lines = []
    for i in range(60):
        text = " ".join(words[(i * 3 + j * (1 + i % 3)) % len(words)] for j in range(40 + i % 23))
        lines.append(json.dumps({"text": text}))
    path.write_text("\n".join(lines))


def stopped_in_step_4() -> None:
    """Become the recipe, whose first rank sends itself what a cluster would send, within step 4."""
    import signal

    from hf_mamba.training.trainer import MambaTrainer

    step = MambaTrainer.training_step

    def patched(self, *args, **kwargs):
        if self.state.global_step == 3 and self.args.process_index == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    MambaTrainer.training_step = patched
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")


def fresh_model(tokenizer: Path, folder: Path) -> None:
    import torch

    from hf_mamba import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    MambaForCausalLM(MambaConfig(**CONFIG)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder / name)


def logits(folder: Path) -> list[float]:
    import torch

    from hf_mamba import MambaForCausalLM

    with torch.no_grad():
        out = MambaForCausalLM.from_pretrained(folder).eval()(torch.arange(24).view(1, 24) * 13 % 320).logits
    return out[0, -1].tolist()


def machine() -> dict[str, str]:
    """What the last bit of a sum depends on."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    facts = [line for line in lines if line.startswith(("model name", "flags"))][:2]
    return {"torch": torch.__version__, "cpu": hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]}


def leave_out_scripts(checkpoint: Path) -> None:
    """Remove DeepSpeed's own scripts from a checkpoint and its manifest: they are not ours to ship."""
    manifest = checkpoint / "manifest.json"
    body = json.loads(manifest.read_text())
    del body["sha256"]
    for script in checkpoint.glob("*.py"):
        script.unlink()
        del body["files"][script.name]
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    manifest.write_text(json.dumps({**body, "sha256": hashlib.sha256(text.encode()).hexdigest()}, indent=1))


def main(old: Path) -> None:
    recipe = str(old / "recipes" / "pretrain.py")
    work = Path(tempfile.mkdtemp())
    os.chdir(work)
    corpus(work / "corpus.jsonl")
    shutil.copy(old / "ds_configs" / "zero2.json", work)
    env = os.environ | {"HF_HOME": "home", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(old)}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def run(words: str, output: str, expect: int = 0, ranks: int = 1) -> None:
        script = [str(HERE / "make.py"), "--stop", recipe] if expect else [recipe]
        command = [sys.executable]
        if ranks > 1:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = str(probe.getsockname()[1])
            command = [str(Path(sys.executable).with_name("accelerate")), "launch", "--use_deepspeed"]
            command += ["--num_processes", str(ranks), "--num_machines", "1", "--mixed_precision", "no"]
            command += ["--dynamo_backend", "no", "--main_process_port", port]
        command += [*script, *words.split(), "--output_dir", output]
        done = subprocess.run(command, env=env, cwd=work, check=False)
        assert done.returncode == expect or ranks > 1, done.returncode

    # The cache: a tokenizer is trained and the corpus is tokenised with it
    run("--dataset corpus.jsonl --vocab_size 320 --seq_len 48 --max_steps 1 --use_cpu --eval_fraction 0.05", "first")
    (trained,) = (work / "home" / "hf_mamba" / "tokenizers").iterdir()
    fresh_model(trained, work / "start")
    for name, more, ranks in (("plain", "--micro_batch_size 4", 1), ("zero2", ZERO2, 2)):
        run(f"{FLAGS} {more}", f"whole-{name}", ranks=ranks)
        run(f"{FLAGS} {more}", name, expect=85, ranks=ranks)

    recorded: dict = {"commit": "b25b921", "machine": machine(), "flags": FLAGS.split(), "zero2_flags": ZERO2.split()}
    for name in ("plain", "zero2"):
        whole, stopped = work / f"whole-{name}", work / name
        assert json.loads((stopped / "status.json").read_text())["status"] == "requeue"
        assert [path.name for path in stopped.glob("checkpoint-*")] == ["checkpoint-4"]
        (stopped / ".lock").unlink(missing_ok=True)  # names the machine
        history = json.loads((whole / "trainer_state.json").read_text())["log_history"]
        recorded[name] = {
            "log": {key: [row[key] for row in history if key in row] for key in LOGGED},
            "run.json": json.loads((whole / "run.json").read_text()),
            "logits": logits(whole / "model"),
            "checkpoint_logits": logits(stopped / "checkpoint-4"),
        }
        shutil.copytree(whole / "model", work / f"{name}-model", ignore=NOT_KEPT)
        shutil.copytree(stopped, HERE / name)
        leave_out_scripts(HERE / name / "checkpoint-4")
        shutil.copytree(work / f"{name}-model", HERE / f"{name}-model")
    shutil.copytree(work / "start", HERE / "start")
    shutil.copy(work / "corpus.jsonl", HERE)
    shutil.copy(work / "zero2.json", HERE)
    for part in ("tokenizers", "tokens"):
        shutil.copytree(work / "home" / "hf_mamba" / part, HERE / "cache" / part)
    for job in HERE.glob("cache/tokens/*/job.json"):  # says where the corpus lay; read only while a build goes on
        job.write_text(job.read_text().replace(str(work), "/data"))
    (HERE / "recorded.json").write_text(json.dumps(recorded, indent=1) + "\n")
    shutil.rmtree(work)


if __name__ == "__main__":
    if sys.argv[1] == "--stop":
        sys.argv[0] = sys.argv[2]
        stopped_in_step_4()
    else:
        main(Path(sys.argv[1]).resolve())
