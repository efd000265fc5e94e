"""What loading a foreign ``torch.save`` file will take, known before torch loads it.

Theory. ``weights_only=True`` lets no code of the file run, and says nothing about memory: a file of 400 bytes may ask
for ``bytearray(1 << 32)``, for a tensor that is larger than its storage (torch then grows the storage), for a storage
without bytes, or for a zip record that inflates a thousandfold. So each pickle is played here first, with stand-ins in
place of objects: strings, numbers and containers are themselves, a storage is its size, a call is looked at and not
made. What passes takes no more memory than the file's bytes account for. Whatever torch would not load safely either
is left to torch, which names it.

* The zip must be as torch.save writes it: records stored, not compressed, and together no longer than the file. The
  one parser here and miniz in torch must not see different records, so everything that is ambiguous is refused.
* A class that somebody told torch to be safe is believed: that is what telling it means.

Not elegant yet: a file of nothing but empty lists, one byte each, becomes Python objects of 32 times its size. That
is bounded, though not tightly.

Source: torch/_weights_only_unpickler.py, torch/serialization.py (2.10 to 2.13); APPNOTE.TXT 6.3 for the zip.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

ZIP_MAGIC: Final = b"PK\x03\x04"

_ITEM_BYTES: Final = {
    "DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2,
    "LongStorage": 8, "IntStorage": 4, "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1,
    "ComplexDoubleStorage": 16, "ComplexFloatStorage": 8,
    "QInt8Storage": 1, "QInt32Storage": 4, "QUInt8Storage": 1, "QUInt4x2Storage": 1, "QUInt2x4Storage": 1,
    "UntypedStorage": 1,
}  # fmt: skip
_STORAGE_MODULES: Final = ("torch", "torch.storage")
_MAX_MARKS: Final = 10_000
"""Containers that are begun and not ended; the deepest that torch.save itself can write are a few hundred."""

_END: Final = struct.Struct("<4s4H2LH")
_END64: Final = struct.Struct("<4sQ2H2L4Q")
_LOCATOR: Final = struct.Struct("<4sLQL")
_ENTRY: Final = struct.Struct("<4s6H3L5H2L")
_IN_ZIP64: Final = 0xFFFFFFFF


class Refused(Exception):
    """Why a file is not loaded."""


class NeedsCode(Exception):
    """The class or function, dotted, that a pickle calls and that is not known to be safe."""


@dataclass(frozen=True, slots=True)
class _Global:
    module: str
    name: str

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True, slots=True)
class _Storage:
    nbytes: int
    item_bytes: int


class _Thing:
    """An object that something made, of which no more needs to be known."""


class _Plain(_Thing):
    """One that BUILD may give attributes: a dict's subclass, or an object of a class that was called safe."""


class _Tensor(_Thing):
    """A tensor; its bytes lie in its storage."""


def require_loadable(raw: memoryview) -> None:
    """Raise unless torch can load *raw*, an uncompressed ``torch.save`` file, within the memory its bytes account for.

    Raises:
        Refused: It cannot.
        NeedsCode: The pickle calls what is not known to be safe.
    """
    if bytes(raw[:4]) == ZIP_MAGIC:
        records = _records(raw)
        root = next(iter(records), "").partition("/")[0]
        start, nbytes = records.get(f"{root}/data.pkl", (0, 0))
        _Player(raw[start : start + nbytes], lambda key: records.get(f"{root}/data/{key}", (0, None))[1]).play()
    else:
        _require_loadable_legacy(raw)


def _require_loadable_legacy(raw: memoryview) -> None:
    """Five pickles: magic number, protocol, machine, the object, the keys of its storages; then the storages."""
    at, left = 0, len(raw)
    for _ in range(5):
        player = _Player(raw[at:], None, left)
        at += player.play()
        left = player.left


# -- the zip -----------------------------------------------------------------------------------------------------------


