"""WebDataset: tar files, batched in the pipeline, ``WebLoader``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import webdataset as wds

from peers import CHUNK_SAMPLES, Batch, Reading, Sample, collate_for

ENDINGS = {"image": "npy", "label": "cls", "tokens": "npy", "x": "npy", "y": "cls", "text": "txt", "meta": "json"}
FIELDS = {"images": ("image", "label"), "tokens": ("tokens",), "rows": ("x", "y"), "ragged": ("tokens", "text", "meta")}
SHUFFLE_BUFFER = 1_000
"""As its documentation has it."""
URL_LIFE_S = 3_600


def write(samples: Iterable[Sample], folder: Path, workload: str) -> None:
    """Write tar files."""
    with wds.ShardWriter(str(folder / "%06d.tar"), maxcount=CHUNK_SAMPLES[workload], verbose=0) as out:
        for number, sample in enumerate(samples):
            out.write({"__key__": f"{number:09d}"} | {f"{name}.{ENDINGS[name]}": v for name, v in sample.items()})


def loader(reading: Reading) -> Iterable[Batch]:
    """Return the loader."""
    names = {f"{name}.{ENDINGS[name]}": name for name in FIELDS[reading.workload]}
    collate = collate_for(reading.workload)

    def collated(samples: list[Sample]) -> Any:
        return collate([{name: sample[key] for key, name in names.items()} for sample in samples])

    # empty_check: small data has fewer shards than workers.
    dataset = wds.WebDataset(urls(reading), shardshuffle=100 if reading.shuffle else False, empty_check=False)
    if reading.shuffle:
        dataset = dataset.shuffle(SHUFFLE_BUFFER)
    dataset = dataset.decode().batched(reading.batch_size, partial=True, collation_fn=collated)
    batches: Iterable[Batch] = wds.WebLoader(dataset, batch_size=None, num_workers=reading.num_workers)
    return batches


def urls(reading: Reading) -> list[str]:
    """Return the places of the tar files: files, or presigned URLs for curl."""
    if reading.s3 is None:
        return [f"{reading.url}/{name}" for name in reading.names]
    import boto3
    from botocore.config import Config

    client = boto3.client("s3", endpoint_url=reading.s3["endpoint_url"], config=Config(s3={"addressing_style": "path"}))
    bucket, _, prefix = reading.url.removeprefix("s3://").partition("/")
    return [
        client.generate_presigned_url("get_object", {"Bucket": bucket, "Key": f"{prefix}/{name}"}, ExpiresIn=URL_LIFE_S)
        for name in reading.names
    ]
