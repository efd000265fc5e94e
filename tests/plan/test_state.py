"""The state: small, plain, the same on every rank, and refused when it cannot be right."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamshards.errors import ResumeMismatch
from streamshards.plan.assignment import Assignment
from streamshards.plan.order import OrderSettings
from streamshards.plan.state import MAX_EPOCH, STATE_VERSION, State, mismatch
from streamshards.plan.topology import Topology

LARGEST = 2**63 - 1

ORDER = OrderSettings(shuffle=True, seed=17, lanes=8, chunk=32, shuffle_block=4096)
STATE = State(epoch=3, position=512, num_samples=10_000, identity={"fingerprint": "ab" * 16}, order=ORDER)

numbers = st.integers(0, LARGEST)
positive = st.integers(1, LARGEST)


@st.composite
def states(draw: st.DrawFn) -> State:
    num_samples = draw(numbers)
    return State(
        epoch=draw(st.integers(0, MAX_EPOCH)),
        position=draw(st.integers(0, num_samples)),
        num_samples=num_samples,
        identity={"fingerprint": draw(st.text("0123456789abcdef", min_size=32, max_size=32))},
        order=OrderSettings(
            shuffle=draw(st.booleans()),
            seed=draw(numbers),
            lanes=draw(st.integers(1, max(1, num_samples))),
            chunk=draw(positive),
            shuffle_block=draw(positive),
        ),
        **draw(st.just({}) | st.fixed_dictionaries({"worker_batches": positive, "num_workers": positive})),
    )


def test_a_state_is_a_flat_dict_of_these_keys() -> None:
    """Checkpoints hold these keys and values; other versions must read them."""
    assert STATE.to_dict() == {
        "version": 1,
        "epoch": 3,
        "position": 512,
        "num_samples": 10_000,
        "fingerprint": "abababababababababababababababab",
        "shuffle": True,
        "seed": 17,
        "lanes": 8,
        "chunk": 32,
        "shuffle_block": 4096,
    }
    assert STATE.to_dict()["version"] == STATE_VERSION


@given(states())
@settings(deadline=None, max_examples=150)
def test_a_state_comes_back_from_json(state: State) -> None:
    """Any state comes back from its dict, and from that as JSON, which is flat and stays under 1 KiB."""
    plain = state.to_dict()
    text = json.dumps(plain)
    assert len(text.encode()) < 1024
    assert all(isinstance(value, (int, str, bool)) for value in plain.values())
    assert State.from_dict(plain) == State.from_dict(json.loads(text)) == state
    assert State.from_dict(MappingProxyType(plain)) == state


def test_each_dict_is_the_callers_own() -> None:
    """What a caller does to the dict it got changes neither the state nor the next dict."""
    first = STATE.to_dict()
    first.clear()
    assert STATE.to_dict()["epoch"] == 3
    given_away = STATE.to_dict()
    state = State.from_dict(given_away)
    given_away["epoch"] = 99
    assert state == STATE


def test_keys_of_others_are_left_alone() -> None:
    """Keys that a state does not know are ignored, so a checkpointer may add its own."""
    assert State.from_dict({**STATE.to_dict(), "saved_by": "me"}) == STATE


INTEGERS = ("version", "epoch", "position", "num_samples", "seed", "lanes", "chunk", "shuffle_block")


@pytest.mark.parametrize("name", [*INTEGERS, "fingerprint", "shuffle"])
def test_each_missing_key_is_named(name: str) -> None:
    """A state without one of its keys is refused by the key's name."""
    plain = STATE.to_dict()
    del plain[name]
    with pytest.raises(ResumeMismatch, match=f"lacks {name};"):
        State.from_dict(plain)


def test_all_missing_keys_are_named_at_once() -> None:
    """A dict that is something else is refused with every key it lacks."""
    with pytest.raises(ResumeMismatch, match=f"lacks {', '.join(INTEGERS)}, fingerprint, shuffle;"):
        State.from_dict({"model": 1})


@pytest.mark.parametrize("name", [*INTEGERS, "worker_batches", "num_workers"])
@pytest.mark.parametrize("value", [-1, 1.0, True, "1", None, [1], {}, float("nan"), 2**63, 10**40], ids=str)
def test_numbers_are_whole_and_in_range(name: str, value: Any) -> None:
    """A number that is negative, fractional, text or beyond 64 bits is refused by its name and, but for a version
    that is only too new, as no number."""
    plain = {**STATE.to_dict(), "worker_batches": 1, "num_workers": 2, name: value}
    with pytest.raises(ResumeMismatch, match=name) as caught:
        State.from_dict(plain)
    assert str(value) in str(caught.value)


