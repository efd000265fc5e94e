"""The comparison with peers: what it sums and relays, and a whole run with loaders that need no installation."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

from contents import Contents  # noqa: E402 - benchmarks/ is on the path only now
from page import METHOD, page  # noqa: E402 - the same
from peers import PEERS  # noqa: E402 - the same

if sys.platform != "linux":
    pytest.skip("the comparison reads /proc: it runs on Linux only", allow_module_level=True)


def batch(rows: slice | list[int], labels: slice | list[int] | None = None) -> dict[str, Any]:
    image = np.arange(10 * 12, dtype=np.uint8).reshape(10, 3, 4)
    return {"image": image[rows], "label": np.arange(10)[rows if labels is None else labels]}


def contents(*batches: dict[str, Any]) -> Contents:
    found = Contents()
    for one in batches:
        found.add(one)
    return found


def test_the_sum_is_that_of_the_samples_in_any_order() -> None:
    """Other batches and another order give the same sum; a sample lost, doubled or mixed up does not."""
    whole = contents(batch(slice(None)))
    assert contents(batch([7, 2, 9]), batch([0, 1, 3, 4, 5, 6, 8])).missing(whole) == ""
    assert contents(batch(slice(9))).missing(whole) == "9 of 10 samples"
    assert contents(batch([0, 0, *range(2, 10)])).missing(whole) == "other contents than were written"
    assert contents(batch(slice(None), [1, 0, *range(2, 10)])).missing(whole) == "other contents than were written"


def test_padding_is_no_content() -> None:
    """Ragged rows, padded or not, have the same sum; a row that is cut short does not."""
    rows = [np.array([5, 6, 7], np.int32), np.array([8], np.int32)]
    padded = np.array([[5, 6, 7, 0], [8, 0, 0, 0]], np.int32)
    whole = contents({"tokens": rows, "text": ["a", "b"]})
    assert contents({"tokens": padded, "lengths": np.array([3, 1]), "text": ["a", "b"]}) == whole
    assert contents({"tokens": padded, "lengths": np.array([2, 1]), "text": ["a", "b"]}) != whole


def test_the_relay_hands_on_what_came_and_counts_it() -> None:
    """Every byte arrives, both ways, after a round trip's delay; the counters say how many; its input's end ends it."""
    body = bytes(range(256)) * 4_096
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1_000)
                connection.sendall(body)

        answering = threading.Thread(target=answer)
        answering.start()
        options = {"host": "127.0.0.1", "port": server.getsockname()[1], "rtt_ms": 2, "mbit": 1_000}
        with subprocess.Popen(
            [sys.executable, BENCHMARKS / "relay.py", json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as relay:
            assert relay.stdin is not None
            assert relay.stdout is not None
            port = json.loads(relay.stdout.readline())["port"]
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.sendall(b"GET / HTTP/1.1\r\n\r\n")
                received = b""
                while piece := client.recv(1 << 16):
                    received += piece
            answering.join()
            relay.stdin.write("\n")
            relay.stdin.flush()
            counters = json.loads(relay.stdout.readline())
            relay.stdin.close()
            assert relay.wait() == 0
    assert received == body
    assert counters == {"connections": 1, "requests": 1, "up_bytes": 18, "down_bytes": len(body)}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run with our own loader and a naive one, as small as it can be."""
    out = tmp_path_factory.mktemp("comparison") / "result.json"
    command = [
        sys.executable, BENCHMARKS / "compare.py", "--peers", "streamshards", "pt-chunks", "mosaicml",
        "--raw-mb", "1", "--repetitions", "1", "--min-s", "0.01", "--max-s", "30", "--steps", "2", "--only", "ragged",
        "--places", "warm", "--workers", "0", "--shuffle", "on", "--environments", "/nowhere", "--out", out,
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.PIPE)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_every_row_delivers_what_was_written(result: dict[str, Any]) -> None:
    """Each peer has its row; its checked epoch had all samples with all their fields, and its numbers are there."""
    assert [row["setting"]["peer"] for row in result["rows"]] == ["streamshards", "pt-chunks"]
    for row in result["rows"]:
        assert (row["failure"], row["lost"]) == ("", "")
        (lap,) = row["laps"]
        assert lap["first"]["whole"]
        assert lap["first"]["samples"] == result["workloads"]["ragged"]["samples"]
        assert lap["more"]["samples"] > 0
        assert lap["stall"]["steps"] == 2
    assert list(result["absent"]) == ["mosaicml"]


def test_the_page_shows_each_row(result: dict[str, Any], tmp_path: Path) -> None:
    """A table row and a bar for each peer; too little data is said first."""
    text = page(result, "result.json", tmp_path)
    assert (
        text.index("Not for quoting") < text.index("| streamshards | 0 | on | **") < text.index("## How it is measured")
    )
    assert "| pt-chunks | 0 | on | **" in text
    assert "- mosaicml: no environment" in text
    assert (tmp_path / "benchmarks-ragged-warm.svg").read_text().count("<rect") == 2


def test_the_committed_page_has_the_present_method() -> None:
    """docs/benchmarks.md ends with the text that page.py writes."""
    assert (BENCHMARKS.parent / "docs" / "benchmarks.md").read_text(encoding="utf-8").endswith(METHOD)


def test_every_peer_has_its_file() -> None:
    """The table names modules that are there, and data of peers that are in it."""
    for peer in PEERS.values():
        assert (BENCHMARKS / "peers" / f"{peer.module}.py").exists()
        assert not peer.data or peer.data in PEERS
