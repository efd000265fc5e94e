"""Stores and servers for every test that wants one."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

from streamshards.testing.servers import S3Server, juicefs, seaweedfs

# Processes of this server begin with torch imported: tests that kill many of them would spend minutes on imports.
multiprocessing.set_forkserver_preload(["streamshards.loader", "streamshards.writer"])

BUCKET: Final = "streamshards"
_number = itertools.count()


class StoreUrl(NamedTuple):
    """Where a test may write, empty and its own."""

    url: str
    storage_options: dict[str, Any] | None


@pytest.fixture(scope="session", autouse=True)
def _no_surroundings() -> Iterator[None]:
    """No test sees the credentials or the endpoint of the machine it runs on, nor asks AWS's metadata service."""
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ:
            if name.startswith("AWS_"):
                patch.delenv(name)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        yield


def _serve(start: Callable[[Path], AbstractContextManager[S3Server]], directory: Path) -> Iterator[S3Server]:
    # A server that is missing is an error, not a skip: the dev extra installs it, and many tests stand on it.
    with start(directory) as server:
        server.create_bucket(BUCKET)
        yield server


@pytest.fixture(scope="session")
def seaweedfs_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    yield from _serve(seaweedfs, tmp_path_factory.mktemp("seaweedfs"))


@pytest.fixture(scope="session")
def juicefs_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    yield from _serve(juicefs, tmp_path_factory.mktemp("juicefs"))


@pytest.fixture(scope="session")
def moto_server() -> Iterator[S3Server]:
    """A simulated S3: right in its answers, but takes any secret."""
    server_module = pytest.importorskip("moto.server")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield S3Server(endpoint_url=f"http://{host}:{port}", access_key="testing", secret_key="testing-secret")
    finally:
        server.stop()


@pytest.fixture(params=["local", "memory", "seaweedfs", "juicefs"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> StoreUrl:
    """A fresh, empty place on each kind of store."""
    kind = request.param
    if kind == "local":
        return StoreUrl(str(tmp_path / "store"), None)
    if kind == "memory":
        return StoreUrl(f"memory://store-{os.getpid()}-{next(_number)}", None)
    server: S3Server = request.getfixturevalue(f"{kind}_server")
    return StoreUrl(f"s3://{BUCKET}/test-{next(_number)}", server.storage_options)


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder for temporary files whose name is short: a socket's path has at most 107 bytes."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)
