"""The page is written nowhere but where it was asked for."""

import json
import os
from pathlib import Path

import pytest

from hf_mamba.report.page import main


def a_run(folder: Path) -> Path:
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    (folder / "samples.jsonl").write_text(json.dumps({"step": 1, "text": "\nssh-ed25519 AAAA evil\n"}) + "\n")
    return folder


@pytest.mark.parametrize("name", [".report.html.part", "report.html"])
def test_a_link_in_a_strangers_run_folder_leads_to_no_file_of_the_users(tmp_path: Path, name: str):
    keys = tmp_path / "authorized_keys"
    keys.write_text("mine")
    run = a_run(tmp_path / "run")
    (run / name).symlink_to(keys)
    assert main([str(run)]) == 0
    assert keys.read_text() == "mine"
    assert not (run / "report.html").is_symlink()
    assert "<html" in (run / "report.html").read_text()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_another_users_run_folder_is_only_read(tmp_path: Path):
    run = a_run(tmp_path / "run")
    os.chown(run, 65534, 65534)
    before = sorted(os.listdir(run))
    with pytest.raises(ValueError, match=r"another user's folder, which is only read\. Write --output FILE"):
        main([str(run)])
    assert main([str(run), "--output", str(tmp_path / "page.html")]) == 0
    assert sorted(os.listdir(run)) == before
    assert (tmp_path / "page.html").is_file()
