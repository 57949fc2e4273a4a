"""Planning, tokenising and the model on a system without /proc, fork and sched_getaffinity, as macOS is."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import os, sys

def refuse(event, arguments):
    if event in ("open", "os.listdir", "os.scandir") and str(arguments[0]).startswith("/proc"):
        raise FileNotFoundError(2, "taken away", str(arguments[0]))

for name in ("fork", "forkpty", "sched_getaffinity", "sched_setaffinity"):
    delattr(os, name)
sys.addaudithook(refuse)

from hf_mamba.preflight import resolve, verify
plan = resolve({"preset": "tiny_mamba", "max_steps": 2, "resume": "never", "output_dir": sys.argv[1] + "/run"})
checked = verify(plan.require(), unused=False).require()  # DeepSpeed is installed on Linux only
print("steps", plan.total_steps, sum(checked.parameters.values()) == plan.parameters["estimated"])

import torch
from hf_mamba import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM
small = dict(vocab_size=32, hidden_size=32, num_hidden_layers=1)
mamba2 = Mamba2Config(head_dim=16, num_heads=4, n_groups=1, **small)
for model in (MambaForCausalLM(MambaConfig(**small)), Mamba2ForCausalLM(mamba2)):
    ids = torch.arange(16).view(2, 8)
    model(input_ids=ids, labels=ids).loss.backward()
    print("gradients", all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters()))
    print("generated", model.generate(ids, max_new_tokens=2, do_sample=False).shape[1])

from hf_mamba.data import prepare_data
data = prepare_data([sys.argv[2]], vocab_size=300, seq_len=16, eval_fraction=0.0, cache_dir=sys.argv[1], progress=False)
print("row", len(data.train[0]["input_ids"]))
"""


def test_it_works_without_what_only_linux_has(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {n} of a text\n" for n in range(500)))
    environ = {**os.environ, "HF_MAMBA_BACKEND": "torch", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), str(text)]
    done = subprocess.run(command, capture_output=True, text=True, env=environ, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-6:] == [
        "steps 2 True",
        *("gradients True", "generated 10"),
        *("gradients True", "generated 10"),
        "row 16",
    ]
