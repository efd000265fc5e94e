"""Options: frozen, keyword-only, right once they exist."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Final, Literal, TypeVar, get_args

from streamshards.errors import OptionInvalid

CacheMode = Literal["raw", "compressed"]
OptionsT = TypeVar("OptionsT")

KiB: Final = 1024
MiB: Final = 1024 * KiB
GiB: Final = 1024 * MiB

_NO_MAXIMUM: Final = 2**63 - 1
"""What an int64 holds."""
_MAX_STALL_S: Final = 60.0
"""After this long without a byte the S3 client itself gives up."""
_UNITS: Final = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": KiB, "MIB": MiB, "GIB": GiB, "TIB": 1024 * GiB,
}  # fmt: skip
_SIZE: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B)?\s*", re.IGNORECASE)


def parse_bytes(size: int | str, *, name: str) -> int:
    """Return *size* as a number of bytes.

    Args:
        size: ``33554432``, ``"32MiB"``, ``"1.5 GB"``; KB/MB/GB are powers of 1,000, KiB/MiB/GiB of 1,024.
        name: What the size is for; stands in the error.

    Raises:
        OptionInvalid: Not a size, or less than one byte.
    """
    if isinstance(size, str):
        match = _SIZE.fullmatch(size)
        if match is None:
            raise OptionInvalid(f'{name}={size!r} is not a size; write 33554432 or "32MiB"')
        number = int(float(match[1]) * _UNITS[(match[2] or "").upper()])
    elif isinstance(size, int) and not isinstance(size, bool):
        number = size
    else:
        raise OptionInvalid(f'{name}={size!r} is not a size; write 33554432 or "32MiB"')
    if number < 1:
        raise OptionInvalid(f"{name}={size!r} must be at least one byte")
    return number


def require_int(value: object, *, name: str, minimum: int, maximum: int = _NO_MAXIMUM) -> int:
    """Return *value* if it is an int in ``[minimum, maximum]``.

    Raises:
        OptionInvalid: It is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
        limits = f"of at least {minimum:,}" if maximum == _NO_MAXIMUM else f"from {minimum:,} to {maximum:,}"
        raise OptionInvalid(f"{name}={value!r} must be a whole number {limits}")
    return value


def require_options(value: OptionsT | None, kind: type[OptionsT], *, name: str) -> OptionsT:
    """Return *value*, or the defaults of *kind* if it is None.

    Raises:
        OptionInvalid: It is something else.
    """
    if value is None:
        return kind()
    if not isinstance(value, kind):
        raise OptionInvalid(f"{name}={value!r} must be {kind.__name__}(…)")
    return value


