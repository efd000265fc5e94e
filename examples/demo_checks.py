"""What the demo promises, each claim held against what was seen."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import demo_digits
import demo_lm
from demo_lm import Life


@dataclass(frozen=True)
class Check:
    """One thing the demo proves, and whether it did."""

    claim: str
    holds: bool
    seen: str


def check(lm: dict[str, Any], digits: dict[str, Any]) -> list[Check]:
    """Return every claim of the demo and whether it holds."""
    return [*check_language_model(**lm), *check_digits(**digits)]


def check_language_model(reference: list[list[int]], killed: Life, resumed: Life, **_: Any) -> Iterator[Check]:
    """Compare both lives with the uninterrupted order."""
    restart, kill, end = resumed.resumed_after, killed.steps[-1], resumed.last_step
    again = kill - restart
    yield Check(
        "SIGKILL came in the middle, and the second process began at a checkpoint",
        killed.exit_status == -signal.SIGKILL and 0 < restart <= kill < end and resumed.steps[0] == restart + 1,
        f"killed after step {kill} of {end}, resumed after step {restart}; {again} steps done again",
    )
    merged = killed.batches[:restart] + resumed.batches
    same = killed.batches == reference[:kill] and merged == reference
    yield Check(
        "both lives together saw the batches of an uninterrupted run, id by id",
        same,
        f"{len(merged)} batches, {sum(map(len, merged)):,} ids compared, {differing(merged, reference)} differ",
    )
    per_epoch = len(reference) // demo_lm.EPOCHS
    epochs = [merged[start : start + per_epoch] for start in range(0, len(merged), per_epoch)]
    padding = per_epoch * demo_lm.BATCH_SIZE - demo_lm.WINDOWS
    once = [Counter(i for batch in epoch for i in batch) for epoch in epochs]
    exact = [
        sorted(counts) == list(range(demo_lm.WINDOWS)) and counts.total() - demo_lm.WINDOWS == padding
        for counts in once
    ]
    yield Check(
        "every window came exactly once an epoch" + (", but for the padding of the last batch" if padding else ""),
        len(exact) == demo_lm.EPOCHS and all(exact) and epochs[0] != epochs[1],
        f"{demo_lm.WINDOWS:,} windows, {demo_lm.EPOCHS} epochs in different orders, {padding} places of padding",
    )
    first, last = mean(killed.losses[:5]), mean(resumed.losses[-20:])
    yield Check("the language model learned", last < 0.6 * first, f"loss {first:.2f}, at the end {last:.2f}")


def check_digits(
    course: demo_digits.Course, skips: list[int], errors: list[str], bad_url: str, shards: int, **_: Any
) -> Iterator[Check]:
    """Look at what the corrupt shard did, and did not do."""
    named = [text for text in errors if text.startswith(f"{bad_url}: shard {demo_digits.CORRUPTED_SHARD} skipped")]
    expected = [demo_digits.CORRUPT_AFTER <= epoch < demo_digits.REPAIR_AFTER for epoch in range(demo_digits.EPOCHS)]
    yield Check(
        "as long as a shard was corrupt, and no longer, each epoch skipped it and logged an ERROR with its url",
        [skip > 0 for skip in skips] == expected and len(named) == len(errors) == sum(skips),
        f"shard {demo_digits.CORRUPTED_SHARD} of {shards}: {len(named)} ERROR lines, "
        f"skips by epoch {' '.join(map(str, skips))}",
    )
    yield Check(
        "no epoch got shorter: its places were refilled",
        course.batches == [course.promised] * demo_digits.EPOCHS and len(set(course.samples)) == 1,
        f"{course.promised} batches promised, {' '.join(map(str, course.batches))} came",
    )
    yield Check(
        "nothing wrong was delivered",
        course.wrong_rows == 0,
        f"{sum(course.samples):,} images compared with what was packed, {course.wrong_rows} differ",
    )
    right = course.accuracies[-1]
    yield Check("the classifier learned all the same", right >= 0.9, f"{100 * right:.1f} % of held-out digits right")


def differing(ours: list[list[int]], theirs: list[list[int]]) -> int:
    """Return how many batches are not the same."""
    return sum(a != b for a, b in zip(ours, theirs, strict=False)) + abs(len(ours) - len(theirs))


def mean(values: list[float]) -> float:
    """Return the arithmetic mean."""
    return sum(values) / len(values)
