"""Files as other people save them: plain ``torch.save``, nothing of ours."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import Any, Final

import torch
import zstandard

NUM_FILES: Final = 12
"""Enough that ``part-10`` and ``part-2`` tell natural order from that of the letters."""


def payload(layout: str, number: int) -> object:
    """Return what file *number* of a folder holds; *layout* is one of LAYOUTS."""
    rows = range(10 * number, 10 * number + 4)
    if layout == "columns":
        return {
            "x": torch.tensor([[row, -row, 0.5] for row in rows]),
            "label": torch.tensor(list(rows)),
            "name": [f"row {row}" for row in rows],
            "meta": {"id": list(rows)},
        }
    if layout == "rows":
        return torch.tensor([[row, row + 1] for row in rows], dtype=torch.int16)
    if layout == "samples":
        return [_sample(row) for row in rows]
    if layout == "tuples":
        return [(torch.tensor([row, row]), row) for row in rows]
    if layout == "sample":
        return _sample(number)
    if layout == "state_dict":
        return {"weight": torch.full((2, 3), float(number)), "bias": torch.full((4,), float(number))}
    raise AssertionError(layout)


LAYOUTS: Final = {
    "columns": "columns",
    "rows": "rows",
    "samples": "samples",
    "tuples": "samples",
    "sample": "sample",
    "state_dict": "sample",
}
"""What this module calls a layout: what streamshards calls it."""


def expected(layout: str, number: int) -> list[dict[str, Any]]:
    """Return the samples that file *number* holds, written out by hand."""
    content: Any = payload(layout, number)
    if layout == "columns":
        return [
            {"x": x, "label": label, "name": name, "meta": {"id": key}}
            for x, label, name, key in zip(
                content["x"], content["label"], content["name"], content["meta"]["id"], strict=True
            )
        ]
    if layout == "rows":
        return [{"data": row} for row in content]
    if layout == "samples":
        return list(content)
    if layout == "tuples":
        return [{"0": first, "1": second} for first, second in content]
    return [content]


def all_expected(layout: str) -> list[dict[str, Any]]:
    """Return the samples of all files, in natural order of their names."""
    return [sample for number in range(NUM_FILES) for sample in expected(layout, number)]


def _sample(row: int) -> dict[str, Any]:
    return {
        "tokens": torch.arange(row % 5) + row,
        "image": torch.full((3, 2 + row % 3, 4), row % 256, dtype=torch.uint8),
        "row": row,
        "score": None if row % 3 else row / 4,
        "caption": f"{row}: ümläut",
        "blob": bytes([row % 256]) * (1 + row % 4),  # torch refuses to unpickle b"" safely
        "tags": [row, {"odd": bool(row % 2)}],
        "nothing": {},
    }


def pt_bytes(content: object, *, ending: str = ".pt", legacy: bool = False) -> bytes:
    """Return the bytes of a file with that ending: ``.pt``, ``.pt.zst``, ``.pt.gz``."""
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not legacy)
    if ending.endswith(".zst"):
        return zstandard.compress(buffer.getvalue())
    return gzip.compress(buffer.getvalue()) if ending.endswith(".gz") else buffer.getvalue()


def names(ending: str = ".pt") -> list[str]:
    """Return the names of the files, in natural order."""
    return [f"part-{number}{ending}" for number in range(NUM_FILES)]


def fill(folder: Path, layout: str, *, ending: str = ".pt", legacy: bool = False) -> Path:
    """Write all files of a layout into *folder* and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names(ending)):
        (folder / name).write_bytes(pt_bytes(payload(layout, number), ending=ending, legacy=legacy))
    return folder


class Custom:
    """A class that torch does not consider safe to unpickle."""

    def __init__(self) -> None:
        self.value = 7
