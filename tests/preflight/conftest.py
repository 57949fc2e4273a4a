import pytest


@pytest.fixture(autouse=True)
def _elsewhere(empty_folder): ...


@pytest.fixture(autouse=True)
def _without_units_for_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests plan for the same processor on every machine; test_precision.py has the others."""
    monkeypatch.setattr("hf_mamba.preflight.precision.bf16_unit", lambda: None)
