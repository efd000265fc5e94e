"""Files that torch.save wrote, in a folder or under a url: found in a steady order, read one at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from streamshards.convert.place import Place
from streamshards.errors import IndexInvalid, SampleInvalid, StreamShardsError
from streamshards.options import GiB
from streamshards.shard.columns import Columns
from streamshards.shard.layouts import columns_of, decompressed, load_foreign
from streamshards.shard.payload import FramedShard, describe_tail, digest_of, is_framed, tail_of
from streamshards.storage import Blob

MAX_RAW_BYTES: Final = 64 * GiB
"""Refuse a file that inflates to more: there is no index yet that says how large it may be."""
OWN: Final = "shard"
"""The layout of the shards that streamshards writes."""

_APART: Final = "keep files of different layouts in different folders"
_FILE: Final = re.compile(r"\.(pt|pth)(\.zst|\.gz)?$", re.IGNORECASE)
_DIGITS: Final = re.compile(r"(\d+)")


class PtFile(NamedTuple):
    """One object that looks like a ``torch.save`` file."""

    name: str
    size: int


@dataclass(frozen=True)
class LoadedFile:
    """What one file holds."""

    layout: str
    columns: Columns
    raw_bytes: int
    """Of the ``.pt`` file inside."""
    digest: str
    tail: tuple[int, int] | None
    """See ``describe_tail``. None: not a shard as streamshards stores it, which is read without unpickling."""


def find_files(place: Place) -> list[PtFile]:
    """Return the ``.pt`` and ``.pth`` files (plain, ``.zst``, ``.gz``) below a place, ``x-2`` before ``x-10``.

    Names of which any part begins with a dot are left out: they are other programs' leftovers.

    Raises:
        IndexInvalid: There are none; the text says what there is.
        StoreError: The store did not answer, or refused.
    """
    found = place.list()
    files = [PtFile(name, size) for name, size in found if _FILE.search(name) and not _is_hidden(name)]
    if not files:
        others = f"{len(found):,} other file{'' if len(found) == 1 else 's'}"
        what = f"{others} such as {found[0][0]}" if found else "empty, or it does not exist"
        raise IndexInvalid(f"{place.url}: no .pt or .pth files (plain, .zst or .gz) here: {what}; check the url")
    return sorted(files, key=lambda file: natural_key(file.name))


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def natural_key(name: str) -> tuple[list[tuple[int, str]], str]:
    """Return a sort key that compares runs of digits as numbers; no two names have the same."""
    parts = _DIGITS.split(name)
    # Odd parts are the digits. Longer is larger once leading zeros are gone; int() refuses more than 4,300 digits.
    keys = [(len(p.lstrip("0")), p.lstrip("0")) if odd % 2 else (0, p) for odd, p in enumerate(parts)]
    return keys, name


def load_files(
    place: Place, files: list[PtFile], *, layout: str, trust_pickle: bool
) -> Iterator[tuple[PtFile, LoadedFile]]:
    """Yield what each file holds, one file in memory at a time.

    Args:
        place: Where they are.
        files: Which, in which order.
        layout: One of ``shard.layouts.Layout``; "auto": the first file decides for all.
        trust_pickle: Let pickles run code.

    Raises:
        ShardCorrupt: A file is damaged, or its pickle is not safe.
        SampleInvalid: A file's samples lie in another way than those of the first, or cannot be stored.
        OptionInvalid: There is no such layout, or this torch cannot load foreign pickles safely.
        StoreError: A file could not be read.
    """
    for file in files:
        data = place.get(file.name, max_bytes=file.size + 1)
        loaded = load_file(data, name=f"{place.url}/{file.name}", layout=layout, trust_pickle=trust_pickle)
        del data
        layout = loaded.layout
        yield file, loaded


def load_file(data: Blob, *, name: str, layout: str = "auto", trust_pickle: bool = False) -> LoadedFile:
    """Return what one file holds; *name* is its url, for messages. Errors: see ``load_files``."""
    digest = digest_of(data)
    if is_framed(data):
        return _load_framed(data, name, layout, digest)
    raw = memoryview(decompressed(data, name=name, max_raw_bytes=MAX_RAW_BYTES))
    raw_bytes = len(raw)
    payload = load_foreign(raw, name=name, max_raw_bytes=MAX_RAW_BYTES, trust_pickle=trust_pickle)
    del raw
    try:
        found, columns = columns_of(payload, layout=layout)
    except SampleInvalid as error:
        raise SampleInvalid(f"{name}: {error}{_hint(payload, layout)}") from error
    return LoadedFile(found, columns, raw_bytes, digest, tail=None)


def _load_framed(data: Blob, name: str, layout: str, digest: str) -> LoadedFile:
    if layout not in ("auto", OWN):
        raise SampleInvalid(f"{name}: a shard of streamshards, where the layout is {layout!r}; {_APART}")
    reader = FramedShard(data, name=name, max_raw_bytes=MAX_RAW_BYTES)
    # Nobody has promised a digest yet: check every frame, those that only plain torch.load reads included.
    decompressed(data, name=name, max_raw_bytes=reader.raw_bytes)
    return LoadedFile(OWN, reader.columns(), reader.raw_bytes, digest, tail=describe_tail(tail_of(data)))


def _hint(payload: object, layout: str) -> str:
    """Return what else the file may be, if it fits another layout than the one that was asked of it."""
    if layout == "auto":
        return ""
    try:
        found, _ = columns_of(payload)
    except StreamShardsError:
        return ""
    return "" if found == layout else f"; by itself it looks like layout {found!r}: {_APART}, or name the layout"
