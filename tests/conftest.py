"""Fixtures that every room's tests share."""

import os
from collections.abc import Iterator

import pytest

from tests.pool import Pool

os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks share the machine's cores
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # each rank's compiler would start processes of its own


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Up to eight gloo ranks: `pool.run(world_size, function, *args)`; see tests/pool.py."""
    pool = Pool()
    yield pool
    pool.close()
