"""A proxy in front of a real S3 server that lets requests fail on a script.

::

    with seaweedfs(folder) as server, FaultProxy(server) as proxy:
        proxy.script = by_key("*/index.json", [SLOW_DOWN, Reset()])   # its third request succeeds
        StreamingDataset("s3://train", storage_options=proxy.server.storage_options)
        proxy.requests                                                # what was asked, and what became of it

Theory: a signature covers the ``Host`` header, so the client signs for the proxy's address, and the proxy hands that
header on unchanged; SeaweedFS and JuiceFS check against the ``Host`` they receive, not against their own address. For
the same reason the proxy cannot ask for another object in the client's name: it has the server's credentials.

One thread per connection; a fault that waits ends when the client hangs up or the proxy closes, whichever is first.
"""

from __future__ import annotations

import contextlib
import fnmatch
import http.client
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from streamshards.testing.servers import S3Server, client_of
from streamshards.testing.stores import Block, FlipBit, Swap, Truncate

_UPSTREAM_TIMEOUT_S: Final = 30.0
_DRIP_S: Final = 0.05
"""Between two drops; short against every stall that a client should notice."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An error in the server's place; nothing is forwarded."""

    status: int
    code: str = ""
    """S3's code, in an XML body. Empty: a page of HTML, as a load balancer sends it."""
    retry_after_s: int | None = None
    """Sent as ``Retry-After``."""
    location: str | None = None
    """Sent as ``Location``, with the path of the request behind it: ``"http://other.host:80"``."""


SLOW_DOWN = Answer(503, "SlowDown")
INTERNAL_ERROR = Answer(500, "InternalError")
BAD_GATEWAY = Answer(502)
TOO_MANY_REQUESTS = Answer(429, "TooManyRequests")
ACCESS_DENIED = Answer(403, "AccessDenied")
EXPIRED_TOKEN = Answer(400, "ExpiredToken")
TIME_SKEWED = Answer(403, "RequestTimeTooSkewed")
NO_SUCH_KEY = Answer(404, "NoSuchKey")


@dataclass(frozen=True, slots=True)
class Reset:
    """The connection is reset: before any byte of the answer, or after so many bytes of its body."""

    after_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Cut:
    """The right ``Content-Length``, then only *length* bytes of the body, then an orderly end of the connection."""

    length: int


@dataclass(frozen=True, slots=True)
class Stall:
    """The head and so many bytes of the body, then nothing for ever; None: not even the head."""

    after_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Drip:
    """The right answer, its body at *bytes_per_s*."""

    bytes_per_s: int


@dataclass(frozen=True, slots=True)
class Late:
    """The right answer, all of it, after so many seconds; nothing if the client hangs up meanwhile."""

    seconds: float


Fault = Answer | Reset | Cut | Stall | Drip | Late | Truncate | FlipBit | Swap | Block
"""``Truncate`` is a shorter body with a ``Content-Length`` to match, ``FlipBit`` a wrong bit at the right length,
``Swap`` the bytes of another ``bucket/key``, ``Block`` an answer held back until an event."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request, as a script sees it."""

    method: str
    key: str
    """``bucket/key``, decoded; ``bucket`` for a listing."""
    attempt: int
    """The number of earlier requests with this method and key."""
    access_key: str
    """Whose signature it carries; empty for an anonymous one."""
    fault: Fault | None = field(default=None, compare=False)
    """What became of it; set in :attr:`FaultProxy.requests`."""


Script = Callable[[Request], Fault | None]


def no_faults(_request: Request) -> None:
    """Let everything through."""


def by_key(pattern: str, faults: Sequence[Fault | None] | Fault, *, method: str = "GET") -> Script:
    """Return a script for the requests whose ``bucket/key`` matches *pattern*.

    Args:
        pattern: As in :mod:`fnmatch`; ``*`` matches slashes, too.
        faults: One for each attempt, none after the last; or a single one, for all attempts.
        method: Other methods go through.
    """

    def script(request: Request) -> Fault | None:
        if request.method != method or not fnmatch.fnmatchcase(request.key, pattern):
            return None
        if not isinstance(faults, Sequence):
            return faults
        return faults[request.attempt] if request.attempt < len(faults) else None

    return script


