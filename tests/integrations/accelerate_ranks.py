"""A rank under Accelerate: prepare, stop in the middle, save_state, load_state, gather; tells what it saw.

accelerate_ranks.py URL CHECKPOINT OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from streamshards import OrderOptions, StreamingDataLoader, StreamingDataset
from tests.datasets import ids

GLOBAL_BATCH = 24
STEPS_BEFORE = 3


def make(url: str, num_ranks: int, **options: Any) -> StreamingDataLoader:
    """Return a loader whose global batch is the same on 1 and 2 ranks."""
    order = OrderOptions(lanes=4, shuffle_block=60)
    dataset = StreamingDataset(
        url, batch_size=GLOBAL_BATCH // num_ranks, shuffle=True, seed=5, columns=["id"], order=order, **options
    )
    return StreamingDataLoader(dataset)


def prepared(accelerator: Accelerator, loader: StreamingDataLoader) -> StreamingDataLoader:
    """Return what ``prepare`` makes of *loader*, beside a model and its optimizer."""
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    result: StreamingDataLoader = accelerator.prepare(model, optimizer, loader)[-1]
    accelerator.register_for_checkpointing(result)
    return result


def main(url: str, checkpoint: str, out: str) -> None:
    accelerator = Accelerator(cpu=True)
    num_ranks = accelerator.num_processes
    ours = make(url, num_ranks)
    loader = prepared(accelerator, ours)
    batches = iter(loader)
    told: dict[str, Any] = {
        "is_ours": loader is ours,
        "before": ids(next(batches) for _ in range(STEPS_BEFORE)),
        "saved": loader.state_dict(),
    }
    accelerator.save_state(checkpoint)
    accelerator.wait_for_everyone()  # rank 0 writes the loader's state for all
    next(batches)
    accelerator.load_state(checkpoint)
    told["rest"] = ids(loader)
    told["gathered"] = [accelerator.gather_for_metrics(batch["id"]).tolist() for batch in loader]

    evaluation = accelerator.prepare(make(url, num_ranks, tail="uneven"))
    count = torch.tensor(sum(len(batch["id"]) for batch in evaluation))
    told["evaluated"] = int(accelerator.reduce(count))
    Path(out, f"{accelerator.process_index}.json").write_text(json.dumps(told))
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
