"""Problems, migrations and notes: the findings of a pre-flight."""

from __future__ import annotations

from typing import NamedTuple


class Problem(NamedTuple):
    """A reason why the run cannot start, or would do something else than what was written."""

    key: str  # the user's own key: an argument's name, or a dotted DeepSpeed key
    found: str  # what was found, and where
    why: str  # why it cannot work
    fix: str  # what to write instead
    id: str = ""  # the rule's name, which never changes: see `hf-mamba rules`

    def __str__(self) -> str:
        return f"{self.key}: found {self.found}. {self.why} {self.fix}"


class Migration(NamedTuple):
    """A key that was moved, renamed or dropped, and why; the run keeps the meaning that was written."""

    old: str
    new: str
    why: str
    id: str = ""


class PlanError(ValueError):
    """Every problem of one pre-flight, in one message."""

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        self.problems = problems
        noun = "problem" if len(problems) == 1 else "problems"
        lines = [f"{len(problems)} {noun} found before the start:"]
        lines += [f"  {i}. {problem}" for i, problem in enumerate(problems, 1)]
        super().__init__("\n".join(lines))


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


MOST = 50  # problems that are listed


class Findings:
    """Collects what the checks find, so that all of it is shown together; of problems, the first fifty."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.migrations: list[Migration] = []
        self.notes: list[str] = []
        self.provenance: dict[str, str] = {}

    def problem(self, key: str, found: object, why: str, fix: str, *, id: str) -> None:
        problem = Problem(key, str(found), why, fix, id)
        if len(self.problems) < MOST:
            if problem not in self.problems:
                self.problems.append(problem)
        elif len(self.problems) == MOST:
            more = f"more than {MOST} problems"
            self.problems.append(Problem("and more", more, "These are the first.", "Correct these.", "more-problems"))

    def migrated(self, old: str, new: str, why: str, *, id: str) -> None:
        self.migrations.append(Migration(old, new, why, id))
        self.provenance[f"changed in ds_config: {old}"] = f"{new}: {why}"

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