def at_random(rate: float, faults: Sequence[Fault], *, seed: int, method: str = "GET") -> Script:
    """Return a script that spoils a part *rate* of the requests, each with one of *faults*.

    What becomes of a request depends on the seed, its key and its attempt alone, not on the order in which they come.
    """

    def script(request: Request) -> Fault | None:
        chance = random.Random(f"{seed} {request.key} {request.attempt}")
        return chance.choice(faults) if request.method == method and chance.random() < rate else None

    return script


class FaultProxy:
    """A proxy on loopback in front of *server*; runs inside a ``with``.

    Args:
        server: The real one.
        script: Decides about each request; may be replaced at any time.

    Attributes:
        server: The proxy as a server, for clients: the real one's credentials, the proxy's address.
        requests: What was asked so far, in the order of arrival, with its fault.
    """

    def __init__(self, server: S3Server, script: Script = no_faults) -> None:
        self.script = script
        self.requests: list[Request] = []
        self._real = server
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter()
        self._objects: dict[str, bytes] = {}
        self._objects_lock = threading.Lock()
        self._closing = threading.Event()
        self._listener: _Listener | None = _Listener(self, 0)
        self.port: int = self._listener.server_address[1]
        self.server = replace(server, endpoint_url=f"http://127.0.0.1:{self.port}")

    def __repr__(self) -> str:
        state = "down" if self._listener is None else "up"
        return f"FaultProxy({self.server.endpoint_url!r}, {state}, {len(self.requests)} requests)"

    def __enter__(self) -> FaultProxy:
        assert self._listener is not None
        self._listener.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self.stop_listening()

    def stop_listening(self) -> None:
        """Close the listening socket and all connections: the endpoint is down, connections are refused."""
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.stop()

    def listen(self) -> None:
        """Be there again, at the same port."""
        if self._listener is None:
            self._listener = _Listener(self, self.port)
            self._listener.start()

    @contextlib.contextmanager
    def down(self) -> Iterator[None]:
        """Be down inside this ``with``."""
        self.stop_listening()
        try:
            yield
        finally:
            self.listen()

    def down_for(self, seconds: float) -> threading.Thread:
        """Be down from now on, and up again after *seconds*; return the thread that sees to it."""
        self.stop_listening()

        def come_back() -> None:
            if not self._closing.wait(seconds):
                self.listen()

        thread = threading.Thread(target=come_back, name="fault-proxy-down", daemon=True)
        thread.start()
        return thread

    def forget(self) -> None:
        """Count attempts from 0 again, and empty ``requests``."""
        with self._lock:
            self.requests.clear()
            self._counts.clear()

    def gets(self, pattern: str = "*") -> int:
        """Return how many GETs of keys that match *pattern* came."""
        with self._lock:
            return sum(r.method == "GET" and fnmatch.fnmatchcase(r.key, pattern) for r in self.requests)

    def _decide(self, method: str, key: str, access_key: str) -> Fault | None:
        with self._lock:
            request = Request(method, key, self._counts[method, key], access_key)
            self._counts[method, key] += 1
            fault = self.script(request)
            self.requests.append(replace(request, fault=fault))
        return fault

    def _object(self, name: str) -> bytes:
        """Return the object ``bucket/key`` of the real server, as it was when first asked for."""
        with self._objects_lock:
            if name not in self._objects:
                bucket, _, key = name.partition("/")
                with client_of(self._real) as client:
                    self._objects[name] = client.get_object(Bucket=bucket, Key=key)["Body"].read()
            return self._objects[name]


class _Listener(ThreadingHTTPServer):
    """The listening socket and its connections, until they are closed together."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, proxy: FaultProxy, port: int) -> None:
        self.proxy = proxy
        self._open: set[socket.socket] = set()
        self._guard = threading.Lock()
        super().__init__(("127.0.0.1", port), _Handler)
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), name="fault-proxy", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        if self._thread.is_alive():
            self.shutdown()
            self._thread.join()
        self.socket.close()
        with self._guard:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads it

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._guard:
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._guard:
            self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that hang up are what this is for."""


class _HungUp(Exception):
    """The connection is over, on purpose."""


