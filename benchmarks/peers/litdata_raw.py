"""LitData: ``optimize``, ``StreamingDataset``, ``StreamingDataLoader``; tokens with its ``TokensLoader``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import litdata
import litdata.streaming.downloader
import torch

from peers import Batch, Reading, Sample, collate_for

CHUNK_BYTES = "64MB"
"""As its documentation has it."""
BLOCK_TOKENS = 2_048
# As installed it refuses endpoints without TLS, and has no option for it. In its favour:
litdata.streaming.downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = "true"


def write(samples: Iterable[Sample], folder: Path, workload: str) -> None:
    """Write chunks."""
    optimized(samples, folder, workload)


def optimized(samples: Iterable[Sample], folder: Path, workload: str, **options: Any) -> None:
    """Write chunks, with more options for ``optimize``."""
    tokens = workload == "tokens" and not options
    if tokens:  # whole blocks to a chunk, about as large as the others
        options = {"chunk_size": BLOCK_TOKENS * 4_096, "item_loader": litdata.TokensLoader(block_size=BLOCK_TOKENS)}
    else:
        options = {"chunk_bytes": CHUNK_BYTES, **options}

    def make(_number: int) -> Iterator[Any]:
        for sample in samples:
            yield torch.from_numpy(sample["tokens"]) if tokens else plain(sample)

    litdata.optimize(
        make, inputs=[0], output_dir=str(folder), num_workers=1, start_method="fork", verbose=False, **options
    )


def plain(sample: Sample) -> Sample:
    """Return the sample with Python's numbers: LitData has no serializer for numpy's."""
    return {name: int(value) if getattr(value, "shape", None) == () else value for name, value in sample.items()}


def loader(reading: Reading) -> Iterable[Batch]:
    """Return the loader."""
    return make_loader(reading, tokens=reading.workload == "tokens")


def make_loader(reading: Reading, *, tokens: bool) -> Iterable[Batch]:
    """Return the loader."""
    dataset = litdata.StreamingDataset(
        reading.url,
        cache_dir=str(reading.scratch) if reading.s3 else None,
        shuffle=reading.shuffle,
        drop_last=False,
        item_loader=litdata.TokensLoader(block_size=BLOCK_TOKENS) if tokens else None,
    )
    return litdata.StreamingDataLoader(
        dataset,
        batch_size=reading.batch_size,
        num_workers=reading.num_workers,
        collate_fn=stacked if tokens else collate_for(reading.workload),
    )


def stacked(blocks: list[torch.Tensor]) -> Batch:
    """Return a batch of blocks of tokens."""
    return {"tokens": torch.stack(blocks)}
