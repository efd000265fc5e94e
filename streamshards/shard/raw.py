"""Raw payloads: the decoded ``.pt`` file of one shard in a file of this machine, for the node cache.

====== ====================================================================================================
bytes  what they are, little-endian
====== ====================================================================================================
8      ``b"ss-raw\\r\\n"``
4      version, 1
4      D, bytes of the directory
8      P, bytes of the payload
16     xxh3-128 of the shard as it lies in the store: which shard this is
16     xxh3-128 of the directory and the payload
8      XXH64 of the 56 bytes above
D      the directory: JSON, see ``directory``
P      the payload
====== ====================================================================================================

Nothing in such a file is believed before ``verify``; after that, sizes and bounds still are checked as for a shard.

The file is read with ``pread`` straight into the block, not mapped. That is as fast (14 GB/s), and a file that is cut
short or a disk that fails is an error, which the store can mend; in a mapping it is a SIGBUS, which kills.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Final

import xxhash

from streamshards.errors import ShardCorrupt
from streamshards.options import MiB
from streamshards.shard.frames import MAX_DIRECTORY_BYTES, FrameReader
from streamshards.shard.payload import Payload

MAGIC: Final = b"ss-raw\r\n"
VERSION: Final = 1
_HEADER: Final = struct.Struct("<8sIIQ16s16s")
_CHECK: Final = struct.Struct("<Q")
_PREFIX_BYTES: Final = _HEADER.size + _CHECK.size
_HASHED_BYTES: Final = MiB
"""Read at once to be hashed: it stays in the processor's cache."""


def raw_size(frames: FrameReader) -> int:
    """Return the size of the file that ``write_raw`` makes."""
    return _PREFIX_BYTES + len(frames.directory) + frames.raw_bytes


