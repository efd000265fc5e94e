"""What S3 needs beyond fsspec's common ground: one request per call, no retries and no redirects of the client's own.

s3fs's defaults would split an object over 50 MiB into parallel ranges (parts of two versions can be spliced), multiply
retries (25 GETs for one answer of "slow down") and follow a redirect to any host, security token and all.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

from streamshards.errors import ObjectExists, ObjectTooLarge, StoreError, StoreUnavailable
from streamshards.memory import LARGE_BYTES, map_memory
from streamshards.options import MiB
from streamshards.storage.store import Blob, Hedge, Patience
from streamshards.storage.translate import RedirectRefused

T = TypeVar("T")

_CONNECT_TIMEOUT_S: Final = 5
_SILENCE_TIMEOUT_S: Final = 60
"""Seconds without a single byte after which the client gives up a connection; no ``Patience.stall_s`` is longer. A get
gives up earlier, after that."""
_READ_BYTES: Final = 1 * MiB
_MAX_CONNECTIONS: Final = 64
"""More than we ever have in flight per process; botocore's default is 10."""
_AWS_DOMAINS: Final = (".amazonaws.com", ".amazonaws.com.cn")


def s3_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments for s3fs: our defaults, and over them the user's *options*."""
    config = _config_defaults() | dict(options.get("config_kwargs") or {})
    defaults = {"max_concurrency": 1, "use_listings_cache": False}
    return defaults | dict(options) | {"config_kwargs": config}


def _config_defaults() -> dict[str, Any]:
    from aiobotocore.config import AioConfig

    config: dict[str, Any] = {
        "retries": {"total_max_attempts": 1},
        "max_pool_connections": _MAX_CONNECTIONS,
        "connect_timeout": _CONNECT_TIMEOUT_S,
        "read_timeout": _SILENCE_TIMEOUT_S,
    }
    if "response_checksum_validation" in AioConfig.OPTION_DEFAULTS:  # botocore ≥ 1.36; we verify a digest ourselves
        config["response_checksum_validation"] = "when_required"
        config["request_checksum_calculation"] = "when_required"
    if "http_session_cls" in inspect.signature(AioConfig.__init__).parameters:  # aiobotocore ≥ 2.22
        config["http_session_cls"] = _homely_session_class()
    return config


async def get_object(
    fs: Any, path: str, *, max_bytes: int, patience: Patience, span: tuple[int, int] | None = None
) -> Blob:
    """Return an object with one GET, or two if *patience* says so; the length is checked before bytes are taken.

    Args:
        fs: The ``s3fs.S3FileSystem``, on whose loop this runs.
        path: ``bucket/key``.
        max_bytes: More is ``ObjectTooLarge``.
        span: Which of its bytes, from and to; None: all.
        patience: No byte for ``stall_s``, or fewer than ``min_bytes_per_s`` over as long, is ``StoreUnavailable``.
    """

    def ask() -> Coroutine[Any, Any, Blob]:
        return _get_once(fs, path, span, max_bytes=max_bytes, patience=patience)

    return await (ask() if patience.hedge is None else _first_of_two(ask, patience.hedge))


async def _first_of_two(ask: Callable[[], Coroutine[Any, Any, Blob]], hedge: Hedge) -> Blob:
    """Return what the first of two requests brings; the second is made after ``hedge.after_s``, if it may be.

    One that fails leaves the other its chance; if both fail, the first one's error is raised.
    """
    requests = [asyncio.ensure_future(ask())]
    try:
        await asyncio.wait(requests, timeout=hedge.after_s)
        if not requests[0].done() and hedge.begin():
            requests.append(asyncio.ensure_future(ask()))
        pending = set(requests)
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for request in done:
                if not request.cancelled() and request.exception() is None:
                    hedge.is_won = request is not requests[0]
                    return request.result()
        return requests[0].result()
    finally:
        for request in requests:
            request.cancel()
            request.add_done_callback(_look_at)


async def _get_once(fs: Any, path: str, span: tuple[int, int] | None, *, max_bytes: int, patience: Patience) -> Blob:
    request = asyncio.ensure_future(_request(fs, path, span, max_bytes=max_bytes))
    body, memory = await _finished(request, path, patience)
    arriving = _Arriving(body, memory)
    try:
        await _finished(asyncio.ensure_future(arriving.fill()), path, patience, arriving)
    finally:
        body.close()
    if arriving.num_bytes != len(memory):
        raise StoreUnavailable(
            f"s3://{path}: get failed: {arriving.num_bytes:,} of {len(memory):,} bytes came; try again"
        )
    return memory if len(memory) >= LARGE_BYTES else bytes(memory)


async def _request(fs: Any, path: str, span: tuple[int, int] | None, *, max_bytes: int) -> tuple[Any, memoryview]:
    """Return the body of an answer, and memory of its length."""
    bucket, _, key = path.partition("/")
    condition = {} if span is None else {"Range": f"bytes={span[0]}-{span[1] - 1}"}
    answer = await fs._call_s3("get_object", Bucket=bucket, Key=key, **condition)
    body = answer["Body"]
    try:
        length = answer.get("ContentLength")
        if length is None:  # only a broken server or proxy leaves it out; a cut body could not be told from a whole one
            raise StoreUnavailable(f"s3://{path}: get failed: an answer without Content-Length; check for a proxy")
        if length > max_bytes:
            raise ObjectTooLarge(f"s3://{path}: get refused: {length:,} bytes, at most {max_bytes:,} were expected")
        return body, map_memory(length) if length >= LARGE_BYTES else memoryview(bytearray(length))
    except BaseException:
        body.close()
        raise


