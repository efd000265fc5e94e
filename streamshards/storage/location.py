"""The one place where urls are taken apart."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import Final

from streamshards.errors import OptionInvalid

_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_USERINFO: Final = re.compile(r"(?<=://)[^/\s'\"]*@")
_QUERY: Final = re.compile(r"(://[^\s?'\"]*)\?[^\s'\"]*")
_LOCAL: Final = frozenset({"file", "local"})
_S3: Final = frozenset({"s3", "s3a"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Location:
    """Where a store is."""

    protocol: str
    """``"file"``, ``"s3"``, ``"memory"`` or whatever else stood before ``://``."""
    url: str
    """Canonical, without credentials: an absolute path, or ``s3://bucket/prefix``."""
    raw: str = field(repr=False)
    """For opening, not for showing: may hold a user and a password."""

    @property
    def is_local(self) -> bool:
        return self.protocol == "file"

    @property
    def is_s3(self) -> bool:
        return self.protocol == "s3"


def parse_url(url: str | os.PathLike[str]) -> Location:
    """Return the parts of *url*: a path (``~`` is expanded), ``file://``, ``s3://``, ``memory://`` or another scheme.

    Raises:
        OptionInvalid: Empty, no bucket, credentials in an S3 url, a query string, or a chain (``a::b``).
    """
    text = os.fspath(url)
    if not isinstance(text, str) or not text or "\0" in text:
        raise OptionInvalid(f'url={text!r} is not a url; write "data/train" or "s3://bucket/train"')
    if "::" in text and "://" in text:
        shown = without_secrets(text)
        raise OptionInvalid(
            f"url={shown!r} is a chain of filesystems; give the inner one, caching is an option of ours"
        )
    match = _SCHEME.fullmatch(text)
    if match is None or match[1].lower() in _LOCAL:
        return _local(text if match is None else match[2])
    protocol = "s3" if match[1].lower() in _S3 else match[1].lower()
    return _remote(protocol, match[2])


def _local(path: str) -> Location:
    if not path:
        raise OptionInvalid('url="file://" names no folder; write "data/train" or "file:///data/train"')
    absolute = os.path.abspath(os.path.expanduser(path))  # so that a worker or a later chdir means the same place
    return Location(protocol="file", url=absolute, raw=absolute)


def _remote(protocol: str, rest: str) -> Location:
    raw = f"{protocol}://{rest.rstrip('/')}"
    url = without_secrets(raw)
    authority, _, _ = rest.partition("/")
    if "?" in rest:
        raise OptionInvalid(f"url={url!r} was given with a query string; keys cannot be appended to one")
    if protocol == "s3" and "@" in authority:
        raise OptionInvalid(f'url={url!r} was given with credentials; put them in storage_options={{"key": …}}')
    if protocol == "s3" and not authority:
        raise OptionInvalid(f'url={url!r} names no bucket; write "s3://bucket/train"')
    return Location(protocol=protocol, url=url, raw=raw)


def without_secrets(text: str) -> str:
    """Return *text* with ``user:password@`` and query strings taken out of every url in it."""
    return _QUERY.sub(r"\1", _USERINFO.sub("", text))
