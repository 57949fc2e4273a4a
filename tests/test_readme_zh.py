"""README.zh-CN.md says what README.md says, and both show what the commands print."""

import re
import shlex
from pathlib import Path

import pytest
from launching import ROOT

from hf_mamba import cli

CHINESE = (ROOT / "README.zh-CN.md").read_text(encoding="utf-8")
ENGLISH = (ROOT / "README.md").read_text(encoding="utf-8")
SCREENS = re.findall(r"```console\n(.*?)```", CHINESE + ENGLISH, re.DOTALL)


def test_its_commands_are_the_english_page_s() -> None:
    commands = re.findall(r"```bash\n(.*?)```", CHINESE, re.DOTALL)
    assert len(commands) == 2
    assert all(f"```bash\n{command}```" in ENGLISH for command in commands)
    table = CHINESE.split("\n## ")[-1].split("\n\n")[1]
    rows = re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE)
    assert len(rows) == 5
    assert all(f"\n| {row} |" in ENGLISH for row in rows)


@pytest.mark.parametrize("screen", SCREENS, ids=["batch", "parameters", "offload", "english"])
def test_its_screens_are_what_is_printed(
    screen: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    *files, (command, *expected) = (part.splitlines() for part in screen.split("$ ")[1:])
    for line, *text in files:
        Path(line.removeprefix("cat ")).write_text("\n".join(text))
    code = cli.main(shlex.split(command)[1:])
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in expected if line not in printed] == []
    assert code == (2 if any("not started" in line for line in expected) else 0)
