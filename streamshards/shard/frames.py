"""Frames: how the bytes of a ``.pt`` file lie in a ``.pt.zst``. The only importer of zstandard.

Theory. A shard is zstd frames, one skippable frame with our directory, and the seek table of the zstd seekable
format. Each column's storage starts a frame and ends one, in between it is cut between rows; so a column, or some rows
of it, can be decoded alone, straight into the memory where it will live. Reading trusts nothing: all sizes are checked
against each other before any memory is taken, and zstd verifies every frame's checksum.

Few, long calls: each call into zstandard gives up the GIL once per frame, and beside a busy Python thread every
return costs up to 5 ms. Hence 2-4 MiB per frame, and one ``readinto`` across all frames of a range.

Source: RFC 8878; https://github.com/facebook/zstd/blob/dev/contrib/seekable_format/zstd_seekable_compression_format.md
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

import numpy as np
import xxhash
import zstandard

from streamshards.errors import ShardCorrupt
from streamshards.options import KiB, MiB

BLOCK_BYTES: Final = 4 * MiB
"""A column is cut into equal blocks of at most this: 2-4 MiB when it is larger. 256 KiB would cost 1-4 % of the ratio
and a sixth of the speed beside a busy thread; larger ones make partial reads dearer and gain nothing."""
MIN_SAVING: Final = 1 / 32
"""A column block that shrinks by less is stored as it is: decoding it would cost more time than its bytes."""
AUTO_MIN_SAVING: Final = 1 / 10
"""The same, where the level is ours to choose: stored bytes are read at the speed of a copy, ten times as fast."""
AUTO_LEVELS: Final = (1, 3)
"""Decoding what level 1 made is up to twice as fast (plain pixels), as compressing is; other levels gain little."""
AUTO_STEP: Final = 1 / 8
"""Level 3 is taken where it makes a column this much smaller than level 1 does."""
_SAMPLE_SLICES: Final = 4
_SAMPLE_BYTES: Final = 128 * KiB  # of each slice; all together more than 256 KiB, below which zstd works differently

DIRECTORY_MAGIC: Final = 0x184D2A5D
SEEK_TABLE_MAGIC: Final = 0x184D2A5E
SEEKABLE_MAGIC: Final = 0x8F92EAB1
MAX_DIRECTORY_BYTES: Final = 16 * MiB
"""About 100,000 columns. The directory is parsed as JSON, which takes many times its size."""

_SKIPPABLE: Final = struct.Struct("<II")  # magic, size of what follows
_FOOTER: Final = struct.Struct("<IBI")  # number of frames, descriptor, SEEKABLE_MAGIC
_ENTRY: Final = struct.Struct("<III")  # compressed size, raw size, low 32 bits of XXH64 of the raw bytes
_ENTRY_DTYPE: Final = np.dtype("<u4")
_DESCRIPTOR: Final = 0x80  # the entries carry checksums; all other bits are reserved
_CHECK: Final = struct.Struct("<Q")  # XXH64 of the directory's JSON: zstd does not look into skippable frames
_EMPTY_CHECKSUM: Final = xxhash.xxh64_intdigest(b"") & 0xFFFFFFFF
_MAX_WINDOW_BYTES: Final = 128 * MiB  # what the zstd command line accepts, too
_RAW_BLOCK_BYTES: Final = 128 * KiB  # Block_Maximum_Size, RFC 8878 section 3.1.1.2.3
_INFLATE_BYTES: Final = 4 * MiB  # few GIL-free calls; a bomb is noticed this late


class FrameWriter:
    """A file object for ``torch.save`` that turns what is written into frames.

    Args:
        level: Of zstd. None: chosen for each column by a sample of its bytes, and by nothing else.
    """

    def __init__(self, *, level: int | None) -> None:
        self.position = 0
        """Bytes written so far, uncompressed."""
        self._watched: dict[int, tuple[int, int]] = {}
        self._found: dict[int, int] = {}
        self._pending = bytearray()
        self._frames: list[bytes] = []
        self._entries: list[bytes] = []
        self._level = level
        self._min_saving = AUTO_MIN_SAVING if level is None else MIN_SAVING
        self._compressors: dict[int, zstandard.ZstdCompressor] = {}

    def watch(self, address: int, nbytes: int, row_bytes: int) -> None:
        """Expect a column's storage at *address*: it gets frames of its own, cut between rows of *row_bytes*."""
        self._watched[address] = (nbytes, row_bytes)

    def found(self, address: int) -> int:
        """Return the position at which the storage at *address* was written.

        Raises:
            RuntimeError: It was not. torch.save hands over each storage in one ``write`` of its own memory; a torch
                that stops doing so must not go unnoticed.
        """
        if address not in self._found:
            raise RuntimeError("torch.save did not write a column's storage in one piece; this torch is not supported")
        return self._found[address]

    def write(self, data: bytes | memoryview) -> int:
        """Take the next bytes of the file."""
        view = memoryview(data).cast("B")
        if not view.nbytes:
            return 0
        address = int(np.frombuffer(view, np.uint8).ctypes.data)
        nbytes, row_bytes = self._watched.get(address, (-1, 0))
        if nbytes == view.nbytes:
            self._found[address] = self.position
            self._write_column(view, row_bytes)
        else:
            self._pending += view
            if len(self._pending) >= BLOCK_BYTES:
                self.flush()
        self.position += view.nbytes
        return view.nbytes

    def flush(self) -> None:
        """End the frame of small writes, if there is one."""
        for start in range(0, len(self._pending), BLOCK_BYTES):
            compressor = self._compressor(AUTO_LEVELS[-1] if self._level is None else self._level)
            self._emit(compressor.compress(self._pending[start : start + BLOCK_BYTES]))
        self._pending = bytearray()

    def finish(self, directory: bytes) -> bytes:
        """Return the whole shard: the frames, *directory* (JSON), the seek table."""
        self.flush()
        if len(directory) > MAX_DIRECTORY_BYTES:
            raise ValueError(f"a directory of {len(directory):,} bytes; {MAX_DIRECTORY_BYTES:,} are possible")
        content = _CHECK.pack(xxhash.xxh64_intdigest(directory)) + directory
        frame = _SKIPPABLE.pack(DIRECTORY_MAGIC, len(content)) + content
        entries = [*self._entries, _ENTRY.pack(len(frame), 0, _EMPTY_CHECKSUM)]
        table = b"".join(entries) + _FOOTER.pack(len(entries), _DESCRIPTOR, SEEKABLE_MAGIC)
        return b"".join([*self._frames, frame, _SKIPPABLE.pack(SEEK_TABLE_MAGIC, len(table)), table])

    def _write_column(self, view: memoryview, row_bytes: int) -> None:
        self.flush()
        size = block_size(view.nbytes, row_bytes)
        level = choose_level(view) if self._level is None else self._level
        for start in range(0, view.nbytes, size):
            block = view[start : start + size]
            self._emit(stored_frame(block) if level is None else self._compress(block, level))

    def _compress(self, block: memoryview, level: int) -> bytes:
        frame = self._compressor(level).compress(block)
        return frame if len(frame) <= block.nbytes * (1 - self._min_saving) else stored_frame(block)

    def _compressor(self, level: int) -> zstandard.ZstdCompressor:
        if level not in self._compressors:
            self._compressors[level] = _make_compressor(level)
        return self._compressors[level]

    def _emit(self, frame: bytes) -> None:
        content_size = zstandard.get_frame_parameters(frame[:18]).content_size
        # The frame ends with the low 32 bits of XXH64 of its content: just what the seek table wants.
        self._entries.append(_ENTRY.pack(len(frame), content_size, int.from_bytes(frame[-4:], "little")))
        self._frames.append(frame)


