"""The data that is measured: four kinds, made up, the same bytes every time.

Run as a program it writes one of them: python benchmarks/workloads.py images FOLDER RAW_BYTES
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

Columns = dict[str, Any]
CHUNK_BYTES = 32_000_000
"""About as much is made at once."""


@dataclass(frozen=True)
class Workload:
    """One kind of data."""

    what: str
    batch_size: int
    row_bytes: int
    """About, uncompressed."""
    make: Callable[[np.random.Generator, int], Columns]
    """Returns so many samples, as columns."""


def images(rng: np.random.Generator, count: int) -> Columns:
    """Flat areas in a few shades, and sensor noise on top: shrinks about as far as real pixels do under zstd."""
    coarse = rng.integers(0, 6, (count, 3, 8, 8), dtype=np.uint8) * 20 + 60
    image = np.repeat(np.repeat(coarse, 12, axis=2), 12, axis=3)
    noise = _table(_triangle(9))
    image += noise.astype(np.uint8)[rng.integers(0, len(noise), image.shape, dtype=np.uint16)]
    return {"image": image, "label": rng.integers(0, 1_000, count)}


def tokens(rng: np.random.Generator, count: int) -> Columns:
    """2,048 token ids a sample, as frequent as words are (Zipf), out of 32,000."""
    return {"tokens": _zipf()[rng.integers(0, 65_536, (count, 2_048), dtype=np.uint16)]}


def rows(rng: np.random.Generator, count: int) -> Columns:
    """64 measurements a sample, in steps of 1/64 as a sensor gives them."""
    normal = NormalDist()
    steps = np.array([round(64 * normal.inv_cdf((i + 0.5) / 4_096)) / 64 for i in range(4_096)], dtype=np.float32)
    return {"x": steps[rng.integers(0, 4_096, (count, 64), dtype=np.uint16)], "y": rng.integers(0, 1_000, count)}


def ragged(rng: np.random.Generator, count: int) -> Columns:
    """50 to 2,000 token ids, 5 to 60 words of text, a little JSON."""
    lengths = rng.integers(50, 2_001, count)
    ids = np.split(_zipf()[rng.integers(0, 65_536, int(lengths.sum()), dtype=np.uint16)], lengths.cumsum()[:-1])
    words = np.array([f"word{number}" for number in range(32_000)])
    num_words = rng.integers(5, 61, count)
    drawn = words[_zipf()[rng.integers(0, 65_536, int(num_words.sum()), dtype=np.uint16)]].tolist()
    stops = num_words.cumsum().tolist()
    return {
        "tokens": ids,
        "text": [" ".join(drawn[stop - n : stop]) for stop, n in zip(stops, num_words.tolist(), strict=True)],
        "meta": [[{"id": f"{number:012x}", "words": n}] for number, n in enumerate(num_words.tolist())],
    }


WORKLOADS = {
    "images": Workload("uint8 [3, 96, 96], label", 256, 27_656, images),
    "tokens": Workload("int32 [2048]", 256, 8_192, tokens),
    "rows": Workload("float32 [64], int64", 8_192, 264, rows),
    "ragged": Workload("int32 [50-2000], text, JSON", 256, 4_400, ragged),
}


def chunks(name: str, raw_bytes: int) -> Iterator[Columns]:
    """Yield about *raw_bytes* of a workload in chunks."""
    workload = WORKLOADS[name]
    left = max(1, raw_bytes // workload.row_bytes)
    number = 0
    while left:
        count = min(left, CHUNK_BYTES // workload.row_bytes)
        seed = [sorted(WORKLOADS).index(name), number]
        yield workload.make(np.random.Generator(np.random.PCG64(seed)), count)
        left, number = left - count, number + 1


def _zipf() -> np.ndarray[Any, np.dtype[np.int32]]:
    frequencies = 1 / (np.arange(32_000) + 2.7)
    return np.searchsorted(np.cumsum(frequencies / frequencies.sum()), (np.arange(65_536) + 0.5) / 65_536).astype(
        np.int32
    )


def _triangle(levels: int) -> list[int]:
    half = levels // 2
    return [half + 1 - abs(level - half) for level in range(levels)]


def _table(weights: list[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.repeat(np.arange(len(weights)), weights)


def main(name: str, folder: str, raw_bytes: str) -> None:
    """Write a workload with the defaults of ``ShardWriter``."""
    import streamshards as ss

    with ss.ShardWriter(folder, mode="replace") as out:
        for columns in chunks(name, int(raw_bytes)):
            out.write_batch(columns)


if __name__ == "__main__":
    main(*sys.argv[1:])
