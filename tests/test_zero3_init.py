"""Under ZeRO-3 a model is partitioned as it is built: no rank ever holds the whole of it."""

import json
import subprocess
import sys
from pathlib import Path

from launching import ROOT, environment

from hf_mamba.family import count_parameters

# glibc gives a freed tensor's pages back at once, so that the resident size is what is held
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def test_no_rank_holds_the_whole_model_at_init(tmp_path: Path):
    from zero3_init import CONFIG

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(Path(__file__).with_name("zero3_init.py")), str(tmp_path)]
    done = subprocess.run(
        command, env=environment(tmp_path) | MALLOC, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    whole = sum(count_parameters(CONFIG).values())
    for rank in (0, 1):
        report = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert report["whole"] == whole
        assert report["mine"] < 0.51 * whole
        # fp32 is 4 bytes a parameter: this rank's half is 2, and one block is gathered at a time
        assert report["rise"] < 3 * whole, report
