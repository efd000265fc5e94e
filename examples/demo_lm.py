"""The demo's language model: bytes of the Python standard library, trained in a process that may be killed.

    python examples/demo_lm.py --url s3://demo/code --checkpoints DIR      # what demo.py starts, kills, starts again

It prints one JSON line per step. A checkpoint is a folder ``step-000100`` with ``data.json`` (where the stream is) and
``model.pt`` (weights and optimizer), put in place by one rename: the two never disagree.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import shutil
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import streamshards as ss

WINDOW_BYTES = 257
"""256 bytes to read, and after each the one to predict."""
WINDOWS = 4_000
BATCH_SIZE = 32
EPOCHS = 2
SAVE_EVERY = 20
SEED = 17
THREADS = 2


@dataclass
class Life:
    """What one process of the language model's training told, until its end."""

    resumed_after: int = -1
    last_step: int = -1
    parameters: int = 0
    first_batch_s: float = 0.0
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    batches: list[list[int]] = field(default_factory=list)
    stats: dict[str, int | float] = field(default_factory=dict)
    seconds: float = 0.0
    """From the first step's message to the last one's."""
    exit_status: int | None = None


class ByteModel(nn.Module):
    """A causal model of bytes: each layer looks twice as far back, so the eighth sees the whole window."""

    def __init__(self, width: int = 96, layers: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.mixes = nn.ModuleList(nn.Linear(2 * width, 2 * width) for _ in range(layers))
        self.out = nn.Linear(width, 256)

    def forward(self, bytes_: torch.Tensor) -> torch.Tensor:
        """Return the logits of each next byte, ``(N, T, 256)``, of int64 ``(N, T)``."""
        hidden = self.embed(bytes_)
        for number, (norm, mix) in enumerate(zip(self.norms, self.mixes, strict=True)):
            here = norm(hidden)
            before = nn.functional.pad(here, (0, 0, 2**number, 0))[:, : here.shape[1]]
            hidden = hidden + nn.functional.glu(mix(torch.cat([here, before], dim=-1)), dim=-1)
        logits: torch.Tensor = self.out(hidden)
        return logits


def standard_library() -> Iterator[tuple[str, bytes]]:
    """Yield the name and the content of each module of the standard library that runs here, tests left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not {"site-packages", "dist-packages", "test", "tests"} & set(name.parts):
            yield name.as_posix(), path.read_bytes()


def pack_windows(url: str, *, shard_bytes: str, storage_options: dict[str, Any]) -> int:
    """Write ``WINDOWS`` windows of the standard library, spread evenly over it; return how many files they are from."""
    windows = [
        (hashlib.blake2b(f"{name}:{at}".encode(), digest_size=8).digest(), name, content[at : at + WINDOW_BYTES])
        for name, content in standard_library()
        for at in range(0, len(content) - WINDOW_BYTES + 1, WINDOW_BYTES)
    ]
    chosen = sorted(windows)[:WINDOWS]
    if len(chosen) < WINDOWS:
        raise SystemExit(f"the standard library here has {len(chosen):,} windows; {WINDOWS:,} are needed")
    with ss.ShardWriter(url, shard_bytes=shard_bytes, storage_options=storage_options) as out:
        for number, (_, name, window) in enumerate(chosen):
            out.write({"id": number, "file": name, "bytes": np.frombuffer(window, np.uint8)})
    return len({name for _, name, _ in chosen})


def open_windows(url: str, storage_options: dict[str, Any] | None = None) -> ss.StreamingDataset:
    """Return the windows as the training reads them; the credentials may stand in the environment."""
    return ss.StreamingDataset(url, batch_size=BATCH_SIZE, shuffle=True, seed=SEED, storage_options=storage_options)


def save_checkpoint(folder: Path, step: int, data_state: dict[str, Any], training: dict[str, Any]) -> None:
    """Put the checkpoint of *step* in place, and drop the one before; a kill leaves one of them whole."""
    name = f"step-{step:06d}"
    unfinished = folder / f".{name}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    (unfinished / "data.json").write_text(json.dumps({"step": step, "data": data_state}, indent=1) + "\n", "utf-8")
    torch.save(training, unfinished / "model.pt")
    old = checkpoints(folder)
    unfinished.rename(folder / name)
    for path in old:
        shutil.rmtree(path)


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in *folder*, oldest first."""
    return sorted(folder.glob("step-*"))


def main() -> None:
    """Train from the latest checkpoint, or from the start, to the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", required=True)
    parser.add_argument("--checkpoints", type=Path, required=True)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)-7s %(name)s: %(message)s")

    torch.set_num_threads(THREADS)
    torch.manual_seed(SEED)
    model = ByteModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    dataset = open_windows(options.url)
    loader = ss.StreamingDataLoader(dataset)
    step, last_step = 0, EPOCHS * len(loader)
    for found in checkpoints(options.checkpoints)[-1:]:
        saved = json.loads((found / "data.json").read_text(encoding="utf-8"))
        loader.load_state_dict(saved["data"])
        training = torch.load(found / "model.pt", weights_only=True)
        model.load_state_dict(training["model"])
        optimizer.load_state_dict(training["optimizer"])
        step = saved["step"]
    say(resumed_after=step, last_step=last_step, parameters=sum(p.numel() for p in model.parameters()))

    started, first_batch_s = time.perf_counter(), None
    while step < last_step:
        for batch in loader:  # one pass is one epoch, or the rest of one
            if first_batch_s is None:
                first_batch_s = time.perf_counter() - started
                say(first_batch_s=first_batch_s)
            step += 1
            rate = 4e-3 * min(1.0, step / 10, 0.05 + (last_step - step) / (0.6 * last_step))
            optimizer.param_groups[0]["lr"] = rate
            bytes_ = batch["bytes"].long()
            loss = nn.functional.cross_entropy(model(bytes_[:, :-1]).flatten(0, 1), bytes_[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch ships it untyped
            optimizer.step()
            say(step=step, loss=loss.item(), ids=batch["id"].tolist(), stats=dataset.stats())
            if step % SAVE_EVERY == 0:
                training = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                save_checkpoint(options.checkpoints, step, loader.state_dict(), training)
    say(done=True)


def say(**facts: Any) -> None:
    """Tell the parent; if it is gone, the broken pipe ends us."""
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