def block_size(nbytes: int, row_bytes: int) -> int:
    """Return how many bytes of a column go into each frame: whole rows, unless one row is larger than a block."""
    unit = row_bytes if 0 < row_bytes <= BLOCK_BYTES // 2 else 64
    num_blocks = -(-nbytes // BLOCK_BYTES)
    return max(1, -(-nbytes // (num_blocks * unit))) * unit


def choose_level(column: memoryview) -> int | None:
    """Return the zstd level for a column's bytes, by what slices of it shrink to; None: store it as it is."""
    if column.nbytes <= _SAMPLE_SLICES * _SAMPLE_BYTES:
        sample = bytes(column)
    else:
        last = column.nbytes - _SAMPLE_BYTES
        starts = [last * number // (_SAMPLE_SLICES - 1) for number in range(_SAMPLE_SLICES)]
        sample = b"".join([column[start : start + _SAMPLE_BYTES] for start in starts])
    quick, small = (len(_make_compressor(level).compress(sample)) for level in AUTO_LEVELS)
    if min(quick, small) > len(sample) * (1 - AUTO_MIN_SAVING):
        return None
    return AUTO_LEVELS[small <= quick * (1 - AUTO_STEP)]


def _make_compressor(level: int) -> zstandard.ZstdCompressor:
    return zstandard.ZstdCompressor(level=level, write_checksum=True, write_content_size=True)


def stored_frame(data: memoryview) -> bytes:
    """Return a zstd frame that holds *data* as it is: raw blocks, content size, checksum (RFC 8878 section 3.1.1)."""
    # Descriptor 0xA4: a content size of 4 bytes, single segment (no window to allocate), checksum.
    parts: list[bytes | memoryview] = [zstandard.FRAME_HEADER, b"\xa4", len(data).to_bytes(4, "little")]
    for start in range(0, len(data), _RAW_BLOCK_BYTES):
        block = data[start : start + _RAW_BLOCK_BYTES]
        is_last = start + _RAW_BLOCK_BYTES >= len(data)
        parts += [(len(block) << 3 | is_last).to_bytes(3, "little"), block]
    parts.append((xxhash.xxh64_intdigest(data) & 0xFFFFFFFF).to_bytes(4, "little"))
    return b"".join(parts)


def is_framed(data: bytes | memoryview) -> bool:
    """Return whether *data* ends as our shards do: a directory, then a seek table. Nothing else is checked."""
    view = memoryview(data)
    table = _table_bytes(view)
    if table is None:
        return False
    directory_bytes = _ENTRY.unpack_from(view, len(view) - _FOOTER.size - _ENTRY.size)[0]
    at = len(view) - table - directory_bytes
    if at < 0 or directory_bytes < _SKIPPABLE.size:
        return False
    magic: int = _SKIPPABLE.unpack_from(view, at)[0]
    return magic == DIRECTORY_MAGIC


def _table_bytes(view: memoryview) -> int | None:
    """Return the size of the seek table frame at the end, or None if there is none with at least one entry."""
    if len(view) < _SKIPPABLE.size + _ENTRY.size + _FOOTER.size:
        return None
    num_frames, descriptor, magic = _FOOTER.unpack_from(view, len(view) - _FOOTER.size)
    size = _SKIPPABLE.size + num_frames * _ENTRY.size + _FOOTER.size
    if magic != SEEKABLE_MAGIC or descriptor != _DESCRIPTOR or num_frames < 1 or size > len(view):
        return None
    start = len(view) - size
    if _SKIPPABLE.unpack_from(view, start) != (SEEK_TABLE_MAGIC, size - _SKIPPABLE.size):
        return None
    return int(size)


def tail_of(data: bytes | memoryview) -> memoryview:
    """Return the end of a shard, directory and seek table: what is needed to read any part of it.

    Args:
        data: A whole shard whose ``FrameReader`` found nothing wrong.
    """
    view = memoryview(data)
    directory_bytes: int = _ENTRY.unpack_from(view, len(view) - _FOOTER.size - _ENTRY.size)[0]
    return view[len(view) - (_table_bytes(view) or 0) - directory_bytes :]


class FrameReader:
    """Reads ranges of the uncompressed ``.pt`` file out of a shard.

    Threads may share it: each call has a decompressor of its own.
    """

    def __init__(
        self, data: bytes | memoryview, *, name: str, max_raw_bytes: int, stored_bytes: int | None = None
    ) -> None:
        """Check the frames against the seek table.

        Args:
            data: The whole object, or its end, from ``tail_of`` on; then ``add`` brings what is to be read.
            name: The shard, for messages.
            max_raw_bytes: Refuse more uncompressed bytes than this.
            stored_bytes: Of the whole object; None: *data* is all of it.

        Raises:
            ShardCorrupt: The seek table, the frames' headers and the object's size do not agree.
        """
        self.name = name
        tail = memoryview(data).cast("B")
        table = _table_bytes(tail)
        if table is None:
            raise self._corrupt(f"no seek table at the end of its {len(tail):,} bytes; truncated, or not a shard")
        entries = np.frombuffer(tail[-table:][_SKIPPABLE.size : -_FOOTER.size], _ENTRY_DTYPE).reshape(-1, 3)
        self._entries = entries.astype(np.int64)
        self._starts = np.concatenate([[0], self._entries[:, 0].cumsum()])
        self._raw_starts = np.concatenate([[0], self._entries[:-1, 1].cumsum()])
        size = len(tail) if stored_bytes is None else stored_bytes
        if int(self._starts[-1]) != size - table:
            raise self._corrupt(f"the seek table accounts for {int(self._starts[-1]):,} bytes, {size - table:,} came")
        self.raw_bytes = int(self._raw_starts[-1])
        """Bytes of the uncompressed file."""
        if self.raw_bytes > max_raw_bytes:
            raise self._corrupt(f"inflates to {self.raw_bytes:,} bytes, more than the {max_raw_bytes:,} allowed")
        self._segments: list[tuple[int, memoryview]] = [(size - len(tail), tail)]
        self.directory = self._read_directory(self._entries[-1])
        """The directory's JSON; its checksum is right."""
        for number, frame in self._frames_in(*self._segments[0]):
            self._check_frame(number, frame)

    def tail(self) -> memoryview:
        """Return the end of the shard that it was made from: see ``tail_of``."""
        return tail_of(self._segments[0][1])

    def add(self, start: int, data: bytes | memoryview) -> None:
        """Take stored bytes from *start* on: those of a ``stored_range``, or of several with what lies between.

        Raises:
            ShardCorrupt: They do not agree with the seek table.
        """
        segment = (start, memoryview(data).cast("B"))
        for number, frame in self._frames_in(*segment):
            self._check_frame(number, frame)
            # No digest vouches for these bytes, the table's checksum does: it must be the one that zstd will look at.
            if _end_of_blocks(frame, zstandard.frame_header_size(frame[:18])) + 4 != len(frame):
                raise self._corrupt(f"what lies at byte {int(self._starts[number]):,} is not one zstd frame")
        self._segments.append(segment)

    def stored_range(self, lo: int, hi: int) -> tuple[int, int]:
        """Return which stored bytes, from and to, hold the frames with bytes lo..hi of the uncompressed file."""
        first = int(np.searchsorted(self._raw_starts, lo, "right")) - 1
        last = int(np.searchsorted(self._raw_starts, hi, "left"))
        return int(self._starts[first]), int(self._starts[last])

    def holds(self, start: int, stop: int) -> bool:
        """Return whether these stored bytes are here."""
        return any(at <= start and stop <= at + len(data) for at, data in self._segments)

    def read_into(self, lo: int, hi: int, out: memoryview) -> None:
        """Fill *out* with bytes lo..hi of the uncompressed file.

        Frames wholly inside are decoded in place, in one call; those on the edges through scratch.

        Raises:
            ShardCorrupt: Out of bounds, another size than *out*, or the frames do not decode.
        """
        if not 0 <= lo <= hi <= self.raw_bytes or len(out) != hi - lo:
            text = f"bytes {lo:,} to {hi:,} of {self.raw_bytes:,} were asked for, with room for {len(out):,}"
            raise self._corrupt(text)
        if lo == hi:
            return
        raw = self._raw_starts
        first = int(np.searchsorted(raw, lo, "right")) - 1
        last = int(np.searchsorted(raw, hi, "left"))  # one past the last frame
        inner_first = first + (int(raw[first]) < lo)
        inner_last = last - (int(raw[last]) > hi)
        if inner_first > inner_last:  # one frame, and both of its ends are cut off
            inner_last = inner_first
        if first < inner_first:
            self._read_edge(first, lo, min(hi, int(raw[inner_first])), out, lo)
        if inner_first < inner_last:
            start, end = int(raw[inner_first]), int(raw[inner_last])
            self._decode(inner_first, inner_last, out[start - lo : end - lo])
        if inner_last < last:
            self._read_edge(inner_last, int(raw[inner_last]), hi, out, lo)

    def pieces(self, nbytes: int = BLOCK_BYTES) -> Iterator[memoryview]:
        """Yield the uncompressed file from its first byte to its last, each piece in the memory of the one before.

        Args:
            nbytes: Of a piece, about: as many whole frames as fit, and at least one.

        Raises:
            ShardCorrupt: The frames do not decode.
        """
        scratch = memoryview(bytearray(min(nbytes, self.raw_bytes)))
        first, last = 0, len(self._raw_starts) - 1
        while first < last:
            start = int(self._raw_starts[first])
            stop = max(first + 1, int(np.searchsorted(self._raw_starts, start + nbytes, "right")) - 1)
            size = int(self._raw_starts[stop]) - start
            if size > len(scratch):
                scratch = memoryview(bytearray(size))
            self._decode(first, stop, scratch[:size])
            yield scratch[:size]
            first = stop

    def _read_edge(self, frame: int, lo: int, hi: int, out: memoryview, origin: int) -> None:
        start = int(self._raw_starts[frame])
        scratch = memoryview(bytearray(int(self._raw_starts[frame + 1]) - start))
        self._decode(frame, frame + 1, scratch)
        out[lo - origin : hi - origin] = scratch[lo - start : hi - start]

    def _decode(self, first: int, last: int, out: memoryview) -> None:
        start, end = int(self._starts[first]), int(self._starts[last])
        decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)
        try:
            with decompressor.stream_reader(self._stored(start, end), read_across_frames=True) as stream:
                count = stream.readinto(out)
        except zstandard.ZstdError as error:
            raise self._corrupt(f"bytes {start:,} to {end:,} do not decode: {error}") from error
        if count != len(out):
            raise self._corrupt(f"bytes {start:,} to {end:,} gave {count:,} of {len(out):,} bytes")

    def _read_directory(self, entry: np.ndarray[tuple[int], np.dtype[np.int64]]) -> bytes:
        size, raw_size, checksum = (int(number) for number in entry)
        start = int(self._starts[-2])
        prefix = _SKIPPABLE.size + _CHECK.size
        if not prefix <= size <= prefix + MAX_DIRECTORY_BYTES or (raw_size, checksum) != (0, _EMPTY_CHECKSUM):
            raise self._corrupt(f"bytes {start:,} to {start + size:,} are no directory")
        if not self.holds(start, start + size):
            raise self._corrupt(f"a directory of {size:,} bytes at byte {start:,}, before what came")
        frame = self._stored(start, start + size)
        if _SKIPPABLE.unpack_from(frame) != (DIRECTORY_MAGIC, size - _SKIPPABLE.size):
            raise self._corrupt(f"no directory at byte {start:,}")
        (check,) = _CHECK.unpack_from(frame, _SKIPPABLE.size)
        content = bytes(frame[prefix:])
        if xxhash.xxh64_intdigest(content) != check:
            raise self._corrupt(f"the directory at byte {start:,} does not have its checksum")
        return content

    def _stored(self, start: int, end: int) -> memoryview:
        for at, data in self._segments:
            if at <= start and end <= at + len(data):
                return data[start - at : end - at]
        raise RuntimeError(f"{self.name}: stored bytes {start:,} to {end:,} have not been fetched")

    def _frames_in(self, start: int, data: memoryview) -> Iterator[tuple[int, memoryview]]:
        """Yield number and bytes of each frame that lies wholly in *data*, the object's bytes from *start* on."""
        first = int(np.searchsorted(self._starts, start, "left"))
        last = int(np.searchsorted(self._starts, start + len(data), "right")) - 1
        for number in range(first, min(last, len(self._entries) - 1)):
            lo, hi = int(self._starts[number]) - start, int(self._starts[number + 1]) - start
            yield number, data[lo:hi]

    def _check_frame(self, number: int, frame: memoryview) -> None:
        start = int(self._starts[number])
        raw_size, checksum = int(self._entries[number, 1]), int(self._entries[number, 2])
        if bytes(frame[:4]) != zstandard.FRAME_HEADER:
            raise self._corrupt(f"no zstd frame at byte {start:,}")
        try:
            header = zstandard.get_frame_parameters(frame[:18])
        except zstandard.ZstdError as error:
            raise self._corrupt(f"the frame header at byte {start:,} is damaged: {error}") from error
        if header.content_size != raw_size or not raw_size:
            text = f"the frame at byte {start:,} declares {header.content_size:,} bytes, the seek table {raw_size:,}"
            raise self._corrupt(text)
        if not header.has_checksum or header.dict_id or header.window_size > max(_MAX_WINDOW_BYTES, raw_size):
            raise self._corrupt(f"the frame at byte {start:,} lacks a checksum, needs a dictionary or a vast window")
        if int.from_bytes(frame[-4:], "little") != checksum:
            raise self._corrupt(f"the frame at byte {start:,} and the seek table have different checksums")

    def _corrupt(self, text: str) -> ShardCorrupt:
        return ShardCorrupt(f"{self.name}: {text}")


def deflate(data: bytes) -> bytes:
    """Return *data* as one zstd frame with content size and checksum; ``inflate`` gives it back."""
    return _make_compressor(3).compress(data)


def inflate(data: bytes | memoryview, *, name: str, max_raw_bytes: int) -> bytearray:
    """Return everything that any zstd file holds: one or more frames, anyone's.

    Raises:
        ShardCorrupt: Truncated (zstandard alone would return less, without a word), damaged, or over *max_raw_bytes*.
    """
    view = memoryview(data).cast("B")
    known = _require_complete(view, name)
    if known is not None and known > max_raw_bytes:
        raise ShardCorrupt(f"{name}: inflates to {known:,} bytes, more than the {max_raw_bytes:,} allowed")
    out = bytearray()
    decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)
    try:
        with decompressor.stream_reader(view, read_across_frames=True) as stream:
            while chunk := stream.read(_INFLATE_BYTES):
                out += chunk
                if len(out) > max_raw_bytes:
                    raise ShardCorrupt(f"{name}: inflates to more than the {max_raw_bytes:,} bytes allowed")
    except zstandard.ZstdError as error:
        raise ShardCorrupt(f"{name}: does not decode: {error}") from error
    if known is not None and len(out) != known:
        raise ShardCorrupt(f"{name}: gave {len(out):,} of {known:,} bytes")
    return out


def _require_complete(view: memoryview, name: str) -> int | None:
    """Return the uncompressed size if all frames tell theirs; raise unless the last frame is all there.

    Walks frame by frame and block by block (RFC 8878 sections 3.1.1 and 3.1.2), decoding nothing.
    """
    at, known = 0, 0
    is_known = True
    try:
        while at < len(view):
            if len(view) - at >= _SKIPPABLE.size and _SKIPPABLE.unpack_from(view, at)[0] >> 4 == DIRECTORY_MAGIC >> 4:
                at += _SKIPPABLE.size + _SKIPPABLE.unpack_from(view, at)[1]
                continue
            header = zstandard.get_frame_parameters(view[at : at + 18])
            is_known = is_known and header.content_size < 2**63
            known += header.content_size
            at = _end_of_blocks(view, at + zstandard.frame_header_size(view[at : at + 18]))
            at += 4 if header.has_checksum else 0
    except zstandard.ZstdError as error:
        raise ShardCorrupt(f"{name}: no complete zstd frame at byte {at:,}: {error}") from error
    if at != len(view):
        raise ShardCorrupt(f"{name}: truncated: its last frame ends at byte {at:,}, {len(view):,} came")
    return known if is_known else None


def _end_of_blocks(view: memoryview, at: int) -> int:
    while at + 3 <= len(view):
        header = int.from_bytes(view[at : at + 3], "little")
        is_last, kind, size = header & 1, header >> 1 & 3, header >> 3
        at += 3 + (1 if kind == 1 else size)  # kind 1: one byte, repeated
        if is_last:
            return at
    return len(view) + 1
