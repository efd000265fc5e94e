"""``state show``: what a checkpoint says, wherever it lies in its file, and whether it fits a dataset."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from streamshards import Mixture, OrderOptions, StreamingDataLoader, StreamingDataset, Topology
from streamshards.cli.codes import ExitCode
from tests.cli.conftest import assert_error
from tests.datasets import write
from tests.pt_files import Custom


@pytest.fixture
def url(tmp_path: Path) -> str:
    """Return a dataset of 100 samples."""
    path = str(tmp_path / "data")
    write(path, range(100), shard_bytes=2_000)
    return path


def opened(url: str, **options: Any) -> StreamingDataset:
    order = OrderOptions(lanes=4, chunk=2, shuffle_block=40)
    return StreamingDataset(
        url, **{"batch_size": 8, "shuffle": True, "seed": 17, "order": order, "topology": Topology(), **options}
    )


def state_after(dataset: StreamingDataset | Mixture, batches: int) -> dict[str, Any]:
    """Return the state of a loop that has received so many batches of epoch 0."""
    loader = StreamingDataLoader(dataset)
    iterator = iter(loader)
    for _ in range(batches):
        next(iterator)
    return loader.state_dict()


def save(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_in_words(url: str, tmp_path: Path, call: Any) -> None:
    """Each fact on a line of its own."""
    state = state_after(opened(url), 3)
    shards = len(json.loads((tmp_path / "data" / "index.json").read_text())["shards"]["name"])
    assert call("state", "show", save(tmp_path / "ckpt.json", state)).out.splitlines() == [
        f"{tmp_path}/ckpt.json",
        "  epoch        0",
        "  position     24 of 100 (24.0 %)",
        "  order        shuffled with seed 17, 4 lanes in chunks of 2, blocks of about 40 samples",
        f"  fingerprint  {state['fingerprint']}",
        f"  shards       {shards}",
    ]


def test_where_an_epoch_begins_and_ends(url: str, tmp_path: Path, call: Any) -> None:
    """Said in words; so is an order that is not shuffled, and which part of a dataset it is."""
    part = opened(url, shuffle=False).skip(2).take(90)
    for batches, told in ((0, "0 of 90 (the epoch's beginning)"), (12, "90 of 90 (the epoch's end)")):
        out = call("state", "show", save(tmp_path / "ckpt.json", state_after(part, batches))).out
        assert f"position     {told}\n" in out
        assert "order        not shuffled, 4 lanes in chunks of 2\n" in out
        assert "subset       skip(2).take(90)\n" in out


def test_every_state_in_a_checkpoint(url: str, tmp_path: Path, call: Any) -> None:
    """In JSON, from standard input and in what torch saved: each with the keys that lead to it."""
    states = [state_after(opened(url), batches) for batches in (1, 2)]
    content = {"epoch": 0, "loops": [{"data": states[0]}, 7], "valid": {"loader": states[1]}, "none": None}
    expected = [("loops.0.data", states[0]), ("valid.loader", states[1])]
    json_file = save(tmp_path / "ckpt.json", content)
    torch.save({**content, "model": {"w": torch.zeros(2, 3)}, "optimizer": [(torch.ones(1), 2)]}, tmp_path / "ckpt.pt")
    for file in (json_file, tmp_path / "ckpt.pt"):
        found = call("state", "show", file, "--json").json
        assert found["file"] == str(file)
        assert [(each["path"], each["state"]) for each in found["states"]] == expected
        assert {each["fits"] for each in found["states"]} == {None}
        headlines = [line for line in call("state", "show", file).out.splitlines() if line and line[0] != " "]
        assert headlines == [f"{file} at loops.0.data", f"{file} at valid.loader"]
    done = subprocess.run(
        [sys.executable, "-m", "streamshards", "state", "show", "-", "--json"],
        input=json_file.read_bytes(), capture_output=True, check=True,
    )  # fmt: skip
    assert [(each["path"], each["state"]) for each in json.loads(done.stdout)["states"]] == expected


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torchdata's
def test_states_of_single_workers(url: str, tmp_path: Path, call: Any) -> None:
    """torchdata's loader keeps one for each worker: all are found, and said to be of a worker."""
    stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is not installed")
    loader = stateful.StatefulDataLoader(opened(url), batch_size=None, num_workers=2)
    iterator = iter(loader)
    for _ in range(4):
        next(iterator)
    torch.save({"loader": loader.state_dict()}, tmp_path / "ckpt.pt")
    del iterator
    found = call("state", "show", tmp_path / "ckpt.pt", "--json").json["states"]
    assert len(found) == 2
    for number, each in enumerate(found):
        assert f".worker_{number}." in each["path"]
        assert (each["state"]["worker_batches"], each["state"]["num_workers"]) == (2, 2)
    out = call("state", "show", tmp_path / "ckpt.pt").out
    assert out.count("worker       one of 2, 2 batches after the position; loads with as many workers only\n") == 2


