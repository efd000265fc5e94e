"""MosaicML Streaming: ``MDSWriter``, ``StreamingDataset``, torch's DataLoader."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from peers import Batch, Reading, Sample, collate_for

# It imports torchvision, whose registry build does not load its operators beside a CPU build of torch and then fails to
# describe two that are not there. Nothing here uses them: declarations are enough.
_vision = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    _vision.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from streaming import MDSWriter, StreamingDataset  # noqa: E402 - after what it needs declared
from streaming.base.util import clean_stale_shared_memory  # noqa: E402 - the same

COLUMNS = {
    "images": {"image": "ndarray:uint8:3,96,96", "label": "int"},
    "tokens": {"tokens": "ndarray:int32:2048"},
    "rows": {"x": "ndarray:float32:64", "y": "int"},
    "ragged": {"tokens": "ndarray:int32", "text": "str", "meta": "json"},
}
clean_stale_shared_memory()  # what an earlier process that was ended left behind
_made: dict[str, StreamingDataset] = {}


def write(samples: Iterable[Sample], folder: Path, workload: str) -> None:
    """Write shards."""
    mds(samples, folder, workload, None)


def mds(samples: Iterable[Sample], folder: Path, workload: str, compression: str | None) -> None:
    """Write shards, perhaps compressed."""
    folder.rmdir()  # it must make its folder itself
    with MDSWriter(out=str(folder), columns=COLUMNS[workload], compression=compression) as out:
        for sample in samples:
            out.write(
                {name: int(value) if COLUMNS[workload][name] == "int" else value for name, value in sample.items()}
            )


def loader(reading: Reading) -> Iterable[Batch]:
    """Return the loader."""
    return make(reading, keep_local=False)


def make(reading: Reading, *, keep_local: bool) -> Iterable[Batch]:
    """Return the loader.

    Args:
        reading: What to read.
        keep_local: Keep copies of local files too: compressed shards are decompressed into files.
    """
    copies = reading.s3 is not None or keep_local
    place = str(reading.scratch) if copies else reading.url
    if place not in _made:  # a second dataset over one folder is refused in one process
        _made[place] = StreamingDataset(
            remote=reading.url if copies else None,
            local=place,
            shuffle=reading.shuffle,
            batch_size=reading.batch_size,
        )
    return DataLoader(
        _made[place],
        batch_size=reading.batch_size,
        num_workers=reading.num_workers,
        collate_fn=collate_for(reading.workload),
    )
