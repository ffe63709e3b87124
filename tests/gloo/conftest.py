"""The worker pool as a fixture."""

from collections.abc import Iterator

import pytest

from tests.gloo.pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    workers = Pool()
    yield workers
    workers.close()
