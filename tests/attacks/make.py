"""Makes the hostile files in ``corpus/``, byte for byte, out of the two seeds: ``python -m tests.attacks.make``.

No compressor and no ``torch.save`` has a hand in it, so that the bytes are the same with every release of them: zstd
frames are of raw and of run-length blocks, pickles are written by the opcode, zips by the field. What each file does,
and what must come of it, stands in ``cases.py``.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import xxhash
import zstandard

HERE: Final = Path(__file__).parent
CORPUS: Final = HERE / "corpus"
SEED_SHARD: Final = HERE / "seed.pt.zst"
"""Eight rows, one field of every kind, as ``ShardWriter`` once wrote them."""
SEED_INDEX: Final = HERE / "seed.json"

GiB: Final = 1 << 30
BLOCK: Final = 128 * 1024
Json = dict[str, Any]
Entry = tuple[int, int, int]


# -- zstd --------------------------------------------------------------------------------------------------------------


def frame(blocks: bytes, content: bytes | int, *, checksum: bytes | None = None, size: int | None = None) -> bytes:
    """Return a zstd frame with content size and checksum around *blocks*; *content*: what is in them, or zeros."""
    length = size if size is not None else content if isinstance(content, int) else len(content)
    check = checksum if checksum is not None else _check(content)
    return zstandard.FRAME_HEADER + b"\xe4" + struct.pack("<Q", length) + blocks + check


def _check(content: bytes | int) -> bytes:
    hasher = xxhash.xxh64()
    if isinstance(content, int):
        chunk = bytes(1 << 20)
        for at in range(0, content, len(chunk)):
            hasher.update(chunk[: content - at])
    else:
        hasher.update(content)
    return struct.pack("<I", hasher.intdigest() & 0xFFFFFFFF)


def raw_frame(content: bytes) -> bytes:
    """Return *content* in a frame of raw blocks."""
    parts = []
    for start in range(0, len(content), BLOCK):
        block = content[start : start + BLOCK]
        parts.append(struct.pack("<I", len(block) << 3 | (start + BLOCK >= len(content)))[:3] + block)
    return frame(b"".join(parts), content)


def zeros_frame(length: int, **lies: Any) -> bytes:
    """Return *length* zeros, a multiple of the block, in a frame of run-length blocks: 4 bytes for 128 KiB."""
    count = length // BLOCK
    block = struct.pack("<I", BLOCK << 3 | 2)[:3] + b"\0"
    last = struct.pack("<I", BLOCK << 3 | 3)[:3] + b"\0"
    return frame(block * (count - 1) + last, length, **lies)


# -- shards ------------------------------------------------------------------------------------------------------------


def entries_of(shard: bytes) -> list[Entry]:
    """Return the seek table: compressed size, raw size, checksum."""
    (count,) = struct.unpack_from("<I", shard, len(shard) - 9)
    table = shard[len(shard) - 9 - 12 * count : -9]
    return [struct.unpack_from("<III", table, at) for at in range(0, len(table), 12)]


def pieces_of(shard: bytes) -> tuple[list[bytes], Json]:
    """Return the uncompressed content of each frame, and the directory."""
    pieces, at = [], 0
    *frames, (directory_size, _, _) = entries_of(shard)
    for size, raw, _ in frames:
        pieces.append(zstandard.ZstdDecompressor().decompress(shard[at : at + size], max_output_size=raw))
        at += size
    return pieces, json.loads(shard[at + 16 : at + directory_size])


def directory_frame(directory: Json | bytes) -> bytes:
    text = directory if isinstance(directory, bytes) else json.dumps(directory, separators=(",", ":")).encode()
    return struct.pack("<IIQ", 0x184D2A5D, 8 + len(text), xxhash.xxh64_intdigest(text)) + text


def seek_table(entries: Sequence[Entry], *, count: int | None = None, descriptor: int = 0x80) -> bytes:
    table = b"".join(struct.pack("<III", *entry) for entry in entries)
    end = struct.pack("<IBI", len(entries) if count is None else count, descriptor, 0x8F92EAB1)
    return struct.pack("<II", 0x184D2A5E, len(table) + 9) + table + end


def shard(
    frames: Sequence[bytes],
    raw_sizes: Sequence[int],
    directory: Json | bytes,
    *,
    entries: Callable[[list[Entry]], list[Entry]] = lambda entries: entries,
    **lies: int,
) -> bytes:
    """Return a shard of these frames, every checksum right: what a hostile writer would make."""
    tail = directory_frame(directory)
    table = [(len(data), raw, int.from_bytes(data[-4:], "little")) for data, raw in zip(frames, raw_sizes, strict=True)]
    table.append((len(tail), 0, 0x51D8E999))
    return b"".join(frames) + tail + seek_table(entries(table), **lies)


def put(*where: Any) -> Callable[[Json], None]:
    """Return an edit that puts the last argument at the place that the others name."""
    *path, last, value = where

    def edit(content: Json) -> None:
        node: Any = content
        for key in path:
            node = node[key]
        node[last] = value

    return edit


def column(directory: Json, name: str, part: str = "values") -> Json:
    """Return the directory's entry of that column."""
    (found,) = (entry for entry in directory["columns"] if entry["path"] == [name] and entry["part"] == part)
    return found


