"""How a command ends: an exit code for scripts, and one line on stderr for people."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Final

from streamshards.cli.codes import ExitCode, Stopped, code_of
from streamshards.errors import StreamShardsError

_FLAGS: Final = (
    (re.compile(r"\btrust_pickle=True"), "--trust-pickle"),
    (re.compile(r"\bstorage_options=(\{[^{}]*\})"), r"--storage-options '\1'"),
    (re.compile(r'"anon": True'), '"anon": true'),
    (re.compile(r'\bmode="(\w+)"'), r"--mode \1"),
    (re.compile(r"\blayout="), "--layout "),
    (re.compile(r"\bcolumns=\[…\]"), "--columns"),
)
"""How the library's advice reads on a command line."""


def line_of(error: BaseException) -> str:
    """Return *error* as one line, its advice in words of the command line."""
    text = " ".join(str(error).split())
    if not isinstance(error, StreamShardsError):
        return f"defect: {type(error).__name__}: {text}; run again with --debug for the traceback, and report it"
    for pattern, flag in _FLAGS:
        text = pattern.sub(flag, text)
    return text


def run(words: Sequence[str]) -> int:
    """Run the command that *words* (without the program's name) ask for; return its exit code. Raises nothing."""
    debug = "--debug" in words
    rest = [word for word in words if word != "--debug"] or ["--help"]
    try:
        with _logging(debug):
            return _run(rest)
    except (KeyboardInterrupt, Stopped) as stop:
        if isinstance(stop, Stopped) and stop.code is ExitCode.PIPE_CLOSED:
            _silence_stdout()
            return stop.code
        return _fail("interrupted", ExitCode.INTERRUPTED)
    except Exception as error:  # noqa: BLE001 - the last door: whatever it is becomes one line
        if _is_usage(error):
            return _fail(_usage_line(error), ExitCode.USAGE)
        if debug:
            traceback.print_exception(error, file=sys.stderr)
        return _fail(line_of(error), code_of(error) if isinstance(error, StreamShardsError) else ExitCode.INTERNAL)


def _run(words: list[str]) -> int:
    from streamshards.cli.commands import app

    return int(app(args=words, prog_name="streamshards", standalone_mode=False) or 0)


def _fail(line: str, code: ExitCode) -> int:
    print(f"streamshards: {line}", file=sys.stderr)  # noqa: T201 - the one place where errors are printed
    return code


def _is_usage(error: Exception) -> bool:
    """Return whether typer refused the words. Its releases bring their own click, so the class cannot be named."""
    return hasattr(error, "format_message") and hasattr(error, "exit_code")


def _usage_line(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    command = getattr(context, "command_path", None) or "streamshards"
    told = " ".join(error.format_message().split()).rstrip(".")  # type: ignore[attr-defined] # looked for just before
    return f'{told}; see "{command} --help"'


def _silence_stdout() -> None:
    """Let the interpreter flush its last words into nothing instead of complaining."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _logging(debug: bool) -> Iterator[None]:
    """Show what the library logs with --debug or to a person; a script gets one line per error and nothing else."""
    if not debug and sys.stderr.isatty():
        yield  # logging's own last resort prints warnings
        return
    logger = logging.getLogger("streamshards")
    handler: logging.Handler = logging.StreamHandler(sys.stderr) if debug else logging.NullHandler()
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
