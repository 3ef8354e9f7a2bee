"""One Prefect server for all tests of the flows."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.testing.utilities import prefect_test_harness

from tests.flows.checkout import Checkout


@pytest.fixture(scope="session", autouse=True)
def prefect_server() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=600):
        yield


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_counts() -> None:
    """A shell has its background jobs ignore Ctrl-C, which every process that they start would inherit."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)
