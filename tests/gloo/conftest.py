"""The worker pool as a fixture; a pool that broke is replaced."""

from collections.abc import Iterator

import pytest

from tests.gloo.pool import Pool


@pytest.fixture(scope="session")
def _pools() -> Iterator[list[Pool]]:
    pools: list[Pool] = []
    yield pools
    for pool in pools:
        pool.close()


@pytest.fixture
def pool(_pools: list[Pool]) -> Pool:
    if not _pools or not _pools[-1].is_alive:
        _pools.append(Pool())
    return _pools[-1]
