"""Foreign ``.pt`` files: what other people saved, as columns.

``load_foreign`` turns bytes into whatever object was saved, without running its code unless told to trust it;
``columns_of`` decides what in that object is a sample.
"""

from __future__ import annotations

import gzip
import io
import pickle
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, get_args

import torch

from streamshards.errors import OptionInvalid, SampleInvalid, ShardCorrupt, StreamShardsError, UnsafePickle
from streamshards.events import logger
from streamshards.options import MiB
from streamshards.shard.columns import Columns, RowBuffer
from streamshards.shard.frames import inflate
from streamshards.shard.payload import columns_of_payload
from streamshards.shard.pickles import NeedsCode, Refused, require_loadable
from streamshards.shard.schema import Schema

Layout = Literal["auto", "shard", "columns", "rows", "samples", "sample"]

SAFE_TORCH: Final = (2, 10)
"""weights_only loading has known holes before: CVE-2025-32434 (fixed in 2.6), CVE-2026-24747 (fixed in 2.10)."""

_ZSTD_MAGICS: Final = (b"\x28\xb5\x2f\xfd", *(bytes([0x50 + low, 0x2A, 0x4D, 0x18]) for low in range(16)))
_GZIP_MAGIC: Final = b"\x1f\x8b"
_GLOBAL: Final = re.compile(r"GLOBAL ([\w.]+)")
_CHUNK_BYTES: Final = MiB
_has_warned = False
_MAX_GROWTH: Final = 16
_FREE_BYTES: Final = 64 * MiB
"""The columns of a file may take so many times its size, and this: a name of 30 letters takes 2 bytes wherever it is
repeated, and a small file may hold one number that was expanded to a column."""
_MAX_OBJECTS: Final = 8
_FREE_OBJECTS: Final = 1 << 19
"""Python objects of a file, per byte of it, and more: a container that stands once may be referred to often."""


def load_foreign(data: bytes | memoryview, *, name: str, max_raw_bytes: int, trust_pickle: bool = False) -> object:
    """Return the object that someone saved with ``torch.save``: zip or legacy, plain, ``.zst`` or ``.gz``.

    Args:
        data: The whole object; how it is compressed is told from its bytes, not from its name.
        name: The shard, for messages.
        max_raw_bytes: Refuse to decompress to more than this.
        trust_pickle: Run whatever code the pickle asks for. Only for files you made yourself; nothing is bounded then.

    Raises:
        ShardCorrupt: Truncated, over *max_raw_bytes*, not a ``torch.save`` file, or one that asks for more memory than
            its bytes account for (see ``pickles``).
        UnsafePickle: Unless trusted: the pickle needs classes torch does not consider safe; the text names the class
            and the two ways out.
        OptionInvalid: This torch cannot load a foreign pickle safely, and *trust_pickle* is not set.
    """
    if not trust_pickle and _torch_version() < SAFE_TORCH:
        safe = ".".join(map(str, SAFE_TORCH))
        text = f"{name}: torch {torch.__version__} has known holes in loading foreign pickles safely"
        raise OptionInvalid(f"{text}; update to {safe}, or pass trust_pickle=True if you made these files yourself")
    raw = decompressed(data, name=name, max_raw_bytes=max_raw_bytes)
    if trust_pickle:
        _warn_of_code(name)
        return _loaded(raw, name, weights_only=False)
    try:
        require_loadable(memoryview(raw).cast("B"))
    except Refused as error:
        raise ShardCorrupt(f"{name}: torch.load cannot read it safely: {error}") from None
    except NeedsCode as error:
        raise _needs_code(name, str(error)) from None
    payload = _loaded(raw, name, weights_only=True)
    _require_no_more_than(payload, len(raw), name)
    return payload


def _warn_of_code(name: str) -> None:
    """Say once per process what *trust_pickle* means."""
    global _has_warned
    if not _has_warned:
        _has_warned = True
        logger.warning("%s: trust_pickle=True: whatever code this file and the ones after it hold runs as you", name)


