"""What was delivered, as one number that does not depend on the order: so that nobody is fast by losing samples.

Every sample becomes 64 bits of all its fields together (an image that got its neighbour's label is another sample); the
sum of them, modulo 2^64, is that of an epoch. Not cryptographic: it has to notice accidents.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Words = np.ndarray[Any, np.dtype[np.uint64]]
_ODD = 0x9E3779B97F4A7C15
"""2^64 divided by the golden ratio: as a factor it spreads small numbers over all bits."""
_PAD_FIELD = "lengths"
"""How long the rows of the padded field ``tokens`` are; see peers/__init__.py."""


@dataclass
class Contents:
    """How many samples, and their sum."""

    samples: int = 0
    total: int = 0

    def add(self, batch: Mapping[str, Any]) -> None:
        """Add a batch: a dict of tensors and lists, as peers deliver it."""
        hashes = batch_hashes(batch)
        self.samples += len(hashes)
        self.total = (self.total + int(hashes.sum(dtype=np.uint64))) % 2**64

    def missing(self, expected: Contents) -> str:
        """Return what is wrong with this epoch, or an empty string."""
        if self.samples != expected.samples:
            return f"{self.samples:,} of {expected.samples:,} samples"
        return "" if self.total == expected.total else "other contents than were written"


def batch_hashes(batch: Mapping[str, Any]) -> Words:
    """Return 64 bits for each sample of a batch."""
    lengths = batch.get(_PAD_FIELD)
    fields = sorted(name for name in batch if name != _PAD_FIELD)
    hashes = _field(batch[fields[0]], lengths if fields[0] == "tokens" else None)
    for name in fields[1:]:
        hashes = _mixed(hashes) + _field(batch[name], lengths if name == "tokens" else None)
    return _mixed(hashes)


def columns_contents(chunks: Iterable[Mapping[str, Any]], *, rows: int = 256) -> Contents:
    """Return what an epoch over these columns must deliver."""
    found = Contents()
    for columns in chunks:
        count = len(next(iter(columns.values())))
        for start in range(0, count, rows):
            found.add({name: values[start : start + rows] for name, values in columns.items()})
    return found


def _field(values: Any, lengths: Any) -> Words:
    if lengths is not None:
        values = [row[:length] for row, length in zip(values, lengths.tolist(), strict=True)]
    if isinstance(values, Sequence):
        return np.array([zlib.crc32(_bytes(value)) for value in values], np.uint64)
    array = np.ascontiguousarray(values)
    raw = array.reshape(len(array), -1).view(np.uint8)
    words = raw.view(np.uint32) if raw.shape[1] % 4 == 0 else raw
    factors = np.arange(1, 2 * words.shape[1], 2, dtype=np.uint64) * np.uint64(_ODD)  # odd: no bit is lost
    return np.asarray((words * factors).sum(axis=1, dtype=np.uint64))


def _bytes(value: Any) -> bytes:
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, (list, dict)):
        return json.dumps(value, sort_keys=True).encode()
    return np.ascontiguousarray(value).tobytes()


def _mixed(hashes: Words) -> Words:
    """Return other bits, one for one; what is summed must not be linear in the fields."""
    hashes = (hashes ^ (hashes >> np.uint64(32))) * np.uint64(_ODD)
    return hashes ^ (hashes >> np.uint64(29))
