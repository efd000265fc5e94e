"""The index: which shards exist, how many rows each holds, and what their bytes must be.

It is readable JSON in columns, not a list of objects, so that a million shards load in about a second; docs/format.md
has the details.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final

import numpy as np
import xxhash

from streamshards.errors import IndexInvalid
from streamshards.plan.order import Int64Array

FORMAT: Final = "streamshards"
VERSION: Final = 1
MAX_INDEX_BYTES: Final = 1 << 28
"""Refuse an index whose JSON is larger: a million shards take about 100 MB, and parsing takes up to 25 times that."""
_MAX_COUNT: Final = 1 << 48
"""No shard has more rows or bytes than this."""
_MAX_TOTAL: Final = 1 << 61
"""No dataset has more rows or bytes than this: sums stay inside int64, also those of two columns together."""

_MAX_NAME_CHARS: Final = 1024
_TAIL_KEYS: Final = ("tail_bytes", "tail_check")

_DIGEST_CHARS: Final = 32
_HEX: Final = re.compile(r"[0-9a-f]*")
_PLAIN_NAMES: Final = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.\-]*\n)*")
"""Names, each with a newline, that need no closer look: most are like these, and a million are seen in no time."""
_BAD_NAME: Final = re.compile(
    r"""
    ^$ | \\                         # empty; a backslash is a separator on some systems
    | (?:^|/)\.{0,2}(?:/|$)         # empty, "." and ".." segments; absolute names
    | ^[A-Za-z][A-Za-z0-9+.\-]*:    # a scheme, or a drive
    """,
    re.VERBOSE,
)


def is_safe_name(name: object) -> bool:
    """Return whether *name* is a relative name that cannot leave the dataset's own place."""
    if not isinstance(name, str) or len(name) > _MAX_NAME_CHARS or not name.isprintable() or _BAD_NAME.search(name):
        return False
    # Some file systems and gateways take a fullwidth ".." or "/" for the plain one.
    return name.isascii() or not _BAD_NAME.search(unicodedata.normalize("NFKC", name))


