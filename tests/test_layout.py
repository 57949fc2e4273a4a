"""The order of the rooms: imports point one way, no module is in a circle, and only a family's own room knows it."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hf_mamba"
# A room may import itself and the rooms before it. Rooms of one line do not import each other.
ORDER = (
    (
        *("files", "dotted", "names", "sizes", "segments", "processor", "progress", "redaction", "findings", "family"),
        "terminal",
    ),
    ("plan",),
    ("private",),
    ("ops",),
    ("formats",),
    ("models",),
    ("data",),
    ("run",),
    ("preflight", "report"),
    ("interop",),
    ("training",),
    ("cli", ""),  # "": the package itself, whose names are import strings
)
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
FILES = sorted(PACKAGE.rglob("*.py"))
# Names of Mamba's own tensors and layers: facts of models/ and ops/.
TENSORS = re.compile(r"\b(A_log|dt_bias|x_proj|dt_proj|in_proj|out_proj|conv1d|norm_f)\b")


def module_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in FILES}


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imported(file: Path) -> set[str]:
    """The modules of this package that a file imports, inside functions too; for type checkers alone does not count."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    hints = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    left_out = {id(inner) for hint in hints for node in hint.body for inner in ast.walk(node)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in left_out:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: imports are absolute"
            assert node.module is not None
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in inside}
    return {name for name in found if name in MODULES}


IMPORTS = {module: imported(file) - {module} for module, file in MODULES.items()}


def test_every_room_has_its_place_in_the_order():
    assert {room_of(module) for module in MODULES} <= RANK.keys()


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str):
    room = room_of(module)
    back = {name for name in IMPORTS[module] if room_of(name) not in ("", room) and RANK[room_of(name)] >= RANK[room]}
    if RANK[room] == 0:  # the ground's modules may use one another
        back = {name for name in back if RANK[room_of(name)] > 0}
    assert not back


def test_no_module_is_in_a_circle():
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for name in sorted(IMPORTS[module]):
                visit(name, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


@pytest.mark.parametrize("module", [m for m in MODULES if room_of(m) not in ("models", "ops")])
def test_nothing_outside_the_models_knows_one(module: str):
    found = TENSORS.findall(MODULES[module].read_text(encoding="utf-8"))
    assert not found, f"{module} names tensors of a Mamba: {sorted(set(found))}"
    own = {name for name in IMPORTS[module] if re.match(r"hf_mamba\.models\.(?!common\b)", name)}
    assert not own, f"{module} imports a family; ask hf_mamba.family instead"
