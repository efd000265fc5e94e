"""The interpreter ends in the middle of an epoch: soon, with the right exit code, and without a word of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENDS_S = 60
"""Importing torch takes seconds, three times with two workers; the rest is over at once."""

SCRIPT = """
import sys
from tests.processes.sessions import make

def main():
    global kept
    loader = make(sys.argv[1], int(sys.argv[2]), sys.argv[3])
    how = sys.argv[4]
    if how == "held":
        kept = iter(loader)
        next(kept)
        return
    for batch in loader:
        if how == "break":
            break
        if how == "exit":
            sys.exit(7)
        if how == "raise":
            raise LookupError("of the trainer's own")

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize(
    ("num_workers", "context", "how"),
    [
        *((0, "fork", how) for how in ("exit", "raise", "held")),
        *((2, "fork", how) for how in ("break", "exit", "held")),
        (2, "forkserver", "held"),
        (2, "spawn", "raise"),
        (2, "spawn", "held"),
    ],
)
def test_the_interpreter_ends_in_silence(
    url: str, tmp_path: Path, scratch: Path, num_workers: int, context: str, how: str
) -> None:
    """After break, sys.exit or an exception, or while a global holds the iterator: stderr has the exception at most."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "TMPDIR": str(scratch)}
    command = [sys.executable, str(script), url, str(num_workers), context, how]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=ENDS_S, check=False
    )
    assert done.returncode == {"exit": 7, "raise": 1}.get(how, 0), done.stderr
    assert done.stdout == ""
    if how == "raise":
        assert done.stderr.count("Traceback") == 1, done.stderr
        assert done.stderr.endswith("LookupError: of the trainer's own\n")
    else:
        assert done.stderr == ""
    assert list(scratch.iterdir()) == []
