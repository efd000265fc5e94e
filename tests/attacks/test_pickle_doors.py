"""Pickles: ours are never unpickled, others only safely, unless trusted; on a torch with holes not at all."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from streamshards import StreamingDataset
from streamshards.errors import OptionInvalid
from streamshards.shard import layouts, pickles
from streamshards.shard.layouts import load_foreign
from tests.attacks import make
from tests.datasets import write
from tests.pt_files import pt_bytes

POISONED = """
import io, pickle, sys
import torch
from streamshards import CacheOptions, StreamingDataset, open_shard

def refuse(*args, **kwargs):
    raise SystemExit("somebody unpickles")

class Poison:
    def __init__(self, *args, **kwargs):
        refuse()

pickle.load = pickle.loads = pickle._load = pickle._loads = torch.load = refuse
pickle.Unpickler = pickle._Unpickler = torch._weights_only_unpickler.Unpickler = Poison
torch._weights_only_unpickler.load = refuse

url, cache = sys.argv[1:]
for options in ({}, {"cache": CacheOptions(directory=cache, keep_free_bytes=0)}):
    for _ in range(2):
        assert [s["id"] for s in StreamingDataset(url, on_corrupt="raise", **options)] == list(range(300))
dataset = StreamingDataset(url)
assert dataset[299]["id"] == 299
assert open_shard(f"{url}/{dataset.index.names[0]}").columns().num_rows
print("read")
"""


def test_our_shards_are_read_without_any_unpickling(tmp_path: Path) -> None:
    """Two epochs from the store, two through the cache, single samples, open_shard: every unpickler is poisoned."""
    write(str(tmp_path / "data"), range(300))
    done = subprocess.run(
        [sys.executable, "-c", POISONED, str(tmp_path / "data"), str(tmp_path / "cache")],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert (done.returncode, done.stdout) == (0, "read\n"), done.stderr


def test_only_trust_turns_weights_only_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.load is told follows from trust_pickle alone."""
    told: list[bool] = []
    load = torch.load

    def watched(*args: Any, **kwargs: Any) -> Any:
        told.append(kwargs["weights_only"])
        return load(*args, **kwargs)

    monkeypatch.setattr(layouts.torch, "load", watched)
    data = pt_bytes({"x": torch.arange(3)})
    load_foreign(data, name="f", max_raw_bytes=1 << 20)
    load_foreign(data, name="f", max_raw_bytes=1 << 20, trust_pickle=True)
    assert told == [True, False]


def test_whoever_unpickles_says_how() -> None:
    """No file of the package calls an unpickler without weights_only, and only two call one at all."""
    package = Path(layouts.__file__).parents[1]
    calls = [
        (path.name, {keyword.arg for keyword in node.keywords})
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "pickle.load", "pickle.loads")
    ]
    assert {name for name, _ in calls} == {"layouts.py", "states.py"}
    assert all("weights_only" in keywords for _, keywords in calls)


@pytest.mark.parametrize(
    ("version", "is_safe"),
    [("2.6.0", False), ("2.9.1+cu128", False), ("2.10.0", True), ("2.13.0+cpu", True), ("3.0.0a1", True)],
)
def test_a_torch_with_holes_refuses_foreign_pickles(
    version: str, is_safe: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before 2.10 weights_only can be broken out of: nothing foreign is loaded unless it is trusted."""
    monkeypatch.setattr(layouts.torch, "__version__", version)
    data = pt_bytes({"x": torch.arange(3)})
    assert (layouts._torch_version() >= layouts.SAFE_TORCH) is is_safe
    if is_safe:
        load_foreign(data, name="f", max_raw_bytes=1 << 20)
    else:
        with pytest.raises(OptionInvalid, match=r"known holes .*trust_pickle=True"):
            load_foreign(data, name="f", max_raw_bytes=1 << 20)


def test_trust_is_what_it_takes_to_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The attack does work, once it is trusted: without that the tests beside this one would prove nothing."""
    monkeypatch.chdir(tmp_path)
    data = make.archive(make.columns(make.call("os system", make.text("touch canary"))))
    load_foreign(data, name="f", max_raw_bytes=1 << 20, trust_pickle=True)
    assert (tmp_path / "canary").exists()


SAVED: dict[str, Any] = {
    "tensors": {"a": torch.arange(6).view(2, 3), "t": torch.arange(6).view(2, 3).t(), "n": torch.zeros(0)},
    "dtypes": [torch.zeros(2, dtype=dtype) for dtype in (torch.bool, torch.bfloat16, torch.int8, torch.complex64)],
    "young dtypes": [torch.zeros(2, dtype=dtype) for dtype in (torch.float8_e5m2, torch.uint16)],
    "values": [1, -1, 2**70, 1.5, 1j, True, None, "ü", b"\xff\0", bytearray(b"ab"), {1, 2}, (1, (2,)), {"a": {}}],
    "views": torch.arange(100)[10:90:3],
    "expanded": torch.zeros(1).expand(1000),
    "modules": torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)).state_dict(),
    "parameters": torch.nn.Parameter(torch.ones(2)),
    "sizes": [torch.Size([2, 3]), torch.device("cpu"), torch.float32],
    "sparse": torch.eye(3).to_sparse(),
    "optimiser": torch.optim.Adam([torch.nn.Parameter(torch.ones(2))]).state_dict(),
    "shared": [torch.arange(3)] * 4,
}  # fmt: skip


# torch itself cannot load the young dtypes from the legacy format.
@pytest.mark.parametrize(
    ("name", "legacy"), [(n, old) for n in SAVED for old in (False, True) if (n, old) != ("young dtypes", True)]
)
def test_what_torch_saves_is_loadable(name: str, legacy: bool) -> None:
    """Everything that torch.save writes and weights_only loads passes the check before it."""
    data = pt_bytes(SAVED[name], legacy=legacy)
    pickles.require_loadable(memoryview(data))
    load_foreign(data, name="f", max_raw_bytes=1 << 20)


class Named:
    """A class of the user's own."""

    def __init__(self) -> None:
        self.x = torch.arange(2)


def test_a_class_that_was_called_safe_is_believed() -> None:
    """``torch.serialization.add_safe_globals`` is one of the two ways out that the error names; it works."""
    data = pt_bytes({"x": Named()})
    with torch.serialization.safe_globals([Named]):
        loaded = load_foreign(data, name="f", max_raw_bytes=1 << 20)
    assert isinstance(loaded, dict)
    assert loaded["x"].x.tolist() == [0, 1]


def test_an_index_cannot_ask_for_trust(tmp_path: Path) -> None:
    """trust_pickle is the caller's alone: there is no key in the index or the shard for it."""
    write(str(tmp_path), range(3))
    assert "trust" not in (tmp_path / "index.json").read_text()
    with pytest.raises(TypeError):
        StreamingDataset(str(tmp_path), unpickle=True)  # type: ignore[call-arg]  # that is the test
