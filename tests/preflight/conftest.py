import pytest


@pytest.fixture(autouse=True)
def _elsewhere(empty_folder): ...
