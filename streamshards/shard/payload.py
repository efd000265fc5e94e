"""A shard's payload: columns to bytes with ``torch.save``, and back without ever unpickling."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
import xxhash

from streamshards.errors import SampleInvalid, ShardCorrupt, StreamShardsError
from streamshards.shard.data import ColumnData, Columns, part_dtype, part_shape
from streamshards.shard.directory import Directory, Extent
from streamshards.shard.frames import FrameReader, FrameWriter, is_framed, tail_of
from streamshards.shard.reader import BaseReader, LoadedShard, ShardReader
from streamshards.shard.schema import Field, Part, Path, Schema

__all__ = [
    "EncodedShard",
    "FramedShard",
    "LoadedShard",
    "ShardReader",
    "columns_of_payload",
    "describe_tail",
    "digest_of",
    "encode",
    "is_framed",
    "payload_of",
    "tail_of",
]

VERSION: Final = 1


@dataclass(frozen=True)
class EncodedShard:
    """The bytes of one shard, and what the index says about it."""

    data: bytes
    num_rows: int
    raw_bytes: int
    """Size of the ``.pt`` file inside."""
    digest: str
    """Of *data*; see ``digest_of``."""
    tail: tuple[int, int]
    """Size and checksum of the end of *data* that says where everything is; see ``describe_tail``."""

    def __repr__(self) -> str:
        return f"<EncodedShard: {self.num_rows:,} rows, {self.raw_bytes:,} bytes in {len(self.data):,}>"


def digest_of(data: bytes | memoryview) -> str:
    """Return the digest that the index keeps of a shard: xxh3-128 of the object's bytes, in hex."""
    return xxhash.xxh3_128_hexdigest(data)


def describe_tail(tail: bytes | memoryview) -> tuple[int, int]:
    """Return what the index says about a shard's tail: its size, and the low 48 bits of its xxh3-64."""
    return len(tail), xxhash.xxh3_64_intdigest(tail) & 0xFFFF_FFFF_FFFF