def _records(raw: memoryview) -> dict[str, tuple[int, int]]:
    """Return where the bytes of each record begin, and how many there are."""
    records: dict[str, tuple[int, int]] = {}
    folded: set[str] = set()  # miniz finds records whatever their case
    total = 0
    for name, header, size in _entries(raw):
        root = name.partition("/")[0]
        if not name.isprintable() or "\\" in name or ".." in name.split("/"):
            raise Refused(f"zip: a record named {name[:80]!r}")
        if name.lower() in folded or (records and root != next(iter(records)).partition("/")[0]):
            raise Refused(f"zip: record {name[:80]!r} stands twice, or outside the others' folder")
        folded.add(name.lower())
        if header + 30 > len(raw) or bytes(raw[header : header + 4]) != ZIP_MAGIC:
            raise Refused(f"zip: no record at byte {header:,}")
        start = header + 30 + sum(struct.unpack_from("<2H", raw, header + 26))
        total += size
        if start + size > len(raw) or total > len(raw):
            raise Refused(f"zip: records of {total:,} bytes in a file of {len(raw):,}: cut, or they overlap")
        records[name] = (start, size)
    return records


def _entries(raw: memoryview) -> Iterator[tuple[str, int, int]]:
    """Yield name, place of the header, and size, for each record of the zip's directory."""
    end = len(raw) - _END.size
    if end < 0 or bytes(raw[end : end + 4]) != b"PK\x05\x06":
        raise Refused("zip: truncated, or something follows its end")
    _, _, _, _, count, nbytes, at, comment = _END.unpack_from(raw, end)
    locator = end - _LOCATOR.size
    if locator >= _END64.size and bytes(raw[locator : locator + 4]) == b"PK\x06\x07":
        end = locator - _END64.size
        if _LOCATOR.unpack_from(raw, locator)[2] != end or bytes(raw[end : end + 4]) != b"PK\x06\x06":
            raise Refused("zip: its two directories do not agree")
        *_, count, nbytes, at = _END64.unpack_from(raw, end)
    if comment or at + nbytes != end:
        raise Refused("zip: its directory is not where its end says")
    for _ in range(count):
        if at + _ENTRY.size > end:
            raise Refused("zip: its directory is cut")
        magic, _, _, _, method, _, _, _, packed, size, named, extra, note, _, _, _, header = _ENTRY.unpack_from(raw, at)
        start = at + _ENTRY.size
        at = start + named + extra + note
        if magic != b"PK\x01\x02" or at > end:
            raise Refused("zip: its directory is damaged")
        if _IN_ZIP64 in (packed, size, header):
            packed, size, header = _zip64(bytes(raw[start + named : start + named + extra]), packed, size, header)
        if method or packed != size:
            raise Refused("zip: a compressed record; torch.save writes none: save the file anew, or compress all of it")
        try:
            name = bytes(raw[start : start + named]).decode()
        except UnicodeDecodeError as error:
            raise Refused("zip: a record's name is not UTF-8") from error
        yield name, header, size
    if at != end:
        raise Refused("zip: its directory holds more than it says")


def _zip64(extra: bytes, packed: int, size: int, header: int) -> tuple[int, int, int]:
    """Return the numbers that are too large for the entry itself."""
    fields = (size, packed, header)
    wanted = sum(number == _IN_ZIP64 for number in fields)
    if len(extra) < 4 or struct.unpack_from("<2H", extra) != (1, len(extra) - 4) or len(extra) - 4 < 8 * wanted:
        raise Refused("zip: a large record without its size")
    large = iter(struct.unpack_from(f"<{wanted}Q", extra, 4))
    size, packed, header = (next(large) if number == _IN_ZIP64 else number for number in fields)
    return packed, size, header


# -- the pickle --------------------------------------------------------------------------------------------------------


