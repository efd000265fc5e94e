"""What a dataset's samples look like: one :class:`Field` per leaf of the sample dict.

Theory. A field has a *type* (kind, dtype, number of dims, Python scalar or tensor) that the first sample fixes, and
*sizes* that may vary. Fields of one type form a lattice, lowest first::

    null  <  tensor (3, 4)  <  ragged (None, 4)  <  ragged (None, None)        (each also <  the same, optional)

``join`` returns the lowest field that holds both; a shard's field is always at or below its dataset's, and a reader
may ask any shard for rows in the dataset's more general form. Where there is no join, the sample does not fit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, cast, get_args

import torch

from streamshards.errors import IndexInvalid, OptionInvalid, SampleInvalid

Kind = Literal["tensor", "ragged", "str", "bytes", "json", "null"]
PythonScalar = Literal["int", "float", "bool", "complex"]
Part = Literal["values", "offsets", "shapes", "present"]
Path = tuple[str, ...]

# Everything torch.save writes and torch.load(weights_only=True) reads back, as far as this torch has it. Quantised
# dtypes are missing on purpose: their scale and zero point are not in the bytes.
_DTYPE_NAMES: Final = (
    *("bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "bfloat16", "complex32", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
)
DTYPES: Final[dict[str, torch.dtype]] = {name: getattr(torch, name) for name in _DTYPE_NAMES if hasattr(torch, name)}
DTYPE_NAMES: Final[dict[torch.dtype, str]] = {dtype: name for name, dtype in DTYPES.items()}
PYTHON_DTYPES: Final[dict[str, str]] = {"int": "int64", "float": "float64", "bool": "bool", "complex": "complex128"}

MAX_DIMS: Final = 64
"""As many dims as torch and numpy can handle."""
MAX_DEPTH: Final = 64
"""Nested dicts in a sample; deeper is a mistake or an attack."""


@dataclass(frozen=True)
class Field:
    """One leaf of a sample."""

    path: Path
    """The dict keys that lead to it: ``("meta", "id")``."""
    kind: Kind
    dtype: str | None = None
    """A name from ``DTYPES`` for tensor and ragged; None for the other kinds."""
    shape: tuple[int | None, ...] | None = None
    """Of one sample. "tensor": no None. "ragged": None where the size varies - the first dim only, or all dims."""
    optional: bool = False
    """Whether some samples hold None here."""
    python: PythonScalar | None = None
    """A Python scalar went in and comes out again."""

    @property
    def name(self) -> str:
        """The dotted path, for messages and column selections."""
        return ".".join(self.path)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the stored values: uint8 for str, bytes and json (and for null, which stores nothing)."""
        return torch.uint8 if self.dtype is None else DTYPES[self.dtype]

    @property
    def parts(self) -> tuple[Part, ...]:
        """The tensors that a column of this field consists of, in stored order."""
        if self.kind == "null":
            return ()
        parts: list[Part] = ["values"]
        if self.kind != "tensor":
            parts.append("offsets")
        if self.has_shapes:
            parts.append("shapes")
        if self.optional:
            parts.append("present")
        return tuple(parts)

    @property
    def has_shapes(self) -> bool:
        """Whether more than the first dim varies, so that each row's shape is stored."""
        return self.kind == "ragged" and self.shape is not None and len(self.shape) > 1 and self.shape[1] is None

    @property
    def item_shape(self) -> tuple[int, ...]:
        """The shape of one item of ``values``: a row of a tensor, an element or first-dim slice of a ragged row."""
        if self.shape is None or self.has_shapes:
            return ()
        sizes = self.shape if self.kind == "tensor" else self.shape[1:]
        return tuple(int(size or 0) for size in sizes)

    def describe(self) -> str:
        """Return the type in words, without the path: ``float32 (3, 224, 224)``, ``optional str``, ``int``."""
        if self.kind == "null":
            return "always None"
        words = "optional " if self.optional else ""
        if self.python is not None:
            return words + self.python
        if self.shape is None:
            return words + self.kind
        sizes = ", ".join("*" if size is None else str(size) for size in self.shape)
        return f"{words}{self.dtype} ({sizes}{',' if len(self.shape) == 1 else ''})"

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; what is at its default is left out."""
        out: dict[str, Any] = {"path": list(self.path), "kind": self.kind}
        if self.dtype is not None:
            out["dtype"] = self.dtype
        if self.shape is not None:
            out["shape"] = list(self.shape)
        if self.optional:
            out["optional"] = True
        if self.python is not None:
            out["python"] = self.python
        return out


def join(field: Field, other: Field) -> Field:
    """Return the lowest field that holds the samples of both.

    Raises:
        SampleInvalid: They differ in kind, dtype, number of dims or Python scalar; the text names the field, what
            stands and what came.
    """
    if field == other:
        return field
    optional = field.optional or other.optional
    if field.kind == "null" or other.kind == "null":
        known = other if field.kind == "null" else field
        return known if known.kind == "null" else replace(known, optional=True)
    if _type_of(field) != _type_of(other):
        raise SampleInvalid(f"field {field.name!r}: expected {field.describe()}, got {other.describe()}")
    if field.shape is None or other.shape is None or field.shape == other.shape:
        return replace(field, optional=optional)
    return replace(field, kind="ragged", shape=_join_shapes(field.shape, other.shape), optional=optional)


def is_at_or_below(field: Field, other: Field) -> bool:
    """Return whether *other* holds everything that *field* holds, so that a shard of *field* reads as *other*."""
    try:
        return join(other, field) == other
    except SampleInvalid:
        return False


def _type_of(field: Field) -> tuple[object, ...]:
    kind = "tensor" if field.kind == "ragged" else field.kind
    return field.path, kind, field.dtype, None if field.shape is None else len(field.shape), field.python


def _join_shapes(shape: tuple[int | None, ...], other: tuple[int | None, ...]) -> tuple[int | None, ...]:
    if shape[1:] == other[1:] and None not in shape[1:]:
        return (None, *shape[1:])
    return (None,) * len(shape)


@dataclass(frozen=True)
class Schema:
    """The fields of a sample, in the order of the first one."""

    fields: tuple[Field, ...]
    empty: tuple[Path, ...] = ()
    """Paths of empty dicts, so that ``{}`` comes back as ``{}``."""

    def field(self, path: Path) -> Field | None:
        """Return the field at *path*, or None."""
        return next((field for field in self.fields if field.path == path), None)

    def merge(self, other: Schema) -> Schema:
        """Return the lowest schema that holds the samples of both, in this one's order.

        Raises:
            SampleInvalid: The fields differ, or a field's type does; the text says which.
        """
        if self == other:
            return self
        others = {field.path: field for field in other.fields}
        require_same_paths([field.path for field in self.fields], others)
        if set(self.empty) != set(other.empty):
            raise SampleInvalid(f"empty dicts {_names(self.empty)} stand, {_names(other.empty)} came")
        return Schema(tuple(join(field, others[field.path]) for field in self.fields), self.empty)

    def select(self, columns: Sequence[str]) -> Schema:
        """Return the schema of some columns: names, dotted paths, or a struct's name for all below it.

        Raises:
            OptionInvalid: There is no such column; the text lists those that exist.
        """
        if isinstance(columns, str):
            raise OptionInvalid(f"columns={columns!r} must be a list of names, such as [{columns!r}]")
        for column in columns:
            if not any(_is_under(path, column) for path in self._paths()):
                known = ", ".join(field.name for field in self.fields)
                raise OptionInvalid(f"columns: there is no {column!r}; the dataset has {known}")
        return Schema(
            tuple(field for field in self.fields if any(_is_under(field.path, column) for column in columns)),
            tuple(path for path in self.empty if any(_is_under(path, column) for column in columns)),
        )

    def describe(self) -> str:
        """Return one line per field."""
        width = max((len(field.name) for field in self.fields), default=0)
        return "\n".join(f"{field.name:<{width}}  {field.describe()}" for field in self.fields)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values that ``from_json`` takes back."""
        return {"fields": [field.to_json() for field in self.fields], "empty": [list(path) for path in self.empty]}

    @staticmethod
    def from_json(value: object) -> Schema:
        """Return the schema that ``to_json`` wrote.

        Raises:
            IndexInvalid: Anything is missing, unknown, of the wrong type or contradictory.
        """
        spec = _require_dict(value, required={"fields"}, allowed={"fields", "empty"}, what="schema")
        fields = tuple(_field_from_json(item) for item in _require_list(spec["fields"], "schema.fields"))
        empty = tuple(_path_from_json(item) for item in _require_list(spec.get("empty", []), "schema.empty"))
        _require_a_tree([*(field.path for field in fields), *empty])
        return Schema(fields, empty)

    def _paths(self) -> list[Path]:
        return [*(field.path for field in self.fields), *self.empty]


