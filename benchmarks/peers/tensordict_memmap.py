"""TensorDict: memory-mapped tensors, whole batches by index, torch's DataLoader."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch.utils.data import DataLoader

from peers import Batch, Reading, Sample, columns_of


def write(samples: Iterable[Sample], folder: Path, workload: str) -> None:  # noqa: ARG001 - the protocol's
    """Write a tensor a field."""
    columns = {name: torch.as_tensor(values) for name, values in _columns(samples).items()}
    TensorDict(columns, batch_size=[len(next(iter(columns.values())))]).memmap(str(folder))


def _columns(samples: Iterable[Sample]) -> dict[str, Any]:
    import numpy as np

    return {name: np.asarray(values) for name, values in columns_of(list(samples)).items()}


def loader(reading: Reading) -> Iterable[Batch]:
    """Return the loader."""
    return DataLoader(
        TensorDict.load_memmap(reading.url),  # type: ignore[arg-type] # it has __getitems__ and a length
        batch_size=reading.batch_size,
        shuffle=reading.shuffle,
        num_workers=reading.num_workers,
        collate_fn=_as_dict,
    )


def _as_dict(batch: TensorDict) -> Batch:
    return dict(batch.items())