class _Handler(BaseHTTPRequestHandler):
    """One connection from a client."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes; else each answer waits 40 ms for an ACK
    server: _Listener

    def do_GET(self) -> None:
        """Answer a request of any method."""
        proxy = self.server.proxy
        path = urlsplit(self.path).path
        body = self._body()
        fault = proxy._decide(self.command, unquote(path).strip("/"), self._access_key())
        try:
            self._answer(fault, body)
        except (_HungUp, OSError):
            self.close_connection = True

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # the names that http.server calls

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            return b"".join(self._chunks())
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline().split(b";")[0], 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers
            pass

    def _access_key(self) -> str:
        return self.headers.get("Authorization", "").partition("Credential=")[2].partition("/")[0]

    def _answer(self, fault: Fault | None, body: bytes) -> None:
        match fault:
            case Answer():
                self._send_error(fault)
            case Reset(None):
                self._reset()
            case Stall(None):
                self._wait_for_hang_up()
            case Late(seconds):
                self._wait_for_hang_up(seconds)
                self._forward(None, body)
            case Block(until, entered):
                if entered is not None:
                    entered.set()
                until.wait()
                self._forward(None, body)
            case _:
                self._forward(fault, body)

    def _forward(self, fault: Fault | None, body: bytes) -> None:
        """Ask the real server and hand on its answer, spoiled."""
        status, reason, headers, data = self._ask(body)
        if not 200 <= status < 300:
            fault = None
        match fault:
            case Truncate(length):
                data = data[:length]
            case FlipBit(bit):
                byte, position = divmod(bit, 8)
                data = b"".join((data[:byte], bytes([data[byte] ^ 1 << position]), data[byte + 1 :]))
            case Swap(name):
                data = self.server.proxy._object(name)
        self.send_response_only(status, reason)
        for name, value in headers:
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        promised = {name.lower(): value for name, value in headers}.get("content-length", "0")
        self.send_header("Content-Length", promised if self.command == "HEAD" else str(len(data)))
        self.end_headers()
        self.wfile.flush()
        self._send(fault, data)

    def _send(self, fault: Fault | None, data: bytes) -> None:
        match fault:
            case Reset(int(length)):
                self.wfile.write(data[:length])
                self._reset()
            case Cut(length):
                self.wfile.write(data[:length])
                raise _HungUp
            case Stall(int(length)):
                self.wfile.write(data[:length])
                self._wait_for_hang_up()
            case Drip(bytes_per_s):
                drop = max(1, int(bytes_per_s * _DRIP_S))
                for start in range(0, len(data), drop):
                    self.wfile.write(data[start : start + drop])
                    if self.server.proxy._closing.wait(drop / bytes_per_s):
                        raise _HungUp
            case _:
                self.wfile.write(data)

    def _ask(self, body: bytes) -> tuple[int, str, list[tuple[str, str]], bytes]:
        real = urlsplit(self.server.proxy._real.endpoint_url)
        upstream = http.client.HTTPConnection(real.hostname or "", real.port, timeout=_UPSTREAM_TIMEOUT_S)
        with contextlib.closing(upstream):
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("connection", "expect", "transfer-encoding", "content-length"):
                    upstream.putheader(name, value)
            if body or self.command in ("PUT", "POST"):
                upstream.putheader("Content-Length", str(len(body)))
            upstream.endheaders(body or None)
            answer = upstream.getresponse()
            return answer.status, answer.reason, answer.getheaders(), answer.read()

    def _send_error(self, fault: Answer) -> None:
        path = urlsplit(self.path).path
        if fault.code:
            kind = "application/xml"
            page = (
                f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{fault.code}</Code><Message>scripted</Message>'
                f"<Resource>{path}</Resource><RequestId>1</RequestId></Error>"
            ).encode()
        else:
            kind, page = "text/html", b"<html><body>scripted</body></html>"
        self.send_response_only(fault.status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(page)))
        if fault.retry_after_s is not None:
            self.send_header("Retry-After", str(fault.retry_after_s))
        if fault.location is not None:
            self.send_header("Location", fault.location + self.path)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(page)

    def _reset(self) -> None:
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()  # holds the socket open, too
        self.connection.close()
        raise _HungUp

    def _wait_for_hang_up(self, at_most_s: float | None = None) -> None:
        """Raise ``_HungUp`` when the client has closed the connection, or the proxy has; return after *at_most_s*."""
        self.wfile.flush()
        self.connection.settimeout(at_most_s)
        try:
            while self.connection.recv(1 << 16):
                pass
        except TimeoutError:
            self.connection.settimeout(None)
            return
        except OSError:
            pass
        raise _HungUp