def _loaded(raw: bytes | bytearray | memoryview, name: str, *, weights_only: bool) -> object:
    try:
        return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=weights_only)
    except pickle.UnpicklingError as error:
        raise _refused(name, error) from error
    except Exception as error:  # torch.load raises what the damage happens to hit: KeyError, RuntimeError, EOFError, …
        raise ShardCorrupt(f"{name}: torch.load cannot read it: {_first_line(error)}") from error


def _require_no_more_than(payload: object, raw_bytes: int, name: str) -> None:
    """Raise ShardCorrupt if *payload* would take far more memory as columns than it did in its file.

    A number may be expanded to a vast tensor, and what stands once in the file be referred to again and again.
    """
    bytes_left = _MAX_GROWTH * raw_bytes + _FREE_BYTES
    objects_left = _MAX_OBJECTS * raw_bytes + _FREE_OBJECTS
    waiting = [payload]
    while waiting:
        value = waiting.pop()
        if isinstance(value, (torch.Tensor, dict)) and hasattr(value, "__dict__"):
            vars(value).clear()  # a pickle may hang anything there, under the names of methods
        if isinstance(value, torch.Tensor):
            bytes_left -= value.numel() * value.dtype.itemsize
        elif isinstance(value, dict):
            waiting += value.keys()
            waiting += value.values()
        elif isinstance(value, (list, tuple, set)):
            waiting += value
        elif isinstance(value, (str, bytes, bytearray)):
            bytes_left -= len(value)
        objects_left -= 1
        if objects_left < len(waiting) or bytes_left < 0:
            what = "tensors that were expanded, or objects that stand in many places; save them as they are to be read"
            raise ShardCorrupt(f"{name}: {raw_bytes:,} bytes that would become far more: {what}")


def decompressed(data: bytes | memoryview, *, name: str, max_raw_bytes: int) -> bytes | bytearray | memoryview:
    """Return what is inside a ``.zst`` or ``.gz``; anything else as it is. Complete, or an error.

    Raises:
        ShardCorrupt: Truncated, damaged, or larger than *max_raw_bytes*.
    """
    head = bytes(data[:4])
    if head in _ZSTD_MAGICS:
        return inflate(data, name=name, max_raw_bytes=max_raw_bytes)
    if head.startswith(_GZIP_MAGIC):
        return _gunzip(data, name, max_raw_bytes)
    if len(data) > max_raw_bytes:
        raise ShardCorrupt(f"{name}: {len(data):,} bytes, more than the {max_raw_bytes:,} allowed")
    return data


def _gunzip(data: bytes | memoryview, name: str, max_raw_bytes: int) -> bytearray:
    out = bytearray()
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                out += chunk
                if len(out) > max_raw_bytes:
                    raise ShardCorrupt(f"{name}: inflates to more than the {max_raw_bytes:,} bytes allowed")
    except (OSError, EOFError, zlib.error) as error:
        raise ShardCorrupt(f"{name}: gzip: {error}") from error
    return out


def _torch_version() -> tuple[int, int]:
    major, minor = re.findall(r"\d+", torch.__version__)[:2]
    return int(major), int(minor)


def _refused(name: str, error: pickle.UnpicklingError) -> StreamShardsError:
    """Return what torch's refusal means: the file needs code of its own, or is no pickle that torch knows."""
    match = _GLOBAL.search(str(error))
    if match is None:
        return ShardCorrupt(f"{name}: torch.load cannot read it safely: {_first_line(error)}")
    return _needs_code(name, match[1])


def _needs_code(name: str, path: str) -> UnsafePickle:
    return UnsafePickle(
        f"{name}: the pickle needs {path}, which torch does not load unless told that it is safe; either call "
        f"torch.serialization.add_safe_globals([{path.rpartition('.')[2]}]) in every process, "
        "or pass trust_pickle=True, which runs any code in the file"
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}"