def field(schema: Json, name: str) -> Json:
    (found,) = (entry for entry in schema["fields"] if entry["path"] == [name])
    return found


class Shards:
    """The hostile shards."""

    def __init__(self, seed: bytes) -> None:
        self.pieces, self.directory = pieces_of(seed)
        self.files: dict[str, bytes] = {}

    def add(self, name: str, data: bytes) -> None:
        self.files[f"shard/{name}.pt.zst"] = data

    def plain(self, **changes: Any) -> bytes:
        frames = [raw_frame(piece) for piece in self.pieces]
        return shard(frames, [len(piece) for piece in self.pieces], **{"directory": self.directory, **changes})

    def with_directory(self, name: str, edit: Callable[[Json], Any]) -> None:
        directory = json.loads(json.dumps(self.directory))
        self.add(name, self.plain(directory=edit(directory) or directory))

    def with_column(self, name: str, column_name: str, part: str, edit: Callable[[bytearray], None]) -> None:
        """Change a tensor's bytes, its frame's checksum with them."""
        at = column(self.directory, column_name, part)["offset"]
        pieces, start = [], 0
        for piece in self.pieces:
            new = bytearray(piece)
            if start == at:
                edit(new)
            pieces.append(bytes(new))
            start += len(piece)
        self.add(name, shard([raw_frame(p) for p in pieces], [len(p) for p in pieces], self.directory))

    def with_entries(self, name: str, edit: Callable[[list[Entry]], list[Entry]], **lies: int) -> None:
        self.add(name, self.plain(entries=edit, **lies))


def edited(name: str, part: str, key: str, value: Any) -> Callable[[Json], None]:
    return lambda directory: column(directory, name, part).__setitem__(key, value)


def shaped(name: str, shape: list[Any], stored: list[Any]) -> Callable[[Json], None]:
    def edit(directory: Json) -> None:
        field(directory["schema"], name)["shape"] = shape
        column(directory, name).update(shape=stored, offset=0)

    return edit


def typed(dtype: str) -> Callable[[Json], None]:
    def edit(directory: Json) -> None:
        for entry in (field(directory["schema"], "x"), column(directory, "x")):
            entry["dtype"] = dtype

    return edit


def int64s(values: Sequence[int]) -> Callable[[bytearray], None]:
    return lambda data: data.__setitem__(slice(0, 8 * len(values)), np.array(values, "<i8").tobytes())


def null_rows(rows: int) -> Json:
    schema = {"fields": [{"path": ["n"], "kind": "null", "optional": True}], "empty": []}
    return {"v": 1, "rows": rows, "bytes": 64, "schema": schema, "columns": []}


