from __future__ import annotations

import io
import json
import random
import shutil
import struct
import subprocess
import threading
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from streamshards.errors import SampleInvalid, ShardCorrupt
from streamshards.options import MiB
from streamshards.shard import payload as payload_module
from streamshards.shard.columns import RowBuffer, to_samples
from streamshards.shard.data import Columns
from streamshards.shard.frames import BLOCK_BYTES, block_size, choose_level, is_framed, stored_frame
from streamshards.shard.payload import FramedShard, LoadedShard, columns_of_payload, digest_of, encode, payload_of
from streamshards.shard.schema import Field, Schema

from .shard_cases import DTYPE_PARAMS, columns_of_samples, mixed_samples, random_tensor, same

MAX = 64 * MiB


def open_shard(data: bytes) -> FramedShard:
    return FramedShard(data, name="s-7.pt.zst", max_raw_bytes=MAX)


def entries_of(data: bytes) -> list[tuple[int, int, int]]:
    """The seek table by the spec of the zstd seekable format, not by our code."""
    number, descriptor, magic = struct.unpack("<IBI", data[-9:])
    assert (descriptor, magic) == (0x80, 0x8F92EAB1)
    table = data[-9 - 12 * number : -9]
    assert struct.unpack("<II", data[-9 - 12 * number - 8 : -9 - 12 * number]) == (0x184D2A5E, 12 * number + 9)
    return [struct.unpack_from("<III", table, 12 * at) for at in range(number)]


def inflated(data: bytes) -> bytes:
    return zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True).read()


# --- round trips -------------------------------------------------------------------------------------------------


def test_every_kind_comes_back_as_it_went_in() -> None:
    columns = columns_of_samples(mixed_samples())
    shard = encode(columns)
    reader = open_shard(shard.data)
    assert (reader.num_rows, reader.raw_bytes, reader.schema) == (4, shard.raw_bytes, columns.schema)
    assert same(to_samples(reader.columns()), mixed_samples())
    assert shard.digest == digest_of(shard.data)
    assert is_framed(shard.data)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", DTYPE_PARAMS)
def test_every_dtype_comes_back_and_torch_load_agrees(dtype: torch.dtype) -> None:
    samples = [
        {"fixed": random_tensor((3,), dtype, row), "ragged": random_tensor((row, 2), dtype, row)} for row in range(3)
    ]
    shard = encode(columns_of_samples(samples))
    assert same(to_samples(open_shard(shard.data).columns()), samples)
    loaded = torch.load(io.BytesIO(inflated(shard.data)), weights_only=True)
    assert same(to_samples(columns_of_payload(loaded)), samples)


@pytest.mark.parametrize("rows", [0, 1])
def test_no_rows_and_no_bytes(rows: int) -> None:
    columns = columns_of_samples([{"x": torch.zeros(0, 3), "s": "", "o": None, "e": {}}])
    if not rows:
        buffer = RowBuffer(columns.schema)
        columns = buffer.finish()
    shard = encode(columns)
    assert same(to_samples(open_shard(shard.data).columns()), to_samples(columns))


def test_the_zstd_command_line_and_torch_load_read_the_same_tensors() -> None:
    if shutil.which("zstd") is None:  # no package of PyPI brings the command; CI's machine has it
        pytest.skip("the zstd command line is not installed")
    columns = columns_of_samples(mixed_samples())
    shard = encode(columns)
    done = subprocess.run(["zstd", "-dc"], input=shard.data, capture_output=True, check=True)
    assert len(done.stdout) == shard.raw_bytes
    loaded = torch.load(io.BytesIO(done.stdout), weights_only=True)
    assert same(loaded, payload_of(open_shard(shard.data).columns()))
    assert loaded["streamshards"] == 1
    assert loaded["columns"]["score?"].tolist() == [True, False, True, True]
    assert same(to_samples(columns_of_payload(loaded)), mixed_samples())


