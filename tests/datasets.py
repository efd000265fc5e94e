"""A dataset for tests: samples of every field kind, each told apart by its id."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch

from streamshards import ShardWriter


def sample(number: int) -> dict[str, Any]:
    """Return sample *number*: the same for ever, different from all others in every field that can be."""
    return {
        "id": number,
        "x": torch.tensor([number, -number, 0.5], dtype=torch.float32),
        "half": torch.tensor([number % 97], dtype=torch.bfloat16),
        "tokens": torch.arange(number % 11, dtype=torch.int32) + number,
        "text": f"sample {number} - ümläut",
        "blob": bytes([number % 256]) * (number % 5),
        "meta": {"tags": [number, {"odd": bool(number % 2)}, None], "score": number / 8, "flag": number % 3 == 0},
        "maybe": None if number % 4 else torch.tensor(number),
    }


def assert_same(actual: Any, expected: Any) -> None:
    """Check that two samples are equal, bit for bit and type for type."""
    assert type(actual) is type(expected), (actual, expected)
    if isinstance(expected, dict):
        assert list(actual) == list(expected)
        for key, value in expected.items():
            assert_same(actual[key], value)
    elif isinstance(expected, torch.Tensor):
        assert actual.dtype == expected.dtype
        assert actual.shape == expected.shape
        assert torch.equal(actual, expected)
    else:
        assert actual == expected


def write(url: str, numbers: Iterable[int], *, shard_bytes: int = 16_000, **options: Any) -> None:
    """Write those samples to *url*, in small shards."""
    with ShardWriter(url, shard_bytes=shard_bytes, **options) as out:
        for number in numbers:
            out.write(sample(number))


def ids(batches: Iterable[dict[str, Any]]) -> list[list[int]]:
    """Return the ids in each of some batches."""
    return [batch["id"].tolist() for batch in batches]


def flat(lists: Iterable[Iterable[int]]) -> list[int]:
    """Return the items of all lists, one after the other."""
    return list(itertools.chain.from_iterable(lists))