def make_shards(seed: bytes) -> dict[str, bytes]:
    s = Shards(seed)
    first = len(s.pieces[0])
    s.add("unchanged", s.plain())
    # memory
    zeros = zeros_frame(GiB)
    s.add("bomb", shard([raw_frame(p) for p in s.pieces] + [zeros], [len(p) for p in s.pieces] + [GiB],
                        {**s.directory, "bytes": s.directory["bytes"] + GiB}))  # fmt: skip
    frames, sizes = [raw_frame(p) for p in s.pieces], [len(p) for p in s.pieces]
    lying = zeros_frame(GiB, checksum=_check(s.pieces[1]), size=sizes[1])
    s.add("frame-larger-than-it-says", shard([frames[0], lying, *frames[2:]], sizes, s.directory))
    s.add("frames-of-no-bytes", shard([*frames, *[frame(b"\1\0\0", b"")] * 1000], [*sizes, *[0] * 1000], s.directory))
    s.with_directory("rows-2-62", put("rows", 2**62))
    s.add("rows-of-nothing", shard([raw_frame(bytes(64))], [64], null_rows(2**31)))
    s.with_directory("rows-negative", put("rows", -1))
    s.with_directory("rows-true", put("rows", True))
    s.with_directory("rows-float", put("rows", 8.0))
    s.with_directory("rows-5000-digits", lambda d: json.dumps(d).replace('"rows": 8', '"rows": ' + "9" * 5000).encode())
    s.with_directory("dims-overflow", shaped("x", [2**32, 2**32], [8, 2**32, 2**32]))
    s.with_directory("dims-nothing-times-huge", shaped("x", [0, 2**62, 2**62], [8, 0, 2**62, 2**62]))
    s.with_directory("dims-many", shaped("x", [1] * 5000, [8] + [1] * 5000))
    s.with_directory("directory-deep", lambda _: b'{"v":1,"rows":' + b"[" * 20_000)
    s.with_directory("directory-of-lists", lambda _: b'{"v":1,"rows":[' + b"[]," * 15_000 + b"0]}")
    s.with_directory("directory-nan", put("rows", float("nan")))
    # places
    s.with_directory("offset-negative", edited("x", "values", "offset", -64))
    s.with_directory("offset-beyond", edited("x", "values", "offset", s.directory["bytes"] // 64 * 64))
    s.with_directory("offset-2-62", edited("x", "values", "offset", 2**62))
    s.with_directory("offset-unaligned", lambda d: column(d, "x").update(offset=column(d, "x")["offset"] + 4))
    s.with_directory("tensors-overlap", lambda d: column(d, "s", "offsets").update(offset=column(d, "x")["offset"]))
    s.with_directory("column-twice", lambda d: d["columns"].append(d["columns"][0]))
    s.with_directory("column-missing", lambda d: d.update(columns=d["columns"][:-1]))
    s.with_directory("column-unknown", lambda d: d["columns"].append({**d["columns"][0], "path": ["y"]}))
    # types
    for name in ("object", "torch.float32", "float33", "qint8", "__class__"):
        s.with_directory(f"dtype-{name.strip('_')}", typed(name))
    s.with_directory("dtype-of-another", edited("x", "values", "dtype", "int64"))
    s.with_directory("version-2", put("v", 2))
    s.with_directory("key-unknown", put("more", 1))
    s.with_directory("columns-a-dict", put("columns", {}))
    s.with_directory("schema-a-list", put("schema", []))
    s.with_directory("field-is-a-dict-too", lambda d: d["schema"]["fields"].append({"path": ["x", "y"], "kind": "str"}))
    s.with_directory("path-65-deep", lambda d: field(d["schema"], "x").update(path=["x"] * 65))
    s.with_directory("path-of-nul", lambda d: field(d["schema"], "x").update(path=["x\0"]))
    s.with_directory("not-json", lambda _: b"\xff\xfe{}")
    # the seek table
    s.with_entries("table-sum-lies", lambda e: [(e[0][0] + 1, *e[0][1:]), *e[1:]])
    s.with_entries("table-swapped", lambda e: [e[1], e[0], *e[2:]])
    s.with_entries("table-raw-size-lies", lambda e: [(e[0][0], e[0][1] + 64, e[0][2]), *e[1:]])
    s.with_entries("table-raw-size-huge", lambda e: [(e[0][0], 2**32 - 1, e[0][2]), *e[1:]])
    s.with_entries("table-checksum-lies", lambda e: [(*e[0][:2], e[0][2] ^ 1), *e[1:]])
    s.with_entries("table-empty-frame", lambda e: [(0, 0, 0), *e])
    s.with_entries("table-no-entry", lambda _: [])
    s.with_entries("table-count-lies", lambda e: e, count=2**32 - 1)
    s.with_entries("table-reserved-bits", lambda e: e, descriptor=0xFC)
    skippable = b"\x50\x2a\x4d\x18\x08\0\0\0" + b"skipped!"
    s.add("skippable-first", skippable + s.plain())
    s.with_entries("skippable-first-in-table", lambda e: e)
    s.add("skippable-first-in-table",
          shard([skippable, *frames], [0, *sizes], s.directory))  # fmt: skip
    s.add("two-shards", s.plain() + s.plain())
    s.add("cut", s.plain()[:-100])
    s.add("empty", b"")
    bare = zstandard.FRAME_HEADER + b"\xe0" + frames[1][5:-4]
    s.add("frame-without-checksum", shard([frames[0], bare, *frames[2:]], sizes, s.directory))
    s.add("frame-with-dictionary", shard([zstandard.FRAME_HEADER + b"\xe5" + frames[0][5:13] + b"\7" + frames[0][13:],
                                          *frames[1:]], sizes, s.directory))  # fmt: skip
    window = zstandard.FRAME_HEADER + b"\xc4\xf8" + frames[0][5:]
    s.add("frame-with-vast-window", shard([window, *frames[1:]], sizes, s.directory))
    # contents
    rows = s.directory["rows"]
    total = column(s.directory, "s")["shape"][0]
    s.with_column("offsets-fall", "s", "offsets", int64s([0, 5, 3]))
    s.with_column("offsets-negative", "s", "offsets", int64s([0, -5]))
    s.with_column("offsets-beyond", "s", "offsets", int64s([0] * rows + [total + 1]))
    s.with_column("offsets-2-62", "s", "offsets", int64s([0] * (rows - 1) + [2**62]))
    s.with_column("offsets-short", "s", "offsets", int64s([0] * rows + [total - 1]))
    s.with_column("shapes-negative", "g", "shapes", lambda b: b.__setitem__(slice(0, 8), b"\xff" * 8))
    s.with_column("shapes-huge", "g", "shapes", lambda b: b.__setitem__(slice(0, 8), b"\xff\xff\xff\x7f" * 2))
    s.with_column("bool-2", "o", "present", lambda b: b.__setitem__(0, 2))
    s.with_column("text-no-utf8", "s", "values", lambda b: b.__setitem__(0, 0xFF))
    s.with_column("json-broken", "j", "values", lambda b: b.__setitem__(0, 0x5B ^ 1))
    # the pickle inside is for people; a reader that looked into it would run this
    hostile = b"cos\nsystem\n(X\x0c\0\0\0touch canarytR."
    s.add("pickle-in-payload", shard([raw_frame(hostile + bytes(first - len(hostile))), *frames[1:]], sizes,
                                     s.directory))  # fmt: skip
    return s.files


# -- indexes -----------------------------------------------------------------------------------------------------------


def sign(index: Json) -> Json:
    """Put the right fingerprint in; one that cannot be reckoned stays as it was."""
    shards = index["shards"]
    hasher = xxhash.xxh3_128()
    try:
        schema = json.dumps(index["schema"], sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        for text in (schema, index["layout"], "\n".join(shards["name"]), "\n".join(shards["digest"])):
            hasher.update(text.encode() + b"\0")
        for key in ("rows", "bytes", "raw_bytes"):
            hasher.update(np.array(shards[key], dtype="<i8").tobytes())
        index["fingerprint"] = hasher.hexdigest()
        index["num_samples"] = sum(shards["rows"])
    except (TypeError, ValueError, OverflowError, KeyError, AttributeError):
        return index
    return index


NAMES: Final = {
    "dotdot": "../../canary.pt.zst",
    "dotdot-inside": "a/../../canary.pt.zst",
    "dot": "./s.pt.zst",
    "absolute": "/etc/passwd",
    "double-slash": "//host/share",
    "scheme": "file:///etc/passwd",
    "scheme-s3": "s3://other/secret",
    "scheme-pipe": "pipe:touch canary",
    "drive": "C:canary",
    "chain": "simplecache::http://127.0.0.1/x",
    "backslash": "..\\canary",
    "nul": "s.pt.zst\0/../canary",
    "newline": "s\n.pt.zst",
    "escape": "\x1b]0;canary\x07.pt",
    "rtl": "s\u202etsz.tp.zst",
    "zero-width": "s\u200b.pt.zst",
    "fullwidth-dots": "\uff0e\uff0e/canary",
    "fullwidth-slash": "..\uff0fcanary",
    "two-dot-leader": "\u2025/canary",
    "surrogate": "s\udc80.pt.zst",
    "overlong": "n" * 2000,
    "empty": "",
    "slash-at-end": "a/",
    "number": 7,
    "null": None,
    "list": ["s.pt.zst"],
}  # fmt: skip
COUNTS: Final = {
    "negative": -1, "true": True, "float": 8.0, "float-huge": 1e300, "2-63": 2**63, "2-49": 2**49, "text": "8",
    "null": None, "list": [8], "nan": float("nan"),
}  # fmt: skip


def make_indexes(seed: Json) -> dict[str, bytes]:
    files: dict[str, bytes] = {}

    def copy() -> Json:
        return json.loads(json.dumps(seed))

    def add(name: str, index: Any, *, ending: str = ".json") -> None:
        data = index if isinstance(index, bytes) else json.dumps(index, separators=(",", ":")).encode()
        files[f"index/{name}{ending}"] = data

    def change(name: str, *edits: Callable[[Json], Any], signed: bool = True) -> None:
        index = copy()
        for edit in edits:
            edit(index)
        add(name, sign(index) if signed else index)

    change("unchanged")
    for name, value in NAMES.items():
        change(f"name-{name}", put("shards", "name", 0, value))
    change("name-twice", *(lambda i, key=key: i["shards"][key].extend(i["shards"][key]) for key in seed["shards"]))
    change("name-homoglyph", put("shards", "name", 0, seed["shards"]["name"][0].replace(".pt", ".\u0440t")))
    change("name-300-bytes", put("shards", "name", 0, "n" * 300))
    for key in ("rows", "bytes", "raw_bytes"):
        for name in COUNTS if key == "rows" else ("negative", "float", "2-63"):
            value = COUNTS[name]
            change(f"{key}-{name}", put("shards", key, 0, value))
    change("rows-2-48", put("shards", "rows", 0, 2**48))
    change("rows-many-times-2-48", *(lambda i, key=key: i["shards"].update(
        {key: [f"{n}" if key == "name" else i["shards"][key][0] if key == "digest" else 2**48 for n in range(600)]}
    ) for key in seed["shards"]))  # fmt: skip
    for key in seed["shards"]:
        change(f"{key}-short", lambda i, key=key: i["shards"][key].clear())
        change(f"{key}-missing", lambda i, key=key: i["shards"].pop(key), signed=False)
        change(f"{key}-a-dict", put("shards", key, {}), signed=False)
    for key, value in (("num_samples", 9), ("num_samples", 8.0), ("num_samples", True), ("fingerprint", "0" * 32),
                       ("fingerprint", None), ("version", 2), ("version", 0), ("version", "1"), ("version", True),
                       ("format", "other"), ("layout", 3), ("codec", None), ("shards", []), ("schema", []),
                       ("created", {"a": 1}), ("writer", "\udc80")):  # fmt: skip
        change(f"{key}-{type(value).__name__}-{str(value)[:5].encode('ascii', 'replace').decode()}".replace("?", "u"),
               put(key, value), signed=False)  # fmt: skip
    change("layout-unknown", put("layout", "pickle"))
    change("digest-short", put("shards", "digest", 0, "00"))
    change("digest-upper", put("shards", "digest", 0, "A" * 32))
    change("schema-deep", lambda i: i["schema"].update(more=json.loads("[" * 500 + "]" * 500)))
    change("schema-dtype", lambda i: field(i["schema"], "x").update(dtype="object"))
    change("schema-dims-overflow", lambda i: field(i["schema"], "x").update(shape=[2**40, 2**40]))
    change("schema-dims-huge", lambda i: field(i["schema"], "x").update(shape=[2**62]))
    change("schema-dims-nothing-times-huge", lambda i: field(i["schema"], "x").update(shape=[0, 2**62, 2**62]))
    change("schema-path-escape", lambda i: field(i["schema"], "x").update(path=["x\0"]))
    change("schema-field-twice", lambda i: i["schema"]["fields"].append(i["schema"]["fields"][0]))
    text = json.dumps(sign(copy()), separators=(",", ":"))
    add("key-twice", text.replace('"layout":', '"layout":"pickle","layout":').encode())
    add("key-twice-in-shards", text.replace('"rows":[', '"rows":[1],"rows":[').encode())
    add("nested", b"[" * 30_000)
    add("nested-objects", b'{"a":' * 10_000)
    add("lists", b'{"format":"streamshards","version":1,"shards":[' + b"[]," * 20_000 + b"0]}")
    add("digits", text.replace('"num_samples":8', '"num_samples":' + "9" * 5000).encode())
    add("utf16", text.encode("utf-16"))
    add("not-utf8", text.encode()[:-2] + b"\xff}")
    add("empty", b"")
    add("html", b"<html><body>504 Gateway Timeout</body></html>")
    add("pickle", b"cos\nsystem\n(X\x0c\0\0\0touch canarytR.")
    add("bomb", b"".join([zstandard.FRAME_HEADER, b"\x00\x88", *_run_blocks(GiB * 3 // 2)]), ending=".json.zst")
    add("bomb-declared", zeros_frame(GiB, size=10_000_000_000), ending=".json.zst")
    add("bomb-of-spaces", b"".join([zstandard.FRAME_HEADER, b"\x00\x88", *_run_blocks(200 << 20, b" ")]),
        ending=".json.zst")  # fmt: skip
    add("bomb-of-lists", b"".join([zstandard.FRAME_HEADER, b"\x00\x88", *_run_blocks(128 << 20, b"[")]),
        ending=".json.zst")  # fmt: skip
    add("cut", raw_frame(text.encode())[:-40], ending=".json.zst")
    pointer = {key: seed[key] for key in ("format", "version", "num_samples", "fingerprint")}
    for name, part in (("dotdot", "../index.json"), ("absolute", "/etc/passwd"), ("url", "http://127.0.0.1/x"),
                       ("missing", f"index-{'0' * 32}.json.zst"), ("number", 3)):  # fmt: skip
        add(f"pointer-{name}", {**pointer, "index": part})
    return files


def _run_blocks(length: int, byte: bytes = b"\0") -> list[bytes]:
    count = length // BLOCK
    return [struct.pack("<I", BLOCK << 3 | 2)[:3] + byte] * (count - 1) + [struct.pack("<I", BLOCK << 3 | 3)[:3] + byte]


# -- foreign files -----------------------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    return b"\x8a\x0a" + value.to_bytes(10, "little", signed=True)


def storage(key: str, items: int, kind: str = "FloatStorage", *more: bytes) -> bytes:
    parts = [text("storage"), f"ctorch\n{kind}\n".encode(), text(key), text("cpu"), number(items), *more]
    return b"(" + b"".join(parts) + b"tQ"


def tensor(stored: bytes, size: Sequence[int], stride: Sequence[int], offset: int = 0) -> bytes:
    shape = b"(" + b"".join(map(number, size)) + b"t(" + b"".join(map(number, stride)) + b"t"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + stored + number(offset) + shape + b"\x89N" + b"tR"


def pickled(value: bytes) -> bytes:
    return b"\x80\x02" + value + b"."


def call(function: str, *args: bytes) -> bytes:
    return b"c" + function.replace(" ", "\n").encode() + b"\n(" + b"".join(args) + b"tR"


GOOD: Final = tensor(storage("0", 8), (8,), (1,))
FLOATS: Final = bytes(32)


def columns(value: bytes) -> bytes:
    """Return ``{"x": value}``."""
    return b"}(" + text("x") + value + b"u"


def zipped(records: Mapping[str, bytes] | Sequence[tuple[str, bytes]], **lies: Any) -> bytes:
    """Return a zip as torch.save lays it out; see ``_zip`` for the *lies*."""
    return _zip(list(records.items()) if isinstance(records, Mapping) else list(records), **lies)


def _zip(
    records: list[tuple[str, bytes]],
    *,
    method: int = 0,
    sizes: Mapping[str, int] | None = None,
    same_place: bool = False,
    at: int | None = None,
    comment: bytes = b"",
) -> bytes:
    out, directory, starts = bytearray(), bytearray(), []
    for name, data in records:
        path = name.encode()
        if same_place and starts and data == records[-1][1]:
            starts.append(starts[-1])
        else:
            starts.append(len(out))
            out += struct.pack("<4s5H3L2H", b"PK\3\4", 0, 0, method, 0, 0, 0, len(data), len(data), len(path), 0)
            out += path + data
    for (name, data), start in zip(records, starts, strict=True):
        path, size = name.encode(), (sizes or {}).get(name, len(data))
        packed = len(data) if method else size
        directory += struct.pack("<4s6H3L5H2L", b"PK\1\2", 0, 0, 0, method, 0, 0, 0, packed, size, len(path),
                                 0, 0, 0, 0, 0, start) + path  # fmt: skip
    place = len(out) if at is None else at
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, len(records), len(records), len(directory), place, len(comment))
    return bytes(out + directory) + end + comment


def deflated_zeros(matches: int) -> bytes:
    """Return a deflate stream of 1 + 258 * matches zeros, with the fixed Huffman code (RFC 1951 section 3.2.6)."""
    bits = "11" + "0" + "00110000" + "1100010100000" * matches + "0000000"
    bits += "0" * (-len(bits) % 8)
    return bytes(int(bits[at : at + 8][::-1], 2) for at in range(0, len(bits), 8))


def archive(value: bytes, storages: Mapping[str, bytes] | None = None, **lies: Any) -> bytes:
    data = {"0": FLOATS} if storages is None else storages
    records = {"a/data.pkl": pickled(value), "a/byteorder": b"little"}
    return zipped({**records, **{f"a/data/{key}": item for key, item in data.items()}, "a/version": b"3\n"}, **lies)


def legacy(value: bytes, *, keys: Sequence[str] = ("0",), storages: bytes = struct.pack("<q", 8) + FLOATS) -> bytes:
    magic = pickled(b"\x8a\x0a" + 0x1950A86A20F9469CFC6C.to_bytes(10, "little"))
    info = pickled(b"}(" + text("little_endian") + b"\x88u")
    names = pickled(b"](" + b"".join(map(text, keys)) + b"e")
    return magic + pickled(b"M" + struct.pack("<H", 1001)) + info + pickled(value) + names + storages


def make_foreign() -> dict[str, bytes]:
    files = {
        "unchanged": archive(columns(GOOD)),
        "unchanged-legacy": legacy(columns(tensor(storage("0", 8, "FloatStorage", b"N"), (8,), (1,)))),
        # code
        "system": archive(columns(call("os system", text("touch canary")))),
        "eval": archive(columns(call("__builtin__ eval", text("open('canary','w')")))),
        "eval-builtins": archive(columns(call("builtins eval", text("open('canary','w')")))),
        "getattr": archive(columns(call("builtins getattr", text("x"), text("__class__")))),
        "import": archive(columns(call("importlib import_module", text("antigravity")))),
        "subprocess": archive(columns(call("subprocess check_output", text("touch canary")))),
        "torch-load": archive(columns(call("torch load", text("canary")))),
        "torch-hub": archive(columns(call("torch.hub load", text("a/b"), text("c")))),
        "torch-save": archive(columns(call("torch save", text("x"), text("canary")))),
        "torch-from-file": archive(columns(call("torch from_file", text("canary"), b"\x88", number(8)))),
        "storage-from-file": archive(columns(call("torch UntypedStorage", text("canary")))),
        "typed-os": archive(columns(call("torch._tensor _rebuild_from_type_v2", b"cos\nsystem\n", b"ctorch\nTensor\n",
                                         b"(" + text("touch canary") + b"t", b"}"))),
        "inst": archive(b"(" + text("touch canary") + b"ios\nsystem\n"),
        "obj": archive(b"(cos\nsystem\n" + text("touch canary") + b"o"),
        "stack-global": archive(text("os") + text("system") + b"\x93" + text("touch canary") + b"\x85R"),
        "ext": archive(b"\x82\x01"),
        "plain-pickle": b"cos\nsystem\n(X\x0c\0\0\0touch canarytR.",
        "legacy-system": legacy(columns(call("os system", text("touch canary")))),
        "legacy-module": legacy(b"(" + text("module") + b"cos\nsystem\n" + text("a") + text("b") + b"tQ"),
        # memory that the file's bytes do not account for
        "bytearray": archive(columns(call("__builtin__ bytearray", number(2 << 30)))),
        "bytearray-typed": archive(columns(call("torch._tensor _rebuild_from_type_v2", b"cbuiltins\nbytearray\n",
                                                b"ctorch\nTensor\n", b"(" + number(2 << 30) + b"t", b"}"))),
        "tensor-by-size": archive(columns(call("torch Tensor", number(1 << 29)))),
        "tensor-class-by-size": archive(columns(call("torch FloatTensor", number(1 << 29)))),
        "storage-by-size": archive(columns(call("torch.storage UntypedStorage", number(2 << 30)))),
        "storage-new-by-size": archive(columns(b"ctorch.storage\nUntypedStorage\n" + number(2 << 30) + b"\x85\x81")),
        "tensor-grows-storage": archive(columns(tensor(storage("0", 8), (1 << 29,), (1,)))),
        "tensor-build": archive(columns(b"ctorch\nTensor\n)\x81(" + storage("0", 8) + number(0)
                                        + number(1 << 29) + b"\x85" + number(1) + b"\x85tb")),
        "tensor-offset": archive(columns(tensor(storage("0", 8), (8,), (1,), 1 << 29))),
        "tensor-negative": archive(columns(tensor(storage("0", 8), (-8,), (1,)))),
        "tensor-stride": archive(columns(tensor(storage("0", 8), (8,), (1 << 27,)))),
        "tensor-expanded": archive(columns(tensor(storage("0", 8), (1 << 32,), (0,)))),
        "tensor-in-float8": archive(columns(b"ctorch._utils\n_rebuild_tensor_v3\n(" + storage("0", 8) + number(0)
                                            + number(8) + b"\x85" + number(1) + b"\x85\x89Nctorch\ncomplex128\ntR")),
        "tensor-shared": archive(b"](" + GOOD + b"q\x01" + b"h\x01" * 20_000 + b"e"),
        "storage-larger-than-record": archive(columns(tensor(storage("0", 1 << 29), (8,), (1,)))),
        "storage-missing": archive(columns(tensor(storage("7", 8), (8,), (1,)))),
        "storage-negative": archive(columns(tensor(storage("0", -8), (8,), (1,)))),
        "laughs": archive(b"](" + text("ha") + b"e" + b"".join(b"q%c](" % n + b"h%c" % n * 10 + b"e"
                                                                for n in range(1, 20))),
        "laughs-tuples": archive(text("ha") + b"".join(b"q%c(" % n + b"h%c" % n * 10 + b"t" for n in range(1, 20))),
        "itself": archive(b"]q\x01h\x01a"),
        "methods-hidden": archive(b"ccollections\nOrderedDict\n)R" + text("x") + GOOD + b"s"
                                  + b"}(" + text("keys") + b"K\x01" + text("values") + b"K\x01ub"),
        "deep": archive(b"]" * 30_000 + b"a" * 29_999),
        "marks": archive(b"(" * 60_000),
        "codec": archive(columns(call("_codecs encode", text("x"), text("punycode")))),
        "legacy-storage": legacy(columns(tensor(storage("0", 1 << 29, "FloatStorage", b"N"), (8,), (1,)))),
        "legacy-view": legacy(columns(tensor(storage(
            "0", 8, "FloatStorage", text("v") + number(4) + number(1 << 30) + b"\x87"), (8,), (1,)))),
        # the zip
        "zip-bomb": zipped({"a/data.pkl": pickled(columns(GOOD)), "a/data/0": deflated_zeros(40_000),
                            "a/version": b"3\n"}, method=8, sizes={"a/data/0": 2 << 30}),
        "zip-version-bomb": zipped({"a/data.pkl": pickled(columns(GOOD)), "a/data/0": FLOATS, "a/version": b"3\n"},
                                   sizes={"a/version": 2 << 30}),
        "zip-record-huge": archive(columns(GOOD), sizes={"a/data/0": 2 << 30}),
        "zip-overlap": zipped([("a/data.pkl", pickled(columns(GOOD))), ("a/version", b"3\n"),
                               *((f"a/data/{n}", bytes(30_000)) for n in range(300))], same_place=True),
        "zip-dotdot": zipped({"../data.pkl": pickled(columns(GOOD)), "../data/0": FLOATS, "../version": b"3\n"}),
        "zip-dotdot-member": archive(columns(GOOD), {"0": FLOATS, "../../../canary": b"x"}),
        "zip-twice": zipped([("a/data.pkl", pickled(columns(GOOD))), ("a/DATA.PKL", pickled(b"N")),
                             ("a/data/0", FLOATS), ("a/version", b"3\n")]),
        "zip-two-folders": zipped([("a/data.pkl", pickled(columns(GOOD))), ("b/data/0", FLOATS),
                                   ("a/version", b"3\n")]),
        "zip-directory-elsewhere": archive(columns(GOOD), at=0),
        "zip-comment": archive(columns(GOOD), comment=b"PK\5\6" + bytes(18)),
        "zip-two-ends": archive(columns(GOOD)) + archive(columns(b"N"))[-22:],
        "zip-nothing": zipped({}),
        "zip-no-pickle": zipped({"a/version": b"3\n"}),
        "zip-byteorder": zipped({"a/data.pkl": pickled(columns(GOOD)), "a/byteorder": b"middle", "a/data/0": FLOATS,
                                 "a/version": b"3\n"}),
        "zst-bomb": zeros_frame(GiB),
        "cut": archive(columns(GOOD))[:-30],
        "empty": b"",
    }  # fmt: skip
    return {f"foreign/{name}.pt": data for name, data in files.items()}


# -- states ------------------------------------------------------------------------------------------------------------


def make_states(seed: Json) -> dict[str, bytes]:
    state = {
        "version": 1, "epoch": 0, "position": 3, "num_samples": 8, "fingerprint": seed["fingerprint"],
        "num_shards": 1, "shuffle": False, "seed": 0, "lanes": 1, "chunk": 1, "shuffle_block": 8,
    }  # fmt: skip
    files = {"unchanged": state}
    for key in state:
        files[f"{key}-missing"] = {name: value for name, value in state.items() if name != key}
    for key in ("epoch", "position", "lanes", "shuffle_block"):
        for name, value in (("negative", -1), ("true", True), ("float", 3.0), ("2-63", 2**63), ("text", "3"),
                            ("null", None), ("list", [3]), ("nan", float("nan"))):  # fmt: skip
            files[f"{key}-{name}"] = {**state, key: value}
    for key in ("seed", "version", "chunk", "num_samples"):
        files[f"{key}-text"] = {**state, key: "3"}
    for key in ("chunk", "lanes", "shuffle_block", "seed", "epoch", "position", "num_samples"):
        files[f"{key}-2-63-1"] = {**state, key: 2**63 - 1}
    files |= {
        "position-beyond": {**state, "position": 9},
        "fingerprint-other": {**state, "fingerprint": "0" * 32},
        "fingerprint-list": {**state, "fingerprint": [seed["fingerprint"]]},
        "num_shards-huge": {**state, "num_shards": 2**62},
        "num_shards-negative": {**state, "num_shards": -1},
        "subset-hostile": {**state, "subset": "take(-1)"},
        "subset-deep": {**state, "subset": json.loads("[" * 300 + "]" * 300)},
        "kind-mixture": {**state, "kind": "mixture", "sources": {"a": state}},
        "workers-huge": {**state, "worker_batches": 2**62, "num_workers": 2**62, "global_batch": 1},
        "list": [state],
        "null": None,
        "keys-many": {**state, **{f"key{n}": n for n in range(3000)}},
    }
    return {f"state/{name}.json": json.dumps(value).encode() for name, value in files.items()}


def make() -> dict[str, bytes]:
    """Return every file of the corpus: its path there, and its bytes."""
    seed = json.loads(SEED_INDEX.read_bytes())
    return {
        **make_indexes(seed), **make_shards(SEED_SHARD.read_bytes()), **make_foreign(), **make_states(seed),
    }  # fmt: skip


def main() -> None:
    for name, data in make().items():
        path = CORPUS / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


if __name__ == "__main__":
    sys.exit(main())
