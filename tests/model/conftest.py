"""Fixtures of the tests of models."""

import os

import pytest

from tests.model.references import CASES, Reference, make_reference


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> list[Reference]:
    """Every case, made by transformers in this process."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    return [make_reference(case, tmp_path_factory.mktemp(f"case{number}")) for number, case in enumerate(CASES)]
