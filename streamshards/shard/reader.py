"""Reading rows of one shard, whatever it was made from, as any field at or above its own.

A dataset's field may be more general than a shard's (see the lattice in ``schema``): the shard stores fixed tensors,
the dataset calls them ragged. ``BaseReader`` does that widening once, over two primitives - whole offsets, and a copy
of some items - so that framed shards and foreign files are read through the same door.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Protocol

import torch

from streamshards.errors import ShardCorrupt
from streamshards.memory import LARGE_BYTES, map_memory
from streamshards.shard.data import ColumnData, Columns, part_dtype, part_shape
from streamshards.shard.schema import Field, Part, Schema, is_at_or_below


class ShardReader(Protocol):
    """One shard, open for reading. Not to be shared by threads without care: see the class at hand."""

    name: str
    num_rows: int
    raw_bytes: int
    schema: Schema
    is_decoded: bool

    def load(self, schema: Schema, lo: int, hi: int) -> None: ...

    def offsets(self, field: Field, lo: int, hi: int) -> torch.Tensor: ...

    def read_into(self, field: Field, part: Part, lo: int, hi: int, out: torch.Tensor) -> None: ...

    def columns(self, schema: Schema | None = None, lo: int = 0, hi: int | None = None) -> Columns: ...


class BaseReader(ABC):
    """A :class:`ShardReader` over ``_own_offsets`` and ``_copy``."""

    name: str
    num_rows: int
    raw_bytes: int
    schema: Schema
    is_decoded: bool = False
    """Whether reading is copying, because someone decoded it in an earlier epoch."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}: {self.num_rows:,} rows, {self.raw_bytes:,} bytes raw>"

    @abstractmethod
    def _own_offsets(self, own: Field) -> torch.Tensor:
        """Return the stored offsets, int64 (num_rows + 1,), validated: from 0, monotone, ending at len(values)."""

    @abstractmethod
    def _copy(self, own: Field, part: Part, lo: int, hi: int, out: torch.Tensor) -> None:
        """Fill flat uint8 *out* with items lo..hi of the first dim of a stored part, exactly."""

    def load(self, schema: Schema, lo: int, hi: int) -> None:  # noqa: B027 - most shards are all here
        """Make sure that rows lo..hi of the fields of *schema* can be read without waiting."""

    def offsets(self, field: Field, lo: int, hi: int) -> torch.Tensor:
        """Return where rows lo..hi begin in the values that ``read_into`` gives, int64 (hi - lo + 1,), from 0.

        Args:
            field: A ragged, str, bytes or json field of the dataset.
            lo: First row.
            hi: One past the last row.

        Raises:
            ShardCorrupt: The shard's field is not at or below *field*, or its offsets do not hold.
        """
        own = self._own(field)
        self._require_rows(lo, hi)
        if own.kind == "null":
            return torch.zeros(hi - lo + 1, dtype=torch.int64)
        if own.kind == "tensor":
            shape = _fixed(own)
            return torch.arange(hi - lo + 1) * (math.prod(shape) if field.has_shapes else shape[0])
        stored = self._own_offsets(own)[lo : hi + 1]
        stored = stored - stored[0]
        if field.has_shapes and not own.has_shapes:
            stored *= math.prod(own.item_shape)
        return stored

    def read_into(self, field: Field, part: Part, lo: int, hi: int, out: torch.Tensor) -> None:
        """Fill *out* with "values", "shapes" or "present" of rows lo..hi.

        Args:
            field: The dataset's field; the shard's own must be at or below it.
            part: For the values of a ragged field: the span ``offsets[lo]:offsets[hi]``. Offsets: see ``offsets``.
            lo: First row.
            hi: One past the last row.
            out: Contiguous, of the field's dtype, of exactly the right number of elements.

        Raises:
            ShardCorrupt: The shard cannot fill it: another field, another size, or bytes that do not decode.
        """
        own = self._own(field)
        self._require_rows(lo, hi)
        if not out.is_contiguous() or out.dtype != part_dtype(field, part) or part not in field.parts:
            raise ValueError(f"{part} of {field.name!r} cannot go into {out.dtype} {tuple(out.shape)}")
        if part == "values":
            self._read_values(own, lo, hi, out)
        elif part == "shapes":
            self._read_shapes(own, lo, hi, out)
        elif part == "present":
            self._read_present(own, lo, hi, out)
        else:
            raise ValueError("offsets are read with offsets()")

    def columns(self, schema: Schema | None = None, lo: int = 0, hi: int | None = None) -> Columns:
        """Return rows lo..hi as columns of *schema*: the shard's own if None; fields may be left out or wider."""
        schema = self.schema if schema is None else schema
        hi = self.num_rows if hi is None else hi
        return Columns(schema, hi - lo, {field.path: self._column(field, lo, hi) for field in schema.fields})

    def _column(self, field: Field, lo: int, hi: int) -> ColumnData:
        self._own(field)
        data = ColumnData(torch.empty(0, dtype=torch.uint8))
        total = 0
        if "offsets" in field.parts:
            data.offsets = self.offsets(field, lo, hi)
            total = int(data.offsets[-1])
        for part in field.parts:
            if part != "offsets":
                tensor = empty(part_shape(field, part, hi - lo, total), part_dtype(field, part))
                self.read_into(field, part, lo, hi, tensor)
                setattr(data, part, tensor)
        return data

    def _read_values(self, own: Field, lo: int, hi: int, out: torch.Tensor) -> None:
        if own.kind == "null":
            out.view(-1).view(torch.uint8).zero_()
            return
        if own.kind != "tensor":
            offsets = self._own_offsets(own)
            lo, hi = int(offsets[lo]), int(offsets[hi])
        self._require_size(own, "values", (hi - lo) * math.prod(own.item_shape), out)
        self._copy_checked(own, "values", lo, hi, out)

    def _read_shapes(self, own: Field, lo: int, hi: int, out: torch.Tensor) -> None:
        if own.kind == "null":
            out.zero_()
            return
        self._require_size(own, "shapes", (hi - lo) * len(own.shape or ()), out)
        rows = out.view(hi - lo, len(own.shape or ()))
        if own.kind == "tensor":
            rows[:] = torch.tensor(_fixed(own), dtype=torch.int32)
            return
        lengths = self._own_offsets(own)[lo : hi + 1].diff()
        if not own.has_shapes:
            rows[:, 0] = lengths
            rows[:, 1:] = torch.tensor(own.item_shape, dtype=torch.int32)
            return
        self._copy_checked(own, "shapes", lo, hi, rows)
        # In float64 a product that int64 would wrap stays large, and every product up to 2**53 is exact.
        if bool((rows < 0).any()) or not torch.equal(rows.double().prod(1), lengths.double()):
            raise ShardCorrupt(f"{self.name}: field {own.name!r}: stored shapes and offsets contradict each other")

    def _read_present(self, own: Field, lo: int, hi: int, out: torch.Tensor) -> None:
        self._require_size(own, "present", hi - lo, out)
        if own.kind != "null" and own.optional:
            self._copy_checked(own, "present", lo, hi, out)
        else:
            out.fill_(own.kind != "null")

    def _copy_checked(self, own: Field, part: Part, lo: int, hi: int, out: torch.Tensor) -> None:
        flat = out.view(-1).view(torch.uint8)
        self._copy(own, part, lo, hi, flat)
        # Any other byte in a bool tensor is undefined behaviour in the operators that come next.
        if out.dtype is torch.bool and flat.numel() and int(flat.max()) > 1:
            raise ShardCorrupt(f"{self.name}: field {own.name!r}: {part} hold bytes other than 0 and 1")

    def _own(self, field: Field) -> Field:
        own = self.schema.field(field.path)
        if own is None:
            raise ShardCorrupt(f"{self.name}: the shard has no field {field.name!r}, which the dataset has")
        if own != field and not is_at_or_below(own, field):
            what = f"{own.describe()} in the shard, {field.describe()} in the dataset"
            raise ShardCorrupt(f"{self.name}: field {field.name!r}: {what}")
        return own

    def _require_rows(self, lo: int, hi: int) -> None:
        if not 0 <= lo <= hi <= self.num_rows:
            raise ShardCorrupt(f"{self.name}: rows {lo:,} to {hi:,} were asked for; the shard has {self.num_rows:,}")

    def _require_size(self, own: Field, part: Part, num_elements: int, out: torch.Tensor) -> None:
        if out.numel() != num_elements:
            text = f"{num_elements:,} elements of {part} are stored, room for {out.numel():,} was made"
            raise ShardCorrupt(f"{self.name}: field {own.name!r}: {text}")