def encode(columns: Columns, *, level: int | None = None) -> EncodedShard:
    """Return *columns* as a shard.

    Args:
        columns: On the CPU. Tensors that share a storage, or are views, are copied first.
        level: Of zstd, 1 (fast) to 22. None: chosen for each column.

    Guarantees: ``zstd -d`` gives a file that ``torch.load(weights_only=True)`` reads into ``payload_of(columns)``.
    """
    columns = _with_own_storages(columns)
    writer = FrameWriter(level=level)
    for field in columns.schema.fields:
        for part in field.parts:
            tensor = columns.data[field.path].part(part)
            if tensor.nbytes:
                writer.watch(tensor.data_ptr(), tensor.nbytes, tensor.nbytes // len(tensor))
    torch.save(payload_of(columns), writer)  # type: ignore[arg-type] # write and flush are all that it calls
    directory = Directory(columns.num_rows, writer.position, columns.schema, _extents(columns, writer)).to_bytes()
    Directory.parse(directory, name="the shard just encoded", raw_bytes=writer.position)
    data = writer.finish(directory)
    return EncodedShard(data, columns.num_rows, writer.position, digest_of(data), describe_tail(tail_of(data)))


def payload_of(columns: Columns) -> dict[str, Any]:
    """Return the dict inside the ``.pt`` file (docs/format.md), over the tensors of *columns*."""
    root: dict[str, Any] = {}
    for path in columns.schema.empty:
        _node(root, path)
    for field in columns.schema.fields:
        node, key, data = _node(root, field.path[:-1]), field.path[-1], columns.data[field.path]
        stored = {part: data.part(part) for part in field.parts if part != "present"}
        node[key] = None if field.kind == "null" else data.values if field.kind == "tensor" else stored
        if "present" in field.parts:
            node[key + "?"] = data.part("present")
    spec = json.dumps(columns.schema.to_json(), separators=(",", ":"))
    return {"streamshards": VERSION, "rows": columns.num_rows, "spec": spec, "columns": root}


def columns_of_payload(payload: Mapping[str, Any]) -> Columns:
    """Return the columns of a payload that someone unpickled: the reverse of ``payload_of``.

    Raises:
        SampleInvalid: From a newer version, or its tensors are not what its spec says.
    """
    try:
        if payload["streamshards"] != VERSION:
            raise SampleInvalid(f"payload version {payload['streamshards']!r:.20}; this release reads {VERSION}")
        schema = Schema.from_json(json.loads(payload["spec"]))
        num_rows = int(payload["rows"])
        columns = Columns(schema, num_rows, {f.path: _column_of(payload["columns"], f) for f in schema.fields})
        _require_consistent(columns)
    except (KeyError, TypeError, ValueError, RecursionError, StreamShardsError) as error:
        raise SampleInvalid(f"a damaged streamshards payload: {error}") from error
    return columns


def _column_of(root: Any, field: Field) -> ColumnData:
    data = ColumnData(torch.empty(0, dtype=torch.uint8))
    node = root
    for key in field.path[:-1]:
        node = node[key]
    for part in field.parts:
        stored = node[field.path[-1] + "?"] if part == "present" else node[field.path[-1]]
        tensor = stored[part] if field.kind != "tensor" and part != "present" else stored
        if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
            raise SampleInvalid(f"field {field.name!r}: {part} are not a tensor")
        setattr(data, part, tensor.contiguous())
    return data


def _require_consistent(columns: Columns) -> None:
    for field in columns.schema.fields:
        for part in field.parts:
            tensor = columns.data[field.path].part(part)
            total = tensor.shape[0] if tensor.ndim else 0
            shape = part_shape(field, part, columns.num_rows, total)
            if tensor.dtype != part_dtype(field, part) or tuple(tensor.shape) != shape:
                raise SampleInvalid(f"field {field.name!r}: {part} are {tensor.dtype} {tuple(tensor.shape)}")
        if "offsets" in field.parts:
            data = columns.data[field.path]
            _require_good_offsets(data.part("offsets"), data.values.shape[0], f"field {field.name!r}")
    for field in columns.schema.fields:
        if field.has_shapes:
            LoadedShard(columns, "payload").columns(Schema((field,)))


def _require_good_offsets(offsets: torch.Tensor, total: int, where: str) -> None:
    """Raise ShardCorrupt unless *offsets* go from 0 to *total* without a step back."""
    if int(offsets[0]) != 0 or int(offsets[-1]) != total or bool((offsets[1:] < offsets[:-1]).any()):
        raise ShardCorrupt(f"{where}: offsets do not rise from 0 to {total:,}")


class Payload(Protocol):
    """The uncompressed ``.pt`` file of a shard, wherever its bytes are."""

    raw_bytes: int
    directory: bytes
    """Where in it each tensor lies: JSON."""

    def read_into(self, lo: int, hi: int, out: memoryview) -> None: ...


class PayloadShard(BaseReader):
    """A shard that streamshards wrote, read out of its payload by the directory. Runs no code from the shard.

    Threads may share it.

    Raises:
        ShardCorrupt: The directory and the payload do not agree.
    """

    def __init__(self, payload: Payload, *, name: str, is_decoded: bool) -> None:
        self._payload = payload
        self._directory = Directory.parse(payload.directory, name=name, raw_bytes=payload.raw_bytes)
        self.name = name
        self.raw_bytes = payload.raw_bytes
        self.num_rows = self._directory.num_rows
        self.schema = self._directory.schema
        self.is_decoded = is_decoded
        self._offsets: dict[Path, torch.Tensor] = {}

    def _own_offsets(self, own: Field) -> torch.Tensor:
        offsets = self._offsets.get(own.path)
        if offsets is None:
            offsets = torch.empty(self.num_rows + 1, dtype=torch.int64)
            self._copy(own, "offsets", 0, self.num_rows + 1, offsets.view(torch.uint8))
            total = self._directory.extents[own.path, "values"].shape[0]
            _require_good_offsets(offsets, total, f"{self.name}: field {own.name!r}")
            self._offsets[own.path] = offsets
        return offsets

    def _copy(self, own: Field, part: Part, lo: int, hi: int, out: torch.Tensor) -> None:
        start, end = self._span(own, part, lo, hi)
        if out.numel() != end - start:
            raise ShardCorrupt(f"{self.name}: field {own.name!r}: {part} {lo:,} to {hi:,} take {end - start:,} bytes")
        if end > start:
            self._payload.read_into(start, end, out.numpy().data)

    def _span(self, own: Field, part: Part, lo: int, hi: int) -> tuple[int, int]:
        """Return where items lo..hi of a stored part lie in the payload."""
        extent = self._directory.extents[own.path, part]
        if hi > extent.shape[0]:
            raise ShardCorrupt(f"{self.name}: field {own.name!r}: items {lo:,} to {hi:,} of {extent.shape[0]:,} {part}")
        return extent.offset + lo * extent.item_bytes, extent.offset + hi * extent.item_bytes


class FramedShard(PayloadShard):
    """A shard as it lies in a store, decoded from its frames."""

    def __init__(self, data: bytes | memoryview, *, name: str, max_raw_bytes: int) -> None:
        """Check the seek table and the directory; decode nothing yet.

        Args:
            data: The whole object; kept until the reader dies.
            name: The shard, for messages.
            max_raw_bytes: Refuse more uncompressed bytes than this (decompression-bomb guard).

        Raises:
            ShardCorrupt: Truncated, over *max_raw_bytes*, or anything that does not agree with the rest. Whether
                ``num_rows`` is what the index promises is the caller's to check, before it allocates by it.
        """
        self.frames = FrameReader(data, name=name, max_raw_bytes=max_raw_bytes)
        super().__init__(self.frames, name=name, is_decoded=False)


def _with_own_storages(columns: Columns) -> Columns:
    """Return *columns* with every tensor contiguous and alone in its storage, so that torch.save writes it once."""
    seen: set[int] = set()

    def own(tensor: torch.Tensor) -> torch.Tensor:
        plain = tensor.contiguous()
        if plain.untyped_storage().nbytes() != plain.nbytes or plain.data_ptr() in seen:
            plain = plain.clone()
        if plain.nbytes:
            seen.add(plain.data_ptr())
        return plain

    data = {}
    for field in columns.schema.fields:
        stored = columns.data[field.path]
        data[field.path] = ColumnData(torch.empty(0, dtype=torch.uint8))
        for part in field.parts:
            setattr(data[field.path], part, own(stored.part(part)))
    return Columns(columns.schema, columns.num_rows, data)


def _extents(columns: Columns, writer: FrameWriter) -> dict[tuple[Path, Part], Extent]:
    extents: dict[tuple[Path, Part], Extent] = {}
    for field in columns.schema.fields:
        for part in field.parts:
            tensor = columns.data[field.path].part(part)
            offset = writer.found(tensor.data_ptr()) if tensor.nbytes else 0
            extents[field.path, part] = Extent(tuple(tensor.shape), offset, tensor.nbytes)
    return extents


def _node(root: dict[str, Any], path: Path) -> dict[str, Any]:
    for key in path:
        root = root.setdefault(key, {})
    return root
