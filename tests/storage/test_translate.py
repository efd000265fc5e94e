"""Every way a store can fail comes out as one of our errors, with advice and without credentials."""

from __future__ import annotations

import errno
import os
import pickle
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from streamshards.errors import (
    AccessDenied,
    ObjectExists,
    ObjectMissing,
    ObjectTooLarge,
    OptionInvalid,
    StoreError,
    StoreUnavailable,
    StreamShardsError,
)
from streamshards.storage import Store, open_store
from streamshards.storage.location import parse_url, without_secrets
from streamshards.storage.translate import translated
from streamshards.testing.servers import S3Server
from tests.engine.rig import watched

KEY_ID, SECRET, TOKEN = "AKIDSHOWNNOWHERE", "secret-shown-nowhere", "token-shown-nowhere"


def _answer(status: str, body: bytes = b"", *headers: str, length: int | None = None) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}", *headers]
    return "\r\n".join([*lines, "Connection: close", "", ""]).encode() + body


def _error(status: str, code: str, *headers: str) -> bytes:
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>told by the server</Message></Error>".encode()
    return _answer(status, body, *headers)


class RawServer:
    """Answers every connection with the same bytes; None: no answer until the server is closed."""

    def __init__(self, answer: bytes | None, *, reset: bool = False) -> None:
        self.requests: list[bytes] = []
        self._answer = answer
        self._reset = reset
        self._closed = threading.Event()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            request = b""
            while b"\r\n\r\n" not in request and (some := connection.recv(65536)):
                request += some
            self.requests.append(request)
            if self._answer is None:
                self._closed.wait(60)
            else:
                connection.sendall(self._answer)
            if self._reset:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # close is a RST

    def close(self) -> None:
        self._closed.set()
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for thread in self._threads:
            thread.join(10)


@contextmanager
def _raw(answer: bytes | None, *, reset: bool = False) -> Iterator[RawServer]:
    server = RawServer(answer, reset=reset)
    try:
        yield server
    finally:
        server.close()


def _s3(port: int, **options: Any) -> Store:
    credentials = {"key": KEY_ID, "secret": SECRET, "token": TOKEN}
    return open_store("s3://bucket/x", credentials | {"endpoint_url": f"http://127.0.0.1:{port}"} | options)


def _failure(store: Store, *, timeout_s: float = 20.0) -> StreamShardsError:
    with pytest.raises(StreamShardsError) as caught:
        store.get("a/b.pt.zst", timeout_s=timeout_s, max_bytes=100)
    assert "s3://bucket/x/a/b.pt.zst" in str(caught.value)
    assert type(caught.value)(str(caught.value)).args == pickle.loads(pickle.dumps(caught.value)).args
    return caught.value


