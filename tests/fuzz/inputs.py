"""Mutated inputs: each is a pure function of its target and its number.

Two kinds. *Damaged*: bytes are changed and no checksum is put right, as disks and networks do it. *Hostile*: a file put
together anew around edited parts, all its checksums and its digest right, as an attacker would do it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import struct
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import xxhash

from tests.attacks import make

SEED: Final = make.SEED_SHARD.read_bytes()
PIECES, DIRECTORY = make.pieces_of(SEED)
PLAIN: Final = make.shard([make.raw_frame(piece) for piece in PIECES], [len(piece) for piece in PIECES], DIRECTORY)
INDEX: Final = make.SEED_INDEX.read_bytes()
FOREIGN: Final = tuple(make.make_foreign().values())
STATES: Final = tuple(make.make_states(json.loads(INDEX)).values())
PAYLOAD: Final = b"".join(PIECES)
DIGEST: Final = bytes(range(16))
TARGETS: Final = ("shard", "shard", "shard", "shard", "index", "raw", "foreign", "state")
"""Half of all inputs are shards: what comes over the network."""

NUMBERS: Final = (0, 1, -1, 2, 7, 8, 63, 64, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**48, 2**53, 2**62, 2**63 - 1,
                  2**63, 2**64, -(2**63), 10**30)  # fmt: skip
VALUES: Final = (*NUMBERS, True, False, None, 0.5, 1e300, float("nan"), "", "x", "..", "../x", "float64", "int64",
                 "bool", "str", "ragged", "tensor", "null", "json", "bytes", "\0", "\ud800", "a" * 2000, [], {}, [[]],
                 [None], [None, None], [0], [2**62, 0], [2**40, 2**40], [1] * 70, {"a": 1})  # fmt: skip


class Input(NamedTuple):
    """One mutated input."""

    target: str
    is_hostile: bool
    data: bytes


def make_input(number: int) -> Input:
    """Return input *number*, always the same."""
    target = TARGETS[number % len(TARGETS)]
    rng = random.Random(number)
    is_hostile = rng.random() < 0.5
    maker = {"shard": _shard, "index": _index, "raw": _raw, "foreign": _foreign, "state": _state}[target]
    return Input(target, is_hostile, maker(rng, is_hostile))


# -- bytes -------------------------------------------------------------------------------------------------------------


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Return *data* with a few flips, cuts, swaps, overwritten and repeated stretches."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        size, at = len(out), rng.randrange(len(out) + 1)
        length = rng.choice((1, 4, 8, 64, 1024))
        kind = rng.randrange(6)
        if kind == 0 or not size:
            out[at % max(1, size) : at % max(1, size) + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            out[at % size] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del out[at : at + length]
        elif kind == 3:
            out[at : at + length] = rng.randbytes(min(length, size))
        elif kind == 4:
            other = rng.randrange(size)
            out[at : at + length], out[other : other + length] = out[other : other + length], out[at : at + length]
        else:
            out[at:at] = out[at : at + length]
    return bytes(out)


def edited(rng: random.Random, value: Any) -> Any:
    """Return a copy of a JSON value with a few nodes replaced, removed, doubled or exchanged."""
    copy = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 2, 4))):
        nodes = list(_nodes(copy))
        if not nodes:
            break
        parent, key = rng.choice(nodes)
        kind = rng.randrange(6)
        if kind <= 2:
            parent[key] = _copied(rng.choice(VALUES))
        elif kind == 3:
            del parent[key]
        elif kind == 4 and isinstance(parent, list):
            parent.append(_copied(parent[key]))
        else:
            other, name = rng.choice(nodes)
            old = parent[key]
            if json.dumps(old) not in json.dumps(other[name]) and json.dumps(other[name]) not in json.dumps(old):
                parent[key], other[name] = _copied(other[name]), _copied(old)
    return copy


def _copied(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _nodes(value: Any) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield value, key
        yield from _nodes(item)


# -- files -------------------------------------------------------------------------------------------------------------


def _shard(rng: random.Random, is_hostile: bool) -> bytes:
    if not is_hostile:
        return damaged(rng, rng.choice((SEED, PLAIN)))
    pieces, directory = list(PIECES), DIRECTORY
    kind = rng.randrange(5)
    if kind == 0 or rng.random() < 0.3:
        directory = edited(rng, directory)
    if kind == 1 or rng.random() < 0.2:
        at = rng.randrange(len(pieces))
        pieces[at] = damaged(rng, pieces[at])
    if kind == 2:
        at = rng.randrange(len(pieces))
        pieces[at] = struct.pack("<q", rng.choice([n for n in NUMBERS if abs(n) < 2**63])) + pieces[at][8:]
    frames = [make.raw_frame(piece) for piece in pieces]
    if kind == 3:
        at = rng.randrange(len(frames))
        frames[at] = make.frame(frames[at][13:-4], pieces[at], size=rng.choice([n for n in NUMBERS if 0 <= n < 2**64]))
    text: Any = directory
    if rng.random() < 0.1:
        text = damaged(rng, json.dumps(directory).encode())
    if kind == 4 and rng.random() < 0.5:
        return _spliced(rng)
    return make.shard(frames, [len(piece) for piece in pieces], text, entries=_entries(rng) if kind == 4 else list)


def _entries(rng: random.Random) -> Callable[[list[make.Entry]], list[make.Entry]]:
    def edit(entries: list[make.Entry]) -> list[make.Entry]:
        rows = [list(entry) for entry in entries]
        row, place = rng.choice(rows), rng.randrange(3)
        row[place] = rng.choice((0, 1, row[place] + 1, row[place] ^ 64, 2**31, 2**32 - 1)) % 2**32
        if rng.random() < 0.2:
            rng.shuffle(rows)
        return [(row[0], row[1], row[2]) for row in rows]

    return edit


def _spliced(rng: random.Random) -> bytes:
    """Return the frames of two shards with the tail of one."""
    entries = make.entries_of(PLAIN)[:-1]
    cuts = [0]
    for size, _, _ in entries:
        cuts.append(cuts[-1] + size)
    frames = [PLAIN[a:b] for a, b in itertools.pairwise(cuts)]
    other = [make.raw_frame(rng.randbytes(len(piece))) for piece in PIECES]
    chosen = [rng.choice(pair) for pair in zip(frames, other, strict=True)]
    return make.shard(chosen, [len(piece) for piece in PIECES], DIRECTORY)


def _index(rng: random.Random, is_hostile: bool) -> bytes:
    if not is_hostile:
        return damaged(rng, INDEX)
    index = edited(rng, json.loads(INDEX))
    with contextlib.suppress(KeyError, TypeError, AttributeError):  # what it is made of may be gone
        index = make.sign(index)
    return json.dumps(index).encode()


def raw_entry(directory: bytes, payload: bytes) -> bytes:
    """Return a file of the node cache (streamshards/shard/raw.py)."""
    content = xxhash.xxh3_128(directory + payload).digest()
    header = struct.pack("<8sIIQ16s16s", b"ss-raw\r\n", 1, len(directory), len(payload), DIGEST, content)
    return header + struct.pack("<Q", xxhash.xxh64_intdigest(header)) + directory + payload


def _raw(rng: random.Random, is_hostile: bool) -> bytes:
    directory = json.dumps(DIRECTORY).encode()
    if not is_hostile:
        return damaged(rng, raw_entry(directory, PAYLOAD))
    if rng.random() < 0.5:
        return raw_entry(json.dumps(edited(rng, DIRECTORY)).encode(), PAYLOAD)
    return raw_entry(directory, damaged(rng, PAYLOAD))


def _foreign(rng: random.Random, is_hostile: bool) -> bytes:
    """Foreign files have no checksums: hostile ones are zips that hold together around a damaged pickle."""
    if not is_hostile:
        return damaged(rng, rng.choice(FOREIGN))
    value = damaged(rng, rng.choice((make.columns(make.GOOD), make.columns(make.GOOD) + b"0", make.GOOD)))
    if rng.random() < 0.5:
        value = value.replace(make.number(8), make.number(rng.choice([n for n in NUMBERS if abs(n) < 2**70])), 1)
    if rng.random() < 0.2:
        return make.legacy(value)
    return make.archive(value)


def _state(rng: random.Random, is_hostile: bool) -> bytes:
    data = rng.choice(STATES)
    return json.dumps(edited(rng, json.loads(data))).encode() if is_hostile else damaged(rng, data)