class _Player:
    """Plays one pickle with stand-ins."""

    def __init__(
        self, data: memoryview, record_bytes: Callable[[object], int | None] | None, left: int | None = None
    ) -> None:
        """Begin.

        Args:
            data: Begins with the pickle.
            record_bytes: Returns how many bytes a zip holds for a storage's key; None: a legacy file.
            left: Legacy: bytes that the storages may take together.
        """
        self.left = len(data) if left is None else left
        self._data = data
        self._at = 0
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._record_bytes = record_bytes
        self._storages: dict[str, _Storage] = {}

    def play(self) -> int:
        """Return the number of bytes up to the pickle's end."""
        data, act = self._data, _ACTS
        try:
            while True:
                code = data[self._at]
                self._at += 1
                if code == 0x2E:  # STOP
                    self._stack.pop()
                    return self._at
                action = act.get(code)
                if action is None:
                    raise Refused(f"pickle: byte {self._at - 1:,}: opcode {code:#x}, which torch.save does not write")
                action(self)
        except (IndexError, KeyError, TypeError, ValueError, RecursionError, struct.error) as error:
            raise Refused(f"pickle: damaged at byte {self._at:,}: {type(error).__name__}") from error

    def take(self, nbytes: int) -> memoryview:
        start, self._at = self._at, self._at + nbytes
        if self._at > len(self._data):
            raise Refused("pickle: truncated")
        return self._data[start : self._at]

    def number(self, form: str, nbytes: int) -> Any:
        return struct.unpack(form, self.take(nbytes))[0]

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def _line(self) -> str:
        start = self._at
        while self._data[self._at] != 0x0A:
            self._at += 1
            if self._at - start > 1024:
                raise Refused("pickle: a name of more than 1,024 bytes")
        self._at += 1
        return bytes(self._data[start : self._at - 1]).decode()

    def find(self) -> None:
        module, name = self._line(), self._line()
        self.push(_Global("builtins" if module == "__builtin__" else module, name))  # Python 2's, as protocol 2 has it

    def mark(self) -> None:
        if len(self._marks) >= _MAX_MARKS:
            raise Refused(f"pickle: more than {_MAX_MARKS:,} containers in each other")
        self._marks.append(self._stack)
        self._stack = []

    def since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    def last(self, count: int) -> tuple[Any, ...]:
        if len(self._stack) < count:
            raise Refused("pickle: damaged: too few values")
        items = tuple(self._stack[-count:])
        del self._stack[-count:]
        return items

    def fill(self, _: object) -> None:
        """Lists and dicts stay empty here: what is in them was looked at when it was made."""
        if not self._stack:
            raise Refused("pickle: damaged: items for nothing")

    def put(self, where: int) -> None:
        self._memo[where] = self._stack[-1]

    def get(self, where: int) -> None:
        self.push(self._memo[where])

    def protocol(self) -> None:
        if self.take(1)[0] != 2:
            raise Refused("pickle: another protocol than 2, which weights_only does not read")

    def reduce(self) -> None:
        function, args = self.last(2)
        self.push(_made(function, args))

    def new(self) -> None:
        kind, args = self.last(2)
        if not isinstance(kind, _Global):
            raise Refused("pickle: a new object of no class")
        if kind.path == "torch.nn.parameter.Parameter":
            self.push(_tensor_from(args))
        elif (kind.path in _EMPTY and not args) or _is_called_safe(kind):
            self.push(_Plain())
        else:
            raise NeedsCode(kind.path)

    def build(self) -> None:
        self.last(1)
        if type(self._stack[-1]) is not _Plain:
            raise Refused("pickle: a state for what has none")

    def find_storage(self) -> None:
        """A storage: ``("storage", type, key, location, items)``, and in a legacy file what part of it is meant."""
        (pid,) = self.last(1)
        legacy = self._record_bytes is None
        if type(pid) is not tuple or len(pid) != (6 if legacy else 5) or pid[0] not in ("storage", b"storage"):
            raise Refused("pickle: a reference to what is no storage")
        kind, key, _, items = pid[1:5]
        if not isinstance(kind, _Global) or kind.module not in _STORAGE_MODULES or kind.name not in _ITEM_BYTES:
            raise Refused(f"pickle: a storage of type {_path_of(kind):.80}")
        if type(key) is not str or type(items) is not int or items < 0:
            raise Refused("pickle: a storage without a name or a size")
        item_bytes = _ITEM_BYTES[kind.name]
        storage = self._storages.get(key)
        if storage is None:
            storage = self._storages[key] = _Storage(items * item_bytes, item_bytes)
            if self._record_bytes is not None:
                if self._record_bytes(key) != storage.nbytes:
                    raise Refused(
                        f"pickle: storage {key[:40]!r} of {storage.nbytes:,} bytes has no record of that size"
                    )
            else:
                self.left -= storage.nbytes
                if self.left < 0:
                    raise Refused(f"pickle: a storage of {storage.nbytes:,} bytes, more than the file holds")
        if legacy and pid[5] is not None:
            _, offset, size = pid[5]
            if not _are_counts((offset, size)) or (offset + size) * item_bytes > storage.nbytes:
                raise Refused("pickle: a part of a storage that is not in it")
            storage = _Storage(size * item_bytes, item_bytes)
        self.push(storage)


