"""One api for all of these tests: they ask and look at answers, and change nothing."""

from collections.abc import Iterator

import pytest

from tests.conformance.processes import running_api


@pytest.fixture(scope="package")
def api_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base URL of a running api with an agent that answers everything."""
    with running_api(tmp_path_factory.mktemp("api")) as url:
        yield url
