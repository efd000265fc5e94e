"""SIGTERM to torchrun: its ranks, with workers, end their steps together, save, and another cluster resumes exactly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from streamshards import StreamingDataset
from tests.datasets import flat, ids
from tests.processes.preempted import MORE
from tests.processes.sessions import BATCH, wait_for_end

ROOT = Path(__file__).resolve().parents[2]
ENDS_S = 120


def test_sigterm_to_torchrun(url: str, tmp_path: Path) -> None:
    """After the signal each rank takes 20 more batches from its two workers; one rank goes on from the state."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--nproc-per-node=2"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", "--max-restarts=0"]
    command += ["-m", "tests.processes.preempted", url, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    said = tmp_path / "said"
    with (
        said.open("w") as file,
        subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=file, start_new_session=True
        ) as job,
    ):
        try:
            assert job.stdout is not None
            assert job.stdout.readline().startswith("ready"), said.read_text()
            job.send_signal(signal.SIGTERM)
            wait_for_end([handle := os.pidfd_open(job.pid)], said.read_text())
            os.close(handle)
        finally:
            if job.poll() is None:
                job.kill()
    parts = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert parts[0][1] == parts[1][1]
    assert len(parts[0][0]) == len(parts[1][0]) > MORE
    seen = [left + right for left, right in zip(parts[0][0], parts[1][0], strict=True)]
    alone = StreamingDataset(url, batch_size=BATCH, shuffle=True, seed=9, columns=["id"])
    alone.load_state_dict(parts[0][1])
    epoch = parts[0][1]["epoch"]
    whole = flat(seen)[epoch * 74 * BATCH :] + flat(ids(alone))
    alone.set_epoch(epoch)
    assert whole == flat(ids(alone))
