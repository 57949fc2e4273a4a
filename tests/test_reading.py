"""The one reader of the files that a user names: whatever the file is, one sentence, bounded in bytes and values."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_mamba.files import MAX_BYTES, MAX_NODES, Unreadable, load_yaml, read_small, too_large
from hf_mamba.findings import MOST, Problem
from hf_mamba.preflight import resolve
from hf_mamba.preflight.command_line import read_arguments
from hf_mamba.preflight.launch.accelerate_config import read_file

pytestmark = pytest.mark.usefixtures("empty_folder")  # a run in this checkout would be part of the plans


def _fifo(folder: Path) -> str:
    os.mkfifo(folder / "pipe")
    return str(folder / "pipe")


def _loop(folder: Path) -> str:
    (folder / "loop").symlink_to(folder / "loop")
    return str(folder / "loop")


def _written(content: bytes) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        (folder / "file").write_bytes(content)
        return str(folder / "file")

    return make


NESTED = b"a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + b"".join(
    b"a%d: &a%d [%s]\n" % (i, i, b", ".join([b"*a%d" % (i - 1)] * 10)) for i in range(1, 10)
)
MERGED = b"m0: &m0 {k: 1}\n" + b"".join(b"m%d: &m%d {<<: [*m%d, *m%d]}\n" % (i, i, i - 1, i - 1) for i in range(1, 30))

# what is named -> words of the one sentence
NOT_READ: dict[str, tuple[Callable[[Path], str], str]] = {
    "pipe": (_fifo, "not a file"),
    "endless device": (lambda _: "/dev/zero", "not a file"),
    "random device": (lambda _: "/dev/random", "not a file"),
    "folder": (str, "folder"),
    "no file": (lambda folder: str(folder / "none"), "no such file"),
    "symlink loop": (_loop, "cannot be read"),
    "nobody's home": (lambda _: "~nosuchuser/x", "no user nosuchuser"),
    "null byte": (lambda _: "a\0b", "not a path"),
    "long name": (lambda _: "x" * 10_000, "cannot be read"),
    "large": (_written(b"#" * (MAX_BYTES + 1)), "too large"),
    "binary": (_written(b"\xff\xfe\x00\x01"), "not text"),
}
# and what is read, but is no configuration in YAML
NOT_YAML: dict[str, tuple[bytes, str]] = {
    "aliases": (NESTED, f"more than {MAX_NODES:,} values"),
    "merges": (MERGED, "values|levels"),
    "itself": (b"a: &a [*a]\n", "levels"),
    "deep": (b"[" * 5000, "YAML|deep|levels"),
    "date": (b"seed: 2020-13-45\n", "not YAML"),
    "whole": (b"seed: !!int abc\n", "not YAML"),
    "switch": (b"bf16: !!bool abc\n", "not YAML"),
    "open": (b"a: [1,\n", "not YAML, line"),
    "foreign tag": (b"a: !!python/object:os.system x\n", "not YAML, line 1"),
}


@pytest.mark.parametrize("name", NOT_READ)
def test_what_is_no_small_file_is_one_sentence(name: str, tmp_path: Path) -> None:
    make, words = NOT_READ[name]
    path = make(tmp_path)
    with pytest.raises(Unreadable, match=words):
        read_small(path)
    for option in ("deepspeed", "model_name_or_path", "resume"):  # none of them waits or ends in a traceback
        if name not in ("no file", "folder"):
            values = {"resume": "never", "max_steps": 1, "seq_len": 8, option: path}
            resolve(values, world_size=1, environ={}, device="cpu")
    assert [problem.id for problem in read_arguments(["--config", path]).problems] == ["config-unreadable"]
    found = Collected()
    read_file(Path(path), found)  # type: ignore[arg-type]
    assert found.ids == ["accelerate-config-unreadable"]
    sharded = resolve({"fsdp": "full_shard", "fsdp_config": path}, world_size=2, environ={}, device="gpu")
    assert [problem.id for problem in sharded.problems] == ["fsdp-refused"]


class Collected:
    """Remembers the ids of problems."""

    def __init__(self) -> None:
        self.ids: list[str] = []

    def problem(self, *words: str, id: str) -> None:
        self.ids.append(id)


@pytest.mark.parametrize("name", NOT_YAML)
def test_yaml_that_is_no_configuration_is_one_sentence(name: str, tmp_path: Path) -> None:
    content, words = NOT_YAML[name]
    with pytest.raises(Unreadable, match=words):
        load_yaml(content.decode())
    path = _written(content)(tmp_path)
    assert [problem.id for problem in read_arguments(["--config", path]).problems] == ["config-unreadable"]
    assert {problem.key for problem in resolved(path)} <= {"deepspeed", "bf16"}
    assert resolved(path)


def resolved(path: str) -> tuple[Problem, ...]:
    return resolve({"resume": "never", "deepspeed": path}, world_size=1, environ={}, device="cpu").problems


def test_only_the_first_bytes_of_a_file_are_read(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(Unreadable, match="too large"):
        read_small(path)


def test_keys_that_stand_twice_are_told_with_their_line() -> None:
    assert load_yaml("seed: 1\nbf16: true\nseed: 2\n") == ({"seed": 2, "bf16": True}, [("seed", 3)])


def test_values_are_counted_as_often_as_they_are_used() -> None:
    shared = [0] * 1000
    assert too_large([shared] * 50) is None
    assert too_large([shared] * 150) is not None


@pytest.mark.parametrize("value", ["1", '"auto"', "null", "1e400", "{}"])
def test_of_many_strange_keys_the_first_are_listed(value: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    keys = ", ".join(f'"k{i}": {value}' for i in range(60_000))
    path.write_text(f'{{"zero_optimization": {{"stage": 1}}, {keys}}}')
    assert len(resolved(str(path))) <= MOST + 1
    path.write_text(f'{{"zero_optimization": {{"stage": 1, {keys}}}}}')
    assert len(resolved(str(path))) <= MOST + 1


def test_of_many_unknown_arguments_the_first_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("".join(f"k{i}: 1\n" for i in range(20_000)))
    assert len(read_arguments(["--config", str(path)]).problems) <= MOST + 1


@pytest.mark.parametrize("value", ["inf", "1e400", "9" * 400, "-inf", "nan"])
@pytest.mark.parametrize("flag", ["seed", "max_steps", "seq_len", "num_gpus", "micro_batch_size"])
def test_numbers_beyond_measure_are_a_problem(flag: str, value: str, tmp_path: Path) -> None:
    read = read_arguments([f"--{flag}", value])
    plan = resolve(read, world_size=None, environ={})
    assert plan.problems
    path = tmp_path / "run.yaml"
    path.write_text(f"{flag}: {value.replace('inf', '.inf').replace('nan', '.nan')}\n")
    read = read_arguments(["--config", str(path)])
    assert resolve(read, environ={}).problems


@pytest.mark.parametrize("key", ["save_steps", "logging_steps", "output_dir", "gpu_memory", "warmup_steps", "optim"])
@pytest.mark.parametrize("value", [".inf", "{a: 1}", "[1, 2]", "9" * 400, "true"])
def test_no_value_of_a_file_ends_in_a_traceback(key: str, value: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"{key}: {value}\n")
    read = read_arguments(["--config", str(path)])
    plan = resolve(read, environ={})
    json.dumps(plan.to_dict())
