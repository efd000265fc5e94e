"""Writes golden/order.json: literal orders, which must be the same on every machine and in every version, for ever.

    python tests/plan/make_golden.py

A checkpoint says "position 1,234"; which samples that means stands in no file but follows from the code. If a golden
order changes, every checkpoint that exists resumes at other samples. So run this only after a change of the order on
purpose: in a commit of its own that says why, that raises STATE_VERSION, and that says what becomes of old checkpoints.
New cases may be added at any time; the lines of old ones must then stay as they are.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from streamshards.plan.order import Draw, EpochOrder, Int64Array, OrderSettings, keyed_permutation, philox_words

GOLDEN = Path(__file__).parent / "golden" / "order.json"

_ROWS = [7, 0, 5, 9, 1, 6, 12]
_BIG_SHARDS = 100_000
_PLAIN = OrderSettings(shuffle=False, seed=0, lanes=1, chunk=1, shuffle_block=16)
_SHUFFLED = OrderSettings(shuffle=True, seed=17, lanes=3, chunk=2, shuffle_block=16)

SMALL: dict[str, tuple[OrderSettings, int]] = {
    "as stored": (_PLAIN, 0),
    "as stored, interleaved": (OrderSettings(shuffle=False, seed=0, lanes=4, chunk=3, shuffle_block=16), 0),
    "one lane, one block": (OrderSettings(shuffle=True, seed=0, lanes=1, chunk=1, shuffle_block=1000), 0),
    "shuffled": (_SHUFFLED, 0),
    "shuffled, the next epoch": (_SHUFFLED, 1),
    "a block for every shard": (OrderSettings(shuffle=True, seed=17, lanes=3, chunk=2, shuffle_block=1), 0),
    "a lane for every sample": (OrderSettings(shuffle=True, seed=17, lanes=40, chunk=1, shuffle_block=16), 0),
    "no full round": (OrderSettings(shuffle=True, seed=17, lanes=3, chunk=64, shuffle_block=16), 0),
    "the largest seed": (OrderSettings(shuffle=True, seed=2**63 - 1, lanes=2, chunk=5, shuffle_block=24), 2**32),
}
"""Settings and epoch of each small case."""

BIG = OrderSettings(shuffle=True, seed=42, lanes=64, chunk=256, shuffle_block=100_000)

WORDS = {"seed": 1, "epoch": 2, "draw": Draw.BLOCK, "lane": 3, "block": 4}


def big_rows() -> Int64Array:
    """Return the rows of the big plan's shards: 4,000 to 4,499 each, all different in sequence."""
    return 4_000 + np.arange(_BIG_SHARDS, dtype=np.int64) * 7_919 % 500


def golden() -> dict[str, Any]:
    """Return what the code at hand says."""
    big = EpochOrder(big_rows(), BIG, epoch=3)
    return {
        "about": "Literal orders as shard:row, from position 0 on. Change them only on purpose: see make_golden.py.",
        "philox_words": {**WORDS, "words": [f"{word:#018x}" for word in philox_words(4, **WORDS).tolist()]},  # type: ignore[arg-type]
        "permutations": {str(n): " ".join(map(str, _permutation(n)[:24])) for n in (0, 1, 2, 3, 8, 16, 17, 1_000_000)},
        "small": {"rows": " ".join(map(str, _ROWS)), "cases": {name: _small(*case) for name, case in SMALL.items()}},
        "big": {
            "rows": f"4000 + i * 7919 % 500 for i in range({_BIG_SHARDS})",
            "num_samples": big.num_samples,
            "epoch": big.epoch,
            **asdict(BIG),
            "first": _rows_at(big, 0, 20),
            "from 123,456,789": _rows_at(big, 123_456_789, 20),
            "last": _rows_at(big, big.num_samples - 20, 20),
        },
    }


def _permutation(n: int) -> list[int]:
    return keyed_permutation(n, seed=17, epoch=5, draw=Draw.SHARDS).tolist()


def _small(settings: OrderSettings, epoch: int) -> dict[str, Any]:
    order = EpochOrder(np.array(_ROWS, dtype=np.int64), settings, epoch)
    lines = [_rows_at(order, first, 10) for first in range(0, order.num_samples, 10)]
    return {"epoch": epoch, **asdict(settings), "order": lines}


def _rows_at(order: EpochOrder, first: int, count: int) -> str:
    shards, rows = order.rows_at(np.arange(first, first + count, dtype=np.int64))
    return " ".join(f"{shard}:{row}" for shard, row in zip(shards.tolist(), rows.tolist(), strict=True))


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(golden(), indent=1) + "\n", encoding="utf-8")
