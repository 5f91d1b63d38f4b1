"""What every test works with: the embedded server, on a free port, and nothing beside it."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pydicom
import pytest
import redis
from hypothesis import settings

from dicomstore import DicomStore, connect
from dicomstore.server import embedded
from dicomstore.server.embedded import RedisServer

PYDICOM_DATA = Path(pydicom.__file__).parent / "data"
PYDICOM_FILES = PYDICOM_DATA / "test_files"
#: The folder of the server that the tests start: redis-server, redis-cli, redisearch.so, rejson.so.
BUILD = embedded.BUILD_FOLDER
# For processes that tests start, wherever they do.
os.environ["TEST_REDIS_HOME"] = os.fspath(BUILD)
if not embedded.is_installed(BUILD):
    needed = ", ".join((*embedded.PROGRAMS, *embedded.MODULES))
    raise pytest.UsageError(f"{BUILD} has to hold {needed}: `make test` installs them in .redis.")

ALL_EXAMPLES = os.environ.get("TEST_EXAMPLES") == "all"


def examples(number: int) -> int:
    """How many examples a property test tries: `number` in `make faults`, else a fifth of them."""
    return number if ALL_EXAMPLES else max(number // 5, 10)


settings.register_profile("default", max_examples=examples(100), deadline=None)
settings.load_profile("default")


# A shell that starts the tests in the background has them, and what they start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def large_files() -> Path:
    """The folder of the package pydicom-data: 58 MB of larger real images."""
    spec = importlib.util.find_spec("data_store")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "data"


@pytest.fixture(scope="session")
def server() -> Iterator[RedisServer]:
    with RedisServer() as running:
        yield running


@pytest.fixture
def client(server: RedisServer) -> Iterator[redis.Redis]:
    """A client of an empty server. It is the tests' own, so that emptying it harms nobody."""
    connected = connect(server.url)
    connected.flushall()
    yield connected
    connected.close()


@pytest.fixture
def store(client: redis.Redis) -> DicomStore:
    return DicomStore(client, progress=False)


@pytest.fixture(autouse=True)
def own_surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the user's Redis or writes outside its temporary folder."""
    monkeypatch.delenv("REDIS_URL", raising=False)
    monkeypatch.setenv("TMPDIR", os.fspath(tmp_path))
