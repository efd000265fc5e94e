"""Memory for large objects: the right size, aligned, and given back."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamshards import Mixture, ShardWriter, StreamingDataset, Topology
from streamshards.epochs import EpochDataset
from streamshards.memory import LARGE_BYTES, map_memory
from streamshards.options import MiB
from streamshards.shard.reader import empty


@pytest.mark.parametrize("size", [1, 1000, LARGE_BYTES - 1, LARGE_BYTES, LARGE_BYTES + 1])
def test_memory_is_aligned_and_of_the_size_asked_for(size: int) -> None:
    """Large or small, a tensor of exactly that size, aligned for every dtype."""
    memory = empty((size,), torch.uint8)
    assert (memory.dtype, memory.shape) == (torch.uint8, (size,))
    assert memory.data_ptr() % 64 == 0
    memory.fill_(1)
    assert memory.untyped_storage().nbytes() == size


def test_an_empty_tensor_is_empty() -> None:
    """No rows need no memory, whatever the dtype."""
    assert empty((0, 3), torch.float32).shape == (0, 3)
    assert len(map_memory(0)) == 0


def test_large_memory_goes_back_when_the_last_view_dies() -> None:
    """The mapping lives as long as any view of it, and no longer."""

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    try:
        before = resident()
    except OSError:
        pytest.skip("no /proc/self/statm on this platform")
    memory = empty((64 * MiB,), torch.uint8)
    memory.fill_(1)
    view = memory[100:200]
    del memory
    assert resident() - before > 48 * MiB
    assert int(view.sum()) == 100
    del view
    assert resident() - before < 16 * MiB


# -- what a batch is reckoned to take ----------------------------------------------------------------------------------

ROWS = 24
_numbers = itertools.count()


def value(kind: str, size: int, row: int) -> Any:
    """Return a field's value: all those of one source are of one size, so that a mean says all."""
    if kind == "str":
        return "x" * size
    if kind == "ragged":  # of two sizes, each as often
        return torch.zeros(size + row % 2)
    if kind == "images":  # more than the first size varies
        return torch.zeros(size + row % 2, 1 + row % 2, dtype=torch.uint8)
    return torch.full((size,), 1.5) if kind == "fixed" else row


fields = st.dictionaries(
    st.sampled_from("abcde"),
    st.tuples(
        st.sampled_from(["fixed", "int", "str", "ragged", "images"]),
        st.integers(0, 400),
        st.sampled_from(["always", "never", "in the first half", "in every second"]),
    ),
    min_size=1,
)


def write_source(spec: dict[str, tuple[str, int, str]]) -> str:
    """Write a dataset of those fields, in two shards; return its url."""
    url = f"memory://reckoning-{next(_numbers)}"
    for half in (0, 1):
        with ShardWriter(url, mode="append" if half else "error") as out:
            for row in range(half * ROWS // 2, (half + 1) * ROWS // 2):
                is_there = {"always": True, "never": False, "in the first half": not half}
                values = {
                    name: value(kind, size, row) if is_there.get(when, row % 2 == 0) else None
                    for name, (kind, size, when) in spec.items()
                }
                out.write(values | {"id": row})
    return url


def reckoned_and_taken(dataset: EpochDataset) -> tuple[int, int]:
    """Return the bytes that one batch of all rows is reckoned to take, and those that its columns take."""
    start = dataset._start.peek()
    state = dataset._state(start, Topology())
    start = start._replace(order=state.order)
    stream = dataset._open(state, start, dataset._assignment(Topology(), start), 0, lambda columns: columns)
    columns = stream.next()
    stream.close()
    return stream._max_ready_bytes // stream._max_ready, columns.nbytes


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])  # shared machines
@given(fields)
def test_a_batch_takes_no_more_than_it_is_reckoned_to(spec: dict[str, tuple[str, int, str]]) -> None:
    """Whatever the fields, optional ones that are None throughout, in one shard or here and there included."""
    dataset = StreamingDataset(write_source(spec), batch_size=ROWS)
    reckoned, taken = reckoned_and_taken(dataset)
    assert taken <= reckoned + 8 * len(spec)  # offsets have one entry more than there are rows


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(fields, fields)
def test_a_batch_of_united_fields_takes_no_more_than_it_is_reckoned_to(
    one: dict[str, tuple[str, int, str]], other: dict[str, tuple[str, int, str]]
) -> None:
    """The same in a mixture, where a source may lack fields of the other, or have them in another size."""
    other = {name: (one.get(name, spec)[0], *spec[1:]) for name, spec in other.items()}
    sources = {
        name: StreamingDataset(write_source(spec), batch_size=2 * ROWS, seed=seed)
        for seed, (name, spec) in enumerate({"one": one, "other": other}.items())
    }
    mix = Mixture(sources, weights=dict.fromkeys(sources, 1.0), stop=2 * ROWS)
    reckoned, taken = reckoned_and_taken(mix)
    assert taken <= reckoned + 8 * len({*one, *other})
