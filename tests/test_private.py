"""Private names of other libraries: each stands in hf_mamba/private, is still there, and is used nowhere else."""

import ast
import importlib
import inspect
import pkgutil
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

import hf_mamba.private
from hf_mamba.private import Used

PACKAGE = Path(hf_mamba.private.__file__).parents[1]
MODULES = sorted(module.name for module in pkgutil.iter_modules(hf_mamba.private.__path__))
USED = [used for name in MODULES for used in importlib.import_module(f"hf_mamba.private.{name}").USED]
HOOKS = {used.name for used in USED if used.hook}
FILES = [file for file in sorted(PACKAGE.rglob("*.py")) if file.parent.name != "private"]
# Documented in spite of the underscore: namedtuple, ctypes.Structure, os.
PUBLIC = {"_asdict", "_replace", "_fields_", "_exit"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in PUBLIC


@pytest.mark.core
@pytest.mark.parametrize("used", USED, ids=lambda used: f"{used.owner.split(':')[-1]}.{used.name}")
def test_the_installed_version_has_it(used: Used):
    module, _, name = used.owner.partition(":")
    if find_spec(module.split(".")[0]) is None:
        pytest.skip(f"{module.split('.')[0]} is not installed")
    owner = importlib.import_module(module)
    owner = getattr(owner, name) if name else owner
    # what __init__ sets is in the source only
    there = hasattr(owner, used.name) or re.search(rf"\b{used.name}\b", inspect.getsource(owner))
    assert there, f"{used.owner} has no {used.name} any more; it was used for: {used.why}"


MARKS = {"_no_weight_decay"}  # on a parameter: read by optimizers written for mamba_ssm's layer


def own_names(trees: list[ast.Module]) -> set[str]:
    """The private names that this package makes itself: functions, classes, variables, attributes of self."""
    found: set[str] = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            found.add(node.attr)
    return {name for name in found if is_private(name)}


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_other_module_uses_one(file: Path):
    """Attributes of what is not self, arguments by keyword, imports, getattr by text, and every name that is listed."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    own = own_names([tree]) | MARKS
    listed = {used.name for used in USED if is_private(used.name)} - HOOKS
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            is_super = ast.unparse(node.value) == "super()"
            hook = node.attr in HOOKS and (is_super or is_self(node.value))
            if not (hook or is_self(node.value) or (node.attr in own and not is_super)):
                found.append(ast.unparse(node))
        elif isinstance(node, ast.keyword) and node.arg and is_private(node.arg) and node.arg not in own:
            found.append(f"{node.arg}=")
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("hf_mamba"):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            found += [name for name in names if is_private(name)]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr", "delattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(str(name.value)) and name.value not in own:
                found.append(ast.unparse(node))
        if isinstance(node, (ast.Name, ast.Attribute)):
            name = node.id if isinstance(node, ast.Name) else node.attr
            found += [name] if name in listed else []
    assert not found, f"private names of other libraries: {found}; give each a function in hf_mamba/private"


def classes() -> list[type]:
    """The classes of this package that derive from another library's."""
    found = []
    for file in FILES:
        module = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        if not re.search(r"^class \w+\(", file.read_text(encoding="utf-8"), re.MULTILINE) or ".triton" in module:
            continue
        for value in vars(importlib.import_module(module)).values():
            if isinstance(value, type) and value.__module__ == module and any(map(is_foreign, value.__mro__)):
                found.append(value)  # noqa: PERF401
    return found


def is_foreign(base: type) -> bool:
    return not base.__module__.startswith("torch._C") and base.__module__.split(".")[0] in (
        "transformers",
        "torch",
        "accelerate",
        "deepspeed",
        "peft",
        "argparse",
    )


@pytest.mark.core
@pytest.mark.parametrize("one", classes(), ids=lambda one: one.__name__)
def test_no_subclass_overrides_or_reads_one(one: type):
    """A private name of ours that a base class has, too, would change the base class, knowing it or not."""
    theirs: set[str] = set()
    for base in filter(is_foreign, one.__mro__):
        theirs |= set(re.findall(r"\b(?:self\.|def )(_[a-z]\w*)", inspect.getsource(base))) | set(vars(base))
    tree = ast.parse(inspect.getsource(inspect.getmodule(one)))
    (own,) = (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == one.__name__)
    used = {node.attr for node in ast.walk(own) if isinstance(node, ast.Attribute) and is_self(node.value)}
    used |= {
        name.id
        for node in own.body
        for name in ast.walk(node)
        if isinstance(node, ast.Assign) and isinstance(name, ast.Name)
    }
    used |= {node.name for node in own.body if isinstance(node, ast.FunctionDef)}
    assert not {name for name in used & theirs if is_private(name)} - HOOKS
