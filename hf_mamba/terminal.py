"""Text for people: wrapped at words on a terminal; whole lines in a pipe or a file, where programs read them."""

import shutil
import sys
import textwrap
from collections.abc import Iterable

NARROW = 120  # columns below which a long name and its text do not share a line


def put(text: str, hanging: int = 0) -> None:
    """Print each line of `text` on stdout, wrapped where that is a terminal; what is wrapped is indented."""
    for line in text.split("\n"):
        print(wrapped(line, hanging) if sys.stdout.isatty() else line)


def wrapped(line: str, hanging: int = 0, width: int | None = None) -> str:
    """One line as several, none wider than the terminal but for a longer word."""
    return textwrap.fill(
        line,
        width or shutil.get_terminal_size().columns,
        subsequent_indent=" " * hanging,
        break_long_words=False,
        break_on_hyphens=False,
    )


def put_names(rows: Iterable[tuple[str, str]]) -> None:
    """Print names with a text each: beside them, or below them in a narrow terminal."""
    rows = list(rows)
    column = max(len(name) for name, _ in rows) + 2
    below = sys.stdout.isatty() and shutil.get_terminal_size().columns < NARROW
    for name, text in rows:
        put(f"{name}\n    {text}" if below else f"{name:<{column}}{text}", 4 if below else column)
