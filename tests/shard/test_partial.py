"""Parts of a shard: the same rows as from the whole, out of the frames that they need and no others."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamshards.errors import ShardCorrupt
from streamshards.options import KiB, MiB
from streamshards.shard import frames as frames_module
from streamshards.shard.columns import RowBuffer, to_samples
from streamshards.shard.data import Columns
from streamshards.shard.frames import FrameReader, deflate
from streamshards.shard.partial import GAP_BYTES, PartialShard
from streamshards.shard.payload import EncodedShard, FramedShard, describe_tail, encode, tail_of
from streamshards.shard.schema import Schema

from .shard_cases import columns_of_samples, mixed_samples, random_tensor, same

MAX = 256 * MiB


@dataclass
class Remote:
    """A shard that lies elsewhere, and what was asked of it."""

    shard: EncodedShard
    asked: list[tuple[int, int]] = field(default_factory=list)
    causes: list[ShardCorrupt] = field(default_factory=list)
    damage: Callable[[bytearray], bytes | bytearray] = bytes

    def get(self, start: int, stop: int) -> bytes | bytearray:
        self.asked.append((start, stop))
        return self.damage(bytearray(self.shard.data[start:stop]))

    def whole(self, cause: ShardCorrupt) -> FrameReader:
        self.causes.append(cause)
        return FrameReader(self.shard.data, name="s", max_raw_bytes=MAX)

    def open(self) -> PartialShard:
        size, check = self.shard.tail
        tail = self.shard.data[-size:]
        assert describe_tail(tail) == (size, check)
        frames = FrameReader(tail, name="s", max_raw_bytes=MAX, stored_bytes=len(self.shard.data))
        return PartialShard(frames, get=self.get, on_damage=self.whole)

    @property
    def num_bytes(self) -> int:
        return sum(stop - start for start, stop in self.asked)


def part_of(schema: Schema, *names: str) -> Schema:
    """The fields whose first key is one of *names*."""
    return Schema(tuple(f for f in schema.fields if f.path[0] in names))


def rows_of(columns: Columns) -> list[dict[str, Any]]:
    return list(to_samples(columns))


RAW_BYTES = {"image": 9 * MiB, "tokens": 11 * MiB, "vector": 5 * MiB, "label": 0}
"""About, of the columns below. None of them can be compressed by much."""


def large() -> Columns:
    """Three columns of several frames each, one of them ragged, and a small one."""
    draw = np.random.default_rng(5)
    count = 3_000
    lengths = draw.integers(0, 2_000, count)
    buffer = RowBuffer()
    buffer.extend(
        {
            "image": random_tensor((count, 3, 32, 32), torch.uint8, 1),
            "tokens": [torch.from_numpy(draw.integers(0, 1 << 30, n, dtype=np.int32)) for n in lengths],
            "vector": random_tensor((count, 1_024), torch.bfloat16, 2),
            "label": torch.arange(count),
        }
    )
    return buffer.finish()


@pytest.fixture(scope="module")
def stored() -> EncodedShard:
    return encode(large())


@pytest.mark.parametrize("names", [("image",), ("label",), ("tokens", "label"), ("vector", "tokens")])
def test_some_fields_cost_their_own_bytes(stored: EncodedShard, names: tuple[str, ...]) -> None:
    """Each byte is fetched once, in few requests, and the bytes of other large fields are not."""
    remote = Remote(stored)
    part = remote.open()
    schema = part_of(part.schema, *names)
    expected = part.cost(schema, 0, part.num_rows)
    part.load(schema, 0, part.num_rows)
    others = sum(RAW_BYTES[name] for name in RAW_BYTES.keys() - {*names})
    assert remote.num_bytes == expected < len(stored.data) - 0.8 * others
    assert len(remote.asked) <= len(names)
    asked = sorted(remote.asked)
    assert all(before[1] <= after[0] for before, after in pairwise(asked))
    whole = FramedShard(stored.data, name="s", max_raw_bytes=MAX)
    assert same(rows_of(part.columns(schema)), rows_of(whole.columns(schema)))
    part.load(schema, 0, part.num_rows)
    assert remote.num_bytes == expected, "what is here is not fetched again"


def test_one_row_costs_a_frame_of_each_field(stored: EncodedShard) -> None:
    """Not the shard: what is fetched for a row anywhere is a frame of each column, and the offsets."""
    for row in (0, 1_499, 2_999):
        remote = Remote(stored)
        part = remote.open()
        part.load(part.schema, row, row + 1)
        whole = FramedShard(stored.data, name="s", max_raw_bytes=MAX)
        assert same(rows_of(part.columns(lo=row, hi=row + 1)), rows_of(whole.columns(lo=row, hi=row + 1)))
        assert remote.num_bytes < len(stored.data) / 2
        assert len(remote.asked) <= 5


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_rows_of_any_fields_are_those_of_the_whole(data: st.DataObject) -> None:
    """Every kind of field, blocks of any size, one range after another out of one reader."""
    size = data.draw(st.sampled_from([64, 200, 1_000]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frames_module, "BLOCK_BYTES", size)
        patch.setattr("streamshards.shard.partial.GAP_BYTES", data.draw(st.sampled_from([0, 50, 10_000])))
        samples = [sample for _ in range(data.draw(st.integers(1, 12))) for sample in mixed_samples()]
        shard = encode(columns_of_samples(samples))
    whole = FramedShard(shard.data, name="s", max_raw_bytes=MAX)
    remote = Remote(shard)
    part = remote.open()
    names = sorted({f.path[0] for f in part.schema.fields})
    for _ in range(3):
        schema = part_of(part.schema, *data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True)))
        lo = data.draw(st.integers(0, len(samples) - 1))
        hi = data.draw(st.integers(lo, len(samples)))
        part.load(schema, lo, hi)
        assert same(rows_of(part.columns(schema, lo, hi)), rows_of(whole.columns(schema, lo, hi)))
    assert remote.causes == []


def test_ranges_close_together_are_one_request() -> None:
    """A request costs more than the bytes between; those far apart are two."""
    small = encode(columns_of_samples(mixed_samples() * 100))
    remote = Remote(small)
    part = remote.open()
    part.load(part_of(part.schema, "image", "label", "caption"), 0, part.num_rows)
    assert len(remote.asked) == 1
    assert small.tail[0] < GAP_BYTES


@pytest.mark.parametrize("where", ["values", "header", "short"])
def test_damage_is_noticed_and_the_whole_is_asked_for(stored: EncodedShard, where: str) -> None:
    """No wrong byte: a frame that does not have its checksum is not used."""

    def damage(data: bytearray) -> bytes | bytearray:
        if where == "short":
            return data[:-1]
        data[2 if where == "header" else 1_000_000] ^= 1
        return data

    remote = Remote(stored, damage=damage)
    part = remote.open()
    schema = part_of(part.schema, "image")
    if where != "values":
        with pytest.raises(ShardCorrupt, match=r"bytes came from byte|no zstd frame"):
            part.load(schema, 0, part.num_rows)
        return
    part.load(schema, 0, part.num_rows)
    whole = FramedShard(stored.data, name="s", max_raw_bytes=MAX)
    assert same(rows_of(part.columns(schema)), rows_of(whole.columns(schema)))
    assert len(remote.causes) == 1


def test_a_frame_before_the_one_that_the_tail_knows_is_refused() -> None:
    """It would decode, with a checksum of its own, and the one that the tail vouches for would never be looked at."""
    buffer = RowBuffer()
    buffer.extend({"image": random_tensor((1_000, 1_000), torch.uint8, 1)})

    def damage(data: bytearray) -> bytes:
        other = deflate(bytes(1_000_000))
        rest = len(data) - len(other) - 8
        return other + struct.pack("<II", 0x184D2A50, rest) + bytes(rest - 4) + data[-4:]

    part = Remote(encode(buffer.finish()), damage=damage).open()
    with pytest.raises(ShardCorrupt, match="not one zstd frame"):
        part.load(part.schema, 0, part.num_rows)


def test_what_was_not_loaded_is_a_defect_and_no_data(stored: EncodedShard) -> None:
    part = Remote(stored).open()
    with pytest.raises(RuntimeError, match="have not been fetched"):
        part.columns(part_of(part.schema, "label"))


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 1 << 30), st.integers(1, 255))
def test_no_damage_to_a_tail_goes_unnoticed(at: int, change: int) -> None:
    """The index's checksum of it holds for every byte; and it is refused without one, too, or says the same."""
    shard = encode(columns_of_samples(mixed_samples()))
    tail = bytearray(tail_of(shard.data))
    tail[at % len(tail)] ^= change
    assert describe_tail(tail) != shard.tail
    with pytest.raises(ShardCorrupt):
        FrameReader(tail, name="s", max_raw_bytes=MAX, stored_bytes=len(shard.data)).add(0, shard.data)


def test_a_tail_of_another_size_is_refused() -> None:
    """Cut short, or of an object of another length."""
    shard = encode(columns_of_samples(mixed_samples()))
    tail = bytes(tail_of(shard.data))
    for data, size in ((tail[1:], len(shard.data)), (tail[40:], len(shard.data)), (tail, len(shard.data) + 1)):
        with pytest.raises(ShardCorrupt):
            FrameReader(data, name="s", max_raw_bytes=MAX, stored_bytes=size)
    assert json.loads(FrameReader(tail, name="s", max_raw_bytes=MAX, stored_bytes=len(shard.data)).directory)["v"] == 1


def test_a_tail_is_a_small_part_of_a_shard(stored: EncodedShard) -> None:
    assert stored.tail[0] < 2 * KiB
