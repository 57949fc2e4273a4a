"""One step in this process.

python -m benchmarks.gpu_session.step NAME MODULE:FUNCTION DIR [--rehearse] [ARGUMENT ...]
"""

import argparse
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.gpu_session.figures import Figure, append, read_figures

T = TypeVar("T")


@dataclass(frozen=True)
class Context:
    """What a step is given."""

    step: str
    folder: Path
    rehearse: bool

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    def pick(self, whole: T, small: T) -> T:
        """What is measured, or what is rehearsed."""
        return small if self.rehearse else whole

    def report(
        self, setting: str, name: str, value: float, unit: str, beside: float | None = None, note: str = ""
    ) -> None:
        figure = Figure(self.step, setting, name, float(f"{value:.5g}"), unit, beside, note)
        append(self.folder, figure)
        print(figure, flush=True)

    def figure(self, key: str) -> float | None:
        """An earlier figure of the session."""
        return next((figure.value for figure in read_figures(self.folder) if figure.key == key), None)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("function")
    parser.add_argument("folder", type=Path)
    parser.add_argument("arguments", nargs="*")
    parser.add_argument("--rehearse", action="store_true")
    options: Any = parser.parse_intermixed_args()
    module, _, function = options.function.partition(":")
    step = getattr(importlib.import_module(module, __package__), function)
    step(Context(options.name, options.folder, options.rehearse), *options.arguments)


if __name__ == "__main__":
    main()
