"""torch.distributed.checkpoint: a loader is a Stateful like a model, and a checkpoint loads on any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.stateful import Stateful

from tests.datasets import flat, ids, write
from tests.integrations.dcp_ranks import GLOBAL_BATCH, STEPS_BEFORE, make, run_ranks

NUM_SAMPLES = 230

pytestmark = [
    # dcp says so whenever a single process saves or loads without a process group, which is what these tests want.
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"),
]


@pytest.fixture
def url(tmp_path: Path) -> str:
    write(str(tmp_path / "data"), range(NUM_SAMPLES))
    return str(tmp_path / "data")


def global_batches(per_rank: list[list[list[int]]]) -> list[list[int]]:
    """Return the ids of each step over all ranks."""
    return [flat(parts) for parts in zip(*per_rank, strict=True)]


def test_saved_by_two_ranks_loaded_by_two_three_and_one(url: str, tmp_path: Path) -> None:
    """One small state, the same on every rank, goes through dcp as it is; the rest of the epoch follows exactly."""
    whole = ids(make(url, 1))
    savers = run_ranks("save", 2, url, tmp_path)
    assert savers[0]["saved"] == savers[1]["saved"]
    assert global_batches([rank["before"] for rank in savers]) == whole[:STEPS_BEFORE]
    for ranks in (savers, run_ranks("load", 3, url, tmp_path)):
        assert [rank["loaded"] for rank in ranks] == [savers[0]["saved"]] * len(ranks)
        assert global_batches([rank["rest"] for rank in ranks]) == whole[STEPS_BEFORE:]

    loader = make(url, 1)
    dcp.load({"loader": loader}, checkpoint_id=tmp_path / "checkpoint")
    assert loader.state_dict() == savers[0]["saved"]
    assert ids(loader) == whole[STEPS_BEFORE:]


def test_the_checkpoint_holds_plain_values(url: str, tmp_path: Path) -> None:
    """Nothing is pickled by us and nothing is kept per rank: the checkpoint has the state's own few keys."""
    loader = make(url, 1)
    assert isinstance(loader, Stateful)
    next(iter(loader))
    dcp.save({"app": {"step": 1}, "loader": loader}, checkpoint_id=tmp_path / "checkpoint")
    saved = dcp.FileSystemReader(tmp_path / "checkpoint").read_metadata().state_dict_metadata
    assert set(saved) == {"app.step", *(f"loader.{name}" for name in loader.state_dict())}
    assert loader.state_dict()["position"] == GLOBAL_BATCH


def test_json_and_dcp_hold_the_same_state(url: str, tmp_path: Path) -> None:
    """A state that went through JSON and dcp loads at the end of an epoch and at its beginning, too."""
    whole = ids(make(url, 1))
    for steps in (0, 1, len(whole)):
        loader = make(url, 1)
        batches = iter(loader)
        assert ids(next(batches) for _ in range(steps)) == whole[:steps]
        loader.load_state_dict(json.loads(json.dumps(loader.state_dict())))
        dcp.save({"loader": loader}, checkpoint_id=tmp_path / str(steps))
        resumed = make(url, 1)
        dcp.load({"loader": resumed}, checkpoint_id=tmp_path / str(steps))
        assert resumed.state_dict() == loader.state_dict()
        assert ids(resumed) == whole[steps:]
