"""Text on a terminal is wrapped at words; in a pipe a line stays a line."""

import re

import pytest

from hf_mamba import cli
from hf_mamba.terminal import put, put_names, wrapped


def test_no_line_is_wider_than_the_terminal_but_for_one_word() -> None:
    text = "  " + "some words of a text " * 20 + "w" * 70 + " end"
    lines = wrapped(text, 4, width=60).split("\n")
    assert [len(line) for line in lines if len(line) > 60] == [74]
    assert all(line.startswith("    ") for line in lines[1:])
    assert " ".join(" ".join(lines).split()) == " ".join(text.split())


def test_a_pipe_has_whole_lines(capsys: pytest.CaptureFixture[str]) -> None:
    put("word " * 100 + "\nend")
    put_names([("a", "b " * 100), ("long", "c")])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("a     b b")


@pytest.mark.parametrize("columns", [80, 160])
@pytest.mark.parametrize("words", [["presets"], ["rules"], ["rules", "xla"], ["memory"]])
def test_tables_fit_a_terminal(
    words: list[str], columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert cli.main(words) == 0
    lines = re.sub("\x1b\\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= columns
