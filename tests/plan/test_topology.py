"""Who reads."""

from __future__ import annotations

import pytest

from streamshards.errors import OptionInvalid
from streamshards.plan.topology import Topology


def test_alone_by_default() -> None:
    """Nothing said is one rank with one reader."""
    assert Topology() == Topology(rank=0, world_size=1, worker=0, num_workers=1)
    assert Topology().num_readers == 1


def test_every_small_place_exists() -> None:
    """Every rank below the world size and every worker below their number is a place; they are counted right."""
    for world_size in range(1, 6):
        for num_workers in range(1, 6):
            places = {
                Topology(rank=rank, world_size=world_size, worker=worker, num_workers=num_workers)
                for rank in range(world_size)
                for worker in range(num_workers)
            }
            assert len(places) == next(iter(places)).num_readers == world_size * num_workers


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"rank": 1}, "rank=1 must be below world_size=1"),
        ({"rank": 4, "world_size": 4}, "rank=4 must be below world_size=4"),
        ({"worker": 1}, "worker=1 must be below num_workers=1"),
        ({"rank": -1}, "rank=-1"),
        ({"worker": -1, "num_workers": 2}, "worker=-1"),
        ({"world_size": 0}, "world_size=0"),
        ({"num_workers": 0}, "num_workers=0"),
        ({"rank": True, "world_size": 2}, "rank=True"),
        ({"rank": 0.0}, "rank=0.0"),
        ({"world_size": "2"}, "world_size='2'"),
        ({"num_workers": None}, "num_workers=None"),
    ],
)
def test_no_place_beyond_the_readers(wrong: dict[str, object], named: str) -> None:
    """A place that cannot be is refused by the name and value of what is wrong."""
    with pytest.raises(OptionInvalid, match=named):
        Topology(**wrong)  # type: ignore[arg-type]  # that is the point


def test_with_worker_keeps_the_rank() -> None:
    """The same rank can be seen from any of its workers; the one it was made from stays as it is."""
    rank = Topology(rank=2, world_size=3)
    assert rank.with_worker(1, 4) == Topology(rank=2, world_size=3, worker=1, num_workers=4)
    assert rank == Topology(rank=2, world_size=3)
    with pytest.raises(OptionInvalid):
        rank.with_worker(4, 4)