def unite(schemas: Mapping[str, Schema]) -> Schema:
    """Return the lowest schema that holds the samples of all *schemas* (by name): fields that one lacks are optional.

    Raises:
        OptionInvalid: A field's type differs; the text names the field and both schemas.
    """
    fields: dict[Path, Field] = {}
    first_with: dict[Path, str] = {}
    for name, schema in schemas.items():
        for field in schema.fields:
            known = fields.get(field.path, field)
            try:
                fields[field.path] = join(known, field)
            except SampleInvalid as error:
                raise OptionInvalid(
                    f"{first_with[field.path]!r} and {name!r} cannot be mixed: {error}. Leave the field out with "
                    "columns=[…], or store it in one type"
                ) from error
            first_with.setdefault(field.path, name)
    everywhere = [path for path in fields if all(schema.field(path) for schema in schemas.values())]
    united = [field if path in everywhere else replace(field, optional=True) for path, field in fields.items()]
    empty = dict.fromkeys(path for schema in schemas.values() for path in schema.empty)
    nodes = {path[:depth] for path in (*fields, *empty) for depth in range(1, len(path))}
    for path in (*fields, *empty):
        if path in fields and (path in nodes or path in empty):
            raise OptionInvalid(f"{'.'.join(path)!r} is a value in {first_with[path]!r} and a dict in another source")
    return Schema(tuple(united), tuple(path for path in empty if path not in nodes))


