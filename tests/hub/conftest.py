"""A Hub for each test, and fresh processes that find it."""

from pathlib import Path

import pytest

from tests.hub.processes import Runner, make_clean_python
from tests.hub.server import HubServer


@pytest.fixture
def hub():
    """A Hub of its own; at the end it must have understood every request, and every fault must have come to pass."""
    with HubServer() as server:
        yield server
        server.check()


@pytest.fixture(scope="session")
def clean_python(tmp_path_factory) -> Path:
    """An interpreter that has what the tests have, except our packages."""
    return make_clean_python(tmp_path_factory.mktemp("clean") / "venv")


@pytest.fixture
def run(hub, tmp_path, clean_python) -> Runner:
    """Runs a function, a script or a command in a fresh process; see [`Runner`]."""
    return Runner(hub, tmp_path, clean_python)
