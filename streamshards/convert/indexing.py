"""An index for files that have none: foreign ``.pt`` files read in place, or our own shards whose index is lost."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Final, Literal, get_args

import numpy as np

from streamshards.clock import utc_timestamp
from streamshards.convert.files import OWN, LoadedFile, PtFile, find_files, load_files
from streamshards.convert.place import Place, Progress
from streamshards.errors import IndexInvalid, OptionInvalid, SampleInvalid
from streamshards.options import RetryOptions
from streamshards.plan.index import Index, is_safe_name
from streamshards.shard.schema import Schema

Mode = Literal["error", "replace"]

_ENDINGS: Final = {".zst": "zstd", ".gz": "gzip"}


def build_index(
    url: str | os.PathLike[str],
    *,
    layout: str = "auto",
    mode: Mode = "error",
    trust_pickle: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    retry: RetryOptions | None = None,
    progress: Progress | None = None,
) -> Index:
    """Index the files at *url* where they are, and return the index; ``StreamingDataset(url)`` then reads them.

    Every file is read and decoded once. Foreign files are not rewritten: readers unpickle them safely each time. Of our
    own shards all that are there become part of the dataset, those that a crashed writer left behind included.

    Args:
        url: A folder or url with ``.pt``/``.pth`` files, plain, ``.zst`` or ``.gz``.
        layout: How samples lie in the files; "auto": the first file decides for all.
        mode: What to do where there is an index: refuse, or put the new one in its place.
        trust_pickle: Let the files run code when they are loaded. Readers will need to be told, too.
        storage_options: For fsspec.
        retry: How long the store may fail.
        progress: Told after each file.

    Raises:
        IndexInvalid: There are no such files, or a damaged index and *mode* is "error".
        SampleInvalid: A file's samples do not fit those before it; the text names the file.
        ShardCorrupt: A file is damaged, or its pickle is not safe.
        OptionInvalid: An argument cannot be what it is, a file's name cannot stand in an index, or there is an index
            and *mode* is "error".
        StoreError: The store failed or refused.

    Guarantees: nothing changes at *url* before the last step, which is atomic. Files in natural order of their names.
    """
    place = Place.at(url, storage_options, retry)
    if mode not in get_args(Mode):
        raise OptionInvalid(f'mode={mode!r} must be "error" or "replace"')
    if mode == "error":
        _require_no_index(place)
    files = find_files(place)
    for file in files:
        if not is_safe_name(file.name):
            raise OptionInvalid(f"{place.url}: {file.name[:80]!r} cannot stand in an index; rename the file")
    rows = _Rows(place)
    for file, loaded in load_files(place, files, layout=layout, trust_pickle=trust_pickle):
        rows.add(file, loaded)
        if progress is not None:
            progress(len(rows.names), len(files), file.name)
    index = rows.to_index(_codec(files))
    place.save_index(index, replace=mode == "replace")
    return index


class _Rows:
    """What the index will say, file by file."""

    def __init__(self, place: Place) -> None:
        self.names: list[str] = []
        self._place = place
        self._layout = "auto"
        self._schema: Schema | None = None
        self._counts: list[tuple[int, int, int]] = []
        self._digests: list[str] = []
        self._tails: list[tuple[int, int]] = []

    def add(self, file: PtFile, loaded: LoadedFile) -> None:
        if loaded.layout == OWN and loaded.tail is None:
            raise SampleInvalid(
                f"{self._place.url}/{file.name}: the .pt file of a shard, but its seek table is damaged or gone; "
                f"pack it anew: streamshards pack {self._place.url} DST"
            )
        columns = loaded.columns
        if columns.num_rows:  # the columns of no rows have no types
            self._merge(columns.schema, f"{self._place.url}/{file.name}")
        self._layout = loaded.layout
        self.names.append(file.name)
        self._counts.append((columns.num_rows, file.size, loaded.raw_bytes))
        self._digests.append(loaded.digest)
        self._tails.append(loaded.tail or (0, 0))

    def to_index(self, codec: str) -> Index:
        if self._schema is None:
            raise IndexInvalid(f"{self._place.url}: not one of the {len(self.names):,} files holds a sample")
        rows, sizes, raw_sizes = np.array(self._counts, dtype=np.int64).T
        return Index(
            schema=self._schema.to_json(),
            names=self.names,
            rows=rows,
            sizes=sizes,
            raw_sizes=raw_sizes,
            digests=self._digests,
            tails=np.array(self._tails, dtype=np.int64),
            layout=self._layout,
            codec=codec,
            created=utc_timestamp(),
            writer="streamshards index",
        )

    def _merge(self, schema: Schema, url: str) -> None:
        try:
            self._schema = schema if self._schema is None else self._schema.merge(schema)
        except SampleInvalid as error:
            raise SampleInvalid(f"{url}: does not fit the files before it: {error}") from error


def _require_no_index(place: Place) -> None:
    """Raise OptionInvalid before any work is done, where there is an index already."""
    names = {name for name, _ in place.list()}
    if names & {"index.json", "index.json.zst"}:
        index = place.load_index()
        raise OptionInvalid(
            f"{place.url}: there is an index already, of {index.num_samples:,} samples; "
            'put a new one in its place with mode="replace"'
        )


def _codec(files: list[PtFile]) -> str:
    """Return how the files are compressed, as far as their names tell: ``"zstd"``, ``"none, gzip"``."""
    found = {next((codec for end, codec in _ENDINGS.items() if f.name.lower().endswith(end)), "none") for f in files}
    return ", ".join(sorted(found))
