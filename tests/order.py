"""Which tests a process runs, and in what order: a hook of conftest.py."""

import os

import pytest


@pytest.hookimpl(trylast=True)  # behind what -m leaves out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of what a file holds, the part that benchmarks/isolated.py gave to this process; the longest
    tests first, so that no core waits for one at the end."""
    part, _, parts = os.environ.get("PONDER_TESTS", "0/1").partition("/")
    items[:] = items[int(part) :: int(parts)]
    items.sort(key=lambda item: item.path.name != "test_compiled.py")
