"""One value of a user's sample: what type it is, and a copy of it in the form in which it is stored."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import torch

from streamshards.errors import SampleInvalid
from streamshards.shard.schema import DTYPE_NAMES, MAX_DEPTH, PYTHON_DTYPES, Field, Path, PythonScalar, key_problem

Stored: TypeAlias = "torch.Tensor | bytes | int | float | complex | None"
"""A tensor, encoded bytes, a Python scalar, or None where there is no value."""


_LEAF_TYPES = {
    torch.Tensor,
    np.ndarray,
    str,
    bytes,
    int,
    float,
    bool,
    type(None),
    list,
}  # isinstance(…, Mapping) is slow


def leaves_of(sample: Mapping[Any, Any]) -> tuple[dict[Path, Any], list[Path]]:
    """Return the leaves of nested dicts by path, in order, and the paths of empty dicts. Keys are not checked yet.

    Raises:
        SampleInvalid: Not a dict, or nested too deeply (a dict that holds itself, perhaps).
    """
    if not isinstance(sample, Mapping):
        raise SampleInvalid(f"a sample is a dict of values, not {type(sample).__name__}")
    leaves: dict[Path, Any] = {}
    empty: list[Path] = []
    _collect(sample, (), leaves, empty)
    return leaves, empty


def _collect(node: Mapping[Any, Any], prefix: Path, leaves: dict[Path, Any], empty: list[Path]) -> None:
    if len(prefix) >= MAX_DEPTH:
        raise SampleInvalid(f"field {_dotted(prefix)!r}: dicts nested more than {MAX_DEPTH} deep")
    for key, value in node.items():
        path = (*prefix, key)
        kind = type(value)
        if kind in _LEAF_TYPES or (kind is not dict and not isinstance(value, Mapping)):
            leaves[path] = value
        elif value:
            _collect(value, path, leaves, empty)
        else:
            empty.append(path)


def require_good_keys(paths: list[Path]) -> None:
    """Raise SampleInvalid for the first key that cannot be a field's name."""
    for path in paths:
        for depth, key in enumerate(path):
            problem = key_problem(key)
            if problem:
                where = f" (in {_dotted(path[:depth])!r})" if depth else ""
                raise SampleInvalid(problem + where)


def _dotted(path: Path) -> str:
    return ".".join(map(str, path))


def infer(path: Path, value: object) -> tuple[Field, Stored]:
    """Return the field that one value makes, and a copy of the value that the caller's buffers do not reach.

    Raises:
        SampleInvalid: It cannot be stored; the text names the field and says what could be stored instead.
    """
    try:
        return _infer(path, value)
    except SampleInvalid as error:
        raise SampleInvalid(f"field {_dotted(path)!r}: {error}") from None


