"""Collecting samples until they make a shard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from streamshards.errors import SampleInvalid
from streamshards.shard.data import ColumnData, Columns, blank
from streamshards.shard.reader import BaseReader, LoadedShard, concat
from streamshards.shard.schema import DTYPE_NAMES, Field, Path, Schema, join, require_same_paths
from streamshards.shard.values import (
    Stored,
    carried,
    infer,
    leaves_of,
    require_good_keys,
    require_int64,
    size_of,
    stack,
    tensor_of,
)

_NUMPY_DTYPES = {
    **{name: np.dtype(name) for name in ("bool", "float16", "float32", "float64", "complex64", "complex128")},
    **{f"{sign}int{size}": np.dtype(f"{sign}int{size}") for sign in ("", "u") for size in (8, 16, 32, 64)},
}
_PYTHON_TYPES: dict[str, type] = {"int": int, "float": float, "bool": bool, "complex": complex}


@dataclass
class _Piece:
    """Rows of one column that are ready: an ``extend``, or the ``append``s between two of them."""

    field: Field
    num_rows: int
    data: ColumnData

    def reader(self) -> BaseReader:
        columns = Columns(Schema((self.field,)), self.num_rows, {self.field.path: self.data})
        return LoadedShard(columns, "rows in memory")


class RowBuffer:
    """Collects samples and gives them out as columns.

    The first sample fixes each field's type, its sizes may vary (see ``schema``). Everything is copied: the caller
    may reuse its buffers. A sample or batch that raises leaves no trace. Not for several threads at once.
    """

    def __init__(self, schema: Schema | None = None) -> None:
        """Start empty; a given *schema* binds the types of the fields from the first sample on."""
        self._columns: dict[Path, _Column] = {}
        self._empty: tuple[Path, ...] = ()
        self._num_rows = 0
        self._num_before = 0
        if schema is not None:
            self._start(schema)

    def __repr__(self) -> str:
        return f"<RowBuffer: {self._num_rows:,} rows of {len(self._columns)} fields, about {self.nbytes:,} bytes>"

    @property
    def num_rows(self) -> int:
        """Rows collected since the last ``finish``."""
        return self._num_rows

    @property
    def nbytes(self) -> int:
        """About how many bytes the collected rows take uncompressed."""
        return sum(column.nbytes for column in self._columns.values())

    @property
    def schema(self) -> Schema:
        """What all samples so far have in common, those of earlier shards included."""
        return Schema(tuple(column.field for column in self._columns.values()), self._empty)

    def append(self, sample: Mapping[str, Any]) -> None:
        """Add one sample.

        Raises:
            SampleInvalid: It does not fit; the text says which sample, which field, what stands and what came.
        """
        try:
            leaves, empty = leaves_of(sample)
            columns = self._columns_for(leaves, empty)
            admitted = [(column, column.admit(leaves[path])) for path, column in columns.items()]
        except SampleInvalid as error:
            raise SampleInvalid(f"sample {self._num_before + self._num_rows:,}: {error}") from None
        for column, (field, stored) in admitted:
            column.add_row(field, stored)
        self._commit(columns, empty, 1)

    def extend(self, batch: Mapping[str, Any]) -> None:
        """Add N samples given as columns.

        Args:
            batch: Per field a tensor or array ``(N, …)``, or a list of N values; nested dicts as in a sample. What
                ``to_batch`` returns fits, ``"name?"`` masks included.

        Raises:
            SampleInvalid: As ``append``, or the columns differ in length.
        """
        try:
            leaves, empty = leaves_of(batch)
            masks = {path: leaves.pop(path) for path in list(leaves) if _is_mask(path, leaves)}
            columns = self._columns_for(leaves, empty)
            pieces = [column.admit_many(leaves[path], masks.get(_mask_path(path))) for path, column in columns.items()]
            num_rows = _common_length(pieces)
        except SampleInvalid as error:
            raise SampleInvalid(f"batch after sample {self._num_before + self._num_rows:,}: {error}") from None
        if num_rows:
            for column, (field, piece) in zip(columns.values(), pieces, strict=True):
                column.add_piece(field, piece)
            self._commit(columns, empty, num_rows)

    def finish(self) -> Columns:
        """Return the collected rows in the lowest schema that holds them, and start over; types stay bound."""
        data = {path: column.finish() for path, column in self._columns.items()}
        schema = Schema(tuple(field for field, _ in data.values()), self._empty)
        columns = Columns(schema, self._num_rows, {path: column for path, (_, column) in data.items()})
        self._num_before += self._num_rows
        self._num_rows = 0
        return columns

    def _start(self, schema: Schema) -> None:
        self._columns = {field.path: _Column(field) for field in schema.fields}
        self._empty = schema.empty

    def _columns_for(self, leaves: dict[Path, Any], empty: list[Path]) -> dict[Path, _Column]:
        """Return the columns that these leaves go to: those that stand, or new ones for the first sample."""
        if self._columns and leaves.keys() == self._columns.keys() and tuple(empty) == self._empty:
            return self._columns
        require_good_keys([*leaves, *empty])
        if not self._columns:
            if not leaves:
                raise SampleInvalid("a sample without any value cannot be stored")
            return {path: _Column(Field(path, "null", optional=True), is_new=True) for path in leaves}
        require_same_paths([*self._columns, *self._empty], [*leaves, *empty])
        if set(empty) != set(self._empty):
            raise SampleInvalid("came with an empty dict where a value stands, or the reverse")
        return self._columns

    def _commit(self, columns: dict[Path, _Column], empty: list[Path], num_rows: int) -> None:
        if not self._columns:
            self._columns, self._empty = columns, tuple(empty)
        self._num_rows += num_rows


class _Column:
    """One field's rows: pieces that are ready, then single rows."""

    def __init__(self, field: Field, *, is_new: bool = False) -> None:
        self.field = Field(field.path, "null", optional=True)
        self.nbytes = 0
        self._shape: tuple[int | None, ...] | None = None
        self._torch_dtype: torch.dtype | None = None
        self._numpy_dtype: np.dtype[Any] | None = None
        self._become(field)
        self._is_new = is_new
        self._pieces: list[_Piece] = []
        self._rows: list[Stored] = []

    def admit(self, value: object) -> tuple[Field, Stored]:
        """Return the field that holds this value too, and the value as it is stored. Changes nothing."""
        stored = self._quick(value)
        if stored is not None:
            return self.field, stored
        field, stored = infer(self.field.path, value)
        return self._joined(field), stored

    def admit_many(self, values: object, mask: object) -> tuple[Field, _Piece]:
        """Return the field that holds these rows too, and the rows. Changes nothing."""
        if isinstance(values, (torch.Tensor, np.ndarray)):
            piece = self._piece_of_tensor(values, mask)
        elif isinstance(values, (list, tuple)):
            piece = self._piece_of_list(list(values), mask)
        else:
            what = f"{type(values).__name__} is not a column: a tensor, an array or a list was expected"
            raise SampleInvalid(f"field {self.field.name!r}: {what}")
        return self._joined(piece.field), piece

    def add_row(self, field: Field, stored: Stored) -> None:
        self._become(field)
        self._rows.append(stored)
        self.nbytes += size_of(stored)

    def add_piece(self, field: Field, piece: _Piece) -> None:
        self._become(field)
        self._flush()
        self._pieces.append(piece)
        self.nbytes += piece.data.nbytes

    def finish(self) -> tuple[Field, ColumnData]:
        self._flush()
        pieces, self._pieces, self.nbytes = self._pieces, [], 0
        if not pieces:
            return self.field, blank(self.field)
        if len(pieces) == 1:
            return pieces[0].field, pieces[0].data
        field = pieces[0].field
        for piece in pieces[1:]:
            field = join(field, piece.field)
        return field, concat(field, [piece.reader() for piece in pieces])

    def _quick(self, value: object) -> Stored:
        """Return the stored value if it is plainly of this field's type and sizes, else None."""
        field, kind = self.field, type(value)
        if kind is torch.Tensor or kind is np.ndarray:
            return self._quick_tensor(value)  # type: ignore[arg-type] # its type was just compared
        if field.python is not None:
            if kind is not _PYTHON_TYPES[field.python]:
                return None
            return _named_int64(field, value) if kind is int else value  # type: ignore[arg-type,return-value] # as above
        if kind is str and field.kind == "str" and value.isascii():  # type: ignore[attr-defined] # as above
            return value.encode("ascii")  # type: ignore[attr-defined,no-any-return] # as above
        return value if kind is bytes and field.kind == "bytes" else None  # type: ignore[return-value] # as above

    def _quick_tensor(self, value: torch.Tensor | np.ndarray[Any, Any]) -> torch.Tensor | None:
        """Copy a plain tensor or array of just this column's dtype and shape; a third of the full way's time."""
        if isinstance(value, np.ndarray):
            if value.dtype != self._numpy_dtype or value.shape != self._shape:
                return None
            return torch.from_numpy(value.copy())
        if value.dtype is not self._torch_dtype or value.is_nested or value.shape != self._shape:
            return None
        if value.requires_grad or value.layout is not torch.strided or value.is_conj() or value.is_neg():
            return None
        return value.clone(memory_format=torch.contiguous_format) if value.is_cpu else None

    def _become(self, field: Field) -> None:
        """Take *field* as what stands from now on."""
        self._is_new = False
        if field is self.field:
            return
        self.field = field
        is_plain = field.kind == "tensor" and field.python is None
        self._shape = field.shape if is_plain else None
        self._torch_dtype = field.torch_dtype if is_plain else None
        self._numpy_dtype = _NUMPY_DTYPES.get(field.dtype or "") if is_plain else None

    def _joined(self, field: Field) -> Field:
        if self._is_new:
            return field
        return join(self.field, field)

    def _piece_of_tensor(self, values: torch.Tensor | np.ndarray[Any, Any], mask: object) -> _Piece:
        name = self.field.name
        if values.ndim == 0:
            raise SampleInvalid(f"field {name!r}: a 0-d tensor is not a column; its first dim counts the samples")
        tensor = _named(self.field, values)
        field = Field(self.field.path, "tensor", DTYPE_NAMES[tensor.dtype], tuple(tensor.shape[1:]))
        if self.field.python is not None and field.shape == () and field.dtype == self.field.dtype:
            field = replace(field, python=self.field.python)
        present = _mask_of(name, mask, len(tensor))
        if present is None or bool(present.all()):
            return _Piece(field, len(tensor), ColumnData(tensor))
        if not bool(present.any()):
            return _Piece(Field(field.path, "null", optional=True), len(tensor), ColumnData(torch.empty(0).byte()))
        carried(tensor)[~present] = 0
        return _Piece(replace(field, optional=True), len(tensor), ColumnData(tensor, present=present))

    def _piece_of_list(self, values: list[Any], mask: object) -> _Piece:
        present = _mask_of(self.field.name, mask, len(values))
        if present is not None:
            values = [value if here else None for value, here in zip(values, present.tolist(), strict=True)]
        scratch = _Column(self.field, is_new=self._is_new)
        for number, value in enumerate(values):
            try:
                scratch.add_row(*scratch.admit(value))
            except SampleInvalid as error:  # noqa: PERF203 the message needs the item's number
                raise SampleInvalid(f"item {number:,}: {error}") from None
        field, data = scratch.finish()
        return _Piece(field, len(values), data)

    def _flush(self) -> None:
        if self._rows:
            rows, self._rows = self._rows, []
            self._pieces.append(_piece_of_rows(self.field, rows))


