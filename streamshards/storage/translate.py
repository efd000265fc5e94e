"""The one translator of foreign errors: disks', fsspec's, botocore's and aiohttp's into ours.

Nothing of theirs is imported: an error is known by its HTTP status, its S3 code, its errno, or the name of its class
(or of a base). Wrappers hide the reason (s3fs's ``OSError(EIO)`` is a catch-all), so the whole chain of causes is read.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Collection, Iterator
from typing import Final

from streamshards.errors import (
    AccessDenied,
    ObjectExists,
    ObjectMissing,
    OptionInvalid,
    StoreError,
    StoreUnavailable,
    StreamShardsError,
)
from streamshards.storage.location import without_secrets

_MISSING_CODES: Final = frozenset({"NoSuchKey", "NoSuchBucket", "NoSuchVersion"})
_DENIED_CODES: Final = frozenset(
    {
        "AccessDenied", "AccountProblem", "AllAccessDisabled", "ExpiredToken", "ExpiredTokenException",
        "InvalidAccessKeyId", "InvalidSecurity", "InvalidToken", "RequestTimeTooSkewed", "SignatureDoesNotMatch",
        "TokenRefreshRequired",
    }
)  # fmt: skip
_EXPIRED_CODES: Final = frozenset(
    {"ExpiredToken", "ExpiredTokenException", "InvalidAccessKeyId", "InvalidToken", "TokenRefreshRequired"}
)
_TRANSIENT_CODES: Final = frozenset(
    {
        "BadDigest", "ConditionalRequestConflict", "IncompleteBody", "InternalError", "OperationAborted",
        "RequestLimitExceeded", "RequestTimeout", "ServiceUnavailable", "SlowDown", "Throttling",
        "ThrottlingException", "TooManyRequests", "XAmzContentSHA256Mismatch",
    }
)  # fmt: skip
_TRANSIENT_STATUS: Final = frozenset({408, 409, 425, 429})  # and every 5xx except 501 "not implemented"

_DENIED_NAMES: Final = frozenset(
    {
        "CredentialRetrievalError", "NoAuthTokenError", "PermissionError", "SSOError", "SSOTokenLoadError",
        "TokenRetrievalError", "UnauthorizedSSOTokenError",
    }
)  # fmt: skip
_NO_CREDENTIALS_NAMES: Final = frozenset({"NoCredentialsError", "PartialCredentialsError"})
_OPTION_NAMES: Final = frozenset(
    {
        "ConfigParseError", "ImportError", "InvalidRegionError", "NoRegionError", "ParamValidationError",
        "ProfileNotFound", "TypeError", "ValueError",
    }
)  # fmt: skip
_TRANSIENT_NAMES: Final = frozenset(
    {
        "ClientConnectionError", "ClientPayloadError", "ConnectionError", "EndpointConnectionError", "FSTimeoutError",
        "HTTPClientError", "HttpProcessingError", "IncompleteRead", "IncompleteReadError", "ResponseParserError",
        "ResponseStreamingError", "SSLError", "TimeoutError", "gaierror",
    }
)  # fmt: skip
_TRANSIENT_ERRNOS: Final = frozenset(
    getattr(errno, name)
    for name in (
        "EAGAIN", "EBUSY", "ECONNABORTED", "ECONNREFUSED", "ECONNRESET", "EHOSTDOWN", "EHOSTUNREACH", "EINTR", "EIO",
        "ENETDOWN", "ENETRESET", "ENETUNREACH", "ENOTCONN", "EPIPE", "EREMOTEIO", "ESTALE", "ETIMEDOUT",
    )
    if hasattr(errno, name)
)  # fmt: skip

_MEND_CREDENTIALS: Final = (
    "check the key, the token's age and the bucket policy, then set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
    'a profile, or storage_options={"key": …, "secret": …}'
)
_SET_CLOCK: Final = "this machine's clock is off: set it (timedatectl, chrony)"
_FIND_CREDENTIALS: Final = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, name a profile with AWS_PROFILE or "
    'storage_options={"profile": …}, or read a public bucket with storage_options={"anon": True}'
)
_TRY_LATER: Final = "try again; if it stays, check the endpoint and the network"
_CHECK_URL: Final = "check the url and the key"


class RedirectRefused(Exception):
    """The endpoint sent us to another host. Raised inside the S3 client, so that nothing is sent there."""


def translated(
    error: Exception, *, what: str, is_local: bool = False, secrets: Collection[str] = ()
) -> StreamShardsError:
    """Return *error* as one of ours; the caller raises it ``from`` the original.

    Args:
        error: What the disk or the client raised.
        what: What was being done to which url, at the head of the message: ``s3://b/train/a.pt.zst: get``.
        is_local: A disk rather than a service; changes the advice.
        secrets: Literal strings that must not appear in the message.
    """
    chain = list(_chain(error))
    kind, advice = _from_answer(chain) or _from_names(chain, is_local=is_local) or _from_errno(chain, is_local=is_local)
    ours = kind(f"{what} failed: {_cause(chain, secrets)}; {advice}")
    if isinstance(ours, StoreUnavailable):
        ours.retry_after_s = _retry_after_s(chain)
    return ours


def is_expired(error: Exception) -> bool:
    """Return whether the server says that the credentials were good once: newer ones may help."""
    return _code(list(_chain(error))) in _EXPIRED_CODES


_Verdict = tuple[type[StreamShardsError], str]


def _from_answer(chain: list[BaseException]) -> _Verdict | None:
    """Judge by what a server answered: S3's code first, then the HTTP status."""
    code, status = _code(chain), _status(chain)
    if code in _TRANSIENT_CODES:
        return StoreUnavailable, _TRY_LATER
    if code in _MISSING_CODES or status == 404:
        return ObjectMissing, ("check the bucket's name" if code == "NoSuchBucket" else _CHECK_URL)
    if code == "RequestTimeTooSkewed":
        return AccessDenied, _SET_CLOCK
    if code in _DENIED_CODES or status in (401, 403):
        return AccessDenied, _MEND_CREDENTIALS
    if code == "PreconditionFailed" or status == 412:
        return ObjectExists, "another writer was first; read its object, or choose another key"
    if status in _TRANSIENT_STATUS or (500 <= status < 600 and status != 501):
        return StoreUnavailable, _TRY_LATER
    if 300 <= status < 400 or any(isinstance(error, RedirectRefused) for error in chain):
        return StoreError, "redirects are not followed: give the bucket's own endpoint_url and region"
    if status >= 400:
        return StoreError, "check the region, the endpoint_url and the url"
    return None