@pytest.mark.parametrize("name", ["lanes", "chunk", "shuffle_block"])
def test_what_divides_is_not_zero(name: str) -> None:
    """Lanes, chunks and blocks of nothing are refused by name."""
    with pytest.raises(ResumeMismatch, match=f"{name}=0"):
        State.from_dict({**STATE.to_dict(), name: 0})


@pytest.mark.parametrize("value", [0, 1, None, "false", "", [], "yes"], ids=ascii)
def test_shuffle_is_true_or_false(value: Any) -> None:
    """What is not a truth value is refused: the text "false" must not switch shuffling on."""
    with pytest.raises(ResumeMismatch, match="shuffle"):
        State.from_dict({**STATE.to_dict(), "shuffle": value})


@pytest.mark.parametrize("value", [None, 0, b"ab", ["ab"]], ids=ascii)
def test_a_fingerprint_is_text(value: Any) -> None:
    """Anything but text is no fingerprint."""
    with pytest.raises(ResumeMismatch, match="fingerprint"):
        State.from_dict({**STATE.to_dict(), "fingerprint": value})


@pytest.mark.parametrize("version", [2, 3, 1000, 10**40])
def test_a_newer_version_says_upgrade(version: int) -> None:
    """A state of a newer version is refused as that before anything else is looked at."""
    with pytest.raises(ResumeMismatch, match=f"version {version}, .* upgrade"):
        State.from_dict({"version": version})


def test_there_is_no_version_zero() -> None:
    """A version that never was is refused."""
    with pytest.raises(ResumeMismatch, match="version 0"):
        State.from_dict({**STATE.to_dict(), "version": 0})


def test_no_position_beyond_the_epoch() -> None:
    """The end of the epoch is a place, one further is not."""
    assert State.from_dict({**STATE.to_dict(), "position": 10_000}).position == 10_000
    with pytest.raises(ResumeMismatch, match="position 10,001 is beyond"):
        State.from_dict({**STATE.to_dict(), "position": 10_001})


@pytest.mark.parametrize("thing", [None, [], "{}", 3, [("version", 1)], STATE], ids=lambda thing: type(thing).__name__)
def test_only_a_dict_is_a_state(thing: Any) -> None:
    """Anything but a mapping is refused by its type."""
    with pytest.raises(ResumeMismatch, match=f"the state is a {type(thing).__name__}"):
        State.from_dict(thing)


values = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers())


@given(st.dictionaries(st.sampled_from([*STATE.to_dict(), "worker_batches", "num_workers"]), values))
@settings(deadline=None, max_examples=150)
def test_any_value_may_be_anything(changes: dict[str, Any]) -> None:
    """Whatever stands under whichever keys: it is refused with `ResumeMismatch`, or is a state with those values."""
    plain = {**STATE.to_dict(), **changes}
    try:
        state = State.from_dict(plain)
    except ResumeMismatch:
        return
    assert {**asdict(state), **state.identity, **asdict(state.order), "version": 1}.items() >= plain.items()


# -- does it belong here? ------------------------------------------------------------------------------------------

HERE: dict[str, Any] = {"fingerprint": "ab" * 16, "num_samples": 10_000, "seed": 17, "shuffle": True}
OTHER: dict[str, Any] = {"fingerprint": "cd" * 16, "num_samples": 9_999, "seed": 18, "shuffle": False}


def here(**changes: Any) -> State:
    """Return a state of what is open, with *changes*."""
    found = {**HERE, **changes}
    return State(
        epoch=0,
        position=0,
        num_samples=found["num_samples"],
        identity={"fingerprint": found["fingerprint"]},
        order=replace(ORDER, seed=found["seed"], shuffle=found["shuffle"], lanes=2),
    )


def test_a_state_matches_its_own_dataset() -> None:
    """The same dataset, seed and shuffle are a match, wherever the state stands and whatever the order's shape."""
    assert STATE.differences(here()) == {}


def test_each_difference_is_listed_and_no_other() -> None:
    """For every combination of differences, the message lists exactly those, with both values, and names the url."""
    for chosen in range(1, 16):
        differing = [name for bit, name in enumerate(HERE) if chosen >> bit & 1]
        found = STATE.differences(here(**{name: OTHER[name] for name in differing}))
        assert sorted(found) == sorted(differing)
        error = mismatch("file:///data", found, "Do this.")
        assert isinstance(error, ResumeMismatch)
        assert str(error).startswith("file:///data: ")
        assert str(error).endswith(". Do this.")
        for name in HERE:
            difference = f"{name} is {OTHER[name]!r} here and {HERE[name]!r} in the state"
            assert (difference in str(error)) == (name in differing)