def _piece_of_rows(field: Field, rows: list[Stored]) -> _Piece:
    """Return stored rows as a column of the lowest field that holds just them."""
    mask = [row is not None for row in rows]
    if not any(mask):
        return _Piece(Field(field.path, "null", optional=True), len(rows), ColumnData(torch.empty(0).byte()))
    field = replace(field, optional=not all(mask))
    if field.kind in ("tensor", "ragged"):
        field, data = _tensor_column(field, rows)
    else:
        stored = [row if isinstance(row, bytes) else b"" for row in rows]
        joined = bytearray().join(stored)
        values = torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.empty(0, dtype=torch.uint8)
        data = ColumnData(values, _offsets([len(row) for row in stored]))
    if field.optional:
        data.present = torch.tensor(mask)
    return _Piece(field, len(rows), data)


def _tensor_column(field: Field, rows: list[Stored]) -> tuple[Field, ColumnData]:
    shapes = {tuple(row.shape) for row in rows if isinstance(row, torch.Tensor)} or {()}
    first, *others = shapes
    own = replace(field, kind="tensor", shape=first)
    for shape in others:
        own = join(own, replace(own, kind="tensor", shape=shape))
    if own.kind == "tensor":
        return own, ColumnData(stack(own, rows))
    sizes = own.item_shape
    none = torch.zeros((0, *sizes), dtype=torch.uint8).view(-1).view(own.torch_dtype).view(0, *sizes)
    tensors = [row if isinstance(row, torch.Tensor) else none for row in rows]
    if not own.has_shapes:
        values = torch.cat([carried(row) for row in tensors]).view(own.torch_dtype)
        return own, ColumnData(values, _offsets([len(row) for row in tensors]))
    values = torch.cat([carried(row.reshape(-1)) for row in tensors]).view(own.torch_dtype)
    zero = (0,) * len(own.shape or ())
    stored = [tuple(row.shape) if isinstance(row, torch.Tensor) else zero for row in rows]
    data = ColumnData(values, _offsets([row.numel() for row in tensors]), torch.tensor(stored, dtype=torch.int32))
    return own, data