def write_raw(descriptor: int, frames: FrameReader, *, digest: str) -> None:
    """Write a shard, decoded, to an empty file.

    Args:
        descriptor: Of the file.
        frames: The shard.
        digest: Of the shard as it lies in the store, 32 hex digits.

    Raises:
        ShardCorrupt: The frames do not decode.
        OSError: The file did not take it.
    """
    hasher = xxhash.xxh3_128(frames.directory)
    write_all(descriptor, bytes(_PREFIX_BYTES) + frames.directory)
    for piece in frames.pieces():
        hasher.update(piece)
        write_all(descriptor, piece)
    header = _HEADER.pack(
        MAGIC, VERSION, len(frames.directory), frames.raw_bytes, bytes.fromhex(digest), hasher.digest()
    )
    # Last, in one write: before, the file is nothing.
    os.lseek(descriptor, 0, os.SEEK_SET)
    write_all(descriptor, header + _CHECK.pack(xxhash.xxh64_intdigest(header)))


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write all of *data*."""
    rest = memoryview(data).cast("B")
    while rest:
        rest = rest[os.write(descriptor, rest) :]


class RawFile:
    """A :class:`Payload` in a file. Threads may share it."""

    def __init__(
        self,
        descriptor: int,
        *,
        name: str,
        digest: str,
        max_raw_bytes: int,
        open_again: Callable[[], int] | None = None,
    ) -> None:
        """Read and check the header and the sizes; the contents are ``verify``'s to check.

        Args:
            descriptor: Of the file; ours from now on, closed with us at the latest, or if this raises.
            name: The file, for messages.
            digest: Which shard it must be.
            max_raw_bytes: Refuse a larger payload.
            open_again: Returns another descriptor of the very same file, or raises OSError: FileNotFoundError if it is
                gone. With it, none is held between two reads. What it raises is the cause of a read's ShardCorrupt.

        Raises:
            ShardCorrupt: It is no such file, or cannot be read.
        """
        self.name = name
        self._descriptor = descriptor
        self._open_again: Callable[[], int] | None = None
        self._close = weakref.finalize(self, os.close, descriptor)
        try:
            self._open(digest, max_raw_bytes)
            if open_again is not None:
                self._open_again = open_again
                self._close()
        except BaseException:
            self._close()
            raise

    @property
    def is_open(self) -> bool:
        """Whether it holds a descriptor."""
        return self._close.alive

    def verify(self) -> None:
        """Check every byte.

        Raises:
            ShardCorrupt: The contents are not what the header says, or cannot be read.
        """
        hasher = xxhash.xxh3_128(self.directory)
        scratch = memoryview(bytearray(min(_HASHED_BYTES, self.raw_bytes)))
        for lo in range(0, self.raw_bytes, _HASHED_BYTES):
            piece = scratch[: min(_HASHED_BYTES, self.raw_bytes - lo)]
            self.read_into(lo, lo + len(piece), piece)
            hasher.update(piece)
        if hasher.digest() != self._content_digest:
            raise self._corrupt(f"digest {hasher.hexdigest()}, its header promises {self._content_digest.hex()}")

    def read_into(self, lo: int, hi: int, out: memoryview) -> None:
        """Fill *out* with bytes lo..hi of the payload.

        Raises:
            ShardCorrupt: Out of bounds, another size than *out*, or the file does not give them.
        """
        if not 0 <= lo <= hi <= self.raw_bytes or len(out) != hi - lo:
            text = f"bytes {lo:,} to {hi:,} of {self.raw_bytes:,} were asked for, with room for {len(out):,}"
            raise self._corrupt(text)
        self._fill(self._start + lo, out)

    def _open(self, digest: str, max_raw_bytes: int) -> None:
        header = self._read(0, _PREFIX_BYTES)
        magic, version, directory_bytes, raw_bytes, shard, content = _HEADER.unpack_from(header)
        if magic != MAGIC or version != VERSION:
            raise self._corrupt(f"not a raw payload of version {VERSION}")
        if _CHECK.unpack_from(header, _HEADER.size)[0] != xxhash.xxh64_intdigest(header[: _HEADER.size]):
            raise self._corrupt("its header does not have its checksum")
        if shard.hex() != digest:
            raise self._corrupt(f"it holds shard {shard.hex()}, not {digest}")
        if raw_bytes > max_raw_bytes or directory_bytes > MAX_DIRECTORY_BYTES:
            raise self._corrupt(f"{raw_bytes:,} bytes, more than the {max_raw_bytes:,} allowed")
        self.raw_bytes = int(raw_bytes)
        self._start = _PREFIX_BYTES + directory_bytes
        size = os.fstat(self._descriptor).st_size
        if size != self._start + self.raw_bytes:
            raise self._corrupt(f"{size:,} bytes, its header promises {self._start + self.raw_bytes:,}")
        self._content_digest = bytes(content)
        self.directory = bytes(self._read(_PREFIX_BYTES, directory_bytes))

    def _read(self, at: int, nbytes: int) -> memoryview:
        out = memoryview(bytearray(nbytes))
        self._fill(at, out)
        return out

    def _fill(self, at: int, out: memoryview) -> None:
        try:
            with self._file() as descriptor:
                while out:
                    count = os.preadv(descriptor, [out], at)
                    if not count:
                        raise self._corrupt(f"it ends at byte {at:,}")
                    out, at = out[count:], at + count
        except OSError as error:
            raise self._corrupt(f"byte {at:,} cannot be read: {error}") from error

    @contextlib.contextmanager
    def _file(self) -> Iterator[int]:
        if self._open_again is None:
            yield self._descriptor
            return
        descriptor = self._open_again()
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _corrupt(self, text: str) -> ShardCorrupt:
        return ShardCorrupt(f"{self.name}: {text}")


class BackedPayload:
    """A :class:`Payload` that goes on from another source when its first fails in the middle. Threads may share it.

    Args:
        first: Verified as far as it can be without reading it.
        on_failure: Returns the same payload from elsewhere; is told what is wrong, and asked once.
    """

    def __init__(self, first: Payload, on_failure: Callable[[ShardCorrupt], Payload]) -> None:
        self.raw_bytes = first.raw_bytes
        self.directory = first.directory
        self._payload: Payload = first
        self._on_failure: Callable[[ShardCorrupt], Payload] | None = on_failure
        self._lock = threading.Lock()

    def read_into(self, lo: int, hi: int, out: memoryview) -> None:
        """Fill *out* with bytes lo..hi.

        Raises:
            ShardCorrupt: The other source fails, too.
        """
        try:
            self._payload.read_into(lo, hi, out)
        except ShardCorrupt as error:
            with self._lock:
                if self._on_failure is not None:
                    self._payload = self._on_failure(error)
                    self._on_failure = None
            self._payload.read_into(lo, hi, out)
