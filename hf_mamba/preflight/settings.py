"""The arguments of a run as the pre-flight reads them: values of known kinds, each with who wrote it and where."""

from __future__ import annotations

import os
from collections.abc import ItemsView, Mapping
from dataclasses import fields
from enum import Enum
from typing import Any, NamedTuple

from hf_mamba.family import Preset, get_preset
from hf_mamba.findings import Findings
from hf_mamba.preflight.arguments import ALIASES, TRAINER_DEFAULTS, defaults, kinds
from hf_mamba.preflight.kinds import KindError, check, show

DEFAULT_PRESET = "minute_mamba"
MODELS = ("model_config", "model_name_or_path", "config_name")  # what describes a model beside a preset


class Origin(Enum):
    """Who decided a value, in the order of precedence."""

    USER = "user"  # as an argument
    FILE = "file"  # the user, too, in a file of another program
    PRESET = "preset"
    DEFAULT = "default"


class Value(NamedTuple):
    """A value of an argument, and where it comes from."""

    value: Any
    origin: Origin
    name: str  # the argument as the user wrote it: an alias where an alias was written
    where: str  # in words: "flag --seed", "config FILE: seed", "preset 7b_mamba", "default"


def resume_of(settings: Settings) -> str:
    """ "auto", "never", or the checkpoint that a run goes on from; TrainingArguments' own name for it counts, too."""
    resume = settings.get("resume_from_checkpoint") or settings.get("resume")
    return "auto" if resume is True else os.path.expanduser(str(resume))


class Settings:
    """Values by argument, in the order of precedence user > preset > default."""

    def __init__(self, written: Mapping[str, Any], out: Findings) -> None:
        """Checks what was written and completes it.

        Args:
            written: by argument; a value that is no `Value` counts as the user's own.
        """
        self._values: dict[str, Value] = {}
        for name, value in written.items():
            own = value if isinstance(value, Value) else Value(value, Origin.USER, name, f"argument {name}")
            if own.value is not None:
                self._accept(name, own, out)
        self.preset = self._find_preset(out)
        if self.preset is not None and self.get("config_overrides") is None:  # then the numbers are by size
            self.follow(self.preset, f"preset {self.preset.name}")
        for name, default in defaults().items():
            self._fill(name, default, Origin.DEFAULT, "default")

    def _accept(self, name: str, own: Value, out: Findings) -> None:
        kind = kinds().get(name)
        if kind is not None and not (name == "per_device_train_batch_size" and own.value == "auto"):
            try:
                own = own._replace(value=check(kind, own.value))
            except KindError as expected:
                out.problem(
                    own.name,
                    f"{show(own.value)} ({own.where})",
                    expected.why,
                    f"Write {expected}.",
                    id="argument-of-the-wrong-kind",
                )
                return
        self._values[name] = own

    def follow(self, recipe: Preset, where: str) -> None:
        """Take the training numbers of a preset, or of a recipe for a size, where nothing is written."""
        for field in fields(recipe):
            if (name := ALIASES.get(field.name, field.name)) in (kinds() | TRAINER_DEFAULTS):
                self._fill(name, getattr(recipe, field.name), Origin.PRESET, where)

    def _fill(self, name: str, value: Any, origin: Origin, where: str) -> None:
        self._values.setdefault(name, Value(value, origin, name, where))

    def _find_preset(self, out: Findings) -> Preset | None:
        name = self.get("preset")
        if name is None:
            if any(other in self._values for other in MODELS):
                return None
            name = DEFAULT_PRESET
            self._fill("preset", name, Origin.DEFAULT, "default")
        try:
            return get_preset(name)
        except ValueError as error:
            out.problem(
                "preset",
                show(name),
                f"{error}".capitalize(),
                "Run `hf-mamba presets` for the list.",
                id="unknown-preset",
            )
            return None

    def fill(self, name: str, value: Any) -> None:
        """Give an argument a default that depends on the others."""
        self._fill(name, value, Origin.DEFAULT, "default")

    def adopt(self, name: str, value: Any, source: str) -> None:
        """Take a value from another file of the user's; it counts as written there."""
        self._values[name] = Value(value, Origin.FILE, name, source)

    def rewrite(self, name: str, value: Any) -> None:
        """Put a value into another form; it stays where it was written."""
        self._values[name] = self._values[name]._replace(value=value)

    def remove(self, name: str) -> None:
        """Take out a value that a problem has named."""
        self._values.pop(name, None)

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def items(self) -> ItemsView[str, Value]:
        return self._values.items()

    def get(self, name: str, default: Any = None) -> Any:
        found = self._values.get(name)
        return default if found is None else found.value

    def source(self, name: str) -> str:
        """Where the value was written, in words."""
        return self._values[name].where if name in self._values else "default"

    def key(self, name: str) -> str:
        """The argument's name as the user wrote it."""
        return self._values[name].name if name in self._values else name

    def is_flag(self, name: str) -> bool:
        """Whether it was written as an argument, rather than in a DeepSpeed file."""
        return name in self._values and self._values[name].origin is Origin.USER

    def given(self, name: str) -> bool:
        """Whether the user wrote it, rather than a preset or a default."""
        return name in self._values and self._values[name].origin in (Origin.USER, Origin.FILE)