@dataclass(frozen=True, eq=False)
class Index:
    """What a dataset consists of. Immutable; two indexes are the same dataset when their fingerprints are.

    Args:
        schema: The schema as JSON values; what it means is the shard layer's business.
        names: Shard names, relative to the dataset's url.
        rows: int64 ``(shards,)``, samples in each shard.
        sizes: int64 ``(shards,)``, bytes of each object in the store.
        raw_sizes: int64 ``(shards,)``, bytes of each payload once decoded.
        digests: xxh3-128 of each object's bytes, 32 hex digits.
        tails: int64 ``(shards, 2)``: bytes of each object's end that says where its fields are, which a reader fetches
            before it reads a part, and the low 48 bits of their xxh3-64. 0 bytes: not known, the object is read whole.
            Left out: none is known.
        layout: ``"shard"`` for our own shards, else the layout of foreign ``.pt`` files.
        codec: How shards were compressed, for people: ``"zstd:3"``.
        created: ISO 8601.
        writer: What wrote it, for people.
    """

    schema: Mapping[str, Any]
    names: Sequence[str]
    rows: Int64Array
    sizes: Int64Array
    raw_sizes: Int64Array
    digests: Sequence[str]
    layout: str = "shard"
    codec: str = "zstd:3"
    created: str = ""
    writer: str = ""
    tails: Int64Array = field(default_factory=lambda: np.empty((0, 2), dtype=np.int64))
    num_samples: int = field(init=False)

    def __post_init__(self) -> None:
        if not len(self.tails):
            object.__setattr__(self, "tails", np.zeros((len(self.rows), 2), dtype=np.int64))
        object.__setattr__(self, "num_samples", int(self.rows.sum()))

    @property
    def num_shards(self) -> int:
        return len(self.names)

    @cached_property
    def fingerprint(self) -> str:
        """Names the content: xxh3-128 over schema, layout, names, rows, sizes and digests; 32 hex digits."""
        hasher = xxhash.xxh3_128()
        for text in (_canonical(self.schema), self.layout, "\n".join(self.names), "\n".join(self.digests)):
            hasher.update(text.encode())
            hasher.update(b"\0")
        for numbers in (self.rows, self.sizes, self.raw_sizes):
            hasher.update(numbers.astype("<i8").tobytes())
        return hasher.hexdigest()

    def dump(self) -> bytes:
        """Return the index as UTF-8 JSON; :meth:`parse` gives it back."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "num_samples": self.num_samples,
            "fingerprint": self.fingerprint,
            "created": self.created,
            "writer": self.writer,
            "codec": self.codec,
            "layout": self.layout,
            "schema": self.schema,
            "shards": {
                "name": list(self.names),
                "rows": self.rows.tolist(),
                "bytes": self.sizes.tolist(),
                "raw_bytes": self.raw_sizes.tolist(),
                "digest": list(self.digests),
                **self._tails(),
            },
        }
        return (json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n").encode()

    def _tails(self) -> dict[str, list[int]]:
        if not self.tails.any():
            return {}
        return {key: column.tolist() for key, column in zip(_TAIL_KEYS, self.tails.T, strict=True)}

    @classmethod
    def parse(cls, data: bytes, *, url: str) -> Index:
        """Return the index that *data* holds.

        Args:
            data: UTF-8 JSON.
            url: Where it comes from; stands in errors.

        Raises:
            IndexInvalid: Not an index, from a newer version, damaged, or naming anything outside its dataset.
        """
        content = _load_json(data, url)
        shards = _require(content, "shards", dict, url)
        names = _require(shards, "name", list, url)
        digests = _require(shards, "digest", list, url)
        _check_names(names, url)
        if not _are_digests(digests):
            raise IndexInvalid(f"{url}: shards.digest must hold 32 hex digits each; rebuild the index")
        keys = ("rows", "bytes", "raw_bytes", *(_TAIL_KEYS if _TAIL_KEYS[0] in shards else ()))
        counts = {key: _integers(shards, key, url) for key in keys}
        for key, column in {"digest": digests, **counts}.items():
            if len(column) != len(names):
                raise IndexInvalid(f"{url}: {len(names):,} shard names but {len(column):,} values in shards.{key}")
        index = cls(
            schema=_require(content, "schema", dict, url),
            names=names,
            rows=counts["rows"],
            sizes=counts["bytes"],
            raw_sizes=counts["raw_bytes"],
            digests=digests,
            layout=_require(content, "layout", str, url),
            codec=_require(content, "codec", str, url),
            created=_require(content, "created", str, url),
            writer=_require(content, "writer", str, url),
            tails=np.stack([counts[key] for key in keys[3:]], axis=1) if keys[3:] else np.empty((0, 2), dtype=np.int64),
        )
        if (index.tails[:, 0] > index.sizes).any():
            raise IndexInvalid(f"{url}: shards.tail_bytes says more than shards.bytes; rebuild the index")
        promised = _require(content, "num_samples", int, url)
        if promised != index.num_samples:
            raise IndexInvalid(
                f"{url}: num_samples says {promised:,}, the shards' rows add up to {index.num_samples:,}"
            )
        try:
            fingerprint = index.fingerprint
            _canonical([index.codec, index.created, index.writer]).encode()
        except (UnicodeEncodeError, RecursionError) as error:
            raise IndexInvalid(f"{url}: text that is not Unicode, or nested too deeply; rebuild the index") from error
        if _require(content, "fingerprint", str, url) != fingerprint:
            raise IndexInvalid(f"{url}: the fingerprint does not fit the content: damaged or edited by hand")
        return index

    def extended(self, other: Index, *, schema: Mapping[str, Any]) -> Index:
        """Return an index of our shards followed by *other*'s, under the merged *schema*.

        Raises:
            IndexInvalid: Both name the same shard, or the layouts differ.
        """
        if self.layout != other.layout:
            raise IndexInvalid(f"cannot join layout {self.layout!r} with {other.layout!r}; pack the files instead")
        names = [*self.names, *other.names]
        _check_names(names, "the joined index")
        return Index(
            schema=schema,
            names=names,
            rows=np.concatenate([self.rows, other.rows]),
            sizes=np.concatenate([self.sizes, other.sizes]),
            raw_sizes=np.concatenate([self.raw_sizes, other.raw_sizes]),
            digests=[*self.digests, *other.digests],
            tails=np.concatenate([self.tails, other.tails]),
            layout=self.layout,
            codec=other.codec,
            created=other.created,
            writer=other.writer,
        )

    def head(self, num_shards: int) -> Index:
        """Return an index of the first *num_shards* shards: what it was, if the others were appended since."""
        return replace(
            self,
            names=self.names[:num_shards],
            rows=self.rows[:num_shards],
            sizes=self.sizes[:num_shards],
            raw_sizes=self.raw_sizes[:num_shards],
            digests=self.digests[:num_shards],
            tails=self.tails[:num_shards],
        )

    def __repr__(self) -> str:
        return (
            f"Index(samples={self.num_samples:,}, shards={self.num_shards:,}, "
            f"bytes={int(self.sizes.sum()):,}, fingerprint={self.fingerprint})"
        )


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def _load_json(data: bytes, url: str) -> dict[str, Any]:
    if len(data) > MAX_INDEX_BYTES:
        raise IndexInvalid(f"{url}: {len(data):,} bytes of JSON; an index has at most {MAX_INDEX_BYTES:,}")
    try:
        content = json.loads(data, object_pairs_hook=_without_twins)
    except (ValueError, RecursionError) as error:
        raise IndexInvalid(f"{url}: not JSON ({error or 'nested too deeply'}); rebuild the index") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise IndexInvalid(f'{url}: JSON, but not a streamshards index (no "format": "streamshards")')
    version = content.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise IndexInvalid(f"{url}: version {version!r} is not a version number")
    if version > VERSION:
        raise IndexInvalid(
            f"{url}: index version {version}, this streamshards reads up to {VERSION}; upgrade streamshards"
        )
    return content


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object; one with a key that stands twice would be another one to another reader."""
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key stands twice in an object")
    return content


