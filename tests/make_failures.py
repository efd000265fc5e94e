"""Writes docs/failures.md from the table in test_failures.py: ``python -m tests.make_failures``."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from tests.test_failures import FAULTS, Ends, Lost, Outcome, Right, Row

PLACE: Final = Path(__file__).parent.parent / "docs" / "failures.md"


def document() -> str:
    """Return the whole document."""
    rows = "".join(f"| {' | '.join(_cells(row))} |\n" for row in FAULTS)
    return HEAD + rows + TAIL


def _cells(row: Row) -> list[str]:
    often = "every request" if row.times is None else f"{row.times} in a row"
    return [
        row.name.removesuffix(", for ever"), often, row.kind,
        _told(row.shard, "skip"), _told(row.shard, "raise"), _told(row.index, ""), _events(row.shard),
    ]  # fmt: skip


def _told(outcome: Outcome, policy: str) -> str:
    match outcome:
        case Right():
            return "the right samples"
        case Lost(error) if policy == "raise":
            return f"`{error.__name__}`"
        case Lost():
            return "its places refilled"
        case Ends(error):
            return f"`{error.__name__}`"


def _events(outcome: Outcome) -> str:
    match outcome:
        case Right(retries):
            return f"{retries} x `FetchRetried`"
        case Lost(_, retries):
            return f"{retries} x `FetchRetried`, then `ShardSkipped` (skip)"
        case Ends(error) if error.transient:
            return "`FetchRetried` before each new attempt"
        case Ends():
            return "none: the error says it"


HEAD: Final = """\
# When the store fails

Made from the table in `tests/test_failures.py` by `python -m tests.make_failures`; do not edit. Each row is tested
against a real S3 server (SeaweedFS) behind a proxy that fails on a script (`streamshards.testing.FaultProxy`), on the
index and on the first, a middle and the last shard, under both policies. Each cell checks every sample and its place,
the events and the log. In the samples that were not lost nothing ever changes, neither a value nor a place. The policy
is in [guarantees.md](guarantees.md).

| fault | met by | class | a shard, `on_corrupt="skip"` | a shard, `"raise"` | the index | events |
|---|---|---|---|---|---|---|
"""
TAIL: Final = ""

if __name__ == "__main__":
    PLACE.write_text(document(), encoding="utf-8")