def test_a_mixture(url: str, tmp_path: Path, call: Any) -> None:
    """Its sources with their weights; --url is looked for among them."""
    books, other = str(tmp_path / "books"), str(tmp_path / "other")
    write(books, range(50), shard_bytes=2_000)
    write(other, range(30), shard_bytes=2_000)
    sources = {"web": opened(url, order=None), "books": opened(books, order=None)}
    mixture = Mixture(sources, weights={"web": 3, "books": 1}, topology=Topology())
    state = state_after(mixture, 2)
    file = save(tmp_path / "ckpt.json", state)
    out = call("state", "show", file).out
    assert f"source web    weight 0.75, fingerprint {state['sources']['web']['fingerprint']}, " in out
    assert "source books  weight 0.25, " in out
    ended = call("state", "show", file, "--url", books)
    assert ended.code == 0
    assert "fits          yes: is source books of the mixture; the other sources are not checked\n" in ended.out
    ended = call("state", "show", file, "--url", other)
    assert ended.code == ExitCode.MISMATCH
    assert "none of the mixture's sources; those are web (" in ended.out


def test_whether_it_fits(url: str, tmp_path: Path, call: Any) -> None:
    """Exit code 0 and 6, and what differs; a dataset that has grown fits, one that was written anew does not."""
    state = state_after(opened(url).take(90), 3)
    file = save(tmp_path / "ckpt.json", {"data": state})
    ended = call("state", "show", file, "--url", url)
    assert (ended.code, ended.out.splitlines()[-1]) == (0, "  fits         yes")
    before = len(list((tmp_path / "data").glob("*.zst")))
    write(url, range(100, 150), shard_bytes=2_000, mode="append")
    grown = len(list((tmp_path / "data").glob("*.zst"))) - before
    ended = call("state", "show", file, "--url", url)
    assert (ended.code, ended.out.splitlines()[-1]) == (
        0, f"  fits         yes: {grown} shards have been appended since"
    )  # fmt: skip
    write(url, range(80), shard_bytes=2_000, mode="replace")
    ended = call("state", "show", file, "--url", url)
    assert (ended.code, ended.err) == (ExitCode.MISMATCH, "")
    assert "  fits         no: " in ended.out
    assert "num_samples is 80 here and 90 in the state" in ended.out
    ended = call("state", "show", file, "--url", url, "--json")
    assert ended.code == ExitCode.MISMATCH
    (found,) = ended.json["states"]
    assert (found["path"], found["fits"]) == ("data", False)
    assert "fingerprint is" in found["told"]


def test_one_of_several_fits(url: str, tmp_path: Path, call: Any) -> None:
    """A checkpoint of two loaders has a state for each dataset: one that fits is enough."""
    other = str(tmp_path / "other")
    write(other, range(30), shard_bytes=2_000)
    file = save(tmp_path / "ckpt.json", {"train": state_after(opened(url), 1), "valid": state_after(opened(other), 1)})
    ended = call("state", "show", file, "--url", other, "--json")
    assert ended.code == 0
    assert [each["fits"] for each in ended.json["states"]] == [False, True]


def test_files_that_are_no_checkpoints(url: str, tmp_path: Path, call: Any) -> None:
    """Nothing there, neither JSON nor torch's, unsafe, damaged, without a state, with one that cannot be read."""
    state = state_after(opened(url), 1)
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(1_000), "state": state}, buffer)
    deep: Any = state
    for _ in range(100):
        deep = [deep]
    for content, code, told in (
        (None, ExitCode.USAGE, "cannot be read: No such file"),
        (b"\x80\x02hello", ExitCode.USAGE, "neither JSON nor a file that torch.save writes"),
        (b"[" * 100_000, ExitCode.USAGE, "neither JSON nor"),
        (_zip_of({"x": Custom()}), ExitCode.BAD_DATA, "weights_only=True"),
        (buffer.getvalue().replace(b"fingerprint", b"fingerpr\0\xffx"), ExitCode.USAGE, "torch.load cannot read it"),
        (b"{}", ExitCode.MISMATCH, "no state in it; save what state_dict()"),
        (json.dumps(deep).encode(), ExitCode.MISMATCH, "no state in it"),
        (json.dumps([{**state, "version": 9}]).encode(), ExitCode.MISMATCH, "at '0': the state has version 9"),
        (json.dumps({**state, "position": -1}).encode(), ExitCode.MISMATCH, "position is -1"),
    ):
        file = tmp_path / "ckpt"
        if content is not None:
            file.write_bytes(content)
        assert_error(call("state", "show", file), code, told)
    assert_error(call("state", "show", tmp_path), ExitCode.USAGE, "Is a directory")


def _zip_of(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def test_a_checkpoint_runs_no_code(tmp_path: Path, call: Any) -> None:
    """A pickle that would make a folder makes none."""

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "made"),)

    (tmp_path / "evil.pt").write_bytes(_zip_of({"x": Evil()}))
    assert_error(call("state", "show", tmp_path / "evil.pt"), ExitCode.BAD_DATA, "weights_only=True")
    assert not (tmp_path / "made").exists()


def test_without_a_command(call: Any) -> None:
    """``state`` alone is a usage error of one line; its help has the command."""
    assert_error(call("state"), ExitCode.USAGE, "Missing command", '"streamshards state --help"')
    assert "show" in call("state", "--help").out
