"""The text of a subset, and the cuts that it stands for."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamshards.errors import OptionInvalid
from streamshards.plan.subset import Cut, Skip, Split, Take, parse_cuts, require_split

COUNTS = st.integers(0, 2**63 - 1)
SPLITS = st.builds(
    lambda fraction, seed, by, side: require_split(fraction, seed=seed, by=by)[side],
    st.one_of(st.floats(0, 1), st.sampled_from([0, 1, 0.9, 1e-05, 5e-324])),
    COUNTS,
    st.sampled_from(["sample", "shard"]),
    st.integers(0, 1),
)
CUTS = st.one_of(st.builds(Take, COUNTS), st.builds(Skip, COUNTS), SPLITS)


@given(st.lists(CUTS, max_size=5))
def test_what_a_subset_writes_is_read_back(cuts: list[Cut]) -> None:
    """Any cuts, with any fraction, seed and count, come back equal."""
    assert parse_cuts(".".join(map(str, cuts))) == tuple(cuts)


def test_a_subset_of_each_kind() -> None:
    """Read as it stands in a state."""
    assert parse_cuts("") == ()
    assert parse_cuts("split(0.9, seed=1, by='sample')[0].take(10).skip(3)") == (
        Split(Fraction(9, 10), 1, "sample", 0), Take(10), Skip(3)
    )  # fmt: skip


@given(st.text(max_size=40) | st.text("takeskipl()[]01.9, =by'd", max_size=60))
def test_nothing_else_is_read(text: str) -> None:
    """Any other text is refused, or it is what its cuts write."""
    try:
        cuts = parse_cuts(text)
    except OptionInvalid:
        return
    assert ".".join(map(str, cuts)) == text


@pytest.mark.parametrize(
    "text",
    [
        "take(01)", "take(-1)", "take(1).", ".take(1)", "take(1)skip(1)", "take(1)..skip(1)", "take(1) ", "take(1)x",
        "take(9223372036854775808)", "take(\u0661)", "drop(1)", "take(1),skip(1)",
        "split(0.9, seed=1, by='sample')", "split(0.9, seed=1, by='sample')[2]", "split(0.9, seed=1, by='row')[0]",
        "split(1.5, seed=1, by='sample')[0]", "split(9e-1, seed=1, by='sample')[0]",
        "split(0.90, seed=1, by='shard')[0]",
        "split(0..9, seed=1, by='shard')[0]", "split(0.9,seed=1,by='shard')[0]", "__import__('os')",
    ],
)  # fmt: skip
def test_near_misses_are_refused(text: str) -> None:
    """Leading zeros, spaces, other words, numbers out of range, and what is no text of ours at all."""
    with pytest.raises(OptionInvalid):
        parse_cuts(text)
