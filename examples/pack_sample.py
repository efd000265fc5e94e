"""Pack a small made-up dataset of labelled, captioned images; the same bytes every time.

Each image is noise with one bright square in one of nine places; the label says which, the caption says it in words.

    python examples/pack_sample.py                      # to $DATA_URL, or s3://streamshards/train
    python examples/pack_sample.py --url /tmp/train     # or any other place
"""

from __future__ import annotations

import argparse
import os

import numpy as np
import torch

import streamshards as ss

SIDE = 32
COLORS = {"red": (255, 40, 40), "green": (40, 255, 40), "blue": (60, 60, 255), "white": (255, 255, 255)}
PLACES = [f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "centre", "right")]


def make_sample(number: int) -> dict[str, object]:
    """Return sample *number*: a pure function of it, so that anybody packs the same dataset."""
    rng = np.random.Generator(np.random.PCG64(number))
    label = int(rng.integers(len(PLACES)))
    color = str(rng.choice(list(COLORS)))
    image = rng.integers(0, 96, size=(3, SIDE, SIDE), dtype=np.uint8)
    row, column = divmod(label, 3)
    top, left = 11 * row + int(rng.integers(0, 3)), 11 * column + int(rng.integers(0, 3))
    image[:, top : top + 8, left : left + 8] = np.array(COLORS[color], dtype=np.uint8)[:, None, None]
    return {
        "image": torch.from_numpy(image),
        "label": label,
        "caption": f"a {color} square at the {PLACES[label]}",
        "meta": {"id": f"S{number:06d}", "color": color},
    }


def is_packed(url: str, *, samples: int) -> bool:
    """Return whether a dataset of that many samples is at *url*."""
    try:
        return ss.StreamingDataset(url).num_samples == samples
    except ss.IndexInvalid:
        return False


def main() -> None:
    """Write the dataset and say where it is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default=os.environ.get("DATA_URL", "s3://streamshards/train"))
    parser.add_argument("--samples", type=int, default=8_192)
    parser.add_argument("--if-missing", action="store_true", help="leave a dataset of this size as it is")
    options = parser.parse_args()
    if options.if_missing and is_packed(options.url, samples=options.samples):
        print(f"{options.samples:,} samples are already in {options.url}")
        return
    # 2 MiB shards, so that this small dataset has several; leave shard_bytes alone for a real one.
    with ss.ShardWriter(options.url, mode="replace", shard_bytes="2MiB") as out:
        for number in range(options.samples):
            out.write(make_sample(number))
    print(f"packed {options.samples:,} samples into {options.url}")


if __name__ == "__main__":
    main()
