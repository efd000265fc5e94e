"""Ranks that save their loader with torch.distributed.checkpoint, load it again, and tell what they saw."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import torch.distributed
import torch.distributed.checkpoint as dcp

from streamshards import OrderOptions, StreamingDataLoader, StreamingDataset
from tests.datasets import ids

GLOBAL_BATCH = 24
STEPS_BEFORE = 3


def make(url: str, num_ranks: int) -> StreamingDataLoader:
    """Return a loader whose global batch is the same on 1, 2 and 3 ranks."""
    order = OrderOptions(lanes=4, shuffle_block=60)
    dataset = StreamingDataset(
        url, batch_size=GLOBAL_BATCH // num_ranks, shuffle=True, seed=5, columns=["id"], order=order
    )
    return StreamingDataLoader(dataset)


def run_ranks(task: str, num_ranks: int, url: str, folder: Path) -> list[dict[str, Any]]:
    """Run *num_ranks* ranks that ``"save"`` and load, or only ``"load"``, and return what each told.

    They come from a fork server that has imported torch: quicker than torchrun by the imports.
    """
    context = multiprocessing.get_context("forkserver")
    processes = [
        context.Process(target=_rank, args=(task, rank, num_ranks, url, str(folder))) for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * num_ranks
    return [json.loads((folder / f"{num_ranks}-{rank}.json").read_text()) for rank in range(num_ranks)]


def _rank(task: str, rank: int, num_ranks: int, url: str, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/group-{num_ranks}", rank=rank, world_size=num_ranks
    )
    told: dict[str, Any] = {}
    if task == "save":
        loader = make(url, num_ranks)
        batches = iter(loader)
        told["before"] = ids(next(batches) for _ in range(STEPS_BEFORE))
        dcp.save({"loader": loader}, checkpoint_id=f"{folder}/checkpoint")
        told["saved"] = loader.state_dict()
    loader = make(url, num_ranks)
    dcp.load({"loader": loader}, checkpoint_id=f"{folder}/checkpoint")
    told["loaded"] = loader.state_dict()
    told["rest"] = ids(loader)
    Path(folder, f"{num_ranks}-{rank}.json").write_text(json.dumps(told))
    torch.distributed.destroy_process_group()