def columns_of(payload: object, *, layout: str = "auto", schema: Schema | None = None) -> tuple[str, Columns]:
    """Return how samples lie in a loaded object, and the samples as columns.

    ==========  ====================================================================================================
    layout      what it is
    ==========  ====================================================================================================
    shard       what streamshards writes, unpickled
    columns     a dict, nested perhaps, whose leaves are tensors, arrays or lists of one length: its rows
    rows        one tensor or array with at least one dim: each row a sample ``{"data": row}``
    samples     a list or tuple of samples: dicts; tuples become ``{"0": …, "1": …}``, anything else ``{"data": …}``
    sample      anything else: a dict is one sample, a value one ``{"data": value}``
    ==========  ====================================================================================================

    Args:
        payload: What ``load_foreign`` returned.
        layout: One of these, or "auto" for the first that fits.
        schema: Binds the types of the fields, as in ``RowBuffer``.

    Raises:
        SampleInvalid: The object is not in that layout, or holds what cannot be a sample.
        OptionInvalid: There is no such layout.
    """
    if layout not in get_args(Layout):
        raise OptionInvalid(f"layout={layout!r} is not one of {', '.join(get_args(Layout))}")
    if layout == "auto":
        layout = _layout_of(payload)
    if layout == "shard":
        if not isinstance(payload, Mapping):
            raise SampleInvalid(f"layout 'shard' is a dict, not {type(payload).__name__}")
        return layout, columns_of_payload(payload)
    buffer = RowBuffer(schema)
    _FILLERS[layout](buffer, payload)
    return layout, buffer.finish()


def _layout_of(payload: object) -> str:
    if isinstance(payload, Mapping):
        if "streamshards" in payload and "spec" in payload and "columns" in payload:
            return "shard"
        lengths = set(_lengths(payload, depth=0))
        return "columns" if len(lengths) == 1 and None not in lengths and 0 not in lengths else "sample"
    if _is_array(payload):
        return "rows" if payload.ndim else "sample"  # type: ignore[attr-defined] # it is an array
    return "samples" if isinstance(payload, (list, tuple)) else "sample"


def _is_array(value: object) -> bool:
    return hasattr(value, "ndim") and hasattr(value, "dtype")


def _lengths(node: Mapping[Any, Any], depth: int) -> list[int | None]:
    """Return the length of each leaf as a column, None for a leaf that cannot be one."""
    lengths: list[int | None] = []
    for value in node.values():
        if isinstance(value, Mapping):
            lengths += _lengths(value, depth + 1) if value and depth < 16 else [None]
        elif _is_array(value) and value.ndim:
            lengths.append(value.shape[0])
        else:
            lengths.append(len(value) if isinstance(value, (list, tuple)) else None)
    return lengths


def _fill_columns(buffer: RowBuffer, payload: object) -> None:
    if not isinstance(payload, Mapping):
        raise SampleInvalid(f"layout 'columns' is a dict of columns, not {type(payload).__name__}")
    buffer.extend(payload)


def _fill_rows(buffer: RowBuffer, payload: object) -> None:
    if not _is_array(payload):
        raise SampleInvalid(f"layout 'rows' is a tensor, not {type(payload).__name__}")
    buffer.extend({"data": payload})


def _fill_samples(buffer: RowBuffer, payload: object) -> None:
    if not isinstance(payload, Sequence) or isinstance(payload, (str, bytes)):
        raise SampleInvalid(f"layout 'samples' is a list of samples, not {type(payload).__name__}")
    for sample in payload:
        if isinstance(sample, tuple):
            buffer.append({str(number): value for number, value in enumerate(sample)})
        else:
            _fill_sample(buffer, sample)


def _fill_sample(buffer: RowBuffer, payload: object) -> None:
    buffer.append(payload if isinstance(payload, Mapping) else {"data": payload})


_FILLERS: Final = {"columns": _fill_columns, "rows": _fill_rows, "samples": _fill_samples, "sample": _fill_sample}
