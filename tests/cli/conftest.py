"""The command line in this process, and how its errors look."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import pytest

from streamshards.cli.codes import ExitCode
from streamshards.cli.outcome import run


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Any:
    """A function that runs the command line on its arguments."""

    def run_words(*words: object) -> Ended:
        capfd.readouterr()
        code = run([str(word) for word in words])
        return Ended(code, *capfd.readouterr())

    return run_words


def assert_error(ended: Ended, code: ExitCode, *texts: str) -> None:
    """Check that a command failed with this code and one line that has these texts, and printed no result."""
    assert ended.code == code, ended
    assert ended.out == ""
    assert ended.err.startswith("streamshards: ")
    assert ended.err.count("\n") == 1
    assert ended.err.endswith("\n")
    assert "Traceback" not in ended.err
    for text in texts:
        assert text in ended.err
