"""Options and fixtures of all rings."""

import difflib
from collections.abc import Callable
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"
PARITY = {"test_parity", "test_hard", "test_zoo", "test_random"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write tests/golden anew; review it as code")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start processes run one after another: parity on one worker, what may fail and wait on another."""
    for item in items:
        if item.get_closest_marker("gloo"):
            group = "parity" if item.path.stem in PARITY else "processes"
            item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, dict[str, str]], None]:
    """Compare texts by file name with tests/golden/<name>/, or write them with --update-golden."""

    def check(name: str, texts: dict[str, str]) -> None:
        directory = GOLDEN / name
        if request.config.getoption("--update-golden"):
            for file, text in texts.items():
                (directory / file).parent.mkdir(parents=True, exist_ok=True)
                (directory / file).write_text(text)
        for file, text in texts.items():
            known = (directory / file).read_text() if (directory / file).exists() else ""
            difference = difflib.unified_diff(
                known.splitlines(), text.splitlines(), f"golden/{file}", "emitted", lineterm=""
            )
            assert known == text, "\n".join(difference)

    return check
