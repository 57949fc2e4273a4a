"""What a run on CPUs may use of this machine: the limits of control groups and of the process; a run beyond them."""

import importlib.util
import os
import platform
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hf_mamba.findings import Findings
from hf_mamba.preflight import resolve
from hf_mamba.preflight.cost import capacity, host
from hf_mamba.preflight.cost.memory import LIBRARIES
from hf_mamba.training.errors import EXIT_USER_ERROR

pytestmark = pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="reads Linux's /proc")
ROOT = Path(__file__).parents[2]
GB = 10**9


@pytest.fixture
def machine(tmp_path):
    """A machine of 64 GB with 40 GB available, and this process in the group /job/step."""

    def write(groups: str, files: dict[str, str]) -> dict[str, Path]:
        proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
        sizes = {"meminfo": "MemTotal: 62500000 kB\nMemAvailable: 39062500 kB\n", "self/cgroup": groups}
        sizes["self/status"] = "Name:\tpython\nVmSize: 3000000 kB\nVmRSS: 976563 kB\nVmData: 2000000 kB\n"
        for path, text in [(proc / name, text) for name, text in sizes.items()] + [
            (cgroups / name, text) for name, text in files.items()
        ]:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return {"proc": proc, "cgroups": cgroups}

    return write


V2 = {
    "job/memory.max": str(8 * GB),
    "job/memory.current": str(5 * GB),
    "job/memory.stat": f"anon 1\ninactive_file {2 * GB}",
}


@pytest.mark.parametrize(
    ("groups", "files", "free"),
    [
        ("", {}, 40),
        ("0::/job/step", V2 | {"job/step/memory.max": "max"}, 5),  # what can be dropped counts as free
        ("0::/job/step", {f"unified/{name}": text for name, text in V2.items()}, 5),
        ("0::/job/step", V2 | {"job/memory.current": str(9 * GB)}, 1),
        (
            "7:cpu:/\n4:memory:/job/step",
            {
                "memory/job/step/memory.limit_in_bytes": str(2**63 - 4096),
                "memory/job/memory.limit_in_bytes": str(6 * GB),
                "memory/job/memory.usage_in_bytes": str(5 * GB),
                "memory/job/memory.stat": f"total_inactive_file {3 * GB}",
            },
            4,
        ),
        # a container: its path is the host's, and only its own group is mounted
        (
            "4:memory:/host/only",
            {
                f"memory/{n}": t
                for n, t in {
                    "memory.limit_in_bytes": str(3 * GB),
                    "memory.usage_in_bytes": str(GB),
                    "memory.stat": "",
                }.items()
            },
            2,
        ),
    ],
)
def test_the_smallest_of_what_the_system_and_every_group_have_left(machine, groups, files, free):
    at = machine(groups, files)
    own = 976563 * 1024
    assert host.usable_memory(**at) == pytest.approx(own + free * GB, rel=1e-3)
    assert host.usable_memory(4, **at) == pytest.approx(own + free * GB / 4, rel=1e-3), "ranks share it"


def test_without_proc_nothing_is_claimed(tmp_path):
    assert host.usable_memory(proc=tmp_path) is host.most_memory(proc=tmp_path) is None


def test_all_ranks_find_the_same_whole(machine):
    assert host.most_memory(2, **machine("0::/job/step", V2)) == 4 * GB
    assert host.most_memory(2, **machine("", {})) == 32 * GB


GROWTH = """
from hf_mamba.preflight.cost import host
host.forget_peak()
before = host.resident_peak()
block = bytearray(64 << 20)
block[::4096] = b"x" * (len(block) // 4096)
print(host.resident_peak() - before)
"""


def test_this_process_is_counted_as_the_system_counts_it():
    """In a process of its own: this one may hold freed memory that the block would fit into."""
    grown = int(subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True).stdout)
    assert 64 << 20 <= grown <= 72 << 20


