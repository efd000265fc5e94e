"""Opens hostile files, each in a process of its own with a bound on its memory: ``python -m tests.attacks.harness``.

Theory. One process imports the package; for each job it forks a child, which sets ``RLIMIT_AS`` to what it has plus
the bound (what ``ulimit -v`` does), goes through one public door with one file, and tells what came of it. So a crash
ends one child, memory over the bound is a MemoryError and not a dead machine, and a job costs milliseconds.

A job runs in an empty folder of its own, with the dataset in another beside it; both are looked at afterwards.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
import xxhash

from streamshards import CacheOptions, PrefetchOptions, RetryOptions, StreamingDataLoader, StreamingDataset, open_shard
from streamshards.cli.outcome import run as command_line
from streamshards.shard.columns import to_samples
from tests.attacks import make

MiB: Final = 1 << 20
STACKS_BYTES: Final = 24 * MiB
"""Address space of the threads of a reader: their stacks and heaps are reserved, not used."""
MAX_S: Final = 30
"""A job that takes longer hangs, and is ended by SIGALRM: "crash 14"."""
SEED: Final = json.loads(make.SEED_INDEX.read_bytes())


@dataclass
class Outcome:
    """What came of one job."""

    ended: str
    """The error's class; "rows": the seed's rows; "other rows"; "ok"; "crash 11": the child died of that signal."""
    text: str = ""
    peak_bytes: int = 0
    """Memory the child touched beyond what it began with."""
    litter: str = ""
    """What stands where nothing should."""


# -- the doors ---------------------------------------------------------------------------------------------------------


def signed(shard: bytes, raw_bytes: int, *, layout: str = "shard", schema: Any = None) -> bytes:
    """Return an index that promises just this shard: what the writer of a hostile dataset would make."""
    index = json.loads(json.dumps(SEED))
    index["layout"] = layout
    index["schema"] = schema or index["schema"]
    index["shards"].update(bytes=[len(shard)], raw_bytes=[raw_bytes], digest=[xxhash.xxh3_128_hexdigest(shard)])
    return json.dumps(make.sign(index)).encode()


FLOAT_SCHEMA: Final = {"fields": [{"path": ["x"], "kind": "tensor", "dtype": "float32", "shape": []}], "empty": []}


def place(kind: str, data: bytes, ending: str, folder: Path) -> None:
    """Make a dataset of which one file is hostile."""
    if kind == "index":
        (folder / f"index{ending}").write_bytes(data)
    elif kind == "foreign":
        (folder / "seed.pt.zst").write_bytes(data)
        (folder / "index.json").write_bytes(signed(data, max(MiB, len(data)), layout="columns", schema=FLOAT_SCHEMA))
        return
    elif kind == "shard":
        (folder / "seed.pt.zst").write_bytes(data)
        (folder / "index.json").write_bytes(signed(data, MiB))
        return
    else:
        (folder / "index.json").write_bytes(make.SEED_INDEX.read_bytes())
    (folder / "seed.pt.zst").write_bytes(make.SEED_SHARD.read_bytes())


def plain(value: Any) -> Any:
    """Return *value* as what compares."""
    if isinstance(value, torch.Tensor):
        return [str(value.dtype), value.tolist()]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def opened(url: str, **options: Any) -> StreamingDataset:
    prefetch = PrefetchOptions(threads=1, memory_bytes=64 * MiB)
    retry = RetryOptions(corrupt_attempts=1)
    return StreamingDataset(url, on_corrupt="raise", prefetch=prefetch, retry=retry, **options)


def by_dataset(folder: Path, wanted: Any) -> str:
    return said([plain(sample) for sample in opened(str(folder))], wanted)


def by_cache(folder: Path, wanted: Any) -> str:
    options = CacheOptions(directory=folder.parent / "cache", keep_free_bytes=0, budget_bytes=64 * MiB)
    for _ in range(2):
        rows = [plain(sample) for sample in opened(str(folder), cache=options)]
    return said(rows, wanted)


def by_getitem(folder: Path, wanted: Any) -> str:
    dataset = opened(str(folder))
    return said([plain(dataset[number]) for number in range(len(dataset))], wanted)


def by_open_shard(folder: Path, wanted: Any) -> str:
    columns = open_shard(str(folder / "seed.pt.zst")).columns()
    if columns.num_rows != len(wanted):  # a dict for each of 2**31 rows would be ours, not the library's
        return "other rows"
    return said([plain(sample) for sample in to_samples(columns)], wanted)


def by_state(folder: Path, wanted: Any, state: Any) -> str:
    loader = StreamingDataLoader(opened(str(folder)))
    loader.load_state_dict(state)
    return said([plain(sample) for sample in loader], wanted[3:])


def by_command(folder: Path, *words: str) -> str:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = command_line([words[0], str(folder), *words[1:]])
        except SystemExit as end:
            code = end.code
    text = err.getvalue() or out.getvalue()
    if "Traceback" in text:
        return f"traceback: {text}"
    return f"exit {code}"


def said(rows: Any, wanted: Any) -> str:
    return "rows" if rows == wanted else "other rows"


def go(kind: str, data: bytes, door: str, folder: Path) -> str:
    """Go through one door; return what came of it, or raise."""
    if door.startswith("cli "):
        return by_command(folder, *door.split()[1:])
    wanted = FLOATS if kind == "foreign" else ROWS
    if kind == "state":
        return by_state(folder, wanted, json.loads(data))
    doors = {"dataset": by_dataset, "cache": by_cache, "getitem": by_getitem, "open_shard": by_open_shard}
    return doors[door](folder, wanted)


# -- the children ------------------------------------------------------------------------------------------------------


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def _listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def attempt(job: dict[str, Any], folder: Path) -> Outcome:
    """Do one job, in this process, which is the child's; memory is bounded from here on."""
    data = (make.CORPUS / job["file"]).read_bytes()
    kind, _, name = job["file"].partition("/")
    dataset, here = folder / "dataset", folder / "here"
    for path in (dataset, here):
        path.mkdir()
    place(kind, data, name[len(name.partition(".json")[0]) :], dataset)
    os.chdir(here)
    os.environ["HOME"] = str(here)
    before = _listing(folder)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    began = _status("VmRSS")
    limit = _status("VmSize") + STACKS_BYTES + job["bound_bytes"]
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.alarm(MAX_S)
    try:
        outcome = Outcome(go(kind, data, job["door"], dataset))
    except BaseException as error:  # noqa: BLE001 whatever came of it is the outcome
        outcome = Outcome(type(error).__name__, str(error)[:2000])
    outcome.peak_bytes = _status("VmHWM") - began
    cache = {name for name in _listing(folder) if name.split("/")[0] == "cache"}
    outcome.litter = ", ".join(sorted(_listing(folder) - before - cache))
    return outcome


