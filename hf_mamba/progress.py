"""Progress of long work: a bar in a terminal; in a pipe or a file a line a minute, without control characters."""

import sys
from typing import Any, TextIO

from hf_mamba.terminal import wrapped

EVERY = 60.0  # seconds between the lines in a pipe


def bar(hidden: bool = False, **options: Any) -> Any:
    """A tqdm bar on stderr, which leaves nothing behind when it is closed; `options` are tqdm's."""
    from tqdm.auto import tqdm

    if sys.stderr.isatty():
        return tqdm(dynamic_ncols=True, leave=False, disable=hidden, **options)
    plain = "{desc}: {n_fmt}/{total_fmt} {unit}s, {elapsed} so far, {remaining} left{postfix}"
    pipe: Any = _Lines(sys.stderr)
    return tqdm(file=pipe, leave=False, disable=hidden, mininterval=EVERY, delay=EVERY, bar_format=plain, **options)


def say(text: str, error: bool = False) -> None:
    """Print `text` on stdout, or on stderr, above the bars of this terminal, and wrapped as it is wide."""
    from tqdm.auto import tqdm

    file = sys.stderr if error else sys.stdout
    if file.isatty():
        text = "\n".join(wrapped(line) for line in text.split("\n"))
    with tqdm.external_write_mode(file=file):
        print(text, file=file, flush=True)


class _Lines:
    """A stream on which each redrawing of a bar is a line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if shown := text.strip():
            self._stream.write(f"{shown}\n")

    def flush(self) -> None:
        self._stream.flush()
