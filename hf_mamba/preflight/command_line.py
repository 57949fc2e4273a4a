"""Command line and YAML -> plain values with their sources, every mistake at once, without creating anything.

TrainingArguments' fields are flags under their own names, read from its dataclass; it is not instantiated, because that
would start devices and process groups. Flags win over the YAML file, which wins over the preset.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import difflib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from hf_mamba.files import Unreadable, load_yaml, read_small
from hf_mamba.findings import MOST, PlanError, Problem
from hf_mamba.preflight.arguments import ALIASES, RunArguments, types
from hf_mamba.preflight.kinds import show
from hf_mamba.preflight.optimizers import INSTEAD
from hf_mamba.preflight.settings import Origin, Value

# DeepSpeed's launcher has these
_NO_LIST = (
    "No list of machines is needed: with --num_nodes N --num_gpus M --main_process_ip ADDRESS, `hf-mamba launch` "
    "prints the line of each machine."
)
# Names that other scripts and older versions have -> ours, or a sentence where there is none.
_KNOWN_ELSEWHERE = {
    **dict.fromkeys(("hostfile", "include", "exclude"), _NO_LIST),
    **dict.fromkeys(("block_size", "max_seq_length", "max_seq_len", "max_length", "sequence_length"), "seq_len"),
    **dict.fromkeys(("train_file", "dataset_name", "data"), "dataset"),
    "validation_file": "eval_dataset",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "no_cuda": "use_cpu",
    "batch_size": "per_device_train_batch_size",
    "overwrite_output_dir": "A folder is never overwritten: write another --output_dir, or go on with --resume auto.",
    "early_stopping_patience": "Remove it: a run goes to --max_steps; --load_best_model_at_end true keeps the best.",
    "logging_dir": "Remove it: the log is log.jsonl in --output_dir, and a tracker is named with --report_to.",
}


def whole_number(text: str) -> int:
    """An integer, also in the forms 8.0, 3e9 and 1_000."""
    try:
        value = float(text)
        whole = value == int(value)
    except OverflowError:  # inf, or more digits than a float holds
        raise ValueError(f"{text[:20]} is no whole number") from None
    if not whole:
        raise ValueError(f"{text} is no whole number")
    return int(text.replace("_", "")) if text.replace("_", "").lstrip("+-").isdigit() else int(value)


def whole_number_or_auto(text: str) -> int | str:
    return "auto" if text == "auto" else whole_number(text)


def _flags() -> type:
    """RunArguments as HfArgumentParser reads it: help texts alone, and no default where nothing is written."""
    rows: list[Any] = []
    for own in dataclasses.fields(RunArguments):
        kind = types()[own.name]
        metadata = {"help": own.metadata["help"]}
        if kind is bool:
            rows.append((own.name, kind, field(default=False, metadata=metadata)))
        elif own.metadata["help"]:
            rows.append((own.name, kind | None, field(default=None, metadata=metadata)))
    return dataclasses.make_dataclass("RunArguments", rows)


@dataclass(frozen=True)
class Arguments:
    """What was written, by argument, and what is wrong with it.

    Presets and defaults are not in it: `preflight.resolve` adds those.
    """

    written: dict[str, Value]
    problems: tuple[Problem, ...] = ()

    def get(self, name: str, default: Any = None) -> Any:
        return self.written[name].value if name in self.written else default


class _Collected(Exception):
    """argparse gave up on the line; the problem is recorded."""


class _Parser:
    """An argparse parser over RunArguments and TrainingArguments whose mistakes are collected, not printed."""

    def __init__(self) -> None:
        from transformers import HfArgumentParser, TrainingArguments

        problems: list[Problem] = []

        class Parser(HfArgumentParser):
            def error(self, message: str) -> NoReturn:
                problems.append(
                    Problem("command line", message, "It cannot be read.", "See --help.", id="command-line-unreadable")
                )
                raise _Collected

            def add_argument(self, *args: Any, **kwargs: Any) -> argparse.Action:
                actions.append(super().add_argument(*args, **kwargs))
                return actions[-1]

        self.problems = problems
        actions: list[argparse.Action] = []
        self.parser = Parser(
            (_flags(), TrainingArguments),  # type: ignore[arg-type]
            allow_abbrev=False,
            description="Pretrain a Mamba language model.",
        )
        self.actions: dict[str, argparse.Action] = {}
        for action in actions:
            if action.dest == "help":
                continue
            action.default = argparse.SUPPRESS
            if action.type is int:
                action.type = whole_number
            if action.dest == "report_to":  # TrainingArguments takes several, its own parser one
                action.nargs = "+"
            if action.dest in ("micro_batch_size", "per_device_train_batch_size"):
                action.type = whole_number_or_auto
            if action.dest == "optim":
                action.choices = [*(action.choices or ()), *INSTEAD]
            self.actions.setdefault(action.dest, copy.copy(action))
            if action.nargs != 0:
                _collect(action, problems)

    def flags(self, argv: Sequence[str]) -> dict[str, Any]:
        """The flags that are really on the line."""
        try:
            namespace, extra = self.parser.parse_known_args(list(argv))
        except _Collected:
            return {}
        unknown = [word for word in extra if word.startswith("-")]  # what follows is theirs
        for word in unknown or extra:
            name = word.split("=")[0]
            guess = self.suggest(name.lstrip("-").replace("-", "_")) if name.startswith("-") else ""
            fix = f"Did you mean --{guess}?" if guess else "Remove it, or see --help."
            fix = guess if " " in guess else fix
            self.problems.append(Problem(name, word, "There is no such flag.", fix, id="unknown-flag"))
        return {name: value for name, value in vars(namespace).items() if value is not argparse.SUPPRESS}

    def suggest(self, name: str) -> str:
        """The argument that is meant, or what to do instead; "" where nothing is near."""
        if name in _KNOWN_ELSEWHERE:
            return _KNOWN_ELSEWHERE[name]
        near = difflib.get_close_matches(name, self.actions, n=1, cutoff=0.6)
        return near[0] if near else ""

    def yaml(self, path: str) -> dict[str, Any]:
        """The keys of a YAML file, checked like flags."""
        data = _read_yaml(path, self.problems)
        values: dict[str, Any] = {}
        for name, value in data.items():
            if len(self.problems) > MOST:
                break  # resolve lists no more
            if name == "model_config" and isinstance(value, Mapping):  # which no flag can say
                values[name] = dict(value)
                continue
            action = self.actions.get(str(name))
            if action is None or name == "config":
                guess = self.suggest(str(name)) if action is None else ""
                fix = f"Did you mean {guess}?" if guess else "Remove it."
                fix = guess if " " in guess else fix
                self.problems.append(
                    Problem(str(name), f"{path}: {name}", "There is no such argument.", fix, id="unknown-argument")
                )
            elif value is not None:
                try:
                    values[name] = _convert(action, value)
                except (ValueError, TypeError, KeyError, OverflowError, argparse.ArgumentTypeError):
                    self.problems.append(_wrong(action, value, f"config {path}"))
        return values


def _collect(action: argparse.Action, problems: list[Problem]) -> None:
    """Have a flag note a value of the wrong kind and leave it out, instead of ending the reading of the line."""
    flag = copy.copy(action)

    def read(text: str) -> Any:
        try:
            return _convert_one(flag, text)
        except (ValueError, TypeError, KeyError, argparse.ArgumentTypeError):
            problems.append(_wrong(flag, text, f"flag {flag.option_strings[0]}"))
            return argparse.SUPPRESS

    if action.choices is not None:  # `read` looks at them; --help goes on to show them
        action.metavar = action.metavar or "{" + ",".join(map(str, action.choices)) + "}"
        action.choices = None
    action.type = read


def _wrong(action: argparse.Action, value: Any, source: str) -> Problem:
    expected = {whole_number: "a whole number", whole_number_or_auto: 'a whole number or "auto"', float: "a number"}
    if action.choices:
        fix = "Write one of " + ", ".join(str(getattr(c, "value", c)) for c in action.choices) + "."
    else:
        fix = f"Write {expected.get(action.type, 'true or false' if action.nargs == '?' else 'another value')}."
    return Problem(
        action.dest, f"{show(value)} ({source})", "It is of the wrong kind.", fix, id="argument-of-the-wrong-kind"
    )


def _convert(action: argparse.Action, value: Any) -> Any:
    """A YAML value as the flag would give it. YAML reads 1e-3 as a string; the flag's type makes it a number."""
    if isinstance(value, Mapping):
        return dict(value)
    if action.nargs in ("+", "*"):
        return [_convert_one(action, item) for item in (value if isinstance(value, list) else [value])]
    if isinstance(value, list):
        raise ValueError("one value is expected")
    return _convert_one(action, value)


