"""streamshards with its node cache: the first epoch decodes, later ones copy."""

from __future__ import annotations

from collections.abc import Iterable

import streamshards as ss
from peers import Batch, Reading
from peers.ours import make, write

__all__ = ["loader", "write"]


def loader(reading: Reading) -> Iterable[Batch]:
    """Return the loader."""
    return make(reading, cache=ss.CacheOptions(directory=reading.scratch / "cache"))
