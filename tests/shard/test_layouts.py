from __future__ import annotations

import collections
import contextlib
import datetime
import gzip
import io
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zstandard

from streamshards.errors import OptionInvalid, SampleInvalid, ShardCorrupt, UnsafePickle
from streamshards.options import MiB
from streamshards.shard import layouts
from streamshards.shard.columns import to_samples
from streamshards.shard.layouts import columns_of, load_foreign
from streamshards.shard.payload import payload_of
from streamshards.shard.schema import Field, Schema

from .shard_cases import columns_of_samples, mixed_samples, same


def saved(value: object, *, legacy: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def load(data: bytes, **options: Any) -> Any:
    return load_foreign(data, name="f.pt", max_raw_bytes=MiB, **options)


def unsized(data: bytes) -> bytes:
    """Two frames that do not tell their size, a skippable one before, between and behind."""
    skippable = b"\x53\x2a\x4d\x18\x03\0\0\0abc"
    half = len(data) // 2
    frames = [zstandard.ZstdCompressor(write_content_size=False).compress(part) for part in (data[:half], data[half:])]
    return skippable + skippable.join(frames) + skippable


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "plain": lambda data: data,
    "gzip": gzip.compress,
    "two gzip members": lambda data: gzip.compress(data[:100]) + gzip.compress(data[100:]),
    "zstd": zstandard.ZstdCompressor(level=1).compress,
    "zstd with a checksum": zstandard.ZstdCompressor(write_checksum=True).compress,
    "frames without sizes": unsized,
}


@pytest.mark.parametrize("pack", PACKERS.values(), ids=PACKERS)
@pytest.mark.parametrize("legacy", [False, True])
def test_any_wrapping_is_told_from_the_bytes(pack: Callable[[bytes], bytes], legacy: bool) -> None:
    value = {"x": torch.arange(1000), "names": ["a", "b"]}
    assert same(load(pack(saved(value, legacy=legacy))), value)


