"""What the ranks of these tests do: read in every way there is, or train. Also what torchrun starts."""

from __future__ import annotations

import json
import multiprocessing.forkserver
import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.data import DataLoader

from streamshards import OptionInvalid, OrderOptions, RetryOptions, StreamingDataLoader, StreamingDataset, Topology
from tests.datasets import ids
from tests.distributed.ranks import COLLECTIVE_S, join_group

NUM_SAMPLES: Final = 461
GLOBAL_BATCH: Final = 32
"""461 = 14 * 32 + 13: on four ranks, the last batches of "uneven" hold 8, 5, 0 and 0 samples."""
LANES: Final = OrderOptions(lanes=4, shuffle_block=60)


def make(url: str, num_ranks: int, **options: Any) -> StreamingDataset:
    """Return the dataset as one of *num_ranks* reads it; the global batch is always the same."""
    options = {"shuffle": True, "seed": 9, "columns": ["id"], "order": LANES} | options
    return StreamingDataset(
        url, batch_size=GLOBAL_BATCH // num_ranks, retry=RetryOptions(base_s=0.001, max_wait_s=0.01), **options
    )


def asked_rank() -> Topology:
    """Say which rank this is; fails until there is a process group."""
    return Topology(rank=dist.get_rank(), world_size=dist.get_world_size())


def _same(batch: Any) -> Any:
    return batch


def _refusal(act: Callable[[], object]) -> str:
    try:
        act()
    except OptionInvalid as error:
        return str(error)
    return "not refused"


class Reading:
    """What one rank reads, by the name of the way it is read."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    def read(self, name: str, dataset: StreamingDataset, num_workers: int = 0, context: str | None = None) -> None:
        """Read epoch 0 of *dataset* with our loader: its length, asked before, and the ids of each batch."""
        dataset.set_epoch(0)
        loader = StreamingDataLoader(dataset, num_workers=num_workers, multiprocessing_context=context)
        self.seen[name] = {"length": len(loader), "batches": ids(loader)}

    def read_plainly(self, name: str, dataset: StreamingDataset, num_workers: int, context: str) -> None:
        """The same with the DataLoader of torch."""
        dataset.set_epoch(0)
        loader = DataLoader(
            dataset, batch_size=None, num_workers=num_workers, multiprocessing_context=context, collate_fn=_same
        )
        self.seen[name] = {"length": len(loader), "batches": ids(loader)}

    def read_in_step(self, name: str, dataset: StreamingDataset, num_workers: int) -> None:
        """XX"""
        loader = StreamingDataLoader(dataset, num_workers=num_workers, multiprocessing_context=_fork(num_workers))
        length, batches, sums = len(loader), [], []
        for batch in loader:
            total = batch["id"].sum()
            dist.all_reduce(total)
            batches.append(batch["id"].tolist())
            sums.append(int(total))
        self.seen[name] = {"length": length, "batches": batches, "sums": sums}


def _fork(num_workers: int) -> str | None:
    return "fork" if num_workers else None


def _start_fork_server() -> None:
    """Start a server for this rank's workers: torch is imported once, in an environment that knows of no ranks."""
    known = {name: os.environ.pop(name) for name in ("RANK", "WORLD_SIZE")}
    multiprocessing.set_forkserver_preload(["streamshards.loader"])
    multiprocessing.forkserver.ensure_running()
    os.environ.update(known)


