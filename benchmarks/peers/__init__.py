"""What is compared: one small file each, behind one protocol.

A peer is a module with two functions, written as its own documentation recommends:

``write(samples, folder, workload)``
    Store the samples (dicts of numpy arrays, ints, str, lists) in a folder, in the peer's own format.

``loader(reading)``
    Return an object; each ``iter()`` of it is one epoch, of batches. A batch is a dict with the workload's fields: the
    fixed ones as torch tensors ``(batch, ...)``; of the ragged workload ``tokens`` as int32 ``(batch, longest)``,
    padded with zeros, and ``lengths`` as int64 ``(batch,)``; ``text`` and ``meta`` as lists of str and of decoded JSON.

``prepare()``, if it is there, starts what a peer needs once on a machine; it is not timed.

The modules import their library only there and inside functions, so that the runner, which has none of them, can read
this table.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

Sample = dict[str, Any]
Batch = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What to read, and how."""

    url: str
    """A folder, or ``s3://bucket/prefix``."""
    workload: str
    batch_size: int
    shuffle: bool
    num_workers: int
    scratch: Path
    """An empty folder, for a peer that keeps copies of what it reads."""
    s3: Mapping[str, str] | None = None
    """``endpoint_url``, ``key``, ``secret``; the ``AWS_*`` variables are set as well."""
    names: tuple[str, ...] = ()
    """The files below *url*, for peers that want a list."""


class PeerModule(Protocol):
    """What the modules here have."""

    def write(self, samples: Iterable[Sample], folder: Path, workload: str) -> None: ...

    def loader(self, reading: Reading) -> Iterable[Batch]: ...


@dataclass(frozen=True, kw_only=True)
class Peer:
    """What the runner must know of a peer without importing it."""

    module: str
    what: str
    """Format and way of reading, for a table."""
    environment: str = ""
    """Which of the peers' environments; empty: ours."""
    packages: tuple[str, ...] = ()
    """Whose versions matter."""
    on_s3: bool = False
    workers: tuple[int, ...] = (0, 2)
    """The worker counts that mean something; others are left out."""
    lacks: Mapping[str, str] = field(default_factory=dict)
    """Workloads (or ``s3``) that it is not measured with, and why."""
    data: str = ""
    """Whose data it reads; empty: its own."""


_NO_RAGGED = "memmaps hold tensors of one shape; text, JSON and ragged rows would be pickled per sample"
PEERS: dict[str, Peer] = {
    "streamshards": Peer(
        module="ours", what=".pt.zst shards of columns", packages=("streamshards", "zstandard", "s3fs"), on_s3=True
    ),
    "streamshards-cache": Peer(
        module="ours_cached",
        what="the same, with the decoded node cache",
        packages=("streamshards",),
        data="streamshards",
        on_s3=True,
    ),
    "litdata": Peer(
        module="litdata_raw",
        what="chunks as litdata.optimize makes them; tokens with TokensLoader",
        environment="common",
        packages=("litdata", "obstore", "boto3"),
        on_s3=True,
    ),
    "litdata-zstd": Peer(
        module="litdata_zstd",
        what='the same with compression="zstd"',
        environment="common",
        packages=("litdata", "zstd"),
        on_s3=True,
        lacks={"tokens": "TokensLoader takes no compressed chunks"},
    ),
    "mosaicml": Peer(
        module="mosaicml_raw",
        what="MDS",
        environment="mosaicml",
        packages=("mosaicml-streaming",),
        on_s3=True,
    ),
    "mosaicml-zstd": Peer(
        module="mosaicml_zstd",
        what='MDS with compression="zstd"; keeps decompressed shards on disk',
        environment="mosaicml",
        packages=("mosaicml-streaming",),
        on_s3=True,
    ),
    "webdataset": Peer(
        module="webdataset_tar",
        what="tar shards, shuffle buffer of 1,000; S3 through curl and presigned URLs",
        environment="common",
        packages=("webdataset",),
        on_s3=True,
    ),
    "hf-datasets": Peer(
        module="hf_parquet",
        what="parquet, arrays as bytes, streaming=True, shuffle buffer of 1,000",
        environment="common",
        packages=("datasets", "pyarrow", "s3fs"),
        on_s3=True,
    ),
    "tensordict": Peer(
        module="tensordict_memmap",
        what="memory-mapped, uncompressed",
        environment="common",
        packages=("tensordict",),
        lacks={"ragged": _NO_RAGGED, "s3": "memory maps need a local file"},
    ),
    "grain": Peer(
        module="grain_records",
        what="ArrayRecord, DataLoader-style pipeline",
        environment="common",
        packages=("grain", "array_record"),
        lacks={"s3": "ArrayRecord reads local files and Google's stores"},
    ),
    "ray-data": Peer(
        module="ray_parquet",
        what="parquet, iter_torch_batches, local shuffle buffer of 1,000",
        environment="common",
        packages=("ray", "pyarrow"),
        on_s3=True,
        workers=(0,),
    ),
    "pt-files": Peer(
        module="naive_files",
        what="one torch.save file a sample, DataLoader",
        packages=("torch",),
        lacks={"s3": "one request a sample; nobody waits for that"},
    ),
    "pt-chunks": Peer(
        module="naive_chunks",
        what="torch.save of lists of samples, 32 MB each; a worker shuffles within a file",
        packages=("torch", "s3fs"),
        on_s3=True,
    ),
}


def module_of(name: str) -> PeerModule:
    """Import and return the module of a peer."""
    module: Any = importlib.import_module(f"peers.{PEERS[name].module}")
    return module  # type: ignore[no-any-return]  # a module is its own protocol


def padded(samples: list[Sample]) -> Batch:
    """Return a batch of ragged samples: the ``collate_fn`` of the peers that use torch's DataLoader."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    tokens = [torch.as_tensor(sample["tokens"]) for sample in samples]
    return {
        "tokens": pad_sequence(tokens, batch_first=True),
        "lengths": torch.tensor([len(row) for row in tokens]),
        "text": [sample["text"] for sample in samples],
        "meta": [sample["meta"] for sample in samples],
    }


def collate_for(workload: str) -> Any:
    """Return the collate_fn of a workload: torch's own, but for ragged rows."""
    from torch.utils.data import default_collate

    return padded if workload == "ragged" else default_collate


def grouped(samples: Iterable[Sample], count: int) -> Iterator[list[Sample]]:
    """Yield lists of *count* samples, the last one shorter."""
    group: list[Sample] = []
    for sample in samples:
        group.append(sample)
        if len(group) == count:
            yield group
            group = []
    if group:
        yield group


def columns_of(samples: list[Sample]) -> dict[str, Any]:
    """Return the samples' fields as arrays and lists."""
    import numpy as np

    columns: dict[str, Any] = {name: [sample[name] for sample in samples] for name in samples[0]}
    for name, values in columns.items():
        if isinstance(values[0], np.ndarray) and len({value.shape for value in values}) == 1:
            columns[name] = np.stack(values)
    return columns


CHUNK_SAMPLES = {"images": 1_024, "tokens": 4_096, "rows": 65_536, "ragged": 8_192}
"""About 32 MB raw: for the formats whose user chooses the size of a file by samples."""