@pytest.mark.parametrize("pack", PACKERS.values(), ids=PACKERS)
def test_every_truncation_raises(pack: Callable[[bytes], bytes]) -> None:
    """zstandard and fsspec would hand out the beginning without a word."""
    value = {"x": torch.arange(100)}
    data = pack(saved(value))
    for size in range(0, len(data), 3):
        with contextlib.suppress(ShardCorrupt):
            assert same(load(data[:size]), value), "only bytes that carry nothing may be missing"
    with pytest.raises(ShardCorrupt, match=r"^f\.pt: "):
        load(data[: len(data) // 2])


@pytest.mark.parametrize("pack", PACKERS.values(), ids=PACKERS)
def test_bombs_are_refused(pack: Callable[[bytes], bytes]) -> None:
    with pytest.raises(ShardCorrupt, match="more than the 1,048,576"):
        load(pack(saved(torch.zeros(MiB))))


@pytest.mark.parametrize(
    "data", [b"", b"PK\x03\x04nonsense", b"text", b"\x1f\x8bnonsense", b"\x28\xb5\x2f\xfdnonsense"]
)
def test_garbage_is_corrupt(data: bytes) -> None:
    with pytest.raises(ShardCorrupt, match=r"^f\.pt: "):
        load(data)


class Ran:
    """Counts how often its pickle ran code here."""

    count = 0

    def __reduce__(self) -> Any:
        return Ran.run, ()

    @staticmethod
    def run() -> int:
        Ran.count += 1
        return Ran.count


def test_no_code_runs_unless_trusted(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """And then a warning says so, once in a process."""
    data = saved({"x": Ran()})
    with pytest.raises(UnsafePickle, match=r"the pickle needs .*add_safe_globals.*or pass trust_pickle=True"):
        load(data)
    assert Ran.count == 0
    monkeypatch.setattr(layouts, "_has_warned", False)
    with caplog.at_level(logging.WARNING, "streamshards"):
        assert [load(data, trust_pickle=True) for _ in range(2)] == [{"x": 1}, {"x": 2}]
    assert [record.getMessage() for record in caplog.records] == [
        "f.pt: trust_pickle=True: whatever code this file and the ones after it hold runs as you"
    ]


def test_the_class_that_is_not_safe_is_named() -> None:
    with pytest.raises(UnsafePickle, match=r"needs datetime\.date"):
        load(saved({"when": datetime.date(2020, 1, 1)}))


def test_a_torch_with_known_holes_must_be_told_to_trust(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts.torch, "__version__", "2.9.1+cpu")
    data = saved(torch.zeros(2))
    with pytest.raises(OptionInvalid, match=r"torch 2\.9\.1.*update to 2\.10, or pass trust_pickle=True"):
        load(data)
    assert load(data, trust_pickle=True).shape == (2,)


T = torch.arange(12.0).view(4, 3)
CASES: list[tuple[Any, str, list[Any]]] = [
    (T, "rows", [{"data": row} for row in T]),
    ({"x": T, "y": list("abcd")}, "columns", [{"x": T[i], "y": "abcd"[i]} for i in range(4)]),
    ({"x": T, "n": {"y": T[:, 0]}}, "columns", [{"x": T[i], "n": {"y": T[i, 0]}} for i in range(4)]),
    ([{"x": T[0], "y": 1}, {"x": T[1, :2], "y": 2}], "samples", [{"x": T[0], "y": 1}, {"x": T[1, :2], "y": 2}]),
    ([T[0], T[1]], "samples", [{"data": T[0]}, {"data": T[1]}]),
    ([(T[0], 3), (T[1], 4)], "samples", [{"0": T[0], "1": 3}, {"0": T[1], "1": 4}]),
    (("a", "b"), "samples", [{"data": "a"}, {"data": "b"}]),
    ({"w": T, "b": T[:2]}, "sample", [{"w": T, "b": T[:2]}]),
    (collections.OrderedDict(w=T, step=3), "sample", [{"w": T, "step": 3}]),
    ({"lr": 0.1, "name": "x"}, "sample", [{"lr": 0.1, "name": "x"}]),
    (T[0, 0], "sample", [{"data": T[0, 0]}]),
    ("text", "sample", [{"data": "text"}]),
]


@pytest.mark.parametrize(
    ("value", "layout", "samples"), CASES, ids=[f"{case[1]}-{at}" for at, case in enumerate(CASES)]
)
def test_layouts_are_told_apart(value: Any, layout: str, samples: list[Any]) -> None:
    got, columns = columns_of(load(saved(value)))
    assert got == layout
    assert same(to_samples(columns), samples)
    assert same(to_samples(columns_of(value, layout=layout)[1]), samples)


def test_our_own_payload_is_recognised() -> None:
    got, columns = columns_of(load(saved(payload_of(columns_of_samples(mixed_samples())))))
    assert got == "shard"
    assert same(to_samples(columns), mixed_samples())


def test_a_layout_may_be_asked_for() -> None:
    got, columns = columns_of({"w": T, "b": T}, layout="sample")
    assert got == "sample"
    assert same(to_samples(columns), [{"w": T, "b": T}])


@pytest.mark.parametrize(
    ("value", "layout"),
    [
        (T, "columns"),
        ({"x": T}, "rows"),
        (3, "samples"),
        ("ab", "samples"),
        (T, "shard"),
        ({"x": T, "y": T[:2]}, "columns"),
    ],
)
def test_an_object_in_another_layout_is_refused(value: Any, layout: str) -> None:
    with pytest.raises(SampleInvalid):
        columns_of(value, layout=layout)


def test_there_is_no_such_layout() -> None:
    with pytest.raises(OptionInvalid, match="layout='table' is not one of auto, shard, columns"):
        columns_of(T, layout="table")


def test_a_schema_binds_the_types() -> None:
    with pytest.raises(SampleInvalid, match="int8"):
        columns_of(T, schema=Schema((Field(("data",), "tensor", "int8", (3,)),)))
