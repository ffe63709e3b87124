"""What tasks run on, as fixtures."""

from collections.abc import Iterator

import pytest

from tests.gloo.pool import OneProcess, Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    workers = Pool()
    yield workers
    workers.close()


@pytest.fixture
def threads() -> OneProcess:
    return OneProcess()
