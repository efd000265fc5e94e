"""The node cache of this user, for people: what is in it, and how to be rid of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from streamshards.engine.cache import EntryCheck, check_entries
from streamshards.engine.cachefolder import CacheFolder, Refused
from streamshards.errors import OptionInvalid
from streamshards.options import CacheOptions
from streamshards.runtime import cache_directory

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class CacheInfo:
    """What is in a cache."""

    home: str
    """The folder of this user."""
    num_entries: int
    nbytes: int
    """Of disk."""
    num_raw: int
    """Entries that are decoded."""


def look(directory: str | None) -> CacheInfo:
    """Return what is in the cache at *directory*; None: at the default one.

    Raises:
        OptionInvalid: It cannot be read, or others could write to it.
    """
    folder = _folder(directory)
    entries = _told(folder, lambda: folder.entries() if folder.require_safe() else [])
    num_raw = sum(entry.path.suffix == ".raw" for entry in entries)
    return CacheInfo(str(folder.home), len(entries), sum(entry.nbytes for entry in entries), num_raw)


def clear(directory: str | None) -> CacheInfo:
    """Remove everything in the cache at *directory*, and return what was there. Raises as ``look``."""
    folder = _folder(directory)
    info = look(directory)
    _told(folder, folder.clear)
    return info


def check(directory: str | None) -> list[EntryCheck]:
    """Read every entry of the cache at *directory*, and remove the damaged ones. Raises as ``look``."""
    folder = _folder(directory)
    return _told(folder, lambda: list(check_entries(folder)))


def _folder(directory: str | None) -> CacheFolder:
    chosen = CacheOptions(directory=directory).directory
    return CacheFolder(cache_directory(None if chosen is None else str(chosen)), budget_bytes=1, keep_free_bytes=0)


def _told(folder: CacheFolder, action: Callable[[], T]) -> T:
    try:
        return action()
    except (Refused, OSError) as error:
        raise OptionInvalid(f"{folder.home}: this cache cannot be used: {error}") from error