def _require_positive_s(value: float, *, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise OptionInvalid(f"{name}={value!r} must be a number of seconds above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class OrderOptions:
    """What shapes the global sample order, besides the seed and the epoch. See docs/architecture.md."""

    lanes: int | None = None
    """How many interleaved lanes the epoch is cut into. None: ``world_size * max(1, num_workers)`` of the
    first start. Give a number (a multiple of every cluster size you may use) to see the same order on all."""
    chunk: int | None = None
    """Consecutive positions taken from one lane. None: the batch size, or ``global batch // lanes``."""
    shuffle_block: int | None = None
    """Rows shuffled together (about; blocks end at shard borders). None: as many as 64 MiB of raw data hold."""

    def __post_init__(self) -> None:
        for name in ("lanes", "chunk", "shuffle_block"):
            value = getattr(self, name)
            if value is not None:
                require_int(value, name=f"OrderOptions.{name}", minimum=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryOptions:
    """How long a store may fail before we give up. Retries have this one owner: the client's own are off."""

    deadline_s: float = 600.0
    """Give up on one object after this long without success; then ``StoreUnavailable`` is raised."""
    first_contact_s: float = 25.0
    """The deadline for opening the dataset: a wrong endpoint should be known at once, not in ten minutes."""
    attempt_timeout_s: float = 120.0
    """Abandon a single request after this long."""
    stall_s: float = 15.0
    """Abandon a single request when no byte has come for this long (S3); up to 60 s."""
    min_bytes_per_s: float = 32 * KiB
    """Abandon a single request when less than this comes, on average over ``stall_s`` (S3): a connection that drips is
    replaced by a new one. Several threads share your network: stay far below its speed divided by them."""
    base_s: float = 0.1
    """The first wait is drawn from ``[0, base_s]``, each next one from twice that range (full jitter)."""
    max_wait_s: float = 10.0
    """No wait between two attempts is longer than this."""
    corrupt_attempts: int = 3
    """How often a shard or an index whose bytes are wrong is fetched in all before it counts as corrupt."""
    hedge_s: float | None = None
    """Ask for a shard a second time, on another connection, when it has not come after this long, and take whichever
    comes first (S3). At most one read in twenty, and none while the store fails. Set it well above what a read takes
    as a rule: to its 99th percentile, say. None: never."""

    def __post_init__(self) -> None:
        for name in ("deadline_s", "first_contact_s", "attempt_timeout_s", "stall_s", "base_s", "max_wait_s"):
            _require_positive_s(getattr(self, name), name=f"RetryOptions.{name}")
        if self.hedge_s is not None:
            _require_positive_s(self.hedge_s, name="RetryOptions.hedge_s")
        if self.stall_s > _MAX_STALL_S:
            raise OptionInvalid(f"RetryOptions.stall_s={self.stall_s!r} must be at most {_MAX_STALL_S:g} s")
        rate = self.min_bytes_per_s
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < float("inf"):
            raise OptionInvalid(f"RetryOptions.min_bytes_per_s={rate!r} must be a number of bytes a second, 0 or more")
        require_int(self.corrupt_attempts, name="RetryOptions.corrupt_attempts", minimum=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefetchOptions:
    """What one reader (a rank, or one worker process of it) may use to run ahead of the training loop."""

    memory_bytes: int | str = GiB
    """Bytes of shards, blocks and ready batches held at once. An order that cannot fit is refused at the start."""
    threads: int | None = None
    """Threads that fetch and decode shards. None: twice the cores this process may use, from 2 to 8."""
    ready_batches: int = 8
    """Batches kept ready for the training loop, at most; fewer when they are large."""
    slow_s: float = 10.0
    """Emit a ``ReadSlow`` event whenever the training loop has waited this long for a batch."""

    def __post_init__(self) -> None:
        size = parse_bytes(self.memory_bytes, name="PrefetchOptions.memory_bytes")
        object.__setattr__(self, "memory_bytes", size)
        if self.threads is not None:
            require_int(self.threads, name="PrefetchOptions.threads", minimum=1, maximum=256)
        require_int(self.ready_batches, name="PrefetchOptions.ready_batches", minimum=1)
        _require_positive_s(self.slow_s, name="PrefetchOptions.slow_s")


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheOptions:
    """A cache of shards on this machine's disk, shared by all ranks, workers and jobs of one user."""

    directory: str | os.PathLike[str] | None = None
    """Where it lies. None: ``$XDG_CACHE_HOME/streamshards``, or ``~/.cache/streamshards``."""
    budget_bytes: int | str = 64 * GiB
    """Disk that the cache may use, all processes together. Once it is full, a new shard takes the place of what nobody
    has used for two epochs, and of nothing else; it is not stored if there is no such thing."""
    keep_free_bytes: int | str = 10 * GiB
    """Disk to leave free for others: the cache shrinks, least recently used first, and stores nothing more, rather than
    take it."""
    mode: CacheMode = "raw"
    """``"raw"`` keeps shards decoded: several times the disk, no decoding after the first epoch. ``"compressed"`` keeps
    them as they came. Foreign ``.pt`` files are always kept as they came."""

    def __post_init__(self) -> None:
        for name in ("budget_bytes", "keep_free_bytes"):
            value = getattr(self, name)
            if value != 0 or name == "budget_bytes" or isinstance(value, bool):
                object.__setattr__(self, name, parse_bytes(value, name=f"CacheOptions.{name}"))
        if self.mode not in get_args(CacheMode):
            raise OptionInvalid(f'CacheOptions.mode={self.mode!r} must be "raw" or "compressed"')
        if self.directory is not None:
            object.__setattr__(self, "directory", _local_path(self.directory, name="CacheOptions.directory"))


def _local_path(path: object, *, name: str) -> str:
    """Return *path*, absolute: a worker process may have another working directory."""
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    if not isinstance(text, str) or not text or "\0" in text or "://" in text:
        raise OptionInvalid(f"{name}={path!r} must be a folder of this machine")
    return os.path.abspath(os.path.expanduser(text))
