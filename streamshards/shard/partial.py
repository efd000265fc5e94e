"""A shard of which only some frames are in memory: those that the rows and fields asked for lie in.

What may be read is fetched before, with ``load``: first what is known from the directory, then the values of ragged
fields, which lie where their offsets say. Ranges that lie close together are fetched as one.

The tail, with the checksum of every frame, must have been verified; so each frame is, and no digest of the whole is
needed. What is damaged all the same is for the caller to fetch whole, where a digest can tell what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from streamshards.errors import ShardCorrupt
from streamshards.options import KiB
from streamshards.shard.frames import FrameReader
from streamshards.shard.payload import PayloadShard
from streamshards.shard.raw import BackedPayload
from streamshards.shard.schema import Field, Part, Schema

GAP_BYTES: Final = 512 * KiB
"""What lies between two ranges is fetched with them if it is less: a request costs more than that on any store."""

GetRange = Callable[[int, int], bytes | memoryview]
"""Returns the stored bytes from, and to but without, a place in the object."""
Wanted = tuple[Field, Part, int, int]
"""A part of a field, as the shard has it, and which of its items."""


class PartialShard(PayloadShard):
    """A shard as it lies in a store, decoded from those of its frames that were loaded.

    Args:
        frames: Made from the tail alone.
        get: Fetches stored bytes.
        on_damage: Returns the whole payload when a frame turns out to be damaged.

    Raises:
        ShardCorrupt: The directory is not right.
    """

    def __init__(self, frames: FrameReader, *, get: GetRange, on_damage: Callable[[ShardCorrupt], FrameReader]) -> None:
        super().__init__(BackedPayload(frames, on_damage), name=frames.name, is_decoded=False)
        self._frames = frames
        self._get = get

    def cost(self, schema: Schema, lo: int, hi: int) -> int:
        """Return about how many stored bytes ``load`` would fetch for a shard of which nothing is here."""
        known, ragged = self._wanted(schema, lo, hi)
        num_rows = max(1, self.num_rows)
        guessed = [(field, part, size * lo // num_rows, size * hi // num_rows) for field, part, _, size in ragged]
        return sum(stop - start for start, stop in _joined(self._ranges(known + guessed)))

    def load(self, schema: Schema, lo: int, hi: int) -> None:
        """Fetch what rows lo..hi of the fields of *schema* need and is not here yet.

        Raises:
            ShardCorrupt: What came is not what the seek table says, or the fields are not those of *schema*.
            StoreError: Whatever *get* raises.
        """
        known, ragged = self._wanted(schema, lo, hi)
        is_whole = (lo, hi) == (0, self.num_rows)
        self._fetch(known + ragged if is_whole else known)
        if not is_whole:
            self._fetch([self._spanned(field, part, lo, hi) for field, part, _, _ in ragged])

    def _wanted(self, schema: Schema, lo: int, hi: int) -> tuple[list[Wanted], list[Wanted]]:
        """Return what is known to be needed, and all values of ragged fields, of which a part will be."""
        known: list[Wanted] = []
        ragged: list[Wanted] = []
        for own in map(self._own, schema.fields):
            for part in own.parts:
                size = self._directory.extents[own.path, part].shape[0]
                if part == "offsets":
                    known.append((own, part, 0, size))
                elif part == "values" and own.kind != "tensor":
                    ragged.append((own, part, 0, size))
                else:
                    known.append((own, part, lo, hi))
        return known, ragged

    def _spanned(self, own: Field, part: Part, lo: int, hi: int) -> Wanted:
        offsets = self._own_offsets(own)
        return own, part, int(offsets[lo]), int(offsets[hi])

    def _fetch(self, wanted: Iterable[Wanted]) -> None:
        missing = [span for span in self._ranges(wanted) if not self._frames.holds(*span)]
        for start, stop in _joined(missing):
            data = self._get(start, stop)
            if len(data) != stop - start:
                raise ShardCorrupt(f"{self.name}: {len(data):,} of {stop - start:,} bytes came from byte {start:,} on")
            self._frames.add(start, data)

    def _ranges(self, wanted: Iterable[Wanted]) -> list[tuple[int, int]]:
        spans = (self._span(own, part, lo, hi) for own, part, lo, hi in wanted)
        return [self._frames.stored_range(start, stop) for start, stop in spans if start < stop]


def _joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the ranges, ascending, those in one that overlap or lie close together."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if joined and start - joined[-1][1] < GAP_BYTES:
            joined[-1] = joined[-1][0], max(stop, joined[-1][1])
        else:
            joined.append((start, stop))
    return joined