def _offsets(lengths: list[int]) -> torch.Tensor:
    offsets = torch.zeros(len(lengths) + 1, dtype=torch.int64)
    torch.cumsum(torch.tensor(lengths, dtype=torch.int64), 0, out=offsets[1:])
    return offsets


def _named(field: Field, value: torch.Tensor | np.ndarray[Any, Any]) -> torch.Tensor:
    try:
        return tensor_of(value)
    except SampleInvalid as error:
        raise SampleInvalid(f"field {field.name!r}: {error}") from None


def _named_int64(field: Field, value: int) -> int:
    try:
        return require_int64(value)
    except SampleInvalid as error:
        raise SampleInvalid(f"field {field.name!r}: {error}") from None


def _mask_path(path: Path) -> Path:
    return (*path[:-1], path[-1] + "?") if isinstance(path[-1], str) else path


def _is_mask(path: Path, leaves: Mapping[Path, Any]) -> bool:
    return isinstance(path[-1], str) and path[-1].endswith("?") and (*path[:-1], path[-1][:-1]) in leaves


def _mask_of(name: str, mask: object, num_rows: int) -> torch.Tensor | None:
    if mask is None:
        return None
    tensor = torch.as_tensor(mask).detach().cpu().clone()
    if tensor.dtype != torch.bool or tuple(tensor.shape) != (num_rows,):
        raise SampleInvalid(
            f"field {name + '?'!r}: a mask is bool ({num_rows},), not {tensor.dtype} {tuple(tensor.shape)}"
        )
    return tensor


def _common_length(pieces: list[tuple[Field, _Piece]]) -> int:
    first = pieces[0][1]
    for _, piece in pieces:
        if piece.num_rows != first.num_rows:
            text = f"{first.num_rows:,} rows in {first.field.name!r}, {piece.num_rows:,} in {piece.field.name!r}"
            raise SampleInvalid(f"columns differ in length: {text}")
    return first.num_rows
