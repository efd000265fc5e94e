"""Memory for large objects: the right size, aligned, and given back."""

from __future__ import annotations

import pytest
import torch

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