ANSWERS: dict[str, tuple[bytes, type[StreamShardsError]]] = {
    "truncated": (_answer("200 OK", b"12345", length=10), StoreUnavailable),
    "cut in the head": (b"HTTP/1.1 200 OK\r\nContent-Le", StoreUnavailable),
    "hung up": (b"", StoreUnavailable),
    "not http": (b"220 smtp.example.com ready\r\n", StoreUnavailable),
    "no length": (b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n12345", StoreUnavailable),
    "too long": (_answer("200 OK", b"x" * 101), ObjectTooLarge),
    "far too long": (_answer("200 OK", b"x", length=1 << 50), ObjectTooLarge),
    "slow down": (_error("503 Slow Down", "SlowDown"), StoreUnavailable),
    "503 in html": (_answer("503 Unavailable", b"<html>try later"), StoreUnavailable),
    "500": (_error("500 Internal", "InternalError"), StoreUnavailable),
    "502 without body": (_answer("502 Bad Gateway"), StoreUnavailable),
    "429": (_error("429 Too Many", "TooManyRequests"), StoreUnavailable),
    "request timeout": (_error("400 Bad", "RequestTimeout"), StoreUnavailable),
    "501": (_error("501 Not Implemented", "NotImplemented"), StoreError),
    "403": (_error("403 Forbidden", "AccessDenied"), AccessDenied),
    "403 without body": (_answer("403 Forbidden"), AccessDenied),
    "401": (_answer("401 Unauthorized"), AccessDenied),
    "expired": (_error("400 Bad", "ExpiredToken"), AccessDenied),
    "signature": (_error("403 Forbidden", "SignatureDoesNotMatch"), AccessDenied),
    "404": (_error("404 Not Found", "NoSuchKey"), ObjectMissing),
    "404 without body": (_answer("404 Not Found"), ObjectMissing),
    "no bucket": (_error("404 Not Found", "NoSuchBucket"), ObjectMissing),
    "wrong region": (_error("400 Bad", "AuthorizationHeaderMalformed"), StoreError),
    "other 400": (_error("400 Bad", "InvalidRequest"), StoreError),
}


class TestAnswers:
    @pytest.mark.parametrize("name", ANSWERS)
    def test_answer(self, name: str) -> None:
        """Each answer of a broken or refusing server is an error of the right branch, after one single request."""
        answer, kind = ANSWERS[name]
        with _raw(answer) as server:
            error = _failure(_s3(server.port))
            assert type(error) is kind, error
            # On a connection that closed without an answer, aiohttp itself asks once more: it may have been an old one.
            assert len(server.requests) <= (2 if name in ("hung up", "cut in the head") else 1)

    def test_reset(self) -> None:
        """A connection reset in the middle of the body is transient."""
        with _raw(_answer("200 OK", b"12345", length=50), reset=True) as server:
            assert type(_failure(_s3(server.port))) is StoreUnavailable

    def test_no_answer(self) -> None:
        """A server that never answers is abandoned at the timeout."""
        with _raw(None) as server:
            started = time.monotonic()
            assert type(_failure(_s3(server.port), timeout_s=0.3)) is StoreUnavailable
            assert time.monotonic() - started < 10

    @pytest.mark.parametrize("scheme", ["s3", "http"])
    @pytest.mark.parametrize("verb", ["get", "put", "list", "delete"])
    def test_nothing_hangs(self, scheme: str, verb: str) -> None:
        """Whatever is asked of a server that never answers is abandoned at the timeout, and the text says which."""
        ask: dict[str, Callable[[Store], object]] = {
            "get": lambda store: store.get("a", timeout_s=0.3, max_bytes=1),
            "put": lambda store: store.put("a", b"1", timeout_s=0.3),
            "list": lambda store: store.list(timeout_s=0.3),
            "delete": lambda store: store.delete("a", timeout_s=0.3),
        }
        with _raw(None) as server:
            store = _s3(server.port) if scheme == "s3" else open_store(f"http://127.0.0.1:{server.port}/x")
            if (scheme, verb) == ("http", "delete"):
                with pytest.raises(StoreError):  # there is no such thing; it does not hang either
                    ask[verb](store)
                return
            with pytest.raises(StoreUnavailable, match=rf"{verb} failed: .*0\.3 s"):
                watched(lambda: ask[verb](store))

    def test_an_endless_listing_ends(self) -> None:
        """A server that sends the same page again and again, each time promising another, is an error."""
        page = (
            b"<?xml version='1.0'?><ListBucketResult><IsTruncated>true</IsTruncated><Contents><Key>x/a</Key>"
            b"<Size>1</Size></Contents><NextContinuationToken>t</NextContinuationToken></ListBucketResult>"
        )
        with _raw(_answer("200 OK", page, "Content-Type: application/xml")) as server:
            with pytest.raises(StoreError, match="the same page for ever"):
                watched(_s3(server.port).list)
            assert len(server.requests) == 2

    def test_http_that_nobody_answers_is_no_missing_file(self) -> None:
        """A refused connection or an unknown host is transient, with its reason; a 404 is a missing object."""
        with socket.create_server(("127.0.0.1", 0)) as unused:
            port = unused.getsockname()[1]
        for url, reason in ((f"http://127.0.0.1:{port}/x", "Connect"), ("http://nowhere.invalid/x", "ClientConnector")):
            with pytest.raises(StoreUnavailable, match=reason) as caught:
                open_store(url).get("a", timeout_s=20, max_bytes=10)
            assert url in str(caught.value)
        for status, kind in (
            ("404 Not Found", ObjectMissing), ("403 Forbidden", AccessDenied), ("503 Slow", StoreUnavailable),
        ):  # fmt: skip
            with _raw(_answer(status)) as server, pytest.raises(kind, match=f"HTTP {status[:3]}"):
                open_store(f"http://127.0.0.1:{server.port}/x").get("a", timeout_s=20, max_bytes=10)

    def test_closed_port(self) -> None:
        """Nobody listening is known at once, and transient: servers restart."""
        with socket.create_server(("127.0.0.1", 0)) as unused:
            port = unused.getsockname()[1]
        started = time.monotonic()
        error = _failure(_s3(port))
        assert type(error) is StoreUnavailable
        assert "endpoint" in str(error)
        assert time.monotonic() - started < 10

    def test_redirect_is_not_followed(self) -> None:
        """A redirect to another host is refused, and that host sees no request, let alone the token."""
        with _raw(_answer("200 OK", b"stolen")) as stranger:
            elsewhere = f"Location: http://127.0.0.1:{stranger.port}/bucket/x/a/b.pt.zst"
            for status in ("301 Moved", "302 Found", "307 Temporary Redirect", "308 Permanent Redirect"):
                with _raw(_error(status, "TemporaryRedirect", elsewhere)) as server:
                    error = _failure(_s3(server.port))
                assert type(error) is StoreError
                assert "redirect" in str(error)
            assert stranger.requests == []

    def test_put_and_list_translate_too(self) -> None:
        """Errors are the same whatever was asked."""
        with _raw(_error("503 Slow Down", "SlowDown")) as server:
            store = _s3(server.port)
            with pytest.raises(StoreUnavailable, match="put failed"):
                store.put("a", b"1", timeout_s=20)
            with pytest.raises(StoreUnavailable, match="list failed"):
                store.list()
            with pytest.raises(StoreUnavailable, match="delete failed"):
                store.delete("a")

    def test_moto(self, moto_server: S3Server) -> None:
        """A right S3 answers: no bucket, no key, then the object; and a put that came second is told so."""
        store = open_store("s3://errors/x", moto_server.storage_options)
        with pytest.raises(ObjectMissing, match="bucket"):
            store.get("a", timeout_s=20, max_bytes=10)
        with pytest.raises(ObjectMissing, match="bucket"):
            store.list()
        moto_server.create_bucket("errors")
        with pytest.raises(ObjectMissing, match="NoSuchKey"):
            store.get("a", timeout_s=20, max_bytes=10)
        store.put("a", b"1", timeout_s=20, if_absent=True)
        with pytest.raises(ObjectExists):
            store.put("a", b"2", timeout_s=20, if_absent=True)
        assert store.get("a", timeout_s=20, max_bytes=10) == b"1"

    def test_wrong_secret(self, seaweedfs_server: S3Server) -> None:
        """A real server refuses a wrong secret and an unknown key; the message says what to set."""
        right = seaweedfs_server.storage_options
        for wrong in ({"secret": SECRET}, {"key": KEY_ID}, {"anon": True, "key": None, "secret": None}):
            store = open_store("s3://streamshards/x", right | wrong)
            with pytest.raises(AccessDenied, match="AWS_ACCESS_KEY_ID") as caught:
                store.get("a", timeout_s=20, max_bytes=10)
            assert SECRET not in str(caught.value)

    def test_environment(self, seaweedfs_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without storage_options the ``AWS_*`` variables are enough."""
        for name, value in seaweedfs_server.environment().items():
            monkeypatch.setenv(name, value)
        store = open_store("s3://streamshards/from-environment")
        store.put("a", b"1", timeout_s=20)
        assert store.list() == [("a", 1)]


class TestCredentials:
    def test_none(self) -> None:
        """No credentials at all: denied before any request, and the message names all three ways to give some."""
        with _raw(_answer("200 OK")) as server:
            error = _failure(open_store("s3://bucket/x", {"endpoint_url": f"http://127.0.0.1:{server.port}"}))
            assert type(error) is AccessDenied
            for advice in ("AWS_ACCESS_KEY_ID", "profile", '{"anon": True}'):
                assert advice in str(error)
            assert server.requests == []

    def test_partial(self) -> None:
        """A key without its secret is denied with the same advice."""
        with _raw(_answer("200 OK")) as server:
            error = _failure(_s3(server.port, secret=None, token=None))
            assert type(error) is AccessDenied
            assert "AWS_SECRET_ACCESS_KEY" in str(error)

    def test_anonymous(self) -> None:
        """``anon`` reads a public bucket without signing."""
        with _raw(_answer("200 OK", b"public")) as server:
            store = open_store("s3://bucket/x", {"anon": True, "endpoint_url": f"http://127.0.0.1:{server.port}"})
            assert store.get("a", timeout_s=20, max_bytes=10) == b"public"
            assert b"authorization" not in server.requests[0].lower()

    @pytest.mark.parametrize("name", ANSWERS)
    def test_do_not_leak(self, name: str) -> None:
        """Neither message, repr nor the traceback's text of any failure shows a key, a secret or a token."""
        with _raw(ANSWERS[name][0].replace(b"told by the server", f"key {KEY_ID}, {SECRET}".encode())) as server:
            store = _s3(server.port)
            error = _failure(store)
        for text in (str(error), repr(error), repr(store), store.url):
            assert not any(secret in text for secret in (KEY_ID, SECRET, TOKEN)), text
        assert TOKEN not in "".join(traceback.format_exception(error))

    def test_in_urls(self) -> None:
        """Credentials in a url are refused for S3 and never shown for others."""
        with pytest.raises(OptionInvalid, match="storage_options") as caught:
            open_store(f"s3://{KEY_ID}:{SECRET}@bucket/x")
        assert SECRET not in str(caught.value)
        with pytest.raises(OptionInvalid, match="query") as caught:
            open_store(f"https://example.com/x?X-Amz-Signature={SECRET}")
        assert SECRET not in str(caught.value)
        store = open_store(f"ftp://{KEY_ID}:{SECRET}@example.com/x")
        assert store.url == "ftp://example.com/x"
        assert SECRET not in repr(store) + repr(parse_url(f"ftp://u:{SECRET}@example.com/x"))

    def test_without_secrets(self) -> None:
        """Urls inside a foreign message lose their user, password and query; the rest stays."""
        text = "GET 'https://u:p@host/a/b?sig=1' failed: see http://host/c?d=2, mail a@b"
        assert without_secrets(text) == "GET 'https://host/a/b' failed: see http://host/c mail a@b"


class TestOptions:
    @pytest.mark.parametrize(
        "url", ["", "s3://", "s3:///x", "nonsense://x", "simplecache::s3://b/x", "zip://a::s3://b", "file://", "a\0b"]
    )
    def test_bad_urls(self, url: str) -> None:
        """What cannot be a store's url is refused, at the latest by the first request."""
        with pytest.raises(OptionInvalid):
            open_store(url).list()

    @pytest.mark.parametrize("options", [["key"], {1: 2}, {"no_such_option": 1}, {"profile": "nobody"}])
    def test_bad_options(self, options: Any) -> None:
        """Options that the filesystem does not know are our caller's mistake, not a broken store."""
        with pytest.raises(OptionInvalid):
            open_store("s3://bucket/x", options).get("a", timeout_s=5, max_bytes=1)

    def test_missing_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without s3fs, the message is the command that installs it."""

        def missing(_protocol: str) -> type:
            raise ImportError("Install s3fs to access S3")

        monkeypatch.setattr("fsspec.get_filesystem_class", missing)
        with pytest.raises(OptionInvalid, match=r'pip install "streamshards\[s3\]"'):
            open_store("s3://bucket/x").list()


LOCAL: dict[str, tuple[OSError, type[StreamShardsError]]] = {
    "missing": (FileNotFoundError(errno.ENOENT, "No such file"), ObjectMissing),
    "denied": (PermissionError(errno.EACCES, "Permission denied"), AccessDenied),
    "read-only": (OSError(errno.EROFS, "Read-only file system"), AccessDenied),
    "full": (OSError(errno.ENOSPC, "No space left on device"), StoreError),
    "quota": (OSError(errno.EDQUOT, "Disk quota exceeded"), StoreError),
    "files": (OSError(errno.EMFILE, "Too many open files"), StoreError),
    "a file in the way": (NotADirectoryError(errno.ENOTDIR, "Not a directory"), StoreError),
    "a folder in the way": (IsADirectoryError(errno.EISDIR, "Is a directory"), StoreError),
    "io": (OSError(errno.EIO, "Input/output error"), StoreUnavailable),
    "stale": (OSError(errno.ESTALE, "Stale file handle"), StoreUnavailable),
    "exists": (FileExistsError(errno.EEXIST, "File exists"), ObjectExists),
    "unheard of": (OSError(errno.EXDEV, "Cross-device link"), StoreError),
}


class TestDisks:
    @pytest.mark.parametrize("name", LOCAL)
    def test_errno(self, name: str) -> None:
        """Each thing a disk can say has its class, and the message keeps the disk's own words."""
        error, kind = LOCAL[name]
        ours = translated(error, what="/data/a: get", is_local=True)
        assert type(ours) is kind
        assert str(error.strerror) in str(ours)
        assert str(ours).startswith("/data/a: get failed: ")

    def test_catch_all_is_judged_by_its_cause(self) -> None:
        """``OSError(EIO)``, which clients use for anything unknown, is as transient as what caused it."""
        wrapped = OSError(errno.EIO, "unknown")
        wrapped.__cause__ = PermissionError("no")
        assert type(translated(wrapped, what="x")) is AccessDenied

    def test_permission(self, tmp_path: Path) -> None:
        """A file that we may not read is denied; root, who may read everything, becomes somebody else for it."""
        (tmp_path / "a").write_bytes(b"1")
        (tmp_path / "a").chmod(0)
        store, user = open_store(tmp_path), os.geteuid()
        with pytest.raises(AccessDenied, match="owner and mode"):
            try:
                os.seteuid(user or 65534)
                store.get("a", timeout_s=1, max_bytes=10)
            finally:
                os.seteuid(user)

    @pytest.mark.parametrize(
        "put", [lambda s: s.put("file/b", b"1", timeout_s=1), lambda s: s.put("d", b"", timeout_s=1)]
    )
    def test_in_the_way(self, tmp_path: Path, put: Callable[[Store], None]) -> None:
        """A file where a folder should be, or a folder where a file should, is an error that waiting cannot mend."""
        (tmp_path / "file").write_bytes(b"1")
        (tmp_path / "d").mkdir()
        with pytest.raises(StoreError) as caught:
            put(open_store(tmp_path))
        assert not caught.value.transient
        assert sorted(os.listdir(tmp_path)) == ["d", "file"]