class _Arriving:
    """A body on its way into memory."""

    def __init__(self, body: Any, memory: memoryview) -> None:
        self.num_bytes = 0
        self._body = body
        self._memory = memory

    async def fill(self) -> None:
        """Take what comes until the end of the body; more than was promised cannot come."""
        while chunk := await self._body.read(_READ_BYTES):
            self._memory[self.num_bytes : self.num_bytes + len(chunk)] = chunk
            self.num_bytes += len(chunk)


async def _finished(task: asyncio.Task[T], path: str, patience: Patience, arriving: _Arriving | None = None) -> T:
    """Return what *task* returns; look once every ``stall_s`` whether enough has come, and abandon it if not."""
    seen = 0
    try:
        while True:
            done, _ = await asyncio.wait({task}, timeout=patience.stall_s)
            if done:
                return task.result()
            came = 0 if arriving is None else arriving.num_bytes - seen
            if came <= patience.min_bytes_per_s * patience.stall_s:
                raise StoreUnavailable(
                    f"s3://{path}: get failed: {came:,} bytes in {patience.stall_s:g} s, abandoned as stalled "
                    f"(RetryOptions.stall_s, min_bytes_per_s={patience.min_bytes_per_s:g}); try again"
                )
            seen += came
    finally:
        task.cancel()
        task.add_done_callback(_look_at)


def _look_at(task: asyncio.Task[Any]) -> None:
    """Take note of how an abandoned task ended; asyncio logs an error that nobody looked at."""
    if not task.cancelled():
        task.exception()


async def put_object(fs: Any, path: str, data: bytes, *, if_absent: bool) -> None:
    """Store *data* with one PUT.

    With *if_absent* the object is looked for first, because some servers (JuiceFS) ignore the condition of the PUT.
    """
    bucket, _, key = path.partition("/")
    if if_absent and await _exists(fs, bucket, key):
        raise ObjectExists(f"s3://{path}: put refused: the object exists; read it, or choose another key")
    condition = {"IfNoneMatch": "*"} if if_absent else {}
    await fs._call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)


async def delete_object(fs: Any, path: str) -> None:
    """Remove an object with one DELETE."""
    bucket, _, key = path.partition("/")
    await fs._call_s3("delete_object", Bucket=bucket, Key=key)


async def list_objects(fs: Any, path: str, *, page_timeout_s: float) -> list[tuple[str, int]]:
    """Return ``(key within the bucket, size)`` of every object whose ``bucket/key`` begins with *path*.

    Args:
        fs: The ``s3fs.S3FileSystem``, on whose loop this runs.
        path: ``bucket/prefix``.
        page_timeout_s: For each page; one that takes longer is ``StoreUnavailable``.
    """
    bucket, _, prefix = path.partition("/")
    found: list[tuple[str, int]] = []
    more: dict[str, str] = {}
    while True:
        request = fs._call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, **more)
        try:
            answer = await asyncio.wait_for(request, page_timeout_s)
        except asyncio.TimeoutError as error:
            raise StoreUnavailable(
                f"s3://{path}: list failed: no answer in {page_timeout_s:g} s, after {len(found):,} objects; try again"
            ) from error
        found += [(item["Key"], int(item["Size"])) for item in answer.get("Contents", ())]
        token = answer.get("NextContinuationToken")
        if not answer.get("IsTruncated") or not token:
            return found
        if token == more.get("ContinuationToken"):
            raise StoreError(f"s3://{path}: list failed: the server sends the same page for ever; check for a proxy")
        more = {"ContinuationToken": token}


async def _exists(fs: Any, bucket: str, key: str) -> bool:
    try:
        await fs._call_s3("head_object", Bucket=bucket, Key=key)
    except FileNotFoundError:
        return False
    return True


def _homely_session_class() -> type:
    """Return the client's HTTP session, made to refuse redirects off the endpoint before anything is sent there."""
    from aiobotocore.httpsession import AIOHTTPSession
    from aiohttp import TraceConfig

    class HomelySession(AIOHTTPSession):  # type: ignore[misc]  # untyped base
        async def _get_session(self, proxy_url: str | None) -> Any:
            session = await super()._get_session(proxy_url)
            if not session.trace_configs:
                trace = TraceConfig()
                trace.on_request_redirect.append(_refuse_strangers)
                trace.freeze()
                session.trace_configs.append(trace)
            return session

    return HomelySession


async def _refuse_strangers(_session: Any, _context: Any, redirect: Any) -> None:
    """Raise ``RedirectRefused`` unless the redirect stays on the host, or within AWS (its buckets' own regions)."""
    origin = urlsplit(str(redirect.url))
    target = urlsplit(redirect.response.headers.get("Location") or redirect.response.headers.get("URI") or "")
    if not target.netloc or (target.scheme, target.netloc) == (origin.scheme, origin.netloc):
        return
    hosts = (origin.hostname or "", target.hostname or "")
    if target.scheme == "https" and all(host.endswith(_AWS_DOMAINS) for host in hosts):
        return
    raise RedirectRefused(f"{origin.hostname} redirects to {target.hostname}")