def _convert_one(action: argparse.Action, value: Any) -> Any:
    numeric = action.type in (whole_number, whole_number_or_auto, float)
    if isinstance(value, bool) and numeric:
        raise ValueError("a number is expected")
    converted = action.type(str(value)) if callable(action.type) else value
    if action.choices is not None and converted not in action.choices:
        raise ValueError("not one of the choices")
    return converted


def _read_yaml(path: str, problems: list[Problem]) -> Mapping[Any, Any]:
    """The keys of a YAML file; what is wrong with it goes to `problems`."""
    try:
        data, twice = load_yaml(read_small(path))
    except Unreadable as error:
        where = path if len(path) < 200 else f"{path[:200]}..."
        problems.append(Problem("config", where, f"{error}", "Give the path of a YAML file.", id="config-unreadable"))
        return {}
    if data is None:
        return {}
    if not isinstance(data, Mapping):
        why, fix = "It holds no keys.", "Write one `flag: value` per line."
        problems.append(Problem("config", path, why, fix, id="config-without-keys"))
        return {}
    if {"zero_optimization", "train_micro_batch_size_per_gpu", "train_batch_size"} & data.keys():
        why = "This is a DeepSpeed file, not the arguments of a run."
        problems.append(Problem("config", path, why, "Give it with --deepspeed.", id="config-is-a-deepspeed-file"))
        return {}
    for key, line in twice:
        why = "It is written twice; YAML keeps the last."
        problems.append(Problem("config", f"{path}, line {line}: {key}", why, "Keep one.", id="config-key-twice"))
    return data


