"""The fuzzer in small, and that its judge notices what is wrong."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.attacks import make
from tests.fuzz import campaign
from tests.fuzz.inputs import DIRECTORY, PIECES, Input, make_input


def other_rows() -> bytes:
    """A sound shard of other rows."""
    at = make.column(DIRECTORY, "x")["offset"]
    payload = bytearray(b"".join(PIECES))
    payload[at : at + 4] = b"\0\0\0\x40"
    return make.shard([make.raw_frame(bytes(payload))], [len(payload)], DIRECTORY)


def run(folder: Path, *words: str) -> str:
    """Fuzz in a process of its own: children are forked, and this one has threads."""
    code = "import sys; from pathlib import Path; from tests.fuzz.campaign import *; " + words[0]
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    return done.stdout


def test_thousands_of_mutated_inputs_are_caught_or_harmless(tmp_path: Path) -> None:
    """A seeded run of a few seconds: no wrong row, crash, hang, foreign error, or memory over the bound."""
    out = run(
        tmp_path, "f = fuzz(seconds=120, count=3000, folder=Path(sys.argv[1])); print(f.inputs, f.faults, f.caught)"
    )
    inputs, faults, caught = map(int, out.split())
    assert (faults, list(tmp_path.iterdir())) == (0, [])
    assert inputs == 3000
    assert caught > inputs // 2


def test_an_input_is_a_function_of_its_number() -> None:
    """So that a number in a report is all that is needed."""
    assert [make_input(n) for n in range(50)] == [make_input(n) for n in range(50)]
    assert len({make_input(n).data for n in range(50)}) > 45


def test_the_judge_notices_wrong_rows() -> None:
    """Rows of another shard are harmless only if somebody reckoned the checksums anew."""
    data = other_rows()
    assert campaign.judge(Input("shard", False, data), random.Random(0)) == "wrong_rows"
    assert campaign.judge(Input("shard", True, data), random.Random(0)) == "harmless"
    assert campaign.judge(Input("shard", False, make.SEED_SHARD.read_bytes()), random.Random(0)) == "harmless"
    assert campaign.judge(Input("shard", False, b""), random.Random(0)) == "caught"


@pytest.mark.parametrize(
    ("reader", "figure"),
    [
        ("lambda data, rng: os.kill(os.getpid(), signal.SIGSEGV)", "crashes"),
        ("lambda data, rng: os.kill(os.getpid(), signal.SIGALRM)", "hangs"),
        ("lambda data, rng: 1 / 0", "other_errors"),
        ("lambda data, rng: bytearray(1 << 30)", "over_bound"),
    ],
)
def test_the_judge_survives_and_counts(tmp_path: Path, reader: str, figure: str) -> None:
    """A reader that crashes, hangs, raises or takes too much is counted, its inputs are kept, and the run goes on."""
    code = (
        f"READERS.update(dict.fromkeys(READERS, {reader})); "
        f"f = fuzz(seconds=120, count=5, folder=Path(sys.argv[1])); print(f.{figure}, f.faults, f.inputs)"
    )
    assert run(tmp_path, code).split() == ["5", "5", "5"]
    assert len(list(tmp_path.iterdir())) == 5