def _infer(path: Path, value: object) -> tuple[Field, Stored]:
    if value is None:
        return Field(path, "null", optional=True), None
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        tensor = tensor_of(value)
        return Field(path, "tensor", DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)), tensor
    if isinstance(value, str):
        return Field(path, "str"), encode_str(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return Field(path, "bytes"), bytes(value)
    if isinstance(value, (list, tuple)):
        return Field(path, "json"), encode_json(value)
    if isinstance(value, (bool, int, float, complex)):
        python, scalar = _scalar_of(value)
        return Field(path, "tensor", PYTHON_DTYPES[python], (), python=python), scalar
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    raise SampleInvalid(f"{kind} cannot be stored; make it a tensor, a number, str, bytes, or a list of JSON values")


def tensor_of(value: torch.Tensor | np.ndarray[Any, Any] | np.generic) -> torch.Tensor:
    """Return a contiguous CPU copy of a tensor, array or numpy scalar, without autograd history.

    Raises:
        SampleInvalid: Sparse, quantised, nested, without data, or of a dtype that cannot be stored.
    """
    if isinstance(value, torch.Tensor):
        return _copy_tensor(value)
    if isinstance(value, np.ma.MaskedArray):
        raise SampleInvalid("a masked array would lose its mask; store data and mask as two fields")
    if value.dtype.kind not in "biufc":
        raise SampleInvalid(f"numpy {value.dtype} cannot be stored; store numbers, or Python str, bytes or lists")
    copy = np.array(value, dtype=value.dtype.newbyteorder("="), order="C", copy=True)
    try:
        return torch.from_numpy(copy)
    except TypeError:
        raise SampleInvalid(f"numpy {value.dtype} has no dtype in torch") from None


def _copy_tensor(value: torch.Tensor) -> torch.Tensor:
    if value.is_nested or value.layout is not torch.strided:
        what = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise SampleInvalid(f"a {what} tensor cannot be stored; use .to_dense(), or one field per component")
    if value.is_quantized or value.dtype not in DTYPE_NAMES:
        raise SampleInvalid(f"a tensor of {value.dtype} cannot be stored; dequantise or cast it")
    if value.device.type == "meta":
        raise SampleInvalid("a tensor on the meta device has no data")
    if value.ndim > 1 and max(value.shape) >= 2**31:
        raise SampleInvalid(f"shape {tuple(value.shape)}: only the dim of a 1-d tensor may exceed 2**31 - 1")
    plain = value.detach().resolve_conj().resolve_neg()
    if type(plain) is not torch.Tensor:
        plain = plain.as_subclass(torch.Tensor)
    if plain.device.type == "cpu":
        return plain.clone(memory_format=torch.contiguous_format)
    return plain.cpu().contiguous()


def encode_str(value: str) -> bytes:
    """Return UTF-8, or raise SampleInvalid for lone surrogates."""
    try:
        return value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise SampleInvalid(f"text is not valid Unicode: {error}; store bytes instead") from None


def encode_json(value: list[Any] | tuple[Any, ...]) -> bytes:
    """Return a list of JSON values as compact UTF-8, or raise SampleInvalid if it would not come back equal."""
    try:
        _require_json(value)
        return encode_str(json.dumps(value, ensure_ascii=False, separators=(",", ":")))
    except RecursionError:
        raise SampleInvalid("a list nested too deeply, or one that holds itself") from None


def _require_json(value: object) -> None:
    if value is None or type(value) in (str, int, float, bool):
        return
    if isinstance(value, (list, tuple)):
        for item in value:
            _require_json(item)
    elif type(value) is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise SampleInvalid(f"key {key!r} inside a list is {type(key).__name__}; it would come back as str")
            _require_json(item)
    elif isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        raise SampleInvalid("a list of tensors or numpy values; stack or concatenate them, or make it a dict of fields")
    else:
        raise SampleInvalid(f"{type(value).__name__} inside a list is not a JSON value")


def _scalar_of(value: bool | int | float | complex) -> tuple[PythonScalar, int | float | complex]:
    if isinstance(value, bool):
        return "bool", value
    if isinstance(value, int):
        return "int", require_int64(int(value))
    if isinstance(value, float):
        return "float", float(value)
    return "complex", complex(value)


def require_int64(value: int) -> int:
    """Return *value*, or raise SampleInvalid if int64 cannot hold it."""
    if not -(2**63) <= value < 2**63:
        raise SampleInvalid(f"{value if abs(value) < 10**30 else 'an int'} does not fit into int64; store it as str")
    return value


def size_of(stored: Stored) -> int:
    """Return about how many bytes a stored value takes in a shard."""
    if isinstance(stored, torch.Tensor):
        return stored.nbytes
    if isinstance(stored, bytes):
        return len(stored) + 8
    return 16 if isinstance(stored, complex) else 8


def stack(field: Field, stored: list[Stored]) -> torch.Tensor:
    """Return the values of a tensor field, ``(N, *shape)``, from one stored value each; None becomes zeros."""
    if field.python is not None:
        return torch.tensor([0 if value is None else value for value in stored], dtype=field.torch_dtype)
    shape = [int(size or 0) for size in field.shape or ()]
    zeros = torch.zeros(max(1, math.prod(shape)) * field.torch_dtype.itemsize, dtype=torch.uint8)
    zeros = zeros.view(field.torch_dtype)[: math.prod(shape)].view(shape)
    rows = [value if isinstance(value, torch.Tensor) else zeros for value in stored]
    return torch.stack([carried(row) for row in rows]).view(field.torch_dtype)


def carried(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same bytes in a dtype that every operator knows; unchanged for the common dtypes."""
    carrier = _CARRIERS.get(tensor.dtype)
    return tensor if carrier is None else tensor.view(carrier)


# stack and cat of the younger dtypes are missing or warn in some versions of torch; bytes are bytes.
_PLAIN = {
    *("bool", "uint8", "int8", "int16", "int32", "int64"),
    *("float16", "float32", "float64", "bfloat16", "complex64", "complex128"),
}
_BY_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CARRIERS = {dtype: _BY_SIZE[dtype.itemsize] for dtype, name in DTYPE_NAMES.items() if name not in _PLAIN}