class LoadedShard(BaseReader):
    """A shard that is already in memory as columns: a foreign file, or rows on their way into a shard.

    Any number of threads may read it.
    """

    def __init__(self, columns: Columns, name: str) -> None:
        self.name = name
        self.num_rows = columns.num_rows
        self.raw_bytes = columns.nbytes
        self.schema = columns.schema
        self._data = columns.data

    def _own_offsets(self, own: Field) -> torch.Tensor:
        return self._data[own.path].part("offsets")

    def _copy(self, own: Field, part: Part, lo: int, hi: int, out: torch.Tensor) -> None:
        stored = self._data[own.path].part(part)[lo:hi]
        out.copy_(stored.contiguous().view(-1).view(torch.uint8))


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor that holds anything, in memory that is fast to decode into."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < LARGE_BYTES:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(map_memory(nbytes), dtype=torch.uint8).view(dtype).view(shape)


def concat(field: Field, pieces: list[BaseReader]) -> ColumnData:
    """Return the rows of all pieces, one after the other, as one column of *field*."""
    num_rows = sum(piece.num_rows for piece in pieces)
    data = ColumnData(torch.empty(0, dtype=torch.uint8))
    starts = [0]
    if "offsets" in field.parts:
        offsets = [torch.zeros(1, dtype=torch.int64)]
        for piece in pieces:
            own = piece.offsets(field, 0, piece.num_rows)
            offsets.append(own[1:] + starts[-1])
            starts.append(starts[-1] + int(own[-1]))
        data.offsets = torch.cat(offsets)
    for part in field.parts:
        if part == "offsets":
            continue
        tensor = empty(part_shape(field, part, num_rows, starts[-1]), part_dtype(field, part))
        in_rows = part != "values" or field.kind == "tensor"
        at = 0
        for number, piece in enumerate(pieces):
            size = piece.num_rows if in_rows else starts[number + 1] - starts[number]
            piece.read_into(field, part, 0, piece.num_rows, tensor[at : at + size])
            at += size
        setattr(data, part, tensor)
    return data


def _fixed(field: Field) -> list[int]:
    return [int(size or 0) for size in field.shape or ()]
