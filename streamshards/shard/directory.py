"""The directory: where in the uncompressed ``.pt`` file each tensor's bytes lie. JSON; nothing in it is believed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from streamshards.errors import IndexInvalid, ShardCorrupt
from streamshards.shard.data import part_dtype, part_shape
from streamshards.shard.schema import DTYPE_NAMES, Field, Part, Path, Schema

VERSION: Final = 1
ALIGNMENT: Final = 64
"""torch.save aligns each storage so; a multiple of every dtype's size, and of a cache line."""
MAX_ROWS: Final = 2**31
"""Of one shard. Rows that take no bytes (all None) would otherwise be a bomb."""
_MAX_ITEMS: Final = 2**48  # so that sums and products of items with no bytes stay far from int64's end


@dataclass(frozen=True)
class Extent:
    """Where one tensor lies."""

    shape: tuple[int, ...]
    offset: int
    """Of its first byte in the uncompressed file; 0 if it has no bytes."""
    nbytes: int

    @property
    def item_bytes(self) -> int:
        """Bytes of one item of the first dim."""
        return self.nbytes // self.shape[0] if self.shape[0] else 0


@dataclass(frozen=True)
class Directory:
    """What one shard holds, and where."""

    num_rows: int
    raw_bytes: int
    schema: Schema
    extents: Mapping[tuple[Path, Part], Extent]

    def to_bytes(self) -> bytes:
        """Return the JSON that ``parse`` reads."""
        columns = []
        for field in self.schema.fields:
            for part in field.parts:
                extent = self.extents[field.path, part]
                dtype = DTYPE_NAMES[part_dtype(field, part)]
                where = {"dtype": dtype, "shape": list(extent.shape), "offset": extent.offset}
                columns.append({"path": list(field.path), "part": part, **where})
        top = {"v": VERSION, "rows": self.num_rows, "bytes": self.raw_bytes}
        return json.dumps({**top, "schema": self.schema.to_json(), "columns": columns}, separators=(",", ":")).encode()

    @staticmethod
    def parse(data: bytes, *, name: str, raw_bytes: int) -> Directory:
        """Return the directory, every word of it checked.

        Args:
            data: JSON.
            name: The shard, for messages.
            raw_bytes: Size of the uncompressed file according to the seek table.

        Raises:
            ShardCorrupt: Unreadable, from a newer version, incomplete, contradictory, or out of the file's bounds.
        """
        try:
            return _parse(data, raw_bytes)
        except _Wrong as error:
            raise ShardCorrupt(f"{name}: directory: {error}") from None
        except IndexInvalid as error:
            raise ShardCorrupt(f"{name}: directory: {error}") from error
        except (ValueError, RecursionError) as error:
            raise ShardCorrupt(f"{name}: directory: not JSON: {error}") from error


class _Wrong(Exception):
    """What is wrong with the directory; the shard's name is added further out."""


def _parse(data: bytes, raw_bytes: int) -> Directory:
    value = json.loads(data)
    if not isinstance(value, dict) or value.get("v") != VERSION:
        version = value.get("v") if isinstance(value, dict) else None
        raise _Wrong(f"version {str(version)[:20]}; this release reads version {VERSION}")
    if value.keys() != {"v", "rows", "bytes", "schema", "columns"} or not isinstance(value["columns"], list):
        raise _Wrong(f"keys {sorted(value)!r:.200}")
    num_rows = _count(value["rows"], MAX_ROWS, "rows")
    if value["bytes"] != raw_bytes:
        raise _Wrong(f"{str(value['bytes'])[:30]} bytes, the seek table has {raw_bytes:,}")
    schema = Schema.from_json(value["schema"])
    entries = _entries(value["columns"])
    extents: dict[tuple[Path, Part], Extent] = {}
    for field in schema.fields:
        for part in field.parts:
            entry = entries.pop((field.path, part), None)
            if entry is None:
                raise _Wrong(f"no {part} for field {field.name!r}")
            extents[field.path, part] = _extent(field, part, entry, num_rows, raw_bytes)
    if entries:
        raise _Wrong(f"{len(entries)} entries that the schema does not have")
    _require_disjoint(extents)
    return Directory(num_rows, raw_bytes, schema, extents)


def _count(value: object, maximum: int, what: str) -> int:
    if type(value) is not int or not 0 <= value <= maximum:
        raise _Wrong(f"{what} {str(value)[:30]}")
    return value


def _entries(values: list[Any]) -> dict[tuple[Path, Part], dict[str, Any]]:
    entries: dict[Any, dict[str, Any]] = {}
    for value in values:
        if not isinstance(value, dict) or value.keys() != {"path", "part", "dtype", "shape", "offset"}:
            raise _Wrong(f"column {value!r:.200}")
        path, part = value["path"], value["part"]
        if not isinstance(path, list) or not all(isinstance(key, str) for key in path) or not isinstance(part, str):
            raise _Wrong(f"column {value!r:.200}")
        if (tuple(path), part) in entries:
            raise _Wrong(f"{part} of field {'.'.join(path)!r:.100} stand twice")
        entries[tuple(path), part] = value
    return entries


def _extent(field: Field, part: Part, entry: dict[str, Any], num_rows: int, raw_bytes: int) -> Extent:
    where = f"field {field.name!r}: {part}"
    dtype = part_dtype(field, part)
    shape = entry["shape"]
    if entry["dtype"] != DTYPE_NAMES[dtype] or not isinstance(shape, list) or not shape:
        raise _Wrong(f"{where}: {str(entry['dtype'])[:30]} {shape!r:.100}, not {DTYPE_NAMES[dtype]}")
    sizes = tuple(_count(size, 2**63 - 1, f"{where}: size") for size in shape)
    total = _count(sizes[0], _MAX_ITEMS, f"{where}: size")
    if sizes != part_shape(field, part, num_rows, total):
        raise _Wrong(f"{where}: shape {sizes!r:.100} for {num_rows:,} rows of {field.describe()}")
    nbytes = math.prod(sizes) * dtype.itemsize
    offset = _count(entry["offset"], raw_bytes, f"{where}: offset")
    if offset % ALIGNMENT or offset + nbytes > raw_bytes or (nbytes == 0 and offset):
        raise _Wrong(f"{where}: {nbytes:,} bytes at {offset:,} in a file of {raw_bytes:,}")
    return Extent(sizes, offset, nbytes)


def _require_disjoint(extents: Mapping[tuple[Path, Part], Extent]) -> None:
    end = 0
    for (path, part), extent in sorted(extents.items(), key=lambda item: item[1].offset):
        if not extent.nbytes:
            continue
        if extent.offset < end:
            raise _Wrong(f"field {'.'.join(path)!r}: {part} at {extent.offset:,} overlap what ends at {end:,}")
        end = extent.offset + extent.nbytes
