"""A store in a folder of this machine."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from streamshards.errors import ObjectMissing, ObjectTooLarge
from streamshards.memory import LARGE_BYTES, map_memory
from streamshards.storage.location import parse_url
from streamshards.storage.store import TIMEOUT_S, Blob, check_key
from streamshards.storage.translate import translated

_UNFINISHED_PREFIX: Final = ".streamshards-"
_UNFINISHED_SUFFIX: Final = ".unfinished"
"""Temporary files of a put. A killed writer can leave one behind; it is never listed, and safe to remove."""

_OPEN_FLAGS: Final = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
"""Non-blocking, so that a named pipe among the shards cannot hang a reader. No effect on regular files."""


class LocalStore:
    """A :class:`Store` of plain files.

    Args:
        url: A path or ``file://`` url; need not exist before the first put. Made absolute at once.

    Guarantees: a put is a temporary file in the same folder, fsync, rename, fsync of the folder: after it returns, the
    object survives a power cut, and at no instant is a part of it to be seen. Timeouts cannot be kept on a disk.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self.url = parse_url(url).raw

    def __repr__(self) -> str:
        return f"LocalStore({self.url!r})"

    def get(self, key: str, *, timeout_s: float, max_bytes: int) -> Blob:  # noqa: ARG002 - see the class
        with self._opened(key) as (file, size):
            if size > max_bytes:
                where = self._path(key)
                raise ObjectTooLarge(f"{where}: get refused: {size:,} bytes, at most {max_bytes:,} were expected")
            return _read(file, size)

    def get_range(self, key: str, start: int, stop: int, *, timeout_s: float) -> Blob:  # noqa: ARG002 - see the class
        with self._opened(key) as (file, size):
            file.seek(start)
            return _read(file, max(0, min(stop, size) - start))

    def put(self, key: str, data: bytes | memoryview, *, timeout_s: float, if_absent: bool = False) -> None:  # noqa: ARG002 - see the class
        path = self._path(key)
        with self._translating(key, "put"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with _unfinished(path.parent) as (descriptor, temporary):
                _write_all(descriptor, data)
                if if_absent:
                    os.link(temporary, path)  # rename would replace; a link to a taken name fails
                else:
                    os.replace(temporary, path)
            _sync_folder(path.parent)

    def delete(self, key: str, *, timeout_s: float = TIMEOUT_S) -> None:  # noqa: ARG002 - see the class
        path = self._path(key)
        with self._translating(key, "delete"), contextlib.suppress(NotADirectoryError):
            path.unlink(missing_ok=True)

    def list(self, prefix: str = "", *, timeout_s: float = TIMEOUT_S) -> list[tuple[str, int]]:  # noqa: ARG002 - see the class
        folder = prefix.rpartition("/")[0]
        if folder:
            check_key(folder)
        with self._translating(prefix, "list"):
            found = _walk(os.path.join(self.url, folder), f"{folder}/" if folder else "")
            return sorted((key, size) for key, size in found if key.startswith(prefix))

    def _path(self, key: str) -> Path:
        return Path(self.url, check_key(key))

    @contextlib.contextmanager
    def _opened(self, key: str) -> Iterator[tuple[io.FileIO, int]]:
        """Yield a file, and its size."""
        path = self._path(key)
        with self._translating(key, "get"):
            try:
                with open(os.open(path, _OPEN_FLAGS), "rb", buffering=0) as file:
                    status = os.fstat(file.fileno())
                    if not stat.S_ISREG(status.st_mode):
                        raise IsADirectoryError
                    yield file, status.st_size
            except (IsADirectoryError, NotADirectoryError) as error:
                raise ObjectMissing(f"{path}: get failed: no such file; check the url and the key") from error

    @contextlib.contextmanager
    def _translating(self, key: str, verb: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            raise translated(error, what=f"{os.path.join(self.url, key)}: {verb}", is_local=True) from error


def _read(file: io.FileIO, nbytes: int) -> Blob:
    """Return the next *nbytes* of *file*, or what there is.

    Large ones in mapped memory: a third of the time that ``read`` takes, whose fresh pages fault in one by one.
    """
    memory = memoryview(bytearray(nbytes)) if nbytes < LARGE_BYTES else map_memory(nbytes)
    filled = 0
    while filled < nbytes:
        count = file.readinto(memory[filled:])
        if not count:
            break
        filled += count
    return memory[:filled] if nbytes >= LARGE_BYTES else bytes(memory[:filled])


@contextlib.contextmanager
def _unfinished(folder: Path) -> Iterator[tuple[int, str]]:
    """Yield the descriptor and path of a new file in *folder*; on leaving, that name is gone, whatever happened."""
    descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=_UNFINISHED_PREFIX, suffix=_UNFINISHED_SUFFIX)
    try:
        os.fchmod(descriptor, 0o666 & ~_umask())  # mkstemp makes private files; a dataset is for others too
        yield descriptor, temporary
    finally:
        os.close(descriptor)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _umask() -> int:
    """Return the process's umask without changing it for an instant, where the kernel tells."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    except OSError:
        pass
    return 0o022


def _write_all(descriptor: int, data: bytes | memoryview) -> None:
    rest = memoryview(data).cast("B")
    while rest:
        rest = rest[os.write(descriptor, rest) :]
    os.fsync(descriptor)


def _sync_folder(folder: Path) -> None:
    """Make a rename in *folder* durable, on file systems that have a notion of it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems refuse to fsync a folder
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _walk(folder: str, above: str) -> Iterator[tuple[str, int]]:
    """Yield ``(key, size)`` of the files below *folder*; links to files count, links to folders are not entered."""
    try:
        entries = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(entry.path, f"{above}{entry.name}/")
        elif not (entry.name.startswith(_UNFINISHED_PREFIX) and entry.name.endswith(_UNFINISHED_SUFFIX)):
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile, or a dangling link
                if entry.is_file():
                    yield f"{above}{entry.name}", entry.stat().st_size
