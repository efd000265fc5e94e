"""What ``topology=`` takes, in one process: what is refused, and when a function is asked."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed
from torch.distributed.device_mesh import init_device_mesh

from streamshards import OptionInvalid, OrderOptions, StreamingDataLoader, StreamingDataset, Topology
from tests.datasets import ids, write
from tests.distributed.ranks import join_group


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("dataset") / "train"
    write(str(folder), range(40))
    return str(folder)


def make(url: str, **options: Any) -> StreamingDataset:
    return StreamingDataset(url, batch_size=4, columns=["id"], order=OrderOptions(lanes=1), **options)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    join_group(tmp_path, 0, 1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("topology", [(0, 2), 1, "dp", Topology], ids=repr)
def test_what_says_no_rank_is_refused_at_once(url: str, topology: Any) -> None:
    """Also the class Topology itself, whose call would be rank 0 of 1; the error lists what is possible."""
    with pytest.raises(OptionInvalid, match=r"must be Topology\(rank=….*DeviceMesh.*function"):
        make(url, topology=topology)


def test_a_mesh_of_one_dimension_is_a_rank(url: str, process_group: None) -> None:
    """It is asked at once; of several dimensions it is refused at once, even if all but one are of size 1."""
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "tp"))
    assert len(ids(StreamingDataLoader(make(url, topology=mesh["dp"])))) == 10
    with pytest.raises(OptionInvalid, match=r'2 dimensions.*mesh\["dp"\].*_flatten\(\)'):
        make(url, topology=mesh)


def test_a_function_is_asked_anew_as_each_iteration_begins(url: str) -> None:
    """Not before; what it says of workers is ours to know, and is ignored."""
    answers = [Topology(rank=1, world_size=2, worker=3, num_workers=4), Topology(rank=0, world_size=5)]
    dataset = make(url, topology=lambda: answers[0])
    assert next(iter(dataset))["id"].tolist() == [4, 5, 6, 7]
    assert len(dataset) == 5
    del answers[0]
    assert next(iter(dataset))["id"].tolist() == [0, 1, 2, 3]
    assert len(StreamingDataLoader(dataset)) == 2


def test_a_function_that_fails_or_says_no_topology_is_an_error(url: str) -> None:
    """OptionInvalid, with what it said; never rank 0."""
    with pytest.raises(OptionInvalid, match="must return a Topology; it returned 3"):
        iter(make(url, topology=lambda: 3))  # type: ignore[arg-type,return-value]
    with pytest.raises(OptionInvalid, match="failed: ZeroDivisionError"):
        len(make(url, topology=lambda: Topology(rank=1 // 0)))


def test_a_copy_in_the_same_process_reads_as_the_same_rank(url: str) -> None:
    """copy.copy goes the way of pickle, and keeps the answer."""
    dataset = make(url, topology=lambda: Topology(rank=1, world_size=2))
    assert ids(copy.copy(dataset)) == ids(dataset)