def explore(folder: Path, rank: int, world_size: int, url: str, bad_url: str) -> None:
    """Read in every way there is, and write what was seen to ``{rank}.json``."""
    reading = Reading()
    # Workers that import torch anew take seconds. The last rank alone has them: it is not the rank that they would
    # take themselves for, if they knew nothing.
    is_last = world_size > 1 and rank == world_size - 1
    if is_last:
        _start_fork_server()
    server, spawn = ("forkserver", "spawn") if is_last else ("fork", "fork")
    early = make(url, world_size)
    asking = make(url, world_size, topology=asked_rank)
    asking_lambda = make(url, world_size, topology=lambda: asked_rank())

    for num_workers in (0, 2):
        reading.read(f"environment, {num_workers}", make(url, world_size), num_workers, _fork(num_workers))
    reading.read("environment, 1 forkserver", make(url, world_size), 1, server)
    reading.read_plainly("environment, 1 forkserver, plain", make(url, world_size), 1, server)
    del os.environ["RANK"]
    reading.seen["no rank, dataset"] = _refusal(lambda: iter(make(url, world_size)))
    reading.seen["no rank, loader"] = _refusal(lambda: iter(StreamingDataLoader(make(url, world_size))))
    reading.seen["asked too early"] = _refusal(lambda: iter(asking))
    del os.environ["WORLD_SIZE"]

    join_group(folder, rank, world_size)
    for num_workers in (0, 2):
        reading.read(f"early, {num_workers}", early, num_workers, _fork(num_workers))
        reading.read(f"asking, {num_workers}", asking, num_workers, _fork(num_workers))
    reading.read_plainly("early, 2 fork, plain", early, 2, "fork")
    reading.read_plainly("asking, 2 fork, plain", asking, 2, "fork")
    reading.read("early, 1 forkserver", early, 1, server)
    for way, dataset in {"early": early, "asking": asking, "asking lambda": asking_lambda}.items():
        reading.read_plainly(f"{way}, 1 forkserver, plain", dataset, 1, server)
    if world_size == 2:
        reading.read_plainly("early, 1 spawn, plain", early, 1, spawn)
    for tail in ("pad", "drop", "uneven"):
        for num_workers in (0, 2):
            dataset = make(url, world_size, tail=tail)
            reading.read(f"{tail}, {num_workers}", dataset, num_workers, _fork(num_workers))
    for num_workers in (0, 1):
        reading.read_in_step(f"bad shard, {num_workers}", make(bad_url, world_size), num_workers)
    if world_size == 4:
        _explore_meshes(reading, url, server)
    dist.barrier()
    dist.destroy_process_group()
    (folder / f"{rank}.json").write_text(json.dumps(reading.seen))


def _explore_meshes(reading: Reading, url: str, server: str) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for num_workers in (0, 2):
        dataset = make(url, 2, topology=mesh["dp"])
        reading.read(f"mesh, {num_workers}", dataset, num_workers, _fork(num_workers))
    reading.read_plainly("mesh, forkserver, plain", make(url, 2, topology=mesh["dp"]), 1, server)
    reading.read_plainly("mesh, fork, plain", make(url, 2, topology=mesh["dp"]), 1, "fork")
    reading.seen["coordinate"] = list(mesh.get_coordinate() or ())
    reading.seen["two dimensions"] = _refusal(lambda: make(url, 4, topology=mesh))
    sharded = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
    flat = sharded["dp_replicate", "dp_shard"]._flatten()
    reading.read("flat mesh", make(url, 4, topology=flat))
    half = DeviceMesh("cpu", [0, 1])
    reading.seen["not in the mesh"] = _refusal(lambda: make(url, 2, topology=half))


def receive(folder: Path, rank: int, world_size: int, asking: StreamingDataset, answered: StreamingDataset) -> None:
    """Read datasets that another process made, with functions that could not and could answer there."""
    reading = Reading()
    join_group(folder, rank, world_size)
    reading.read("asking", asking)
    reading.seen["answered"] = _refusal(lambda: iter(answered))
    dist.barrier()
    dist.destroy_process_group()
    (folder / f"{rank}.json").write_text(json.dumps(reading.seen))


def read_to_the_bad_shard(folder: Path, rank: int, world_size: int, bad_url: str, num_workers: int) -> None:
    """Read in step with ``on_corrupt="raise"``: nobody gets to the end."""
    if not dist.is_initialized():
        join_group(folder, rank, world_size)
    dataset = make(bad_url, world_size, shuffle=False, order=OrderOptions(lanes=4, shuffle_block=1), on_corrupt="raise")
    Reading().read_in_step("to the end", dataset, num_workers)
    (folder / f"{rank}.json").write_text("{}")


# -- training ----------------------------------------------------------------------------------------------------------

