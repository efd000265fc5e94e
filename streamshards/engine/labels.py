"""Labels: what a batch says about its rows besides their data - where each comes from, and whether it is padding.

Labels are columns like any other. Those of a block (shard, row, epoch, source) are gathered with its data, so that a
refilled place names the row that really stands there; those of a step (position, mask) are added to the batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import torch

from streamshards.errors import OptionInvalid
from streamshards.plan.order import Int64Array
from streamshards.shard.data import ColumnData, Columns
from streamshards.shard.schema import Field, Path, Schema


def _number(*path: str) -> Field:
    return Field(path, "tensor", "int64", (), python="int")


_SHARD: Final = _number("key", "shard")
_ROW: Final = _number("key", "row")
_EPOCH: Final = _number("key", "epoch")
_POSITION: Final = _number("key", "position")
_SOURCE: Final = _number("source")
_MASK: Final = Field(("mask",), "tensor", "bool", (), python="bool")


@dataclass(frozen=True, kw_only=True, slots=True)
class Labels:
    """Which labels batches get."""

    keys: bool = False
    """``"key"``: a dict of the sample's shard and row in the index, and the epoch and position it is delivered at."""
    mask: bool = False
    """``"mask"``: False where the epoch's tail is padding."""
    source: bool = False
    """``"source"``: the number of the mixture's source."""

    def __bool__(self) -> bool:
        return self.keys or self.mask or self.source

    @property
    def block_fields(self) -> tuple[Field, ...]:
        """The labels that belong to a row of a block."""
        return ((_SOURCE,) if self.source else ()) + ((_SHARD, _ROW, _EPOCH) if self.keys else ())

    @property
    def step_fields(self) -> tuple[Field, ...]:
        """The labels that belong to a row of a step."""
        return ((_POSITION,) if self.keys else ()) + ((_MASK,) if self.mask else ())

    @property
    def block_row_bytes(self) -> int:
        """What the labels of a row take in a block."""
        return sum(field.torch_dtype.itemsize for field in self.block_fields)

    @property
    def batch_row_bytes(self) -> int:
        """What the labels of a row take in a batch."""
        return self.block_row_bytes + sum(field.torch_dtype.itemsize for field in self.step_fields)

    def require_free(self, schema: Schema, *, url: str) -> None:
        """Check that the data has no fields of these names.

        Raises:
            OptionInvalid: It has.
        """
        taken = {path[0] for path in (*(field.path for field in schema.fields), *schema.empty)}
        wanted = (("with_keys=True", "key", self.keys), ("with_mask=True", "mask", self.mask))
        for cause, name, is_wanted in (*wanted, ("a mixture", "source", self.source)):
            if is_wanted and name in taken:
                raise OptionInvalid(
                    f"{url}: {cause} adds a field {name!r} to each sample, but the data has one; "
                    "leave that one out with columns=[…]"
                )

    def of_block(self, columns: Columns, spans: Iterable[tuple[int, int, int]], *, epoch: int, source: int) -> Columns:
        """Return *columns* with the labels of a block.

        Args:
            columns: Of the block.
            spans: Shard, first row and stop of each piece, in the order of the columns' rows.
            epoch: Of the dataset.
            source: Its number in the mixture.
        """
        spans = list(spans)
        added: dict[Path, torch.Tensor] = {}
        for field in self.block_fields:
            if field is _SHARD:
                parts = [torch.full((stop - first,), shard) for shard, first, stop in spans]
                added[field.path] = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
            elif field is _ROW:
                parts = [torch.arange(first, stop) for _, first, stop in spans]
                added[field.path] = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
            else:
                added[field.path] = torch.full((columns.num_rows,), epoch if field is _EPOCH else source)
        return _with(columns, self.block_fields, added)

    def of_step(self, columns: Columns, slots: Int64Array, num_samples: int) -> Columns:
        """Return *columns* with the labels of a step.

        Args:
            columns: The batch.
            slots: The position of each of its rows, int64 ``(rows,)``; padding lies at or beyond *num_samples*.
            num_samples: Of the epoch.
        """
        if not self.step_fields:
            return columns
        positions = torch.from_numpy(slots)
        added = {_POSITION.path: positions % num_samples, _MASK.path: positions < num_samples}
        return _with(columns, self.step_fields, added)


NO_LABELS: Final = Labels()


def _with(columns: Columns, fields: tuple[Field, ...], added: dict[Path, torch.Tensor]) -> Columns:
    schema = Schema((*columns.schema.fields, *fields), columns.schema.empty)
    data = {**columns.data, **{field.path: ColumnData(added[field.path]) for field in fields}}
    return Columns(schema, columns.num_rows, data)
