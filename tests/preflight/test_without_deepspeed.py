"""Planning needs neither DeepSpeed nor torch nor transformers: the read-back alone does, on the machine that runs."""

import json
import subprocess
import sys

import pytest

from hf_mamba.findings import Findings
from hf_mamba.preflight import resolve
from hf_mamba.preflight.deepspeed.readback import check_readback

PLANNING = """
import json, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("deepspeed", "torch", "transformers", "accelerate"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
from hf_mamba.preflight import resolve
config = {"zero_optimization": {"stage": 3, "overlap_comm": True}, "bf16": {"enabled": "auto"},
          "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}, "gradient_clipping": "auto"}
plan = resolve({"preset": "7b_mamba", "num_gpus": 4, "resume": "never", "deepspeed": config}, environ={})
print(json.dumps([plan.ok, plan.to_dict()["training_arguments"]["learning_rate"], plan.dtype]))
"""


def test_a_plan_is_made_where_deepspeed_is_not_installed() -> None:
    done = subprocess.run([sys.executable, "-c", PLANNING], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == [True, 1e-4, "bf16"]


def test_the_machine_that_runs_needs_it_and_the_one_that_plans_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    config = {"zero_optimization": {"stage": 1}}
    values = {"resume": "never", "max_steps": 5, "deepspeed": config}
    here, there, without = Findings(), Findings(), Findings()
    assert check_readback(resolve({**values, "use_cpu": True}, world_size=1, environ={}).require(), here) is None
    assert [problem.id for problem in here.problems] == ["deepspeed-not-installed"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    planned = resolve({**values, "num_gpus": 4}, environ={}, device="gpu").require()
    assert check_readback(planned, there) is None
    assert not there.problems
    assert any("not installed" in note for note in there.notes)
    check_readback(resolve({"resume": "never", "use_cpu": True}, world_size=1, environ={}).require(), without)
    assert not without.problems
