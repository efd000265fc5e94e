"""A store on any fsspec filesystem; the only file that imports fsspec.

Theory: an fsspec filesystem owns an event loop in a thread, sockets and locks. None of that survives a fork, and a
pickled one would take its caches along. So a store holds only *how* to open (url and options) and, per process, what
was opened: an instance of another process id is put aside, never used and never closed, for closing it would wait on
a loop whose thread stayed in the parent.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import fsspec
import fsspec.asyn
import fsspec.core

from streamshards.errors import ObjectExists, ObjectTooLarge, OptionInvalid, StoreUnavailable, StreamShardsError
from streamshards.events import logger
from streamshards.storage.location import parse_url
from streamshards.storage.s3 import delete_object, get_object, list_objects, put_object, s3_options
from streamshards.storage.store import TIMEOUT_S, Blob, Patience, check_key
from streamshards.storage.translate import is_expired, translated

T = TypeVar("T")

_SECRET_OPTIONS: Final = ("secret", "token", "password", "passwd", "key", "access", "credential", "sas", "private")
"""An option with one of these in its name is not shown."""

_OWN_CREDENTIALS: Final = frozenset({"key", "secret", "token"})
"""Options that hold the credentials themselves: reading them anew would give the same."""
_EXTRAS: Final = {"s3": "s3"}
"""Protocols for which we have an extra to install."""

_inherited: Final[list[Any]] = []
"""Filesystems opened before a fork, kept from being collected; see above."""
_opening = threading.Lock()


def _after_fork() -> None:
    """Have a fresh lock in the child: another thread of the parent may have held it at the fork."""
    global _opening
    _opening = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class FsspecStore:
    """A :class:`Store` on S3, in memory, or on whatever else fsspec can open.

    Args:
        url: ``s3://bucket/prefix``, ``memory://name``, or any fsspec url that is no local path.
        storage_options: Arguments of the filesystem; for S3 those of s3fs: ``key``, ``secret``, ``token``,
            ``profile``, ``anon``, ``endpoint_url``, ``client_kwargs``, ``config_kwargs``. What is not given comes
            from the environment (``AWS_*``) and AWS's config files.

    On S3, a get and a put are one request each - two if the server says that the credentials have expired, and they
    come from the environment, a profile, a file or a process: those are then read anew, once. On other filesystems a
    put is as atomic as their ``pipe_file``: on object stores and in memory it is; for SFTP and the like readers may see
    a part of a file being written, and as these don't use asyncio, no request to them can be abandoned: their own
    timeouts hold.
    """

    def __init__(self, url: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> None:
        self._location = parse_url(url)
        if self._location.is_local:
            raise OptionInvalid(f"url={self._location.url!r} is a local path; open_store() opens those, too")
        self._options = _checked_options(storage_options)
        self.url = self._location.url
        self._opened: tuple[int, Any, str] | None = None  # process id, filesystem, root path

    def __repr__(self) -> str:
        return f"FsspecStore({self.url!r})"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}

    @property
    def site(self) -> str:
        """The server that is asked: the endpoint that was named; else protocol and bucket or host."""
        client = self._options.get("client_kwargs")
        named = self._options.get("endpoint_url") or (isinstance(client, Mapping) and client.get("endpoint_url"))
        return str(named) if named else f"{self._location.protocol}://{urlsplit(self.url).netloc}"

    def get(self, key: str, *, timeout_s: float, max_bytes: int) -> Blob:
        check_key(key)
        with self._translating(key, "get"):
            fs, path = self._resolve(key)
            if self._location.is_s3:
                patience = Patience.of(timeout_s)
                return self._ask_s3(key, get_object, max_bytes=max_bytes, patience=patience, timeout_s=timeout_s)
            return self._get_generic(fs, path, key, timeout_s=timeout_s, max_bytes=max_bytes)

    def get_range(self, key: str, start: int, stop: int, *, timeout_s: float) -> Blob:
        check_key(key)
        with self._translating(key, "get"):
            fs, path = self._resolve(key)
            limits = {"max_bytes": stop - start, "timeout_s": timeout_s}
            if self._location.is_s3:
                return self._ask_s3(key, get_object, span=(start, stop), patience=Patience.of(timeout_s), **limits)
            data: bytes = self._call(fs, "cat_file", path, start=start, end=stop, timeout_s=timeout_s)
            if len(data) > stop - start:
                raise ObjectTooLarge(f"{self.url}/{key}: get refused: {len(data):,} of {stop - start:,} bytes came")
            return data

    def put(self, key: str, data: bytes | memoryview, *, timeout_s: float, if_absent: bool = False) -> None:
        check_key(key)
        whole = data if isinstance(data, bytes) else bytes(data)  # clients take nothing else
        with self._translating(key, "put"):
            fs, path = self._resolve(key)
            if self._location.is_s3:
                self._ask_s3(key, put_object, whole, if_absent=if_absent, timeout_s=timeout_s)
            elif not if_absent:
                self._call(fs, "pipe_file", path, whole, timeout_s=timeout_s)
            elif self._call(fs, "exists", path, timeout_s=timeout_s):
                raise ObjectExists(f"{self.url}/{key}: put refused: the object exists; choose another key")
            else:
                self._call(fs, "pipe_file", path, whole, mode="create", timeout_s=timeout_s)

    def delete(self, key: str, *, timeout_s: float = TIMEOUT_S) -> None:
        check_key(key)
        with self._translating(key, "delete"), contextlib.suppress(FileNotFoundError):
            fs, path = self._resolve(key)
            if self._location.is_s3:
                self._ask_s3(key, delete_object, timeout_s=timeout_s)
            else:
                self._call(fs, "rm_file", path, timeout_s=timeout_s)

    def list(self, prefix: str = "", *, timeout_s: float = TIMEOUT_S) -> list[tuple[str, int]]:
        folder = prefix.rpartition("/")[0]
        if folder:
            check_key(folder)
        with self._translating(prefix, "list"):
            fs, root = self._filesystem()
            if self._location.is_s3:
                found = self._ask_s3(prefix, list_objects, page_timeout_s=timeout_s, timeout_s=None)
                first = len(f"{root}/".partition("/")[2])  # letters of a key before ours begins
                return sorted((key[first:], size) for key, size in found if not key.endswith("/"))
            top = f"{root}/{folder}" if folder else root
            fs.invalidate_cache()
            files = self._call(fs, "find", top, detail=True, timeout_s=timeout_s)
        keys = ((name[len(root) + 1 :], info) for name, info in files.items() if name.startswith(f"{root}/"))
        return sorted(
            (key, int(info["size"] or 0))
            for key, info in keys
            if key.startswith(prefix) and info["type"] == "file" and not key.endswith("/")
        )

    def _get_generic(self, fs: Any, path: str, key: str, *, timeout_s: float, max_bytes: int) -> bytes:
        size = self._call(fs, "info", path, timeout_s=timeout_s).get("size")
        if size is not None and size > max_bytes:
            raise ObjectTooLarge(f"{self.url}/{key}: get refused: {size:,} bytes, at most {max_bytes:,} were expected")
        data: bytes = self._call(fs, "cat_file", path, timeout_s=timeout_s)
        if len(data) > max_bytes:
            raise ObjectTooLarge(f"{self.url}/{key}: get refused: {len(data):,} bytes, {max_bytes:,} were expected")
        if size is not None and len(data) != size:
            raise StoreUnavailable(f"{self.url}/{key}: get failed: {len(data):,} of {size:,} bytes came; try again")
        return data

    def _call(self, fs: Any, method: str, *args: Any, timeout_s: float, **kwargs: Any) -> Any:
        """Call an fsspec method by its public name, under a timeout if the filesystem can keep one."""
        if fs.async_impl:
            return self._run(fs, getattr(fs, f"_{method}"), *args, timeout_s=timeout_s, **kwargs)
        return getattr(fs, method)(*args, **kwargs)

    def _run(
        self, fs: Any, action: Callable[..., Awaitable[T]], *args: Any, timeout_s: float | None, **kwargs: Any
    ) -> T:
        """Run a coroutine on the filesystem's loop and return its result.

        Raises:
            TimeoutError: It took longer than *timeout_s* and was called off; the text says so.
        """
        try:
            result: T = fsspec.asyn.sync(fs.loop, action, *args, timeout=timeout_s, **kwargs)
        except fsspec.FSTimeoutError as error:
            raise TimeoutError(f"timed out after {timeout_s:g} s") from error
        return result

    def _ask_s3(
        self, key: str, action: Callable[..., Awaitable[T]], *args: Any, timeout_s: float | None, **kwargs: Any
    ) -> T:
        """Make one request; once more, with credentials read anew, if the server says that they have expired."""
        fs, path = self._resolve(key)
        try:
            return self._run(fs, action, fs, path, *args, timeout_s=timeout_s, **kwargs)
        except Exception as error:
            if not is_expired(error) or self._options.keys() & _OWN_CREDENTIALS:
                raise
            logger.warning("%s/%s: the credentials have expired; they are read anew", self.url, key)
        self._drop(fs)
        fs, path = self._resolve(key)
        return self._run(fs, action, fs, path, *args, timeout_s=timeout_s, **kwargs)

    def _drop(self, fs: Any) -> None:
        """Have the next request open a new filesystem, unless another thread has seen to it; *fs* is no longer ours."""
        with _opening:
            if self._opened is not None and self._opened[1] is fs:
                self._opened = None

    def _resolve(self, key: str) -> tuple[Any, str]:
        fs, root = self._filesystem()
        return fs, f"{root}/{key}"

    def _filesystem(self) -> tuple[Any, str]:
        """Return this process's filesystem and the path of our root in it, without a slash at the end."""
        opened = self._opened
        if opened is None or opened[0] != os.getpid():
            with _opening:
                opened = self._opened
                if opened is None or opened[0] != os.getpid():
                    if opened is not None:
                        _inherited.append(opened)
                    self._opened = opened = (os.getpid(), *self._open())
        return opened[1], opened[2]

    def _open(self) -> tuple[Any, str]:
        protocol = self._location.protocol
        if protocol not in fsspec.available_protocols():
            raise OptionInvalid(f"url={self.url!r}: no filesystem is called {protocol!r}; write a path or s3://…")
        try:
            fsspec.get_filesystem_class(protocol)
            options = s3_options(self._options) if self._location.is_s3 else dict(self._options)
        except ImportError as error:
            package = f"streamshards[{_EXTRAS[protocol]}]" if protocol in _EXTRAS else f"fsspec[{protocol}]"
            raise OptionInvalid(f'url={self.url!r} needs a package: pip install "{package}" ({error})') from error
        fs, root = fsspec.core.url_to_fs(self._location.raw, skip_instance_cache=True, **options)
        if self._location.is_s3:
            fs.retries = 1
        return fs, str(root).rstrip("/")

    @contextlib.contextmanager
    def _translating(self, key: str, verb: str) -> Iterator[None]:
        try:
            yield
        except StreamShardsError:
            raise
        except Exception as error:
            what = f"{self.url}/{key}: {verb}"
            raise translated(error, what=what, secrets=_secrets(self._options)) from error


def _checked_options(options: Mapping[str, Any] | None) -> dict[str, Any]:
    if options is None:
        return {}
    if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
        raise OptionInvalid('storage_options must be a dict of names to values, like {"anon": True}')
    return dict(options)


def _secrets(options: Mapping[str, Any]) -> list[str]:
    """Return the strings among *options*, at any depth, whose names say that they are not to be shown."""
    found: list[str] = []
    for name, value in options.items():
        if isinstance(value, Mapping):
            found += _secrets(value)
        elif isinstance(value, str) and len(value) > 3 and any(word in name.lower() for word in _SECRET_OPTIONS):
            found.append(value)
    return found
