"""Hostile files, through the public doors: a typed error that says what is wrong, no code run, memory bounded.

``cases.py`` is the table, ``make.py`` makes the files, ``harness.py`` opens each in a child with a bound.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest

from streamshards import errors
from tests.attacks import harness, make
from tests.attacks.cases import CASES, PARSED_MiB, case_of, names
from tests.attacks.harness import MiB, Outcome

NAMES = names()
DOORS = {
    "index": ("dataset",),
    "shard": ("dataset", "open_shard", "getitem", "cache"),
    "foreign": ("dataset",),
    "state": ("state",),
}
COMMANDS = {
    "index/name-dotdot.json": ("exit 3", "exit 3", "exit 3"),
    "index/bomb.json.zst": ("exit 3", "exit 3", "exit 3"),
    "index/schema-dtype.json": ("exit 3", "exit 3", "exit 3"),
    "shard/offset-beyond.pt.zst": ("exit 0", "exit 1", "exit 5"),
    "shard/bomb.pt.zst": ("exit 0", "exit 1", "exit 5"),
    "foreign/zip-bomb.pt": ("exit 0", "exit 1", "exit 5"),
    "foreign/laughs.pt": ("exit 0", "exit 1", "exit 5"),
    "shard/unchanged.pt.zst": ("exit 0", "exit 0", "exit 0"),
}
"""Files, and what ``inspect``, ``verify`` and ``cat`` end with: 1 bad shards, 3 no dataset, 5 bad data."""

Jobs = list[tuple[str, str]]


def bound_bytes(name: str) -> int:
    """Return what a child may take: twice what the file says, and 64 MiB; an index is inflated up to its limit."""
    return (PARSED_MiB if name.endswith(".json.zst") else 64) * MiB + 2 * len((make.CORPUS / name).read_bytes())


@pytest.fixture(scope="module")
def outcomes() -> Mapping[tuple[str, str], Outcome]:
    jobs: Jobs = [(name, door) for name in NAMES for door in DOORS[name.split("/")[0]]]
    jobs += [(name, f"cli {command}") for name in COMMANDS for command in ("inspect", "verify", "cat")]
    asked = [{"file": name, "door": door, "bound_bytes": bound_bytes(name)} for name, door in jobs]
    return dict(zip(jobs, harness.run(asked), strict=True))


def test_the_corpus_is_what_its_generator_makes() -> None:
    """Byte for byte; and no file is large."""
    made = make.make()
    assert sorted(made) == NAMES
    assert [name for name, data in made.items() if (make.CORPUS / name).read_bytes() != data] == []
    assert max(map(len, made.values())) < 64 * 1024


def test_the_table_has_each_file_and_no_row_too_many() -> None:
    """Each file has a row, and each row a file."""
    assert {case_of(name) for name in NAMES} == set(CASES)


@pytest.mark.parametrize("name", NAMES)
def test_a_hostile_file_is_a_typed_error_or_harmless(name: str, outcomes: Mapping[Any, Outcome]) -> None:
    """What the table says, through each door; nothing is written anywhere, and no child dies."""
    case = case_of(name)
    for door in DOORS[name.split("/")[0]]:
        outcome = outcomes[name, door]
        assert outcome.litter == "", (door, outcome)
        if door == "open_shard" and case.ended != "rows":
            # No index is there to promise rows and sizes, so what only contradicts those is as it says.
            assert outcome.ended in (case.ended, "rows", "other rows"), outcome
            continue
        assert outcome.ended == case.ended, (door, outcome)
        assert re.search(case.says, outcome.text), (door, outcome)
        assert case.ended == "rows" or issubclass(getattr(errors, outcome.ended), errors.StreamShardsError)
        assert name.startswith("state/") or len(outcome.text) < 1200, "a message is for people"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_commands_say_it_in_one_line(name: str, outcomes: Mapping[Any, Outcome]) -> None:
    """inspect, verify and cat end with the documented exit code, without a traceback."""
    ended = tuple(outcomes[name, f"cli {command}"].ended for command in ("inspect", "verify", "cat"))
    assert ended == COMMANDS[name]


def test_memory_stays_within_the_bound(outcomes: Mapping[Any, Outcome]) -> None:
    """The largest peak of all files is far below what they declare; none came near its bound by accident."""
    peaks = {(name, door): outcome.peak_bytes for (name, door), outcome in outcomes.items()}
    over = {job: peak for job, peak in peaks.items() if peak > bound_bytes(job[0])}
    assert over == {}
    assert max(peak for (name, _), peak in peaks.items() if not name.endswith(".json.zst")) < 64 * MiB