FAULTS = """
import resource, torch
from hf_mamba.run.processes import use_cpu_well
use_cpu_well(deepspeed=False)
for turn in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize(
    ("own", "kept"),
    [
        ({}, True),
        ({"MALLOC_ARENA_MAX": "2"}, True),
        ({"MALLOC_MMAP_THRESHOLD_": "65536"}, False),
        ({"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=65536"}, False),
    ],
)
def test_freed_memory_is_kept_for_the_next_step_unless_the_user_said_otherwise(own, kept):
    """64 MB are 16,384 pages of 4 KiB, or 32 of 2 MiB; glibc may take some more blocks until one that it kept fits."""
    environment = {name: value for name, value in os.environ.items() if "MALLOC" not in name and "GLIBC" not in name}
    command = [sys.executable, "-c", FAULTS]
    done = subprocess.run(command, cwd=ROOT, env=environment | own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (int(done.stdout) < 32) == kept


BEFORE_A_MODEL = """
import sys
from hf_mamba.preflight.cost import host
assert host.libraries() is None, "torch is not here yet"
import transformers.trainer
found, held = host.libraries(), host._fields(host.PROC / "self" / "status")["VmRSS"]
model = b"x" * (256 << 20)
assert host.libraries() == found, "later there is a model"
print(found, held)
"""


def test_the_libraries_are_what_this_process_holds_before_it_has_a_model():
    done = subprocess.run([sys.executable, "-c", BEFORE_A_MODEL], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, held = map(int, done.stdout.split())
    later = host.LATER + (host.DEEPSPEED_IMPORT if importlib.util.find_spec("deepspeed") else 0)
    assert abs(found - held - later) < 2**20


def test_a_run_is_predicted_with_the_libraries_of_its_process(monkeypatch):
    monkeypatch.setattr(capacity, "libraries", lambda: None)
    elsewhere = capacity.predict(plan(), "cpu").predicted_bytes
    monkeypatch.setattr(capacity, "libraries", lambda: LIBRARIES + 10**8)
    assert capacity.predict(plan(), "cpu").predicted_bytes == elsewhere + 10**8


def plan(**more):
    values = {"preset": "130m_mamba", "max_steps": 2, "resume": "never"}
    return resolve(values | more, device="cpu").require()


@pytest.mark.parametrize(
    ("more", "usable", "words"),
    [
        ({}, 26 * GB, ""),
        ({"per_device_train_batch_size": 64}, 24 * GB, "--per_device_train_batch_size"),
        ({}, 20 * GB, "--gradient_checkpointing"),
        ({"preset": "7b_mamba"}, 24 * GB, "--preset 370m_mamba fits"),
        ({}, GB, "or a smaller model (--preset tiny_mamba fits)"),
    ],
)
def test_a_run_that_does_not_fit_is_told_what_would(monkeypatch, more, usable, words):
    monkeypatch.setattr(capacity, "usable_memory", lambda ranks: usable)
    monkeypatch.setattr(capacity, "libraries", lambda: None)  # this process's are not a training's
    out = Findings()
    found = capacity.check_memory(plan(**more), "cpu", out)
    assert found["usable_bytes"] == usable
    assert [problem.id for problem in out.problems] == ["does-not-fit"] * bool(words)
    assert (found["predicted_bytes"] > usable) == bool(words)
    for problem in out.problems:
        assert words in problem.fix


def test_ranks_of_a_node_share_its_memory(monkeypatch):
    asked = []
    monkeypatch.setattr(capacity, "usable_memory", lambda ranks: asked.append(ranks) or GB)
    two, out = replace(plan(), num_processes=4, num_nodes=2, world_size=4), Findings()
    capacity.check_memory(two, "cpu", out)
    assert asked == [2]
    assert "for each of 2 ranks here" in out.problems[0].found


def test_a_micro_batch_is_found_for_this_machine(monkeypatch):
    monkeypatch.setattr(capacity, "usable_memory", lambda: 12 * GB)
    monkeypatch.setattr(capacity, "libraries", lambda: None)
    found = plan(per_device_train_batch_size="auto")
    assert found.micro_batch_size > 1
    assert found.provenance["micro_batch_size"] == "the memory planner"
    fits = capacity.predict(found, "cpu", 12 * GB)
    assert found.micro_batch_size <= fits.largest_micro_batch_size <= found.micro_batch_size + 1, "a tenth stays free"
    monkeypatch.setattr(capacity, "most_memory", lambda ranks: 24 * GB // ranks)
    monkeypatch.setenv("WORLD_SIZE", "2")
    two = resolve({"preset": "130m_mamba", "per_device_train_batch_size": "auto"}, world_size=2, device="cpu").require()
    assert abs(two.micro_batch_size - found.micro_batch_size) <= 1, "the same share, and DDP's buckets"


def test_a_real_limit_refuses_a_real_start(tmp_path):
    """No data is read; the limit is one that the process would have died of."""
    limit, arguments = 12 * GB, ["--preset", "790m_mamba", "--max_steps", "2", "--use_cpu", "true", "--resume", "never"]
    arguments += ["--output_dir", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "recipes/pretrain.py", *arguments],
        cwd=ROOT,
        env=os.environ | {"HF_HOME": str(tmp_path / "home")},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == EXIT_USER_ERROR, done.stdout + done.stderr
    assert "of the machine's memory: it would be killed" in done.stdout
    assert "ready to start" not in done.stdout
    assert not list(tmp_path.rglob("*.bin")), "nothing was tokenised"
