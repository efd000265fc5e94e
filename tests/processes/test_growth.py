"""Nothing grows with epochs. The long version: ``python -m tests.soak.growth``."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamshards import CacheOptions
from tests.soak.growth import MAX_GROWTH_MIB, growth


@pytest.mark.parametrize(("num_workers", "persistent"), [(0, False), (2, False), (2, True)])
def test_epochs_leave_nothing(url: str, tmp_path: Path, num_workers: int, persistent: bool) -> None:
    """Descriptors, threads, children, shared memory: as after three epochs, however many follow or are left early."""
    cache = CacheOptions(directory=str(tmp_path), keep_free_bytes=0)
    grown = growth(url, 7, num_workers=num_workers, persistent=persistent, cache=cache)
    assert grown < MAX_GROWTH_MIB
