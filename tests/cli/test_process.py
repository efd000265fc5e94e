"""The command line as a process of its own: streams, signals and what starting it costs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from streamshards.cli.codes import ExitCode
from tests.datasets import write
from tests.pt_files import fill


def start(*words: object, **options: Any) -> subprocess.Popen[str]:
    """Start ``python -m streamshards`` on *words*."""
    return subprocess.Popen([sys.executable, "-m", "streamshards", *map(str, words)], text=True, **options)


@pytest.mark.parametrize("command", ["pack", "index", "inspect", "cat", "verify", "state", "state show"])
def test_the_help_of_a_command_does_not_pay_for_torch(command: str) -> None:
    """Nor for numpy, fsspec or rich."""
    timed = [sys.executable, "-X", "importtime", "-m", "streamshards", *command.split(), "--help"]
    done = subprocess.run(timed, capture_output=True, text=True, timeout=120, check=True)
    assert f"streamshards {command}" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "streamshards.cli.commands" in imported
    assert {"torch", "numpy", "fsspec", "rich.progress"} & imported == set()


def test_results_on_stdout_progress_on_a_terminal(tmp_path: Path) -> None:
    """The bar goes to stderr when it is a terminal, and stdout is the same to the byte with and without one."""
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    with start("index", fill(tmp_path, "rows"), stdout=subprocess.PIPE, stderr=theirs) as process:
        os.close(theirs)
        shown = _read_all(ours)
        assert process.stdout is not None
        out = process.stdout.read()
    assert process.returncode == 0
    assert out.startswith(f"indexed 12 files of layout rows at {tmp_path}: 48 samples, ")
    assert out.count("\n") == 1
    assert "indexing" in shown
    quiet = subprocess.run(
        [sys.executable, "-m", "streamshards", "index", tmp_path, "--mode", "replace"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert (quiet.stdout, quiet.stderr) == (out, "")


def _read_all(descriptor: int) -> str:
    """Return what a terminal was sent until its last writer closed it (on Linux that is an error)."""
    chunks: list[bytes] = []
    try:
        while chunk := os.read(descriptor, 65_536):
            chunks.append(chunk)
    except OSError:
        pass
    finally:
        os.close(descriptor)
    return b"".join(chunks).decode(errors="replace")


def test_a_reader_that_stops_is_no_error(tmp_path: Path) -> None:
    """``streamshards cat … | head -1`` ends in silence."""
    write(str(tmp_path), range(2_000), shard_bytes=1 << 20)
    with start("cat", tmp_path, "--json", "--limit", 2_000, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith('{"id": 0,')
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == ExitCode.PIPE_CLOSED


def test_the_exit_code_reaches_the_shell(tmp_path: Path) -> None:
    """And the error is one line on stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "streamshards", "inspect", tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == ExitCode.NO_DATASET
    assert done.stdout == ""
    assert done.stderr == (
        f"streamshards: {tmp_path}: no dataset: empty, or it does not exist; "
        f"make one with: streamshards pack SRC {tmp_path}\n"
    )
