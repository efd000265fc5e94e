"""What S3 needs beyond fsspec's common ground: one request per call, no retries and no redirects of the client's own.

s3fs's defaults would split an object over 50 MiB into parallel ranges (parts of two versions can be spliced), multiply
retries (25 GETs for one answer of "slow down") and follow a redirect to any host, security token and all.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlsplit

from streamshards.errors import ObjectExists, ObjectTooLarge, StoreUnavailable
from streamshards.storage.translate import RedirectRefused

_CONNECT_TIMEOUT_S: Final = 5
_SILENCE_TIMEOUT_S: Final = 15
"""Seconds without a single byte after which a connection is given up."""
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


async def get_object(fs: Any, path: str, *, max_bytes: int) -> bytes:
    """Return a whole object with one GET; its length is checked before its bytes are taken.

    Args:
        fs: The ``s3fs.S3FileSystem``, on whose loop this runs.
        path: ``bucket/key``.
        max_bytes: More is ``ObjectTooLarge``.
    """
    bucket, _, key = path.partition("/")
    answer = await fs._call_s3("get_object", Bucket=bucket, Key=key)
    body = answer["Body"]
    try:
        length = answer.get("ContentLength")
        if length is None:  # only a broken server or proxy leaves it out; a cut body could not be told from a whole one
            raise StoreUnavailable(f"s3://{path}: get failed: an answer without Content-Length; check for a proxy")
        if length > max_bytes:
            raise ObjectTooLarge(f"s3://{path}: get refused: {length:,} bytes, at most {max_bytes:,} were expected")
        data: bytes = await body.read()
    finally:
        body.close()
    if len(data) != length:
        raise StoreUnavailable(f"s3://{path}: get failed: {len(data):,} of {length:,} bytes came; try again")
    return data


async def put_object(fs: Any, path: str, data: bytes, *, if_absent: bool) -> None:
    """Store *data* with one PUT.

    With *if_absent* the object is looked for first, because some servers (JuiceFS) ignore the condition of the PUT.
    """
    bucket, _, key = path.partition("/")
    if if_absent and await _exists(fs, bucket, key):
        raise ObjectExists(f"s3://{path}: put refused: the object exists; read it, or choose another key")
    condition = {"IfNoneMatch": "*"} if if_absent else {}
    await fs._call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)


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