def _path_of(value: object) -> str:
    return value.path if isinstance(value, _Global) else type(value).__name__


def _are_counts(values: object) -> bool:
    return isinstance(values, tuple) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _made(function: object, args: object) -> Any:
    """Return what stands for ``function(*args)``."""
    if not isinstance(function, _Global):
        raise Refused(f"pickle: a call of a {type(function).__name__}")
    if type(args) is not tuple:
        raise Refused(f"pickle: a call of {function.path} without arguments")
    maker = _MAKERS.get(function.path)
    if maker is not None:
        return maker(args)
    if _is_called_safe(function):
        return _Plain()
    raise NeedsCode(function.path)


def _is_called_safe(kind: _Global) -> bool:
    """Return whether somebody told torch that this class or function is safe."""
    for entry in torch.serialization.get_safe_globals():
        thing, name = entry if isinstance(entry, tuple) else (entry, None)
        if (name or f"{thing.__module__}.{thing.__qualname__}") == kind.path:
            return True
    return False


def _view(args: tuple[Any, ...], item_bytes: int | None = None) -> _Tensor:
    """``(storage, offset, size, stride, …)``: must lie in the storage, or torch would make that larger."""
    storage, offset, size, stride = args[:4]
    # A torch.Size is pickled as one; what it holds was kept.
    size = size.args if isinstance(size, _Size) else size
    if type(storage) is not _Storage or not _are_counts((offset,)) or not _are_counts(size) or not _are_counts(stride):
        raise Refused("pickle: a tensor without a storage, or with sizes below zero")
    if len(size) != len(stride) or len(size) > 64:
        raise Refused(f"pickle: a tensor of {len(size):,} dims with {len(stride):,} strides")
    if 0 not in size:
        last = offset + sum((count - 1) * step for count, step in zip(size, stride, strict=True))
        if (last + 1) * (item_bytes or storage.item_bytes) > storage.nbytes:
            raise Refused(f"pickle: a tensor that ends beyond the {storage.nbytes:,} bytes of its storage")
    return _Tensor()


@dataclass(frozen=True, slots=True)
class _Size:
    args: tuple[Any, ...]


def _view_of_dtype(args: tuple[Any, ...]) -> _Tensor:
    kind = args[6]
    dtype = getattr(torch, kind.name, None) if isinstance(kind, _Global) and kind.module == "torch" else None
    if not isinstance(dtype, torch.dtype):
        raise Refused("pickle: a tensor without a dtype")
    return _view(args, dtype.itemsize)


def _quantised(args: tuple[Any, ...]) -> _Tensor:
    tensor, count = _view(args), 1
    for size in args[2].args if isinstance(args[2], _Size) else args[2]:
        count *= size
    if count * args[0].item_bytes > args[0].nbytes:
        raise Refused("pickle: a quantised tensor larger than its storage")
    return tensor


def _tensor_from(args: tuple[Any, ...]) -> _Tensor:
    if type(args) is not tuple or not args or not isinstance(args[0], _Tensor):
        raise Refused("pickle: a parameter without a tensor")
    return _Tensor()


def _typed(args: tuple[Any, ...]) -> Any:
    """``_rebuild_from_type_v2(function, type, args, state)`` calls the function."""
    return _made(args[0], args[2])