def test_columns_that_share_a_storage_are_written_whole() -> None:
    values = torch.arange(20.0)
    columns = columns_of_samples([{"a": torch.zeros(2), "b": torch.zeros(2)}] * 3)
    columns.data["a",].values = values[4:10].view(3, 2)
    columns.data["b",].values = values.view(10, 2).t()[:, :3].t()
    back = open_shard(encode(columns).data).columns()
    assert back.data["a",].values.tolist() == [[4, 5], [6, 7], [8, 9]]
    assert back.data["b",].values.tolist() == [[0, 1], [2, 3], [4, 5]]


def test_same_columns_same_bytes() -> None:
    one, two = (encode(columns_of_samples(mixed_samples())) for _ in range(2))
    assert one == two


@settings(deadline=None)
@given(st.data())
def test_any_rows_of_any_columns(data: st.DataObject) -> None:
    """Projection and row ranges, against the samples themselves."""
    samples = mixed_samples()
    reader = open_shard(SHARD.data)
    lo = data.draw(st.integers(0, 4))
    hi = data.draw(st.integers(lo, 4))
    names = data.draw(st.lists(st.sampled_from(sorted(samples[0])), min_size=1, unique=True))
    got = to_samples(reader.columns(reader.schema.select(names), lo, hi))
    assert same(got, [{key: sample[key] for key in sample if key in names} for sample in samples[lo:hi]])


SHARD = encode(columns_of_samples(mixed_samples()))


# --- a dataset's field may be more general than the shard's ------------------------------------------------------

FIXED = [{"x": random_tensor((2, 3), torch.int16, row)} for row in range(5)]
FIRST = [{"x": random_tensor((row, 3), torch.int16, row)} for row in range(5)]
ALL = [{"x": random_tensor((row % 2, row), torch.int16, row)} for row in range(5)]
GAPS = [{"x": None if row % 2 else sample["x"]} for row, sample in enumerate(FIXED)]
NOTHING: list[dict[str, Any]] = [{"x": None}] * 5


@pytest.mark.parametrize("own", [FIXED, FIRST, ALL, GAPS, NOTHING], ids=["fixed", "first", "all", "gaps", "nothing"])
@pytest.mark.parametrize("other", [FIXED, FIRST, ALL, GAPS, NOTHING], ids=["fixed", "first", "all", "gaps", "nothing"])
@pytest.mark.parametrize("framed", [True, False])
def test_a_shard_reads_as_any_field_above_its_own(own: list[Any], other: list[Any], framed: bool) -> None:
    columns = columns_of_samples(own)
    wide = columns.schema.merge(columns_of_samples(other).schema)
    reader = open_shard(encode(columns).data) if framed else LoadedShard(columns, "foreign.pt")
    for lo, hi in [(0, 5), (1, 4), (2, 2), (5, 5)]:
        assert same(to_samples(reader.columns(wide, lo, hi)), own[lo:hi])


@pytest.mark.parametrize(
    "field",
    [
        Field(("y",), "str"),
        Field(("x",), "str"),
        Field(("x",), "tensor", "int16", (2, 4)),
        Field(("x",), "tensor", "int32", (2, 3)),
        Field(("x",), "null", optional=True),
    ],
    ids=Field.describe,
)
def test_a_field_that_does_not_hold_the_shard_is_refused(field: Field) -> None:
    reader = open_shard(encode(columns_of_samples(FIXED)).data)
    with pytest.raises(ShardCorrupt, match=r"s-7\.pt\.zst: .*field"):
        reader.columns(Schema((field,)))


def test_out_must_be_of_the_right_size() -> None:
    reader = open_shard(encode(columns_of_samples(FIRST)).data)
    (field,) = reader.schema.fields
    with pytest.raises(ShardCorrupt, match=r"field 'x': 30 elements of values are stored, room for 31"):
        reader.read_into(field, "values", 0, 5, torch.empty(31, dtype=torch.int16))
    with pytest.raises(ShardCorrupt, match="rows 0 to 6 were asked for; the shard has 5"):
        reader.offsets(field, 0, 6)
    with pytest.raises(ValueError, match="cannot go into"):
        reader.read_into(field, "values", 0, 5, torch.empty(30))


