"""DeepSpeed files that people have: they start, with the meaning that today's stack gives them, or say why not.

`ds_files/` holds one in our own words of every kind. Files of public projects are read from ../shared/real_ds_configs
beside the repository, or from HF_MAMBA_REAL_FILES, where there are such; INDEX.tsv says what the stack makes of each.
"""

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks.fuzz_verdict import other_blocks, other_meanings
from benchmarks.stack_oracle import Refused, run_stack
from hf_mamba.preflight import Plan, resolve

HERE = Path(__file__).parent
REAL = Path(os.environ.get("HF_MAMBA_REAL_FILES") or HERE.parents[2] / "shared" / "real_ds_configs")
ROWS: list[list[str]] = []
if (REAL / "INDEX.tsv").is_file():
    with open(REAL / "INDEX.tsv", encoding="utf-8", newline="") as index:
        ROWS = [row for row in list(csv.reader(index, delimiter="\t", quoting=csv.QUOTE_NONE))[1:] if row]

# What our own files are refused for; the others start.
OURS = {
    "one_bit.json": {"optimizer-without-equal"},
    "cycle.json": {"unknown-scheduler"},
    "misspelt.json": {"misspelt-key"},
    "dots_in_keys.json": {"key-with-dots"},
    "another_trainers.json": {"no-deepspeed-file"},
    "arguments_of_a_run.yaml": {"no-deepspeed-file"},
    "pointer.json": {"file-of-another-kind"},
    "sparse_attention.json": {"removed-sparse-attention"},
}
# What real files are refused for: a kind that nothing can take over, or the same that the stack refuses.
REFUSED = {"optimizer-without-equal", "removed-sparse-attention", "removed-curriculum-learning", "removed-amp"}
REFUSED |= {"no-deepspeed-file"}


def plan(file: Path, gpus: int = 4, preset: str = "7b_mamba") -> Plan:
    values = {"preset": preset, "num_gpus": gpus, "resume": "never", "deepspeed": str(file)}
    return resolve({**values, "output_dir": "runs/none"}, environ={})


@pytest.mark.parametrize("file", sorted((HERE / "ds_files").iterdir()), ids=lambda path: path.name)
def test_a_file_of_every_kind(file: Path) -> None:
    found = plan(file)
    assert {problem.id for problem in found.problems} == OURS.get(file.name, set())
    if found.ok and file.suffix == ".json":
        check_same_meaning(found, json.loads(file.read_text(encoding="utf-8")))


def test_what_our_files_mean() -> None:
    found = plan(HERE / "ds_files" / "decay_to_nothing.json").require()
    assert found.total_steps == 500
    assert found.rates == {
        "type": "WarmupDecayLR",
        "params": {
            "warmup_min_lr": 0.0,
            "warmup_max_lr": 3e-5,
            "warmup_num_steps": 50,
            "total_num_steps": 500,
            "warmup_type": "linear",
        },
    }
    quoted = plan(HERE / "ds_files" / "everything_in_quotes.json").require()
    assert quoted.ds_config is not None
    assert (quoted.micro_batch_size, quoted.dtype, quoted.ds_config["zero_optimization"]["stage"]) == (2, "bf16", 3)
    notes = " ".join(plan(HERE / "ds_files" / "without_effect.json").require().notes)
    for key in ("activation_checkpointing", "compression_training", "autotuning", "offload_param", "thread_count"):
        assert key in notes


@pytest.mark.skipif(not ROWS, reason=f"there is no {REAL / 'INDEX.tsv'}")
@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_a_real_file_starts_with_its_meaning(row: list[str]) -> None:
    file, starts = REAL / row[0], row[3] == "ok"
    found = plan(file, int(row[4]) if starts else 4)
    assert {problem.id for problem in found.problems} <= REFUSED
    if found.ok and starts:
        check_same_meaning(found, json.loads(file.read_text(encoding="utf-8")))


@pytest.mark.skipif(not ROWS, reason=f"there is no {REAL / 'INDEX.tsv'}")
def test_nearly_all_that_the_stack_starts_start_here() -> None:
    starting = [row for row in ROWS if row[3] == "ok"]
    refused = [row[0] for row in starting if not plan(REAL / row[0], int(row[4])).ok]
    assert len(refused) <= 0.02 * len(starting), refused


def check_same_meaning(found: Plan, raw: dict[str, Any]) -> None:
    """DeepSpeedConfig of HF's processing and of ours, attribute by attribute; a difference has its own provenance."""
    assert found.ds_config is not None
    assert found.world_size is not None
    assert found.total_steps is not None
    arguments, world = found.training_arguments, found.world_size
    hidden = found.model_config["hidden_size"]
    ours = run_stack(found.ds_config, arguments, world, hidden, found.total_steps)
    try:
        theirs = run_stack(raw, arguments, world, hidden, found.total_steps)
    except Refused:
        return  # repaired here
    assert not [*other_meanings(found, theirs, ours), *other_blocks(found, theirs)]
