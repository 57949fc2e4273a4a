"""transformers' tensor parallelism shards a hybrid's tied embeddings over two processes, as it does a stock one's."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from launching import ROOT, environment
from packaging.version import Version
from test_beside_stock import pair

SCRIPT = """
import json, os, sys, torch
from hf_mamba import GraniteMoeHybridForCausalLM

ids = torch.arange(2 * 13).view(2, 13) * 11 % 60 + 1
model = GraniteMoeHybridForCausalLM.from_pretrained(sys.argv[1], tp_plan="auto")
rows = model.lm_head.weight.to_local().shape[0]
loss = model.train()(ids, labels=ids).loss
loss.backward()
said = model.eval().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False).tolist()
gradient = model.lm_head.weight.grad.full_tensor().norm().item()
if os.environ["RANK"] == "0":
    print(json.dumps({"rows": rows, "loss": loss.item(), "said": said, "gradient": gradient}))
"""


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.24"),
    reason="a stock model's tied head fails, too, with transformers 5.17; the versions between were not tried",
)
def test_a_sharded_hybrid_is_the_whole_one(tmp_path: Path):
    model = pair("granitemoehybrid", vocab_size=64, tie_word_embeddings=True, eos_token_id=None)["ours"].train()
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(tmp_path / "script.py"), str(tmp_path / "model")]
    variables = environment(tmp_path) | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    ids = torch.arange(2 * 13).view(2, 13) * 11 % 60 + 1
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert found["rows"] == 32
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert found["gradient"] == pytest.approx(model.lm_head.weight.grad.norm().item(), rel=1e-4)
    greedy = {"max_new_tokens": 3, "do_sample": False}
    assert found["said"] == model.eval().generate(ids, attention_mask=torch.ones_like(ids), **greedy).tolist()
