"""What the rest of the house may ask of a store, and what a key may look like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol, TypeAlias

from streamshards.errors import OptionInvalid
from streamshards.options import KiB

Blob: TypeAlias = bytes | memoryview
"""The bytes of one object; large ones may come in memory of their own kind."""


_STALL_S: Final = 15.0
_MIN_BYTES_PER_S: Final = 32.0 * KiB
TIMEOUT_S: Final = 120.0
"""For requests whose caller names none; as ``RetryOptions.attempt_timeout_s``."""


class Hedge:
    """A second request for an object that takes long to come: whichever is first is taken, the other called off.

    Args:
        after_s: Seconds after the first request.
        allow: Asked then, on any thread; False: no second request. Must be quick.
    """

    def __init__(self, after_s: float, allow: Callable[[], bool]) -> None:
        self.after_s = after_s
        self.is_asked = False
        """Whether there was a second request."""
        self.is_won = False
        """Whether it was the one that brought the object."""
        self._allow = allow

    def begin(self) -> bool:
        """Return whether to make the second request now."""
        self.is_asked = self._allow()
        return self.is_asked


class Patience(float):
    """The seconds that one request may take, and with them how slow it may be meanwhile.

    A float, so that every store takes it as its ``timeout_s``; stores that cannot watch bytes come need not know more.

    Attributes:
        stall_s: Abandon the request when no byte has come for this long.
        min_bytes_per_s: Abandon it when less than this comes, on average over ``stall_s``.
        hedge: A second request beside it, if the store can; None: only the one.
    """

    stall_s: float
    min_bytes_per_s: float
    hedge: Hedge | None

    def __new__(
        cls,
        timeout_s: float,
        *,
        stall_s: float = _STALL_S,
        min_bytes_per_s: float = _MIN_BYTES_PER_S,
        hedge: Hedge | None = None,
    ) -> Patience:
        """Return *timeout_s* with the rest."""
        patience = super().__new__(cls, timeout_s)
        patience.stall_s = stall_s
        patience.min_bytes_per_s = min_bytes_per_s
        patience.hedge = hedge
        return patience

    @classmethod
    def of(cls, timeout_s: float) -> Patience:
        """Return *timeout_s* itself, or with the defaults if it is a plain number."""
        return timeout_s if isinstance(timeout_s, Patience) else cls(timeout_s)

    def hedged(self, hedge: Hedge | None) -> Patience:
        """Return the same, with *hedge*."""
        return Patience(self, stall_s=self.stall_s, min_bytes_per_s=self.min_bytes_per_s, hedge=hedge)

    def __repr__(self) -> str:
        return f"Patience({float(self)!r}, stall_s={self.stall_s!r}, min_bytes_per_s={self.min_bytes_per_s!r})"


class Store(Protocol):
    """A folder of objects under one url. Every method makes one attempt; retrying is the engine's business.

    A store may have an attribute ``site``: see :func:`site_of`. It may lack ``get_range``: then objects are read whole.

    Raises (all methods):
        StoreUnavailable: No or no complete answer, or "not now"; the one worth trying again.
        ObjectMissing: No such object, or no such bucket.
        ObjectTooLarge: Longer than the caller takes.
        AccessDenied: No credentials, refused ones, or a file we may not touch.
        OptionInvalid: A key that is no key, or an option the filesystem does not take.
        StoreError: Anything else; the message says what next.

    Guarantees: thread-safe, picklable, and usable after a fork. No credentials in any message or repr.
    """

    url: str
    """Where the store is, canonical and without credentials; for messages."""

    def get(self, key: str, *, timeout_s: float, max_bytes: int) -> Blob:
        """Return the whole object.

        Args:
            key: As in :func:`check_key`.
            timeout_s: Abandon the request after this long. A local disk cannot be abandoned. A :class:`Patience` also
                says when a connection is too slow, which S3 can tell.
            max_bytes: An object longer than this is ``ObjectTooLarge``, raised before its bytes are taken into memory.
        """

    def get_range(self, key: str, start: int, stop: int, *, timeout_s: float) -> Blob:
        """Return the object's bytes from *start* to, but without, *stop*: fewer if it ends before.

        Where *start* lies beyond the end: none, or ``StoreError``.

        Args:
            key: As in :func:`check_key`.
            start: From 0.
            stop: After *start*. More than was asked for is ``ObjectTooLarge``: the server does not know ranges.
            timeout_s: As in :meth:`get`.
        """

    def put(self, key: str, data: bytes | memoryview, *, timeout_s: float, if_absent: bool = False) -> None:
        """Store *data* under *key*, replacing what was there; a reader sees the old object or the new, never a part.

        Args:
            key: As in :func:`check_key`.
            data: Any contiguous bytes.
            timeout_s: Abandon the request after this long; whether the object arrived is then unknown.
            if_absent: Raise ``ObjectExists`` instead of replacing. Exclusive on disks, in memory and on S3 servers
                that honour ``If-None-Match`` (AWS, SeaweedFS, moto); others (JuiceFS) only see a check just before
                the write. After an attempt whose answer was lost, the object that exists may be one's own.
        """

    def delete(self, key: str, *, timeout_s: float = TIMEOUT_S) -> None:
        """Remove the object; no error if there is none. As for *timeout_s*, see :meth:`put`."""

    def list(self, prefix: str = "", *, timeout_s: float = TIMEOUT_S) -> list[tuple[str, int]]:
        """Return ``(key, size in bytes)`` of every object whose key starts with *prefix*, sorted by key.

        Recursive, and never from a listings cache. A folder that is not there has no objects.

        Args:
            prefix: The beginning of a key, folder or not.
            timeout_s: Abandon a request after this long; on S3 each page of 1,000 keys is a request, so a listing that
                goes on may take longer.
        """


def site_of(store: Store) -> str | None:
    """Return what names the server that *store* asks, or None if it does not say: its attribute ``site``.

    Stores of the same site fail together: the engine asks a site that does not answer with one probe at a time.
    """
    site: str | None = getattr(store, "site", None)
    return site


def check_key(key: str) -> str:
    """Return *key* if it names something inside a store: relative, posix, ``a/b.pt.zst``.

    Raises:
        OptionInvalid: Empty, absolute, or with ``..``, ``.``, an empty part, a backslash or a control character.
    """
    parts = key.split("/")
    if not key or "\\" in key or any(ord(c) < 32 or ord(c) == 127 for c in key) or {"", ".", ".."} & set(parts):
        raise OptionInvalid(f'{key!r} is not a key; keys are relative and posix, like "parts/shard-00001.pt.zst"')
    return key
