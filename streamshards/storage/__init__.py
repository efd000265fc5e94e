"""The edge to disks and object stores: whole objects in and out, one attempt each, errors in our words."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from streamshards.storage.location import parse_url
from streamshards.storage.store import Blob, Store, check_key

__all__ = ["Blob", "Store", "check_key", "open_store"]


def open_store(url: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> Store:
    """Return the store at *url*. Nothing is connected or touched before the first request.

    Args:
        url: A path, ``file://``, ``s3://bucket/prefix``, ``memory://name``, or another fsspec url.
        storage_options: What the filesystem takes (see :class:`FsspecStore`); a local path needs none and ignores it.

    Raises:
        OptionInvalid: Not a url, credentials or a query string in it, or options that are no dict.
    """
    if parse_url(url).is_local:
        from streamshards.storage.local import LocalStore

        return LocalStore(url)
    from streamshards.storage.fsspec_store import FsspecStore

    return FsspecStore(url, storage_options)
