"""Credentials: in no log, error, traceback, repr, event, state or index, and on no output of the command line."""

from __future__ import annotations

import json
import logging
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamshards import (
    CacheOptions,
    Mixture,
    RetryOptions,
    ShardWriter,
    StreamingDataLoader,
    StreamingDataset,
    open_shard,
)  # fmt: skip
from streamshards.errors import StreamShardsError
from streamshards.storage import open_store
from streamshards.testing import FaultProxy, Request
from streamshards.testing.servers import S3Server
from tests.conftest import BUCKET

CANARIES = {
    "key": "CANARYKEYID0001",
    "secret": "canary-secret-0002",
    "token": "canary-token-0003",
    "password": "canary-password-0004",
}
QUICK = RetryOptions(first_contact_s=0.5, deadline_s=0.5, attempt_timeout_s=5.0, base_s=0.01)


def leaks(text: str) -> list[str]:
    """Return the canaries that *text* shows."""
    return [name for name, value in CANARIES.items() if value.lower() in text.lower()]


def told(error: BaseException) -> str:
    """Return all that a user may see of an error: its text, repr, traceback, and those of all that caused it."""
    chain: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is not None and one not in chain:
            chain.append(one)
            waiting += [one.__cause__, one.__context__]
    return "\n".join([*traceback.format_exception(error), *(f"{one} {one!r} {one.args}" for one in chain)])


@pytest.fixture
def options(seaweedfs_server: S3Server) -> dict[str, Any]:
    """A real server, which does not know these keys."""
    keys = {name: CANARIES[name] for name in ("key", "secret", "token")}
    return {
        **seaweedfs_server.storage_options,
        **keys,
        "client_kwargs": {"endpoint_url": seaweedfs_server.endpoint_url},
    }


@pytest.fixture
def plain_options(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "client_kwargs"}


def write(url: str, options: dict[str, Any]) -> None:
    with ShardWriter(url, storage_options=options) as out:
        out.write_batch({"x": list(range(10))})


URL = f"s3://{BUCKET}/secrets"
REFUSED: dict[str, Callable[[dict[str, Any]], object]] = {
    "denied": lambda o: StreamingDataset(URL, storage_options=o, retry=QUICK),
    "denied to write": lambda o: write(URL, o),
    "denied a shard": lambda o: open_shard(f"{URL}/a.pt.zst", storage_options=o),
    "no such bucket": lambda o: StreamingDataset("s3://no-such-bucket-here/x", storage_options=o, retry=QUICK),
    "nobody answers": lambda o: StreamingDataset(
        URL, storage_options={**o, "endpoint_url": "http://127.0.0.1:9"}, retry=QUICK
    ),
    "no endpoint": lambda o: StreamingDataset(
        URL, storage_options={**o, "endpoint_url": f"http://u:{CANARIES['password']}@[bad"}, retry=QUICK
    ),
    "keys in an S3 url": lambda o: StreamingDataset(f"s3://{o['key']}:{o['secret']}@{BUCKET}/x"),
    "a token in the query": lambda _: StreamingDataset(f"https://host/x?token={CANARIES['token']}"),
    "a password in a url": lambda _: StreamingDataset(f"sftp://u:{CANARIES['password']}@127.0.0.1:9/x", retry=QUICK),
    "a chain": lambda o: StreamingDataset(f"simplecache::s3://{o['key']}:{o['secret']}@b/x"),
    "an unknown protocol": lambda o: StreamingDataset(f"nope://u:{CANARIES['password']}@host/x", storage_options=o),
    "an unknown option": lambda o: StreamingDataset(URL, storage_options={**o, "sekret_option": 1}, retry=QUICK),
}


@pytest.mark.parametrize("name", REFUSED)
def test_no_error_shows_a_credential(
    name: str, plain_options: dict[str, Any], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """The text, the traceback, and the text of everything that caused it; logs and both outputs."""
    caplog.set_level(logging.DEBUG, logger="streamshards")
    with pytest.raises(StreamShardsError) as caught:
        REFUSED[name](plain_options)
    ours = "\n".join(f"{error}" for error in [caught.value])
    out, err = capfd.readouterr()
    assert leaks(ours + caplog.text + out + err) == []
    assert leaks(told(caught.value)) == []


def test_nothing_that_a_dataset_shows_or_saves_holds_a_credential(
    seaweedfs_server: S3Server, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Repr, url, schema, stats, state, index, events and logs of datasets that work, with retries on the way."""
    caplog.set_level(logging.DEBUG, logger="streamshards")
    monkeypatch.setenv("AWS_SESSION_TOKEN", CANARIES["token"])
    good = seaweedfs_server.storage_options
    monkeypatch.setitem(CANARIES, "key", good["key"])
    monkeypatch.setitem(CANARIES, "secret", good["secret"])
    url = f"s3://{BUCKET}/shown"
    write(url, good)
    events: list[object] = []
    failed: list[str] = []

    def script(request: Request) -> None:
        if request.key.endswith(".pt.zst") and not failed:
            failed.append(request.key)
            raise ConnectionResetError

    with FaultProxy(seaweedfs_server) as proxy:
        proxy.script = script
        dataset = StreamingDataset(
            url, batch_size=2, storage_options=proxy.server.storage_options, observer=events.append,
            cache=CacheOptions(directory=tmp_path, keep_free_bytes=0),
        )  # fmt: skip
        loader = StreamingDataLoader(dataset)
        batches = list(loader)
        mixture = Mixture({"a": dataset}, weights={"a": 1})
        shown: list[object] = [
            dataset, loader, mixture, dataset.url, dataset.index, dataset.index.dump(), dataset.schema, dataset.stats(),
            loader.state_dict(), mixture.state_dict(), events, [str(event) for event in events], batches, vars(dataset),
            open_store(url, good), caplog.text, sorted(str(path) for path in tmp_path.rglob("*")),
        ]  # fmt: skip
    assert [found for thing in shown if (found := leaks(f"{thing!r} {thing}"))] == []
    assert leaks(json.dumps(loader.state_dict())) == []


def test_a_worker_gets_the_credentials_and_its_errors_do_not_show_them(plain_options: dict[str, Any]) -> None:
    """A pickled dataset must hold them, for a worker that is spawned needs them; no text of it does."""
    store = open_store(URL, plain_options)
    again = pickle.loads(pickle.dumps(store))
    assert leaks(f"{store!r} {again!r} {store.url}") == []


@pytest.mark.parametrize("command", ["inspect", "verify", "cat", "index"])
@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_no_command_prints_a_credential(
    command: str, debug: list[str], plain_options: dict[str, Any], tmp_path: Path
) -> None:
    """Keys in --storage-options and in the environment; with --debug, too."""
    env = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "AWS_ACCESS_KEY_ID": CANARIES["key"],
        "AWS_SECRET_ACCESS_KEY": CANARIES["secret"],
        "AWS_SESSION_TOKEN": CANARIES["token"],
        "HOME": str(tmp_path),
    }
    words = [*debug, command, URL, "--storage-options", json.dumps(plain_options)]
    done = subprocess.run(
        [sys.executable, "-m", "streamshards", *words],
        capture_output=True,
        text=True,
        env=env,
        timeout=120,
        check=False,
    )
    assert done.returncode == 4, done.stderr
    assert leaks(done.stdout + done.stderr) == []