NUM_EPOCHS: Final = 2
CHECKPOINT_STEPS: Final = 4
_GRID: Final = 2.0**30
"""Gradients are multiples of 1 / this."""
_LARGEST: Final = 2.0**10
"""And not larger than this: 40 bits and a sign. The sum of 32 takes 5 more, so every partial sum fits float64's 53."""
_RATE: Final = 2.0**-6

Report = Callable[[dict[str, Any]], None]


def _model() -> torch.nn.Module:
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()


def _sum_of_gradients(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return the sum over the batch of each sample's gradient, rounded to the grid: exact, in whatever order.

    Samples go through the model one by one, because a matrix product may round differently in a larger batch.
    """
    parameters = list(model.parameters())
    sums = [torch.zeros_like(parameter) for parameter in parameters]
    for x, number in zip(batch["x"].double() / NUM_SAMPLES, batch["id"].tolist(), strict=True):
        error = model(x.clone()) - torch.sin(torch.tensor(number / 40, dtype=torch.float64))
        for total, gradient in zip(sums, torch.autograd.grad(error.square().sum(), parameters), strict=True):
            total += (gradient.clamp(-_LARGEST, _LARGEST) * _GRID).round() / _GRID
    return sums


def _weights(model: torch.nn.Module) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in model.state_dict().items()}  # JSON keeps each bit of a float


def train(folder: Path, url: str, num_workers: int, report: Report) -> None:
    """Train to the end, from the checkpoint in *folder* if there is one; needs a process group.

    Args:
        folder: Rank 0 keeps ``checkpoint.json`` here; each rank writes its weights to ``{rank}.json`` at the end.
        url: Of the dataset.
        num_workers: DataLoader workers of each rank.
        report: Called on rank 0 after each step.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = _model()
    loader = StreamingDataLoader(
        make(url, world_size, columns=["id", "x"]),
        num_workers=num_workers,
        multiprocessing_context=_fork(num_workers),
    )
    checkpoint = folder / "checkpoint.json"
    step = 0
    if checkpoint.exists():
        saved = json.loads(checkpoint.read_text())
        step = saved["step"]
        loader.load_state_dict(saved["loader"])
        model.load_state_dict({name: torch.tensor(w, dtype=torch.float64) for name, w in saved["model"].items()})
    dist.barrier()  # all have read it before anyone writes the next
    for _ in range(loader.state_dict()["epoch"], NUM_EPOCHS):
        for batch in loader:
            for parameter, total in zip(model.parameters(), _sum_of_gradients(model, batch), strict=True):
                dist.all_reduce(total)
                parameter.data -= _RATE / GLOBAL_BATCH * total  # SGD; torch.optim would cost each rank 2 s of imports
            step += 1
            if rank == 0 and step % CHECKPOINT_STEPS == 0:
                saved = {"step": step, "model": _weights(model), "loader": loader.state_dict()}
                (folder / "checkpoint.new").write_text(json.dumps(saved))
                (folder / "checkpoint.new").replace(checkpoint)
            if rank == 0:
                report({"step": step})
    (folder / f"{rank}.json").write_text(json.dumps({"steps": step, "weights": _weights(model)}))


def live(
    folder: Path, rank: int, world_size: int, url: str, num_workers: int, killed_at: int, results: Connection
) -> None:
    """One life of a training job: at step *killed_at* rank 0 says so and waits to be killed; 0: it ends by itself."""

    def report(progress: dict[str, Any]) -> None:
        if progress["step"] == killed_at:
            results.send(killed_at)
            signal.pause()

    join_group(folder / f"life-{killed_at}", rank, world_size)
    train(folder, url, num_workers, report)
    dist.barrier()
    dist.destroy_process_group()


def main(task: str, url: str, folder: str, num_workers: str, killed_at: str) -> None:
    """What torchrun starts."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=COLLECTIVE_S))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if task == "read":
        read_to_the_bad_shard(Path(folder), rank, world_size, url, int(num_workers))
    else:
        pids: list[int] = [0] * world_size
        dist.all_gather_object(pids, os.getpid())

        def report(progress: dict[str, Any]) -> None:
            if progress["step"] == int(killed_at):
                print("kill", json.dumps(pids), flush=True)  # noqa: T201
                signal.pause()

        train(Path(folder), url, int(num_workers), report)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
