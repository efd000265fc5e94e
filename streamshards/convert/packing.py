"""Foreign ``.pt`` files, or another dataset, rewritten into columnar shards."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from streamshards.convert.files import find_files, load_files
from streamshards.convert.place import Place, Progress
from streamshards.errors import IndexInvalid, OptionInvalid, SampleInvalid
from streamshards.options import RetryOptions
from streamshards.plan.index import Index
from streamshards.shard.columns import Columns, to_batch
from streamshards.shard.samples import rows_of
from streamshards.writer import ShardWriter

_INDEX_NAMES: Final = frozenset({"index.json", "index.json.zst"})


@dataclass(frozen=True)
class Packed:
    """What ``pack`` did."""

    num_files: int
    num_samples: int
    """Packed now, without those that an appended-to dataset had before."""
    layout: str
    """Of the files; "shard" for a dataset's own shards."""
    index: Index
    """What is at the destination now."""


def pack(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    shard_bytes: int | str = "32MiB",
    compression: str = "auto",
    mode: Literal["error", "append", "replace"] = "error",
    layout: str = "auto",
    trust_pickle: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    retry: RetryOptions | None = None,
    progress: Progress | None = None,
) -> Packed:
    """Write the samples of *src* as a dataset at *dst*, and return what was done.

    Args:
        src: A folder or url with ``.pt``/``.pth`` files, plain, ``.zst`` or ``.gz``; or a dataset, whose shards are
            then read in the order of its index.
        dst: Where the shards and the index go.
        shard_bytes: About how large a shard is before compression.
        compression: As for ``ShardWriter``.
        mode: What to do where there is a dataset at *dst*.
        layout: How samples lie in the files; "auto": the first file decides for all.
        trust_pickle: Let the files run code when they are loaded.
        storage_options: For both urls; a local path ignores them.
        retry: How long a store may fail.
        progress: Told after each file.

    Raises:
        IndexInvalid: There is nothing to pack at *src*.
        SampleInvalid: A file's samples do not fit those before it, or cannot be stored; the text names the file.
        ShardCorrupt: A file is damaged.
        UnsafePickle: A file's pickle is not safe, and *trust_pickle* is not set.
        OptionInvalid: An argument cannot be what it is, or *dst* is a dataset and *mode* is "error".
        StoreError: A store failed or refused.

    Guarantees: one file in memory at a time, besides what the writer holds. Files in natural order of their names, so
    the same files make the same samples in the same order. Nothing is visible at *dst* unless all went well.
    """
    source = Place.at(src, storage_options, retry)
    target = Place.at(dst, storage_options, retry)
    if source.url == target.url:
        raise OptionInvalid(f"{source.url}: SRC and DST are the same place; write the shards somewhere else")
    pieces = _Pieces(source, layout, trust_pickle)
    if mode == "replace":  # the writer looks only in the other modes; a wrong endpoint is to be known at once
        with contextlib.suppress(IndexInvalid):
            target.index_keys()
    writer = ShardWriter(
        dst,
        shard_bytes=shard_bytes,
        compression=compression,
        mode=mode,
        storage_options=storage_options,
        retry=retry,
    )
    with writer:
        for done, (name, columns) in enumerate(pieces, start=1):
            _write(writer, columns, f"{source.url}/{name}")
            if progress is not None:
                progress(done, pieces.num_files, name)
    return Packed(pieces.num_files, pieces.num_samples, pieces.layout, writer.index)


class _Pieces:
    """The columns of each file of a folder, or of each shard of a dataset."""

    def __init__(self, source: Place, layout: str, trust_pickle: bool) -> None:
        self.layout = layout
        self.num_samples = 0
        self._source = source
        self._trust_pickle = trust_pickle
        self._index: Index | None = None
        index = source.load_index() if _INDEX_NAMES & {name for name, _ in source.list()} else None
        if index is not None and index.layout == "shard":
            if layout not in ("auto", "shard"):
                raise OptionInvalid(f"layout={layout!r}: {source.url} is a dataset of shards, not of {layout}")
            self._index = index
            self.layout = index.layout
            self.num_files = index.num_shards
            return
        if index is not None and layout == "auto":
            self.layout = index.layout
        # An index made in place only names files: those that came after it was made count, too.
        self._files = find_files(source)
        self.num_files = len(self._files)

    def __iter__(self) -> Iterator[tuple[str, Columns]]:
        for name, columns in self._of_files() if self._index is None else self._of_dataset(self._index):
            self.num_samples += columns.num_rows
            yield name, columns

    def _of_files(self) -> Iterator[tuple[str, Columns]]:
        for file, loaded in load_files(self._source, self._files, layout=self.layout, trust_pickle=self._trust_pickle):
            self.layout = loaded.layout
            yield file.name, loaded.columns

    def _of_dataset(self, index: Index) -> Iterator[tuple[str, Columns]]:
        fetcher = self._source.fetcher(index, trust_pickle=self._trust_pickle)
        for number, name in enumerate(index.names):
            yield name, fetcher.fetch(number).columns()


def _write(writer: ShardWriter, columns: Columns, url: str) -> None:
    if not columns.num_rows:
        return
    try:
        writer.write_batch(batch_of(columns))
    except SampleInvalid as error:
        raise SampleInvalid(f"{url}: does not fit what came before it: {error}") from error


def batch_of(columns: Columns) -> dict[str, Any]:
    """Return what ``write_batch`` makes these very columns of: as ``to_batch``, but Python numbers in lists."""
    batch = to_batch(columns)
    for field in columns.schema.fields:
        if field.python is None:
            continue
        node = batch
        for key in field.path[:-1]:
            node = node[key]
        node[field.path[-1]] = rows_of(field, columns.data[field.path], columns.num_rows)
        node.pop(field.path[-1] + "?", None)
    return batch