def in_a_child(job: dict[str, Any]) -> Outcome:
    """Do one job in a child, whatever becomes of it."""
    folder = Path(tempfile.mkdtemp(prefix="attack-"))
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.close(reading)
            outcome = attempt(job, folder)
            with open(writing, "wb") as pipe:
                pickle.dump(asdict(outcome), pipe)
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    with open(reading, "rb") as pipe:
        told = pipe.read()
    _, status = os.waitpid(pid, 0)
    shutil.rmtree(folder)
    if status or not told:
        return Outcome(f"crash {os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)}")
    return Outcome(**pickle.loads(told))


def _prepare() -> None:
    """Import and use what is needed before the first fork, so that children are alike."""
    global ROWS, FLOATS
    faulthandler.enable()
    torch.set_num_threads(1)
    threading.stack_size(512 * 1024)
    ROWS = FLOATS = None
    with tempfile.TemporaryDirectory() as folder:
        place("shard", make.SEED_SHARD.read_bytes(), "", Path(folder))
        ROWS = [plain(sample) for sample in opened(folder)]
    FLOATS = [{"x": ["torch.float32", 0.0]}] * 8
    torch.load(io.BytesIO((make.CORPUS / "foreign/unchanged.pt").read_bytes()), weights_only=True)


ROWS: Any = None
FLOATS: Any = None


def main() -> None:
    _prepare()
    for line in sys.stdin:
        print(json.dumps(asdict(in_a_child(json.loads(line)))), flush=True)  # noqa: T201 a script: this is its result


def run(jobs: Sequence[dict[str, Any]], *, timeout_s: float = 240.0) -> Iterator[Outcome]:
    """Return what came of each job, in their order; jobs are done in a process that has nothing of this one's."""
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    told = subprocess.run(
        [sys.executable, "-m", "tests.attacks.harness"],
        input="".join(json.dumps(job) + "\n" for job in jobs),
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        timeout=timeout_s,
        check=True,
    ).stdout
    for line in told.splitlines():
        yield Outcome(**json.loads(line))


if __name__ == "__main__":
    main()
