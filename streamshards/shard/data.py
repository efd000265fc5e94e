"""Columns in memory: what one shard (or part of one) holds, field by field."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from streamshards.shard.schema import Field, Part, Path, Schema


@dataclass
class ColumnData:
    """The tensors of one column of N rows, on the CPU.

    ======================  ================================  ===================================
    field                   ``values``                        ``offsets``, int64 (N+1,), from 0
    ======================  ================================  ===================================
    tensor                  ``(N, *shape)``                   None
    ragged ``(None, *d)``   ``(total, *d)``, rows in a line   in items of the first dim
    ragged, all dims None   ``(total,)`` elements             in elements
    str, bytes, json        uint8 ``(total,)``                in bytes
    null                    empty                             None
    ======================  ================================  ===================================
    """

    values: torch.Tensor
    offsets: torch.Tensor | None = None
    shapes: torch.Tensor | None = None
    """int32 (N, k), where more than the first dim varies."""
    present: torch.Tensor | None = None
    """bool (N,), for optional fields; an absent row's values are zeros, or empty."""

    def part(self, part: Part) -> torch.Tensor:
        """Return one of the tensors.

        Raises:
            ValueError: This column does not have it.
        """
        tensor: torch.Tensor | None = getattr(self, part)
        if tensor is None:
            raise ValueError(f"the column has no {part}")
        return tensor

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the column."""
        return sum(part.nbytes for part in (self.values, self.offsets, self.shapes, self.present) if part is not None)


@dataclass
class Columns:
    """Some rows, column by column."""

    schema: Schema
    num_rows: int
    data: dict[Path, ColumnData]
    """One entry per field of the schema."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(column.nbytes for column in self.data.values())


def part_dtype(field: Field, part: Part) -> torch.dtype:
    """Return the dtype in which that part of a column of *field* is stored."""
    if part == "values":
        return field.torch_dtype
    return {"offsets": torch.int64, "shapes": torch.int32, "present": torch.bool}[part]


def part_shape(field: Field, part: Part, num_rows: int, total: int) -> tuple[int, ...]:
    """Return the shape in which that part of a column of *field* is stored; *total*: items in all its rows."""
    if part == "values":
        return (num_rows if field.kind == "tensor" else total, *field.item_shape)
    if part == "offsets":
        return (num_rows + 1,)
    if part == "shapes":
        return (num_rows, len(field.shape or ()))
    return (num_rows,)


def blank(field: Field) -> ColumnData:
    """Return the column of no rows."""
    data = ColumnData(torch.empty(0, dtype=torch.uint8))
    for part in field.parts:
        setattr(data, part, torch.zeros(part_shape(field, part, 0, 0), dtype=part_dtype(field, part)))
    return data