def require_same_paths(expected: Iterable[Path], got: Iterable[Path]) -> None:
    """Raise SampleInvalid, naming what is missing and what is new, unless both have the same paths."""
    expected, got = set(expected), set(got)
    if expected == got:
        return
    missing, new = sorted(expected - got), sorted(got - expected)
    clauses = []
    if missing:
        clauses.append(f"without {_names(missing)} (write None where there is no value)")
    if new:
        clauses.append(f"with {_names(new)}, which the first sample did not have")
    raise SampleInvalid("came " + " and ".join(clauses))


def key_problem(key: object) -> str | None:
    """Return why *key* cannot be a key of a sample dict, or None if it can."""
    if not isinstance(key, str):
        return f"key {key!r} is {type(key).__name__}, not str"
    if key == "" or "\0" in key:
        return f"key {key!r} is empty or holds a NUL"
    if key.endswith("?"):
        return f'key {key!r} ends in "?", which marks the masks of optional fields'
    try:
        key.encode()
    except UnicodeEncodeError:
        return f"key {key!r} is not valid Unicode"
    return None


def _names(paths: Iterable[Path]) -> str:
    return ", ".join(repr(".".join(path)) for path in paths) or "none"


def _is_under(path: Path, column: str) -> bool:
    name = ".".join(path)
    return name == column or name.startswith(column + ".")


# --- from JSON: nothing is believed ------------------------------------------------------------------------------


def _require_dict(value: object, *, required: set[str], allowed: set[str], what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise IndexInvalid(f"{what}: an object was expected, not {_short(value)}")
    if not required <= value.keys() <= allowed:
        raise IndexInvalid(
            f"{what}: keys {sorted(map(str, value))} instead of {sorted(required)} (or {sorted(allowed)})"
        )
    return value


def _require_list(value: object, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise IndexInvalid(f"{what}: a list was expected, not {_short(value)}")
    return value


def _path_from_json(value: object) -> Path:
    keys = _require_list(value, "schema: path")
    if not 0 < len(keys) <= MAX_DEPTH:
        raise IndexInvalid(f"schema: a path of {len(keys)} keys; 1 to {MAX_DEPTH} are possible")
    for key in keys:
        problem = key_problem(key)
        if problem:
            raise IndexInvalid(f"schema: path {_short(keys)}: {problem}")
    return tuple(keys)


def _field_from_json(value: object) -> Field:
    allowed = {"path", "kind", "dtype", "shape", "optional", "python"}
    spec = _require_dict(value, required={"path", "kind"}, allowed=allowed, what="schema: field")
    path, kind = _path_from_json(spec["path"]), spec["kind"]
    optional, python, dtype = spec.get("optional", False), spec.get("python"), spec.get("dtype")
    where = f"schema: field {'.'.join(path)!r}"
    if kind not in get_args(Kind) or not isinstance(optional, bool):
        raise IndexInvalid(f"{where}: kind {_short(kind)}, optional {_short(optional)}")
    if kind not in ("tensor", "ragged"):
        if (
            dtype is not None
            or spec.get("shape") is not None
            or python is not None
            or (kind == "null" and not optional)
        ):
            raise IndexInvalid(f"{where}: {_short(spec)} is contradictory")
        return Field(path, cast(Kind, kind), optional=optional)
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise IndexInvalid(
            f"{where}: dtype {_short(dtype)} is not one of {', '.join(DTYPES)} of torch {torch.__version__}"
        )
    shape = _shape_from_json(spec.get("shape"), kind, where)
    if python is not None and (shape != () or PYTHON_DTYPES.get(str(python)) != dtype):
        raise IndexInvalid(f"{where}: python {_short(python)} as {dtype} {shape}")
    return Field(path, cast(Kind, kind), dtype, shape, optional, python)


def _shape_from_json(value: object, kind: str, where: str) -> tuple[int | None, ...]:
    sizes = _require_list(value, f"{where}: shape")
    known = [size for size in sizes if size is not None]
    plain = all(type(size) is int and 0 <= size < 2**63 for size in known)
    varying = len(sizes) - len(known)
    first_only = varying == 1 and bool(sizes) and sizes[0] is None
    fits = varying == 0 if kind == "tensor" else first_only or (varying == len(sizes) > 0)
    if not plain or not fits or len(sizes) > MAX_DIMS or math.prod(max(1, size) for size in known) >= 2**63:
        raise IndexInvalid(f"{where}: {kind} with shape {_short(sizes)}")
    return tuple(sizes)


def _require_a_tree(paths: list[Path]) -> None:
    """Raise IndexInvalid if a path stands twice, or one is a leaf and a struct at once."""
    leaves = set(paths)
    if len(leaves) != len(paths):
        raise IndexInvalid("schema: a field stands twice")
    for path in paths:
        for depth in range(1, len(path)):
            if path[:depth] in leaves:
                raise IndexInvalid(f"schema: {'.'.join(path[:depth])!r} is both a value and a dict")


def _short(value: object) -> str:
    """Return *value* for a message: hostile input may be large."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= 80 else text[:77] + "…"
