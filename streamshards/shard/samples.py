"""From columns to what a user gets: samples (dicts of one row each) and batches (dicts of columns)."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final

import torch

from streamshards.errors import ShardCorrupt
from streamshards.shard.data import ColumnData, Columns
from streamshards.shard.schema import Field, Path

_DECODERS: Final[dict[str, Callable[[bytes], Any]]] = {
    "str": lambda data: data.decode("utf-8"),
    "bytes": lambda data: data,
    "json": json.loads,
}


class RaggedList(list[Any]):
    """The rows of a ragged column: a list of tensors (None where absent) over one shared ``values`` tensor.

    Pickles as its two to four whole tensors: 256 tensors in a list sent through a DataLoader worker's queue would
    cost 256 file descriptors. A list that was changed after it was made pickles as a plain list.
    """

    def __init__(
        self,
        values: torch.Tensor,
        lengths: torch.Tensor,
        shapes: torch.Tensor | None = None,
        present: torch.Tensor | None = None,
    ) -> None:
        """Cut *values* into rows.

        Args:
            values: ``(total, *d)`` with *lengths* in its first dim, or ``(total,)`` elements if *shapes* are given.
            lengths: int64 (N,).
            shapes: int (N, k), the shape of each row.
            present: bool (N,); rows that are False become None.
        """
        rows: list[Any] = list(torch.split(values, lengths.tolist()))
        if shapes is not None:
            rows = [row.view(shape) for row, shape in zip(rows, shapes.tolist(), strict=True)]
        if present is not None:
            rows = [row if here else None for row, here in zip(rows, present.tolist(), strict=True)]
        super().__init__(rows)
        self.values, self.lengths, self.shapes, self.present = values, lengths, shapes, present
        self._made = tuple(rows)

    def __reduce__(self) -> Any:
        if len(self) != len(self._made) or any(now is not made for now, made in zip(self, self._made, strict=True)):
            return list, (list(self),)
        parts = (self.values, self.lengths, self.shapes, self.present)
        return RaggedList, tuple(part if part is None else _owning(part) for part in parts)


def _owning(tensor: torch.Tensor) -> torch.Tensor:
    """Return *tensor* with a storage of its own: a view sent to another process ships all that it looks at."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def to_samples(columns: Columns) -> list[dict[str, Any]]:
    """Return one nested dict per row.

    Tensors are views into the columns; Python scalars, str, bytes and JSON values are Python values (tuples went in
    as lists); None where a value is absent.

    Raises:
        ShardCorrupt: Stored text is not UTF-8, or stored JSON does not parse.
    """
    tree = _tree(columns, lambda field, data: {"": rows_of(field, data, columns.num_rows)})
    return _zip_rows(tree, columns.num_rows)


def to_owned_samples(columns: Columns) -> list[dict[str, Any]]:
    """Return what :func:`to_samples` does, each tensor in memory of its own: fit to be sent to another process."""
    return [_own(sample) for sample in to_samples(columns)]


def _own(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _own(item) for key, item in value.items()}
    return value


def to_batch(columns: Columns) -> dict[str, Any]:
    """Return one nested dict of columns.

    Fixed-size tensors and Python scalars become one tensor ``(N, …)``; an optional one comes with its mask, bool
    (N,), under ``"name?"``. Ragged fields become a :class:`RaggedList`; str, bytes, json and null a list. Lists hold
    None where a value is absent.

    Raises:
        ShardCorrupt: As ``to_samples``.
    """

    def entries(field: Field, data: ColumnData) -> dict[str, Any]:
        if field.kind != "tensor":
            return {"": rows_of(field, data, columns.num_rows)}
        return {"": data.values, "?": data.present} if field.optional else {"": data.values}

    return _tree(columns, entries)


def rows_of(field: Field, data: ColumnData, num_rows: int) -> list[Any]:
    """Return the rows of one column as a list; a RaggedList if the field is ragged."""
    if field.kind == "null":
        return [None] * num_rows
    if field.kind == "ragged":
        return RaggedList(data.values, data.part("offsets").diff(), data.shapes, data.present)
    if field.kind != "tensor":
        return _decoded(field, data)
    rows: list[Any] = data.values.tolist() if field.python else list(data.values.unbind(0))
    return _masked(rows, data.present)


def _decoded(field: Field, data: ColumnData) -> list[Any]:
    decode = _DECODERS[field.kind]
    stored = data.values.numpy().tobytes()
    offsets = data.part("offsets").tolist()
    here = [True] * (len(offsets) - 1) if data.present is None else data.present.tolist()
    rows: list[Any] = []
    try:
        for number, is_here in enumerate(here):
            # No comprehension: len(rows) tells where it failed.
            rows.append(decode(stored[offsets[number] : offsets[number + 1]]) if is_here else None)
    except (ValueError, RecursionError) as error:
        text = f"field {field.name!r}, row {len(rows):,}: stored {field.kind} does not decode: {error}"
        raise ShardCorrupt(text) from error
    return rows


def _masked(rows: list[Any], present: torch.Tensor | None) -> list[Any]:
    if present is None:
        return rows
    return [row if here else None for row, here in zip(rows, present.tolist(), strict=True)]


def _tree(columns: Columns, entries: Callable[[Field, ColumnData], dict[str, Any]]) -> dict[str, Any]:
    """Return nested dicts with the entries of each field; the keys of *entries* are suffixes to the field's key."""
    root: dict[str, Any] = {}
    for field in columns.schema.fields:
        node = _node(root, field.path[:-1])
        for suffix, value in entries(field, columns.data[field.path]).items():
            node[field.path[-1] + suffix] = value
    for path in columns.schema.empty:
        _node(root, path)
    return root


def _node(root: dict[str, Any], path: Path) -> dict[str, Any]:
    for key in path:
        root = root.setdefault(key, {})
    return root


def _zip_rows(tree: dict[str, Any], num_rows: int) -> list[dict[str, Any]]:
    if not tree:
        return [{} for _ in range(num_rows)]
    columns = [_zip_rows(node, num_rows) if isinstance(node, dict) else node for node in tree.values()]
    keys = list(tree)
    return [dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)]
