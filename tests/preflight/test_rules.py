"""Every rule of the pre-flight: its example meets it, its mended example does not, and every finding has a name."""

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import hf_mamba
from hf_mamba.preflight import Plan, resolve
from hf_mamba.preflight.combinations import RULES
from hf_mamba.preflight.rules import Rule


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


def test_no_two_rules_share_a_name() -> None:
    assert len({rule.id for rule in RULES}) == len(RULES)


def test_every_finding_of_the_package_has_a_name() -> None:
    """Every call that reports a problem or a migration gives an id."""
    nameless = []
    for path in Path(hf_mamba.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            named = any(keyword.arg in ("id", None) for keyword in node.keywords)
            if name in ("problem", "migrated", "Problem") and not named and len(node.args) < 5:
                nameless.append(f"{path.name}:{node.lineno}")
    assert not nameless