def _require(content: Mapping[str, Any], key: str, kind: type, url: str) -> Any:
    value = content.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise IndexInvalid(f"{url}: {key!r} must be a {kind.__name__}, found {type(value).__name__}")
    return value


def _integers(shards: Mapping[str, Any], key: str, url: str) -> Int64Array:
    values = _require(shards, key, list, url)
    if not {*map(type, values)} <= {int} or not 0 <= min(values, default=0) <= max(values, default=0) <= _MAX_COUNT:
        raise IndexInvalid(f"{url}: shards.{key} must hold whole numbers from 0 to {_MAX_COUNT:,}")
    if key != _TAIL_KEYS[1] and sum(values) > _MAX_TOTAL:
        raise IndexInvalid(f"{url}: shards.{key} adds up to {sum(values):,}; a dataset has at most {_MAX_TOTAL:,}")
    return np.array(values, dtype=np.int64)


def _are_digests(values: list[Any]) -> bool:
    """Return whether all are text of 32 hex digits: a look at each would take as long as all the rest of the index."""
    if not {*map(type, values)} <= {str} or not {*map(len, values)} <= {_DIGEST_CHARS}:
        return False
    return _HEX.fullmatch("".join(values)) is not None


def _are_plain(names: list[Any]) -> bool:
    """Return whether all names are short, and safe at first sight."""
    if not {*map(type, names)} <= {str} or max(map(len, names), default=0) > _MAX_NAME_CHARS:
        return False
    text = "\n".join([*names, ""])
    return text.count("\n") == len(names) and _PLAIN_NAMES.fullmatch(text) is not None


def _check_names(names: list[Any], url: str) -> None:
    for number, name in enumerate(() if _are_plain(names) else names):
        if not is_safe_name(name):
            raise IndexInvalid(
                f"{url}: shard {number} is named {str(name)[:80]!r}; names must be relative, printable and without '..'"
            )
    if len(set(names)) != len(names):
        raise IndexInvalid(f"{url}: a shard name appears twice")
