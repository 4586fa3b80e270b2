"""What these tests compute is cached in a folder of their own."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def cache_root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PONDER_CACHE", str(folder))
        yield folder
