"""Every rule of the pre-flight: its example meets it, its mended example does not, and every finding has a name."""

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import hf_mamba
from hf_mamba.cli import main
from hf_mamba.preflight import Plan, resolve
from hf_mamba.preflight.catalogue import RAISED, Page, describe, pages
from hf_mamba.preflight.combinations import RULES
from hf_mamba.preflight.deepspeed.migrations import MIGRATIONS, REFUSED
from hf_mamba.preflight.rules import Rule

SOURCES = list(Path(hf_mamba.__file__).parent.rglob("*.py"))


def resolved(example: Mapping[str, Any]) -> Plan:
    """The plan of an example, on two CPU ranks unless it says otherwise."""
    surroundings = {"environ": {}, "device": "cpu", "world_size": 2}
    surroundings |= {name: example[name] for name in surroundings if name in example}
    arguments = {name: value for name, value in example.items() if name not in surroundings}
    return resolve({"resume": "never", "max_steps": 10, **arguments}, **surroundings)


@pytest.mark.parametrize("rule", RULES, ids=[rule.id for rule in RULES])
def test_a_rule_names_its_example_and_not_the_mended_one(rule: Rule) -> None:
    if rule.id.endswith("-not-installed") and rule.id not in [p.id for p in resolved(rule.example).problems]:
        pytest.skip(f"the package of {rule.key} is installed")
    found = [problem for problem in resolved(rule.example).problems if problem.id == rule.id]
    assert [problem.key for problem in found] == [rule.key]
    assert not [str(problem) for problem in resolved(rule.mended).problems if problem.id == rule.id]


PAGES = [page for page in RAISED if page.example is not None]


@pytest.mark.parametrize("page", PAGES, ids=[page.id for page in PAGES])
def test_a_page_s_example_is_found_and_its_mended_one_is_not(page: Page) -> None:
    assert page.example is not None
    assert page.id in found_in(page.example)
    if page.mended is not None:
        assert page.id not in found_in(page.mended)


def found_in(example: Mapping[str, Any]) -> set[str]:
    plan = resolved(example)
    return {problem.id for problem in plan.problems} | {migration.id for migration in plan.migrations}


def test_every_id_of_the_package_has_a_page() -> None:
    written = set()
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        written |= set(re.findall(r"""\bid="([a-z0-9-]+)\"""", text))
        for name in re.findall(r"\bid=([A-Z][A-Z_]+)\b", text):
            written |= set(re.findall(rf'^{name} = "([a-z0-9-]+)"', text, re.MULTILINE))
    assert not sorted(written - pages().keys())
    assert not sorted({page.id for page in RAISED} - written - {"more-problems"}), "pages of nothing"


def test_a_page_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rules"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(pages())
    for id in pages():
        assert describe(id).startswith(id)
    assert main(["rules", "batch-does-not-divid"]) == 2
    assert "did you mean batch-does-not-divide" in capsys.readouterr().err


def test_no_two_rules_share_a_name() -> None:
    assert len(pages()) == len(RULES) + len(MIGRATIONS) + len(REFUSED) + len(RAISED)


def test_every_finding_of_the_package_has_a_name() -> None:
    """Every call that reports a problem or a migration gives an id."""
    nameless = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            named = any(keyword.arg in ("id", None) for keyword in node.keywords)
            if name in ("problem", "migrated", "Problem") and not named and len(node.args) < 5:
                nameless.append(f"{path.name}:{node.lineno}")
    assert not nameless
