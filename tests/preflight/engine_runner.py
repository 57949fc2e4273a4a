"""Real engine starts, cheaply: a parent that has imported everything forks the ranks of one run after the other.

    python engine_runner.py CASES.json RESULTS.json [RANKS]

A case is {"training_arguments", "model_config", "seq_len"}, and optionally "save": true and "resume": folder, for ranks
(two by default) on CPUs over gloo. Its result is what DeepSpeed's engine says after the run, or {"error": text}; of a
rank that hangs the error says where: its stack, and the end of what it has printed.
"""

import faulthandler
import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

WORLD = int(sys.argv[3]) if len(sys.argv) > 3 else 2
LIMIT_S = 300.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_rank(case: dict[str, Any], folder: str) -> dict[str, Any]:
    """A run through Trainer; the engine's own numbers."""
    import torch
    from transformers import Trainer, TrainingArguments

    from hf_mamba import MambaConfig, MambaForCausalLM
    from hf_mamba.preflight.parameters import count

    arguments = {**case["training_arguments"], "disable_tqdm": True}
    if not case.get("save"):
        arguments |= {"output_dir": folder, "save_strategy": "no"}
    args = TrainingArguments(**arguments)
    model = MambaForCausalLM._from_config(MambaConfig(**case["model_config"]))
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * WORLD
    parameters = sum(count(model).values())  # under zero.Init, where a rank holds shards only
    tokens = torch.arange(case["seq_len"]) % case["model_config"]["vocab_size"]
    data = [{"input_ids": tokens, "labels": tokens}] * (rows * args.max_steps)
    trainer = Trainer(model=model, args=args, train_dataset=data)
    trainer.train(resume_from_checkpoint=case.get("resume"))
    engine = trainer.model_wrapped
    return {
        "micro_batch_size": engine.train_micro_batch_size_per_gpu(),
        "gradient_accumulation_steps": engine.gradient_accumulation_steps(),
        "global_batch_size": engine.train_batch_size(),
        "stage": int(engine.zero_optimization_stage()),
        "gradient_clipping": engine.gradient_clipping(),
        "dtype": str(next(model.parameters()).dtype),
        "parameters": parameters,
        "steps": trainer.state.global_step,
        "loss": trainer.state.log_history[-1]["train_loss"],
    }


def child(rank: int, case: dict[str, Any], port: int, folder: str) -> None:
    """The forked rank: its output goes to a file, and it never returns."""
    code = 0
    log = os.open(f"{folder}/{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    try:
        result = run_rank(case, folder)
    except BaseException as error:
        result = {"error": f"{type(error).__name__}: {error}"[:500], "trace": traceback.format_exc()[-3000:]}
        code = 1
    Path(f"{folder}/{rank}.json").write_text(json.dumps(result))
    os._exit(code)


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """Fork the ranks, wait, and return rank 0's result, or the first error."""
    with tempfile.TemporaryDirectory() as folder:
        port, pids = free_port(), []
        for rank in range(WORLD):
            pid = os.fork()
            if pid == 0:
                child(rank, case, port, folder)
            pids.append(pid)
        running, deadline, failed, killed = set(pids), time.monotonic() + LIMIT_S, False, ""
        while running and time.monotonic() < deadline and not failed:
            for pid in list(running):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    running.discard(pid)
                    failed = failed or status != 0
                    if os.WIFSIGNALED(status):
                        killed += f"rank {pids.index(pid)} was killed by {signal.Signals(os.WTERMSIG(status)).name}. "
            time.sleep(0.02)
        stuck = "" if failed else "".join(where(pids.index(pid), pid, folder) for pid in sorted(running))
        for pid in running:  # the other rank waits for one that has failed
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        results = [Path(f"{folder}/{rank}.json") for rank in range(WORLD)]
        found = [json.loads(file.read_text()) for file in results if file.is_file()]
        errors = [result for result in found if "error" in result]
        return errors[0] if errors else found[0] if len(found) == WORLD else {"error": killed + stuck}


def where(rank: int, pid: int, folder: str) -> str:
    """The stack of a rank that hangs, after what it has printed."""
    os.kill(pid, signal.SIGUSR1)
    time.sleep(1.0)  # faulthandler writes at once, in C
    log = Path(f"{folder}/{rank}.log").read_text(errors="replace")
    return f"rank {rank} has not ended after {LIMIT_S:.0f} s:\n{log[-3000:]}\n"


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from fork_server import preload

    print("preloading, which may compile ShareMemCommBuilder", flush=True)
    faulthandler.dump_traceback_later(LIMIT_S)  # a build that waits for another's lock shows it in the log
    preload()
    from deepspeed.ops.op_builder import CPUAdamBuilder  # type: ignore[attr-defined]

    print("loading CPUAdamBuilder, which may compile it", flush=True)
    CPUAdamBuilder().load(verbose=False)
    faulthandler.cancel_dump_traceback_later()
    cases = json.loads(Path(sys.argv[1]).read_text())
    results = []
    for case in cases:
        start = time.monotonic()
        results.append({**run_case(case), "seconds": round(time.monotonic() - start, 2)})
        Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