def test_differences_are_found_in_depth() -> None:
    """What is missing on either side, and what differs inside a dict, is named by its path."""
    ours = replace(here(), identity={"fingerprint": "x", "sources": {"web": {"n": 1}, "code": {"n": 2}}})
    theirs = replace(ours, identity={"fingerprint": "x", "sources": {"web": {"n": 3}}, "kind": "mixture"})
    found = theirs.differences(ours)
    assert found == {"sources.web.n": (1, 3), "sources.code": ({"n": 2}, None), "kind": (None, "mixture")}
    assert "the state is of a mixture, this is a dataset" in str(mismatch("u", found, ""))
    del found["kind"]
    assert "sources.code is {'n': 2} here and missing in the state" in str(mismatch("u", found, ""))


@given(states())
def test_between_epochs(state: State) -> None:
    """A state lies between two epochs when nothing of its own has been received, or all."""
    expected = state.position in (0, state.num_samples) and not state.worker_batches
    assert state.is_between_epochs == expected


# -- going on ------------------------------------------------------------------------------------------------------


def test_the_state_is_the_same_on_every_rank() -> None:
    """After each step, every rank that took part in it says the same, whatever its batch size and rank; once the
    training loop has seen the end, every rank says that the epoch is over."""
    for num_samples, position in ((40, 0), (41, 0), (47, 8), (8, 8)):
        start = replace(STATE, num_samples=num_samples, position=position)
        for world_size in (1, 2, 4):
            for tail in ("pad", "drop", "uneven"):
                ranks = [
                    Assignment(
                        num_samples=num_samples,
                        start=position,
                        batch_size=8 // world_size,
                        topology=Topology(rank=rank, world_size=world_size),
                        tail=tail,  # type: ignore[arg-type]  # each is one of the literals
                    )
                    for rank in range(world_size)
                ]
                for step in range(ranks[0].rank_batches):
                    said = {start.after(rank, step) for rank in ranks if rank.rank_batches >= step}
                    assert said == {replace(start, position=position + 8 * step)}
                done = {start.after(rank, rank.rank_batches, is_over=True) for rank in ranks}
                assert done == {replace(start, position=num_samples)}


def test_one_worker_counts_its_own_batches() -> None:
    """The state of one of several workers keeps the position and counts the worker's batches, over resumes too."""
    reader = Assignment(
        num_samples=10_000,
        start=512,
        batch_size=4,
        topology=Topology(worker=1, num_workers=3),
        tail="pad",
    )
    once = STATE.after(reader, 5)
    assert (once.position, once.worker_batches, once.num_workers) == (512, 5, 3)
    twice = State.from_dict(once.to_dict()).after(reader, 2)
    assert (twice.position, twice.worker_batches, twice.num_workers) == (512, 7, 3)
    assert asdict(replace(twice, worker_batches=0, num_workers=1, global_batch=0)) == asdict(STATE)


def test_one_workers_state_needs_as_many_workers() -> None:
    """A worker's own state goes on only among as many workers, in steps of the same size."""
    one = replace(STATE, worker_batches=5, num_workers=3, global_batch=4)
    one.require_workers(3, 4)
    for other in (1, 2, 5):
        with pytest.raises(ResumeMismatch, match=f"one of 3 DataLoader workers, there are {other} here"):
            one.require_workers(other, 4)
        with pytest.raises(ResumeMismatch, match=f"steps of 4 samples over all ranks, there are {other} here"):
            one.require_workers(3, other)


def test_what_is_no_state_is_told_apart() -> None:
    """A whole checkpoint names the part to pass; torchdata's own state is called by its name."""
    with pytest.raises(ResumeMismatch, match="there is one under 'loader': pass that part"):
        State.from_dict({"model": {}, "step": 3, "loader": STATE.to_dict()})
    with pytest.raises(ResumeMismatch, match="torchdata's StatefulDataLoader"):
        State.from_dict({"_snapshot": {}, "_steps_since_snapshot": 0, "_iterator_finished": False})
    with pytest.raises(ResumeMismatch, match="lacks seed; pass what state_dict\\(\\) returned, unchanged"):
        State.from_dict({name: value for name, value in STATE.to_dict().items() if name != "seed"})