def _from_names(chain: list[BaseException], *, is_local: bool) -> _Verdict | None:
    """Judge by the names of the classes in the chain and their bases."""
    names = _names(chain)
    if "SSLCertVerificationError" in names:
        return StoreError, "the certificate is not trusted: set AWS_CA_BUNDLE, or mend the endpoint_url"
    if names & _NO_CREDENTIALS_NAMES:
        return AccessDenied, _FIND_CREDENTIALS
    if names & _DENIED_NAMES:
        return AccessDenied, ("check the owner and mode of the file and its folder" if is_local else _MEND_CREDENTIALS)
    if names & _TRANSIENT_NAMES:  # before the next: fsspec calls whatever http did not bring a missing file
        return StoreUnavailable, _TRY_LATER
    if "FileNotFoundError" in names:
        return ObjectMissing, _CHECK_URL
    if "FileExistsError" in names:
        return ObjectExists, "another writer was first; read its object, or choose another key"
    if names & _OPTION_NAMES:
        return OptionInvalid, "check storage_options and the url"
    return None


def _from_errno(chain: list[BaseException], *, is_local: bool) -> _Verdict:
    """Judge by errno; what nobody knows is a plain ``StoreError``."""
    numbers = {error.errno for error in chain if isinstance(error, OSError)}
    if numbers & {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}:
        return StoreError, "the disk or quota is full: make room"
    if errno.EROFS in numbers:
        return AccessDenied, "the file system is read-only: write somewhere else"
    if numbers & {errno.EMFILE, errno.ENFILE}:
        return StoreError, "too many open files: raise the limit (ulimit -n)"
    if numbers & _TRANSIENT_ERRNOS:
        return StoreUnavailable, ("check the disk (dmesg)" if is_local else _TRY_LATER)
    if numbers & {errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY}:
        return StoreError, "a file stands where a folder should be, or a folder where a file should: check the key"
    return StoreError, _CHECK_URL


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield *error* and what caused it, nearest first."""
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        following = following.__cause__ or (None if following.__suppress_context__ else following.__context__)


def _names(chain: list[BaseException]) -> set[str]:
    """Return the names of the classes in the chain and of their bases."""
    return {base.__name__ for error in chain for base in type(error).__mro__}


def _response(chain: list[BaseException]) -> dict[str, dict[str, object]]:
    """Return the parsed answer that botocore's ClientError carries, or nothing."""
    for error in chain:
        response = getattr(error, "response", None)
        if isinstance(response, dict) and isinstance(response.get("Error"), dict):
            return response
    return {}


def _code(chain: list[BaseException]) -> str:
    return str(_response(chain).get("Error", {}).get("Code", ""))


def _retry_after_s(chain: list[BaseException]) -> float:
    """Return the seconds in the answer's ``Retry-After``, or 0; a date in it is left alone."""
    headers = _response(chain).get("ResponseMetadata", {}).get("HTTPHeaders")
    value = headers.get("retry-after", "") if isinstance(headers, dict) else ""
    return float(value) if re.fullmatch(r"\d{1,6}", value) else 0.0


def _status(chain: list[BaseException]) -> int:
    """Return the HTTP status of the answer, or 0."""
    status = _response(chain).get("ResponseMetadata", {}).get("HTTPStatusCode")
    if isinstance(status, int):
        return status
    if "HttpProcessingError" in _names(chain):
        return 0  # aiohttp could not read the answer; the 400 that it puts on that is its own, not the server's
    for error in chain:
        for name in ("status", "code", "status_code"):  # aiohttp's, gcsfs's and others' spelling
            value = getattr(error, name, None)
            if isinstance(value, int) and 300 <= value < 600:
                return value
    return 0


def _cause(chain: list[BaseException], secrets: Collection[str]) -> str:
    """Return one line about the error, without secrets: its code, status or class, and its text."""
    # fsspec's http calls every failure a missing file; what is missing indeed has no cause, or one with a status.
    hides = isinstance(chain[0], FileNotFoundError) and len(chain) > 1
    error = chain[1] if hides else chain[0]
    status = _status(chain)
    name = _code(chain) or (f"HTTP {status}" if status else type(error).__name__)
    told = error.strerror if isinstance(error, OSError) else None  # without the file's name, which the message has
    text = without_secrets(" ".join((told or str(error)).split()))[:300]
    for secret in secrets:
        text = text.replace(secret, "***")
    return f"{name}: {text}" if text else name
