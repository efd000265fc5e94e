"""What torchrun starts for test_torchrun.py: ranks that train until SIGTERM, agree on a last step, and save."""

from __future__ import annotations

import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from streamshards import StreamingDataLoader, StreamingDataset
from tests.processes.sessions import BATCH

MORE = 20
"""Steps after the one in which the ranks agreed to stop."""


def main(url: str, folder: str) -> None:
    """Train; at SIGTERM go on for some steps, then write what was seen and the state."""
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dataset = StreamingDataset(url, batch_size=BATCH // world_size, shuffle=True, seed=9, columns=["id"])
    loader = StreamingDataLoader(dataset, num_workers=2, multiprocessing_context="fork")
    seen: list[list[int]] = []
    last_step = None
    while last_step != len(seen):
        for batch in loader:
            seen.append(batch["id"].tolist())
            is_asked = torch.tensor(len(asked))
            dist.all_reduce(is_asked, dist.ReduceOp.MAX)  # or the ranks would stop at different steps
            if last_step is None and is_asked:
                last_step = len(seen) + MORE
            if len(seen) == last_step:
                break
            if len(seen) == 4 and rank == 0:
                print("ready", os.getpid(), flush=True)  # noqa: T201 - the parent reads it
    Path(folder, f"{rank}.json").write_text(json.dumps([seen, loader.state_dict()]))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
