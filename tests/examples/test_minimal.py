"""The two small examples, run as a reader of theirs would run them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]


def run(script: str, *arguments: str) -> str:
    """Return what ``examples/SCRIPT`` printed."""
    command = [sys.executable, str(ROOT / "examples" / script), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_pack_train_and_resume(tmp_path: Path) -> None:
    """The sample dataset is packed once, and a run cut into two ends where an uninterrupted one does."""
    url = str(tmp_path / "train")
    assert "packed 700 samples" in run("pack_sample.py", "--url", url, "--samples", "700")
    assert "already in" in run("pack_sample.py", "--url", url, "--samples", "700", "--if-missing")

    whole, halves = tmp_path / "whole.json", tmp_path / "halves.json"
    assert "step 22 of 22" in run("train_minimal.py", "--url", url, "--epochs", "2", "--checkpoint", str(whole))
    run("train_minimal.py", "--url", url, "--epochs", "1", "--checkpoint", str(halves))
    resumed = run("train_minimal.py", "--url", url, "--epochs", "2", "--checkpoint", str(halves))
    assert "resumed" in resumed
    assert json.loads(halves.read_text()) == json.loads(whole.read_text())
