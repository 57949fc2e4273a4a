"""Which precision a run has where nothing names one: by the processor's units for bf16, and by the run that goes on."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_rules import resolved

from hf_mamba import processor
from hf_mamba.preflight import Plan, resolve
from hf_mamba.preflight.combinations import RULES
from hf_mamba.preflight.rules import Rule

UNITS = [None, "avx512_bf16", "amx_bf16"]


def plan(monkeypatch: pytest.MonkeyPatch, unit: str | None, **arguments: Any) -> Plan:
    """The plan of a CPU run on a processor with this unit."""
    monkeypatch.setattr("hf_mamba.preflight.precision.bf16_unit", lambda: unit)
    device = arguments.pop("device", "cpu")
    return resolve({"max_steps": 2, **arguments}, environ={}, device=device).require()


@pytest.mark.parametrize("unit", UNITS)
def test_a_cpu_trains_in_bf16_where_it_has_units_for_it(monkeypatch: pytest.MonkeyPatch, unit: str | None) -> None:
    found = plan(monkeypatch, unit)
    assert found.dtype == ("bf16" if unit else "fp32")
    assert found.training_arguments["bf16"] is (unit is not None)
    assert (unit or "without units for bf16") in found.provenance["dtype"]


@pytest.mark.parametrize("unit", UNITS)
def test_a_written_precision_is_kept(monkeypatch: pytest.MonkeyPatch, unit: str | None) -> None:
    assert plan(monkeypatch, unit, bf16=False).dtype == "fp32"
    asked = plan(monkeypatch, unit, bf16=True)
    assert asked.dtype == "bf16"
    assert any("as long as those of fp32" in note for note in asked.notes) is (unit is None)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("begun_in", ["fp32", "bf16"])
def test_a_run_goes_on_in_its_own_precision(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, unit: str | None, begun_in: str
) -> None:
    same = ("model_config", "seq_len", "global_batch_size", "seed")
    known = plan(monkeypatch, unit, output_dir=str(tmp_path)).known
    (tmp_path / "run.json").write_text(json.dumps({name: known[name] for name in same}))
    (tmp_path / "plan.json").write_text(json.dumps({"dtype": begun_in}))
    (tmp_path / "log.jsonl").write_text("")  # a step was made
    assert plan(monkeypatch, unit, output_dir=str(tmp_path)).dtype == begun_in
    assert plan(monkeypatch, unit, output_dir=str(tmp_path), bf16=begun_in == "fp32").dtype != begun_in
    assert plan(monkeypatch, unit, output_dir=str(tmp_path), resume="never").dtype == ("bf16" if unit else "fp32")


def test_fp16_of_another_machine_does_not_go_on_on_a_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps({"dtype": "fp16"}))
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"fp16 does not train on a CPU.*--bf16"):
        plan(monkeypatch, None, output_dir=str(tmp_path))


@pytest.mark.parametrize("rule", RULES, ids=[rule.id for rule in RULES])
def test_the_examples_of_the_rules_hold_on_every_processor(monkeypatch: pytest.MonkeyPatch, rule: Rule) -> None:
    def ids(example: Any, unit: str | None) -> list[str]:
        monkeypatch.setattr("hf_mamba.preflight.precision.bf16_unit", lambda: unit)
        return [problem.id for problem in resolved(example).problems]

    for example in (rule.example, rule.mended):
        assert ids(example, "avx512_bf16") == ids(example, None)


AMD, INTEL = "vendor_id\t: AuthenticAMD", "vendor_id\t: GenuineIntel"


@pytest.mark.parametrize(
    ("vendor", "flags", "unit", "slowdown"),
    [
        (AMD, "avx2", None, "27 to 30 times"),
        (AMD, "avx2 avx512f avx512_bf16", "avx512_bf16", "about twice"),
        (INTEL, "avx2 avx512f avx512_bf16", None, "about twice"),
        (INTEL, "avx2 avx512f avx512_bf16 amx_tile amx_bf16", "amx_bf16", "about twice"),
    ],
)
def test_the_units_of_a_processor(
    monkeypatch: pytest.MonkeyPatch, vendor: str, flags: str, unit: str | None, slowdown: str
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda path: f"processor\t: 0\n{vendor}\nflags\t\t: fpu {flags}\n")
    assert (processor.bf16_unit.__wrapped__(), processor.bf16_slowdown()) == (unit, slowdown)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/cpuinfo is Linux's")
def test_the_processor_is_read_as_torch_reads_it() -> None:
    found = torch.cpu.get_capabilities()
    have = set(processor.description().split())
    assert [name in have for name in ("amx_bf16", "avx512_bf16")] == [
        found.get(name) is True for name in ("amx_bf16", "avx512_bf16")
    ]
