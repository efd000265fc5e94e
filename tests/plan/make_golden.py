"""Writes golden/order.json and golden/mixture.json: literal orders, for every machine and every version, for ever.

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

from streamshards.plan.mixture import MixtureOrder, MixtureSettings, SourceRows
from streamshards.plan.order import Draw, EpochOrder, Int64Array, OrderSettings, keyed_permutation, philox_words
from streamshards.plan.weights import Phase, parse_weights

GOLDEN = Path(__file__).parent / "golden" / "order.json"
GOLDEN_MIXTURE = GOLDEN.with_name("mixture.json")

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


MIXTURE_SOURCES = (
    SourceRows("web", np.array([400, 0, 650, 300], dtype=np.int64), True, 17, 256),
    SourceRows("code", np.array([31, 7, 12], dtype=np.int64), False, 0, 16),
    SourceRows("rare", np.array([2, 1], dtype=np.int64), True, 2**63 - 1, 1),
)
MIXTURE_WINDOW = 40
_NAMES = [source.name for source in MIXTURE_SOURCES]
_CONSTANT = parse_weights({"web": 0.7, "code": 0.29, "rare": 0.0103}, _NAMES)
_CHANGING = parse_weights(
    [
        (0, {"web": 1, "code": 1, "rare": 1}),
        (3_100, {"web": 5, "code": 0, "rare": 1}),
        (9_000, {"web": 2, "code": 5, "rare": 0.01}),
    ],
    _NAMES,
)
MIXTURES: dict[str, tuple[tuple[Phase, ...], MixtureSettings]] = {
    "one lane": (_CONSTANT, MixtureSettings(seed=0, lanes=1, chunk=1)),
    "lanes in chunks": (_CONSTANT, MixtureSettings(seed=17, lanes=4, chunk=8)),
    "more lanes than samples": (_CONSTANT, MixtureSettings(seed=17, lanes=64, chunk=1)),
    "changing weights": (_CHANGING, MixtureSettings(seed=2**63 - 1, lanes=3, chunk=5)),
}
"""Phases and settings of each mixture."""
_MIXTURE_STARTS = (0, 3_080, 8_990, 20_000)


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


def mixture(name: str) -> MixtureOrder:
    """Return one of MIXTURES."""
    phases, settings = MIXTURES[name]
    return MixtureOrder(MIXTURE_SOURCES, phases, settings, epoch=0, num_samples=10**15)


def golden_mixture() -> dict[str, Any]:
    """Return what the code at hand says about mixtures."""
    return {
        "about": "Literal orders as source:epoch:shard:row. Change them only on purpose: see make_golden.py.",
        "sources": {s.name: {**_plain(s), "rows": " ".join(map(str, s.rows.tolist()))} for s in MIXTURE_SOURCES},
        "cases": {name: _mixture(name) for name in MIXTURES},
        "far": {name: {"from": 10**14, "order": _mixture_rows(mixture(name), 10**14, 20)} for name in MIXTURES},
    }


def _plain(source: SourceRows) -> dict[str, Any]:
    return {"shuffle": source.shuffle, "seed": source.seed, "shuffle_block": source.shuffle_block}


def _mixture(name: str) -> dict[str, Any]:
    phases, settings = MIXTURES[name]
    starts = {
        str(start): [_mixture_rows(mixture(name), start + i, 10) for i in range(0, MIXTURE_WINDOW, 10)]
        for start in _MIXTURE_STARTS
    }
    weights = {str(phase.from_sample): " ".join(map(str, phase.weights)) for phase in phases}
    return {**asdict(settings), "weights": weights, "from": starts}


def _mixture_rows(order: MixtureOrder, first: int, count: int) -> str:
    columns = order.rows_at(np.arange(first, first + count, dtype=np.int64))
    return " ".join(":".join(map(str, row)) for row in zip(*(column.tolist() for column in columns), strict=True))


if __name__ == "__main__":
    GOLDEN_MIXTURE.write_text(json.dumps(golden_mixture(), indent=1) + "\n", encoding="utf-8")
    GOLDEN.write_text(json.dumps(golden(), indent=1) + "\n", encoding="utf-8")
