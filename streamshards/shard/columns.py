"""Columns: the front door to what a shard holds in memory.

``RowBuffer`` collects samples into :class:`Columns`; ``to_samples`` and ``to_batch`` give them back.
"""

from streamshards.shard.buffer import RowBuffer
from streamshards.shard.data import ColumnData, Columns, blank, part_dtype, part_shape
from streamshards.shard.samples import RaggedList, to_batch, to_owned_samples, to_samples

__all__ = [
    "ColumnData",
    "Columns",
    "RaggedList",
    "RowBuffer",
    "blank",
    "part_dtype",
    "part_shape",
    "to_batch",
    "to_owned_samples",
    "to_samples",
]
