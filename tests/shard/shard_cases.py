"""Samples and helpers that the shard's tests share."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from streamshards.shard.columns import Columns, RowBuffer
from streamshards.shard.schema import DTYPES


def same(left: Any, right: Any) -> bool:
    """Whether two sample values are the same in type, shape and every bit (NaN equals NaN)."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, torch.Tensor):
        if (left.dtype, left.shape) != (right.dtype, right.shape):
            return False
        return torch.equal(bits(left), bits(right))
    if isinstance(left, float) and math.isnan(left):
        return math.isnan(right)
    return bool(left == right)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Any bit pattern, NaNs included; only 0 and 1 for bool."""
    count = math.prod(shape) * dtype.itemsize
    high = 2 if dtype is torch.bool else 256
    data = np.random.default_rng(seed).integers(0, high, max(count, 16), dtype=np.uint8)
    return torch.from_numpy(data)[:count].clone().view(dtype).view(shape)


def columns_of_samples(samples: list[dict[str, Any]]) -> Columns:
    buffer = RowBuffer()
    for sample in samples:
        buffer.append(sample)
    return buffer.finish()


def mixed_samples() -> list[dict[str, Any]]:
    """Every kind, optional and nested ones included."""
    return [
        {
            "image": random_tensor((2, 3), torch.uint8, row),
            "tokens": random_tensor((row,), torch.int32, row),
            "boxes": random_tensor((row % 3, row + 1), torch.float32, row),
            "label": row,
            "score": None if row == 1 else row / 2,
            "ok": row % 2 == 0,
            "phase": complex(row, 1),
            "caption": None if row == 2 else f"löwe {row}",
            "blob": bytes([row, 0, 255]) * row,
            "tags": ["a", {"n": [row, None, 1.5]}],
            "meta": {"id": f"P{row}", "deep": {"zero_d": torch.tensor(row / 3), "nothing": {}}, "never": None},
        }
        for row in range(4)
    ]


DTYPE_PARAMS = [pytest.param(dtype, id=name) for name, dtype in DTYPES.items()]
