"""Files appear whole, under a mode that the umask decides, and never through somebody's link."""

import os
import stat
from pathlib import Path

import pytest

from hf_mamba.files import beside, cache_folder, open_whole, publish_folder, remove_parts, write_json, write_whole


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_umask_decides_the_mode_of_a_new_file_and_a_replaced_one_keeps_its_own(tmp_path: Path, umask, mode):
    before = os.umask(umask)
    try:
        new = write_json(tmp_path / "deep" / "new.json", {"a": [1]})
        old = tmp_path / "old"
        old.write_text("old")
        old.chmod(0o640)
        write_whole(old, "new")
    finally:
        os.umask(before)
    assert stat.S_IMODE(new.stat().st_mode) == mode
    assert new.read_text() == '{\n  "a": [\n    1\n  ]\n}\n'
    assert (old.read_text(), stat.S_IMODE(old.stat().st_mode)) == ("new", 0o640)
    assert sorted(os.listdir(tmp_path)) == ["deep", "old"]
    assert os.listdir(tmp_path / "deep") == ["new.json"]


def test_a_link_is_replaced_and_what_it_points_to_is_not_touched(tmp_path: Path):
    other = tmp_path / "other"
    other.write_text("somebody's")
    for name, points_to in (("there", other), ("nowhere", tmp_path / "absent")):
        (tmp_path / name).symlink_to(points_to)
        write_whole(tmp_path / name, b"ours")
        assert not (tmp_path / name).is_symlink()
        assert (tmp_path / name).read_bytes() == b"ours"
    assert other.read_text() == "somebody's"
    assert not (tmp_path / "absent").exists()


def test_after_a_failure_the_old_file_stands_and_nothing_else_is_left(tmp_path: Path):
    target = write_whole(tmp_path / "file", "old")

    def interrupted() -> None:
        with open_whole(target) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_replaces_another_as_a_whole(tmp_path: Path):
    for name in ("first", "second"):
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / name / "inner" / name).write_text(name)
        publish_folder(tmp_path / name, tmp_path / "final")
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == [
        "final", "final/inner", "final/inner/second",
    ]  # fmt: skip


def test_variables_that_users_have_set_name_the_caches(monkeypatch: pytest.MonkeyPatch):
    for name in ("HF_HOME", "HF_MAMBA_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    kinds = ("data", "kernels", "throughput")
    assert [str(cache_folder(kind)) for kind in kinds] == [
        "/x/huggingface/hf_mamba", "/x/hf_mamba/kernels", "/x/hf_mamba",
    ]  # fmt: skip
    monkeypatch.setenv("HF_HOME", "/hf")
    monkeypatch.setenv("HF_MAMBA_CACHE", "/own")
    assert [str(cache_folder(kind)) for kind in kinds] == ["/hf/hf_mamba", "/x/hf_mamba/kernels", "/own"]
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/me")
    assert str(cache_folder("kernels")) == "/home/me/.cache/hf_mamba/kernels"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_all_files_of_a_published_folder_have_the_users_mode(tmp_path: Path, umask: int):
    building = tmp_path / "building"
    building.mkdir()
    (building / "a").touch(mode=0o600)  # as safetensors writes
    (building / "b").touch(mode=0o777)
    before = os.umask(umask)
    try:
        publish_folder(building, tmp_path / "final")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "final").iterdir()} == {0o666 & ~umask}
    assert sorted(os.listdir(tmp_path)) == ["final"]


def test_what_a_killed_builder_left_is_removed_and_what_a_living_one_builds_is_not(tmp_path: Path):
    final = tmp_path / "model"
    (tmp_path / ".model.0123456789abcdef.partial").mkdir()  # nobody holds it
    (tmp_path / ".other.0123456789abcdef.partial").mkdir()
    with beside(final) as one, beside(final) as other:
        assert {path.name for path in tmp_path.iterdir()} == {one.name, other.name, ".other.0123456789abcdef.partial"}
        one.rename(final)
    assert sorted(os.listdir(tmp_path)) == [".other.0123456789abcdef.partial", "model"]


def test_unfinished_files_are_told_from_others(tmp_path: Path):
    for name in (".status.json.0123456789abcdef", ".lock", "plan.json", ".saving", ".a.0123456789abcde"):
        (tmp_path / name).touch()
    remove_parts(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".a.0123456789abcde", ".lock", ".saving", "plan.json"]