def _sized(args: tuple[Any, ...]) -> _Size:
    (sizes,) = args
    if not _are_counts(sizes):
        raise Refused("pickle: a size that is no tuple of counts")
    return _Size(sizes)


def _of_bytes(args: tuple[Any, ...]) -> _Thing:
    if any(isinstance(arg, int) for arg in args):
        raise Refused("pickle: a bytearray by its length, which torch.save does not write")
    return _Thing()


def _encoded(args: tuple[Any, ...]) -> _Thing:
    if type(args[0]) is not str or args[1:] not in (("latin1",), ("latin-1",), ("utf-8",)):
        raise Refused("pickle: bytes in an encoding that torch.save does not write")
    return _Thing()


def _plain(_: tuple[Any, ...]) -> _Plain:
    return _Plain()


def _thing(_: tuple[Any, ...]) -> _Thing:
    return _Thing()


_EMPTY: Final = frozenset({"collections.OrderedDict", "collections.Counter", "builtins.set"})
_MAKERS: Final[Mapping[str, Callable[[tuple[Any, ...]], Any]]] = {
    "torch._utils._rebuild_tensor": _view,
    "torch._utils._rebuild_tensor_v2": _view,
    "torch._utils._rebuild_tensor_v3": _view_of_dtype,
    "torch._utils._rebuild_qtensor": _quantised,
    "torch._utils._rebuild_parameter": _tensor_from,
    "torch._utils._rebuild_parameter_with_state": _tensor_from,
    "torch._utils._rebuild_sparse_tensor": _thing,
    "torch._utils._rebuild_nested_tensor": _thing,
    "torch._utils._rebuild_meta_tensor_no_storage": _thing,
    "torch._tensor._rebuild_from_type_v2": _typed,
    "torch.serialization._get_layout": _thing,
    "torch.Size": _sized,
    "torch.device": _thing,
    "collections.OrderedDict": _plain,
    "collections.Counter": _plain,
    "builtins.set": _thing,
    "builtins.complex": _thing,
    "builtins.bytearray": _of_bytes,
    "_codecs.encode": _encoded,
}


_ACTS: Final[dict[int, Callable[[_Player], object]]] = {
    ord("c"): _Player.find,
    ord("("): _Player.mark,
    ord("Q"): _Player.find_storage,
    ord("R"): _Player.reduce,
    0x81: _Player.new,
    ord("b"): _Player.build,
    ord("a"): lambda p: p.fill(p.last(1)),
    ord("e"): lambda p: p.fill(p.since_mark()),
    ord("s"): lambda p: p.fill(p.last(2)),
    ord("u"): lambda p: p.fill(p.since_mark()),
    ord("t"): lambda p: p.push(tuple(p.since_mark())),
    0x85: lambda p: p.push(p.last(1)),
    0x86: lambda p: p.push(p.last(2)),
    0x87: lambda p: p.push(p.last(3)),
    ord("N"): lambda p: p.push(None),
    0x89: lambda p: p.push(False),
    0x88: lambda p: p.push(True),
    ord(")"): lambda p: p.push(()),
    ord("]"): lambda p: p.push([]),
    ord("}"): lambda p: p.push({}),
    0x8F: lambda p: p.push(_Thing()),
    ord("J"): lambda p: p.push(p.number("<i", 4)),
    ord("K"): lambda p: p.push(p.take(1)[0]),
    ord("M"): lambda p: p.push(p.number("<H", 2)),
    ord("G"): lambda p: p.push(p.number(">d", 8)),
    ord("X"): lambda p: p.push(str(p.take(p.number("<I", 4)), "utf-8", "surrogatepass")),
    ord("U"): lambda p: p.push(bytes(p.take(p.take(1)[0]))),
    ord("h"): lambda p: p.get(p.take(1)[0]),
    ord("j"): lambda p: p.get(p.number("<I", 4)),
    ord("q"): lambda p: p.put(p.take(1)[0]),
    ord("r"): lambda p: p.put(p.number("<I", 4)),
    0x8A: lambda p: p.push(int.from_bytes(p.take(p.take(1)[0]), "little", signed=True)),
    0x80: _Player.protocol,
}