def read_arguments(argv: Sequence[str] | None = None) -> Arguments:
    """The arguments of a run, from flags and from the YAML file that --config names; mistakes are in `problems`."""
    parser = _Parser()
    flags = parser.flags(sys.argv[1:] if argv is None else argv)
    file = parser.yaml(flags["config"]) if flags.get("config") else {}
    written: dict[str, Value] = {}
    for given, where in ((file, "config {file}: {name}"), (flags, "flag --{name}")):
        layer: dict[str, str] = {}
        for name, value in given.items():
            target = ALIASES.get(name, name)
            if target in layer and written[target].value != value:
                found = f"{layer[target]}={written[target].value} and {name}={value}"
                parser.problems.append(
                    Problem(name, found, "Both mean the same.", "Keep one.", id="two-names-two-values")
                )
            layer[target] = name
            value = getattr(value, "value", value)  # enums of transformers as their text
            # a problem in a file is named by the argument itself, which its place in the file follows
            shown = name if where.startswith("flag") else target
            written[target] = Value(value, Origin.USER, shown, where.format(file=flags.get("config"), name=name))
    return Arguments(written, tuple(parser.problems))


def parse_arguments(argv: Sequence[str] | None = None) -> Arguments:
    """The arguments of a run.

    Raises:
        PlanError: (a ValueError) with every mistake of the line and the file.
    """
    arguments = read_arguments(argv)
    if arguments.problems:
        raise PlanError(arguments.problems)
    return arguments