def test_threads_may_share_a_reader() -> None:
    columns = RowBuffer()
    columns.extend({"x": torch.arange(3 * MiB).view(-1, 16), "s": [str(row) for row in range(3 * MiB // 16)]})
    want = columns.finish()
    reader = open_shard(encode(want, level=1).data)
    wrong: list[int] = []

    def read(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(5):
            lo = draw.randrange(want.num_rows)
            got = reader.columns(lo=lo)
            if not torch.equal(got.data["x",].values, want.data["x",].values[lo:]):
                wrong.append(lo)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# --- the layout of the bytes -------------------------------------------------------------------------------------


def large() -> tuple[bytes, dict[str, np.ndarray[Any, Any]]]:
    """Two columns of 10 MB, one that shrinks and one that does not, and a small one."""
    noise = np.random.default_rng(0).integers(0, 256, (1000, 10_007), dtype=np.uint8)
    ramp = np.arange(2_500_000, dtype=np.int32).reshape(1000, 2500) // 100
    buffer = RowBuffer()
    buffer.extend({"ramp": ramp, "noise": noise, "label": np.arange(1000)})
    return encode(buffer.finish()).data, {"ramp": ramp, "noise": noise}


def test_frames_and_columns() -> None:
    """Each column starts and ends a frame; blocks are whole rows of 2-4 MiB; every frame tells size and checksum."""
    data, arrays = large()
    entries = entries_of(data)
    assert data[:4] == zstandard.FRAME_HEADER, "a leading skippable frame breaks one-shot decoders"
    raw_starts = np.cumsum([0] + [raw for _, raw, _ in entries]).tolist()
    reader = open_shard(data)
    ends = set(raw_starts)
    for (path, _), extent in reader._directory.extents.items():
        assert extent.offset in ends
        assert extent.offset + extent.nbytes in ends
        inside = [start for start in raw_starts if extent.offset <= start < extent.offset + extent.nbytes]
        assert all((start - extent.offset) % extent.item_bytes == 0 for start in inside)
        if path[0] in arrays:
            blocks = np.diff([*inside, extent.offset + extent.nbytes])
            assert len(blocks) == 3
            assert 2 * MiB <= blocks.min() <= blocks.max() <= 4 * MiB
    at = 0
    for size, raw, checksum in entries[:-1]:
        frame = data[at : at + size]
        header = zstandard.get_frame_parameters(frame)
        assert (header.content_size, header.has_checksum) == (raw, True)
        assert frame[-4:] == checksum.to_bytes(4, "little")
        at += size
    assert (
        inflated(data)[reader._directory.extents[("noise",), "values"].offset :][:10_007]
        == arrays["noise"][0].tobytes()
    )


def test_a_column_that_does_not_shrink_is_stored_as_it_is() -> None:
    data, arrays = large()
    assert data.count(arrays["noise"][0].tobytes()) == 1


@given(st.integers(1, 50 * MiB), st.integers(1, 20 * MiB))
def test_blocks_are_whole_rows_and_not_small(nbytes: int, row_bytes: int) -> None:
    size = block_size(nbytes, row_bytes)
    unit = row_bytes if row_bytes <= BLOCK_BYTES // 2 else 64
    assert size % unit == 0
    assert size <= BLOCK_BYTES + unit
    assert nbytes <= BLOCK_BYTES or size >= BLOCK_BYTES // 2


@pytest.mark.parametrize("size", [1, 255, 256, 65_792, 128 * 1024, 128 * 1024 + 1, 3_000_000])
def test_a_stored_frame_is_a_zstd_frame_with_a_checksum(size: int) -> None:
    data = bytes(random.Random(size).randbytes(size))
    frame = stored_frame(memoryview(data))
    assert zstandard.ZstdDecompressor().decompress(frame) == data
    broken = bytearray(frame)
    broken[-5] ^= 1
    with pytest.raises(zstandard.ZstdError):
        zstandard.ZstdDecompressor().decompress(broken)


def test_golden_directory_and_seek_table() -> None:
    """The format, field by field. Compressed sizes vary with zstd's version; everything else is pinned."""
    samples = [
        {"x": torch.tensor([1, 2], dtype=torch.int16), "s": "ab", "o": None},
        {"x": torch.tensor([3, 4], dtype=torch.int16), "s": "c", "o": True},
    ]
    data = encode(columns_of_samples(samples)).data
    *frames, (directory_size, raw, checksum) = entries_of(data)
    assert (raw, checksum) == (0, 0x51D8E999)
    start = sum(size for size, _, _ in frames)
    frame = data[start : start + directory_size]
    magic, size, check = struct.unpack_from("<IIQ", frame)
    assert (magic, size, check) == (0x184D2A5D, len(frame) - 8, xxhash.xxh64_intdigest(frame[16:]))
    directory = json.loads(frame[16:])
    total = sum(raw for _, raw, _ in frames)
    offsets = [column.pop("offset") for column in directory["columns"]]
    assert directory == {
        "v": 1,
        "rows": 2,
        "bytes": total,
        "schema": {
            "fields": [
                {"path": ["x"], "kind": "tensor", "dtype": "int16", "shape": [2]},
                {"path": ["s"], "kind": "str"},
                {"path": ["o"], "kind": "tensor", "dtype": "bool", "shape": [], "optional": True, "python": "bool"},
            ],
            "empty": [],
        },
        "columns": [
            {"path": ["x"], "part": "values", "dtype": "int16", "shape": [2, 2]},
            {"path": ["s"], "part": "values", "dtype": "uint8", "shape": [3]},
            {"path": ["s"], "part": "offsets", "dtype": "int64", "shape": [3]},
            {"path": ["o"], "part": "values", "dtype": "bool", "shape": [2]},
            {"path": ["o"], "part": "present", "dtype": "bool", "shape": [2]},
        ],
    }
    raw_file = inflated(data)
    assert [raw_file[at : at + 3] for at in offsets[:2]] == [b"\1\0\2", b"abc"]
    assert all(at % 64 == 0 for at in offsets)
    loaded = torch.load(io.BytesIO(raw_file), weights_only=True)
    assert json.loads(loaded["spec"]) == directory["schema"]
    assert {key: value for key, value in loaded.items() if key not in ("spec", "columns")} == {
        "streamshards": 1,
        "rows": 2,
    }


# --- damage ------------------------------------------------------------------------------------------------------


def test_every_truncation_is_noticed() -> None:
    for size in range(len(SHARD.data)):
        with pytest.raises(ShardCorrupt, match=r"s-7\.pt\.zst"):
            open_shard(SHARD.data[:size])


def test_bit_flips_raise_or_change_nothing() -> None:
    """Without the digest, by what the frames alone give: 2,000 single-bit flips."""
    want, draw = mixed_samples(), random.Random(1)
    unnoticed = 0
    for _ in range(2000):
        data = bytearray(SHARD.data)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        try:
            got = to_samples(open_shard(bytes(data)).columns())
        except ShardCorrupt:
            continue
        unnoticed += 1
        assert same(got, want)
    # Flips between the columns' frames (the zip's own records) are not read, so they change nothing.
    assert unnoticed < 1600


def test_garbage_is_never_a_shard() -> None:
    draw = random.Random(2)
    for size in [0, 1, 8, 9, 17, 29, 30, 100, 5000]:
        with pytest.raises(ShardCorrupt):
            open_shard(draw.randbytes(size))
        assert not is_framed(draw.randbytes(size))
    assert not is_framed(zstandard.ZstdCompressor().compress(b"x" * 100))


def test_a_shard_larger_than_allowed_is_refused_before_anything_is_decoded() -> None:
    with pytest.raises(ShardCorrupt, match=r"inflates to .* bytes, more than the 100 allowed"):
        FramedShard(SHARD.data, name="s", max_raw_bytes=100)


def rebuilt(data: bytes, *, entries: Any = None, directory: Any = None) -> bytes:
    """The same frames with another directory or seek table, all checksums right: what an attacker would make."""
    old = entries_of(data)
    frames_end = sum(size for size, _, _ in old[:-1])
    frame = data[frames_end : frames_end + old[-1][0]]
    if directory is not None:
        value = json.loads(frame[16:])
        value = directory(value) or value
        text = value if isinstance(value, bytes) else json.dumps(value).encode()
        frame = struct.pack("<IIQ", 0x184D2A5D, len(text) + 8, xxhash.xxh64_intdigest(text)) + text
    new = [*old[:-1], (len(frame), *old[-1][1:])]
    if entries is not None:
        new = entries([list(entry) for entry in new])
    table = b"".join(struct.pack("<III", *entry) for entry in new)
    tail = struct.pack("<IBI", len(new), 0x80, 0x8F92EAB1)
    return data[:frames_end] + frame + struct.pack("<II", 0x184D2A5E, len(table) + 9) + table + tail


SMALL = encode(columns_of_samples([{"x": torch.zeros(2), "s": "ab"}, {"x": torch.ones(2), "s": ""}])).data


def test_rebuilding_without_a_change_is_harmless() -> None:
    assert open_shard(rebuilt(SMALL, directory=lambda value: value)).num_rows == 2


def put(*where: Any, value: Any) -> Any:
    def change(directory: dict[str, Any]) -> None:
        node: Any = directory
        for key in where[:-1]:
            node = node[key]
        node[where[-1]] = value

    return change


X = ("columns", 0)
DIRECTORIES: list[tuple[Any, str]] = [
    (lambda _: b" ", "not JSON"),
    (lambda _: b"{" * 10_000, "not JSON"),
    (lambda _: b"[" * 1_000_000, "not JSON"),
    (lambda _: b"\xff", "not JSON"),
    (lambda _: b"[]", "version None"),
    (put("v", value=2), "version 2; this release reads version 1"),
    (put("more", value=2), "keys"),
    (put("rows", value=-1), "rows -1"),
    (put("rows", value=3), "shape"),
    (put("rows", value=1), "shape"),
    (put("rows", value=10**18), "rows 1000000000000000000"),
    (put("rows", value=True), "rows True"),
    (put("rows", value=2.0), "rows 2.0"),
    (put("bytes", value=1), "1 bytes, the seek table has"),
    (put("schema", value=None), "schema"),
    (put("schema", "fields", 0, "dtype", value="object"), "dtype"),
    (put("schema", "fields", 0, "dtype", value="float64"), "not float64"),
    (put("schema", "fields", 0, "optional", value=True), "no present for field 'x'"),
    (put("schema", "fields", 0, "shape", value=[3]), "shape"),
    (put("schema", "fields", 0, "shape", value=[2**40]), "shape"),
    (put("schema", "fields", value=[]), "3 entries that the schema does not have"),
    (put("columns", value={}), "keys"),
    (put("columns", value=[]), "no values for field 'x'"),
    (put("columns", 0, value=3), "column 3"),
    (put(*X, "more", value=1), "column"),
    (put(*X, "part", value="offsets"), "no values"),
    (put(*X, "part", value=[]), "column"),
    (put(*X, "path", value="x"), "column"),
    (put(*X, "dtype", value="int64"), "int64"),
    (put(*X, "shape", value=[]), "not float32"),
    (put(*X, "shape", value=[2, 3]), "shape"),
    (put(*X, "shape", value=[2, -2]), "size -2"),
    (put(*X, "shape", value=[2, 1e3]), "size 1000.0"),
    (put(*X, "offset", value=-64), "offset -64"),
    (put(*X, "offset", value=1), "bytes at 1"),
    (put(*X, "offset", value=2**62), "offset"),
    (put("columns", 1, "shape", value=[2**47]), "bytes at"),
    (put("columns", 1, "shape", value=[2**60]), "size"),
    (put("columns", 1, "shape", value=[10**9]), "bytes at"),
]


@pytest.mark.parametrize(("change", "message"), DIRECTORIES)
def test_hostile_directories(change: Any, message: str) -> None:
    with pytest.raises(ShardCorrupt, match=message) as caught:
        open_shard(rebuilt(SMALL, directory=change))
    assert str(caught.value).startswith("s-7.pt.zst: directory: ")
    assert len(str(caught.value)) < 600


def test_columns_may_not_overlap_nor_stand_twice() -> None:
    def overlap(value: dict[str, Any]) -> None:
        value["columns"][1]["offset"] = value["columns"][0]["offset"]

    with pytest.raises(ShardCorrupt, match="overlap"):
        open_shard(rebuilt(SMALL, directory=overlap))
    with pytest.raises(ShardCorrupt, match="stand twice"):
        open_shard(rebuilt(SMALL, directory=lambda value: value["columns"].append(value["columns"][0])))


ENTRIES: list[tuple[Any, str]] = [
    (lambda _: [], "no seek table"),
    (lambda e: e[1:], "accounts for"),
    (lambda e: e[:-1], "accounts for"),
    (lambda e: [[e[0][0] - 1, *e[0][1:]], [e[1][0] + 1, *e[1][1:]], *e[2:]], "zstd frame|checksum"),
    (lambda e: [[e[0][0], e[0][1] + 1, e[0][2]], *e[1:]], "declares"),
    (lambda e: [[e[0][0], 0, e[0][2]], *e[1:]], "declares"),
    (lambda e: [[e[0][0], 2**32 - 1, e[0][2]], *e[1:]], "inflates to"),
    (lambda e: [[e[0][0], e[0][1], e[0][2] ^ 1], *e[1:]], "different checksums"),
    (lambda e: [*e[:-1], [e[-1][0], 5, e[-1][2]]], "no directory"),
    (lambda e: [*e[:-2], [e[-2][0] + e[-1][0], *e[-2][1:]]], "no directory"),
    (lambda e: [[0, 0, 0], *e], "no zstd frame"),
]


@pytest.mark.parametrize(("change", "message"), ENTRIES)
def test_hostile_seek_tables(change: Any, message: str) -> None:
    with pytest.raises(ShardCorrupt, match=message):
        open_shard(rebuilt(SMALL, entries=change))


def test_a_vast_number_of_frames_is_not_believed() -> None:
    data = SMALL[:-9] + struct.pack("<IBI", 2**32 - 1, 0x80, 0x8F92EAB1)
    with pytest.raises(ShardCorrupt, match="no seek table"):
        open_shard(data)


@pytest.mark.parametrize("offsets", [[1, 2, 2], [0, 3, 2], [0, -1, 2], [0, 2, 1], [0, 2**62, 2]])
def test_offsets_that_do_not_rise_are_corrupt(offsets: list[int]) -> None:
    columns = columns_of_samples([{"s": "ab"}, {"s": ""}])
    columns.data["s",].offsets = torch.tensor(offsets)
    reader = open_shard(encode(columns).data)
    with pytest.raises(ShardCorrupt, match=r"field 's': offsets do not rise from 0 to 2"):
        reader.columns()


@pytest.mark.parametrize("shape", [[2, 2], [-1, -3], [2**31 - 1, 2**31 - 1], [0, 3]])
def test_shapes_that_contradict_the_offsets_are_corrupt(shape: list[int]) -> None:
    columns = columns_of_samples([{"x": torch.zeros(1, 3)}, {"x": torch.zeros(2, 1)}])
    columns.data["x",].shapes[0] = torch.tensor(shape)
    reader = open_shard(encode(columns).data)
    with pytest.raises(ShardCorrupt, match="shapes and offsets contradict"):
        reader.columns()
    with pytest.raises(SampleInvalid, match="contradict"):
        columns_of_payload(payload_of(columns))


def test_bools_other_than_0_and_1_are_corrupt() -> None:
    columns = columns_of_samples([{"x": True}, {"x": False}])
    columns.data["x",].values.view(torch.uint8)[0] = 2
    with pytest.raises(ShardCorrupt, match="bytes other than 0 and 1"):
        open_shard(encode(columns).data).columns()


def test_a_frame_without_a_checksum_is_refused() -> None:
    old = entries_of(SMALL)
    first = inflated(SMALL)[: old[0][1]]
    frame = zstandard.ZstdCompressor(write_checksum=False).compress(first)
    data = rebuilt(SMALL, entries=lambda e: [[len(frame), *old[0][1:]], *e[1:]])
    with pytest.raises(ShardCorrupt, match="lacks a checksum"):
        open_shard(frame + data[old[0][0] :])


def test_a_payload_that_contradicts_its_spec_is_refused() -> None:
    def changed(**changes: Any) -> dict[str, Any]:
        return {**payload_of(columns_of_samples(mixed_samples())), **changes}

    for damage in [
        {"streamshards": 2},
        {"rows": 5},
        {"spec": "{"},
        {"spec": "[" * 10**5},
        {"columns": {}},
        {"columns": 3},
        {"rows": None},
    ]:
        with pytest.raises(SampleInvalid, match="damaged streamshards payload"):
            columns_of_payload(changed(**damage))


def test_a_torch_that_writes_otherwise_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """If torch.save copied storages before writing them, offsets could not be known; encode must not guess."""

    def save(payload: object, file: Any) -> None:
        scratch = io.BytesIO()
        torch_save(payload, scratch)
        file.write(scratch.getvalue())

    torch_save = torch.save
    monkeypatch.setattr(payload_module.torch, "save", save)
    with pytest.raises(RuntimeError, match="in one piece"):
        encode(columns_of_samples(mixed_samples()))


def columns_of(data: dict[str, torch.Tensor]) -> Columns:
    """Return *data* as columns."""
    buffer = RowBuffer()
    buffer.extend(data)
    return buffer.finish()


def columns_to_compress() -> dict[str, torch.Tensor]:
    """One that does not shrink, one that level 1 shrinks as far as level 3, one that level 3 shrinks further."""
    draw = torch.Generator().manual_seed(0)
    phrases = torch.randint(0, 256, (5_000, 24), dtype=torch.uint8, generator=draw)
    return {
        "noise": torch.randint(0, 256, (100, 8_192), dtype=torch.uint8, generator=draw),
        "nibbles": torch.randint(0, 16, (100, 8_192), dtype=torch.uint8, generator=draw),
        "phrases": phrases[torch.randint(0, 5_000, (34_000,), generator=draw)].reshape(100, -1),
    }


def test_the_level_is_chosen_for_each_column_by_its_bytes() -> None:
    """What would not shrink by a tenth is stored, the rest is level 1, or 3 where that is an eighth smaller."""
    columns = columns_to_compress()
    views = {name: memoryview(column.numpy()).cast("B") for name, column in columns.items()}
    assert {name: choose_level(view) for name, view in views.items()} == {"noise": None, "nibbles": 1, "phrases": 3}
    for name, view in views.items():
        shard = encode(columns_of({name: columns[name]}))
        sizes = [len(encode(columns_of({name: columns[name]}), level=level).data) for level in (1, 3)]
        expected = {"noise": view.nbytes, "nibbles": sizes[0], "phrases": sizes[1]}[name]
        assert abs(len(shard.data) - expected) < 4_096, name
        assert torch.equal(open_shard(shard.data).columns().data[name,].values, columns[name])


def test_a_choice_of_level_looks_at_slices_from_end_to_end() -> None:
    """Noise at the beginning does not decide for a column that is mostly plain, and no bytes are no trouble."""
    column = np.random.default_rng(0).integers(0, 256, 8 * MiB, dtype=np.uint8)
    assert choose_level(memoryview(column)) is None
    column[2 * MiB :] = 7
    assert choose_level(memoryview(column)) == 1
