"""Other ways to feed the same samples to a training loop, beside streamshards: same data, same machine, in turn.

    make bench-peers                                              # the environments of the peers, then everything
    python benchmarks/compare.py --peers streamshards pt-chunks   # these need no other environment
    python benchmarks/compare.py --raw-mb 256 --repetitions 3 --record laptop

docs/benchmarks.md shows the last recorded run and says how to read it; ``page.py`` makes it of a recording.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from contents import Contents, columns_contents
from peers import PEERS
from processes import watched
from run import HERE, MIB, describe_host, folder_or_temporary, load_average, say, usable_cores
from workloads import WORKLOADS, chunks

Place = Literal["warm", "cold", "s3", "far"]
PLACES: dict[Place, str] = {
    "warm": "local files in the page cache",
    "cold": "local files, dropped from the page cache before each measurement",
    "s3": "SeaweedFS on loopback, on the same cores",
    "far": "the same server, 30 ms and 1 Gbit/s away",
}
FAR = {"rtt_ms": 30, "mbit": 1000}
BUCKET = "bench"
TIMEOUT_S = 180
SETTLE_S = 5.0
"""Processes that a peer leaves behind get so long to go by themselves."""
ROWS_SHARE = 4
"""Small rows are made of so much less data: the peers that handle them one by one would take minutes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured, and how much."""

    raw_mb: int
    repetitions: int
    min_s: float
    max_s: float
    steps: int
    threads: int
    peers: list[str]
    workloads: list[str]
    places: list[Place]
    workers: list[int]
    shuffles: list[bool]

    def raw_bytes(self, workload: str) -> int:
        """Return about how large a workload is."""
        return self.raw_mb * MIB // (ROWS_SHARE if workload == "rows" else 1)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One row of a table."""

    workload: str
    place: Place
    peer: str
    shuffle: bool
    num_workers: int


@dataclasses.dataclass
class Data:
    """One workload in one peer's format."""

    folder: Path
    stored_bytes: int
    names: list[str]
    write_s: float | None


@dataclasses.dataclass
class Expected:
    """What every epoch of a workload must deliver."""

    contents: Contents
    raw_bytes: int


@dataclasses.dataclass
class Row:
    """All that was measured of a setting."""

    setting: Setting
    stored_bytes: int
    laps: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    lost: str = ""
    """What the checked epoch did not deliver; "not checked" if there was none."""
    failure: str = ""


def main() -> None:
    """Write, measure, print, and record if asked to."""
    options = _arguments()
    # A polite kill takes the same way out as Ctrl-C: through every `with`, which stop the servers and remove the data.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    plan = Plan(
        raw_mb=options.raw_mb,
        repetitions=options.repetitions,
        min_s=options.min_s,
        max_s=options.max_s,
        steps=options.steps,
        threads=min(options.threads, usable_cores()),
        peers=options.peers,
        workloads=options.only,
        places=options.places,
        workers=options.workers,
        shuffles=[word == "on" for word in options.shuffle],
    )
    environments = {name: _python(PEERS[name].environment, options.environments) for name in plan.peers}
    absent = {name: f"no environment: {path} is not there" for name, path in environments.items() if not path.exists()}
    machine = describe_host() | {"command": shlex.join(["python", *sys.argv])}
    for label, value in machine.items():
        say(f"{label:>12} {value}")
    started = time.monotonic()
    with folder_or_temporary(options.cache) as cache:
        race = Race(plan, environments, absent, cache)
        rows = race.run()
    machine["load, end"] = load_average()
    result = {
        "machine": machine,
        "plan": dataclasses.asdict(plan),
        "took_s": round(time.monotonic() - started),
        "workloads": {
            name: {"samples": one.contents.samples, "raw_bytes": one.raw_bytes, "what": WORKLOADS[name].what,
                   "batch_size": WORKLOADS[name].batch_size}
            for name, one in race.expected.items()
        },
        "peers": {name: {"what": PEERS[name].what, "lacks": dict(PEERS[name].lacks)} for name in plan.peers},
        "absent": absent,
        "versions": race.versions,
        "rows": [dataclasses.asdict(row) for row in rows],
    }  # fmt: skip
    for row in rows:
        print(summary(row))
    print(f"{len(rows)} rows, {sum(len(row.laps) for row in rows)} measurements in {result['took_s']:,} s")
    if options.out or options.record:
        path = options.out or HERE / "results" / f"{datetime.date.today().isoformat()}-peers-{options.record}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"recorded in {path}; python benchmarks/page.py {path} makes docs/benchmarks.md of it")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--raw-mb", type=int, default=256, help="MiB a workload before compression (small rows: a quarter)"
    )
    parser.add_argument("--repetitions", type=int, default=3, help="fresh processes for each row")
    parser.add_argument("--min-s", type=float, default=1.0, help="local, warm: further epochs for at least so long")
    parser.add_argument("--max-s", type=float, default=4.0, help="a span is cut after so long: it counts what came")
    parser.add_argument("--steps", type=int, default=30, help="training steps of 20 ms")
    parser.add_argument("--threads", type=int, default=2, help="cores each measured process may use")
    parser.add_argument("--only", choices=sorted(WORKLOADS), nargs="+", default=list(WORKLOADS), help="these workloads")
    parser.add_argument("--peers", choices=sorted(PEERS), nargs="+", default=list(PEERS), help="these peers")
    parser.add_argument("--places", choices=sorted(PLACES), nargs="+", default=list(PLACES), help="from these places")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="num_workers")
    parser.add_argument(
        "--shuffle", choices=["on", "off"], nargs="+", default=["on", "off"], help="off: local, warm only"
    )
    parser.add_argument("--cache", type=Path, help="folder that keeps the data for the next run")
    parser.add_argument("--environments", type=Path, default=HERE.parent / ".venv-peers", help="where the peers live")
    parser.add_argument("--record", metavar="NAME", help="write benchmarks/results/DATE-peers-NAME.json")
    parser.add_argument("--out", type=Path, help="write to this file instead")
    return parser.parse_args()


def _python(environment: str, home: Path) -> Path:
    return home / environment / "bin" / "python" if environment else Path(sys.executable)


# -- measuring ---------------------------------------------------------------------------------------------------------


class Race:
    """Measures every setting of a plan."""

    def __init__(self, plan: Plan, pythons: dict[str, Path], absent: dict[str, str], cache: Path) -> None:
        self._plan, self._pythons, self._absent, self._cache = plan, pythons, absent, cache
        self.expected: dict[str, Expected] = {}
        self.versions: dict[str, dict[str, str]] = {}

    def run(self) -> list[Row]:
        """Return a row for each setting; those of one workload and place are measured in turn."""
        rows: list[Row] = []
        local = [place for place in self._plan.places if place in ("warm", "cold")]
        remote = [place for place in self._plan.places if place not in local]
        for workload in self._plan.workloads:
            self.expected[workload] = expect(workload, self._plan.raw_bytes(workload))
            data = self._write(workload)
            for place in local:
                rows += self._measure(workload, place, data, servers=None)
            if remote:
                with s3_server(data, workload) as servers:
                    for place in remote:
                        rows += self._measure(workload, place, data, servers=servers)
        return rows

    def settings(self, workload: str, place: Place) -> list[Setting]:
        """Return what is measured there, in the order of one repetition."""
        found = []
        for shuffle in self._plan.shuffles:
            if not shuffle and place != "warm" and True in self._plan.shuffles:
                continue
            for num_workers in self._plan.workers:
                for name in self._plan.peers:
                    peer = PEERS[name]
                    asked = {workload, "s3"} if place in ("s3", "far") else {workload}
                    if name not in self._absent and num_workers in peer.workers and not asked & set(peer.lacks):
                        found.append(Setting(workload, place, name, shuffle, num_workers))
        return found

    def _write(self, workload: str) -> dict[str, Data | str]:
        """Return the data of each peer, or why there is none."""
        found: dict[str, Data | str] = {}
        for name in self._plan.peers:
            owner = PEERS[name].data or name
            if name in self._absent or workload in PEERS[name].lacks or owner in found:
                continue
            folder = self._cache / f"{workload}-{self._plan.raw_bytes(workload) // MIB}MiB" / owner
            write_s = None
            if not (folder.parent / f"{owner}.done").exists():
                say(f"{workload}: writing {owner}")
                shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
                arguments = {"peer": owner, "workload": workload, "folder": str(folder),
                             "raw_bytes": self._plan.raw_bytes(workload)}  # fmt: skip
                lap = run_lap(self._pythons.get(owner, self._pythons[name]), "write", arguments, {})
                if "failure" in lap:
                    found[owner] = "writing: " + lap["failure"]
                    continue
                write_s = lap["write_s"]
                (folder.parent / f"{owner}.done").touch()
            paths = sorted(path for path in folder.rglob("*") if path.is_file())
            found[owner] = Data(
                folder,
                sum(path.stat().st_size for path in paths),
                [str(path.relative_to(folder)) for path in paths],
                write_s,
            )
        return found

    def _measure(
        self, workload: str, place: Place, data: dict[str, Data | str], *, servers: Servers | None
    ) -> list[Row]:
        rows: dict[Setting, Row] = {}
        for setting in self.settings(workload, place):
            found = data[PEERS[setting.peer].data or setting.peer]
            rows[setting] = (
                Row(setting, 0, failure=found) if isinstance(found, str) else Row(setting, found.stored_bytes)
            )
        for number in range(self._plan.repetitions):
            for setting, row in rows.items():
                if row.failure:  # once is enough
                    continue
                say(f"{workload}, {place}, {number + 1} of {self._plan.repetitions}: {_named(setting)}")
                owner = data[PEERS[setting.peer].data or setting.peer]
                assert isinstance(owner, Data)
                self._lap(row, owner, servers, first=number == 0)
        return list(rows.values())

    def _lap(self, row: Row, data: Data, servers: Servers | None, *, first: bool) -> None:
        setting, plan = row.setting, self._plan
        warm = setting.place == "warm"
        with tempfile.TemporaryDirectory(prefix="streamshards-lap-", dir=self._cache) as scratch:
            arguments: dict[str, Any] = {
                "peer": setting.peer, "workload": setting.workload, "url": str(data.folder), "names": data.names,
                "batch_size": WORKLOADS[setting.workload].batch_size, "shuffle": setting.shuffle,
                "num_workers": setting.num_workers, "scratch": scratch, "min_s": plan.min_s if warm else 0,
                "max_s": plan.max_s, "steps": plan.steps, "threads": plan.threads,
                "check": first and setting.place != "cold",
            }  # fmt: skip
            variables, before = {}, None
            if setting.place == "cold":
                drop_from_page_cache(data)
            if servers is not None:
                way = servers.far if setting.place == "far" else servers.direct
                # The checked epoch goes through a relay that counts.
                arguments |= {
                    "url": servers.url(PEERS[setting.peer].data or setting.peer, setting.workload),
                    "s3": way.s3, "check_s3": servers.counting.s3,
                }  # fmt: skip
                variables, before = way.variables(), servers.counting.counters()
            lap = run_lap(self._pythons[setting.peer], "read", arguments, variables)
        if "failure" in lap:
            row.failure = lap["failure"]
            return
        if servers is not None and before is not None and "check" in lap:
            lap["check_relayed"] = {name: count - before[name] for name, count in servers.counting.counters().items()}
        self.versions[setting.peer] = lap.pop("versions")
        if first:
            row.lost = "not checked"
            if "check" in lap:
                row.lost = Contents(**lap["check"]).missing(self.expected[setting.workload].contents)
        row.laps.append(lap)


def expect(workload: str, raw_bytes: int) -> Expected:
    """Return what an epoch must deliver, from the data itself."""
    size = 0

    def counted() -> Iterator[dict[str, Any]]:
        nonlocal size
        for columns in chunks(workload, raw_bytes):
            size += sum(_size_of(values) for values in columns.values())
            yield columns

    contents = columns_contents(counted())
    return Expected(contents, size)


def _size_of(values: Any) -> int:
    """Return the bytes of a column: of arrays as they are, of text and JSON as UTF-8."""
    if isinstance(values, np.ndarray):
        return values.nbytes
    return sum(
        value.nbytes if isinstance(value, np.ndarray) else len(value if isinstance(value, str) else json.dumps(value))
        for value in values
    )


def run_lap(python: Path, what: str, arguments: dict[str, Any], variables: dict[str, str]) -> dict[str, Any]:
    """Run lap.py in a process of its own; return its result, or ``{"failure": why}``."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "S3_"))}
    environment |= {"AWS_EC2_METADATA_DISABLED": "true", "PYTHONUNBUFFERED": "1", **variables}
    if not environment.get("PYTHONPATH"):
        environment["PYTHONPATH"] = str(HERE.parent)
    with tempfile.TemporaryFile("w+") as errors, tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [python, HERE / "lap.py", what, json.dumps(arguments)],
            stdin=subprocess.DEVNULL, stdout=output, stderr=errors, env=environment, start_new_session=True,
        )  # fmt: skip
        with watched(process.pid) as watch:
            try:
                status: int | None = process.wait(TIMEOUT_S)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        _end(watch.survivors)
        output.seek(0)
        lines = output.read().splitlines()
        if status == 0:
            result: dict[str, Any] = json.loads(lines[-1])
            return result | (watch.peak(*result.pop("window")) if "window" in result else {})
        errors.seek(0)
        said = errors.read()
    if status is None:
        return {"failure": f"no result after {TIMEOUT_S} s"}
    if os.environ.get("BENCH_DEBUG"):
        say(said)
    return {"failure": reason(said) or f"ended with status {status}"}


def reason(said: str) -> str:
    """Return the line of a traceback that names the error."""
    errors = [line.strip() for line in said.splitlines() if line and not line[0].isspace() and ": " in line]
    named = [line for line in errors if line.split(":")[0].rsplit(".", 1)[-1].endswith(("Error", "Exception", "Exit"))]
    return re.sub(r"/\S+/", "…/", (named or errors or [""])[-1])[:200]  # no places of this machine in a recording


def _end(survivors: Any) -> None:
    """Wait until what a peer left behind is gone; end what stays."""
    deadline = time.monotonic() + SETTLE_S
    while (left := survivors()) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def drop_from_page_cache(data: Data) -> None:
    """Ask the kernel to forget the files; needs no privileges. tmpfs ignores it."""
    for name in data.names:
        descriptor = os.open(data.folder / name, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # pages that were never written cannot be dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


# -- the server, near and far ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to the server: direct, or through a relay."""

    endpoint_url: str
    key: str
    secret: str
    process: subprocess.Popen[str] | None = None

    @property
    def s3(self) -> dict[str, str]:
        """What s3fs takes."""
        return {"endpoint_url": self.endpoint_url, "key": self.key, "secret": self.secret}

    def variables(self) -> dict[str, str]:
        """Return the variables that lead any client here."""
        return {
            "AWS_ACCESS_KEY_ID": self.key, "AWS_SECRET_ACCESS_KEY": self.secret, "AWS_ENDPOINT_URL": self.endpoint_url,
            "S3_ENDPOINT_URL": self.endpoint_url, "AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ALLOW_HTTP": "true",
        }  # fmt: skip

    def counters(self) -> dict[str, int]:
        """Return what has gone through the relay."""
        assert self.process is not None
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        counters: dict[str, int] = json.loads(self.process.stdout.readline())
        return counters


@dataclasses.dataclass(frozen=True)
class Servers:
    """The S3 server and the ways to it."""

    direct: Way
    counting: Way
    far: Way

    def url(self, owner: str, workload: str) -> str:
        """Return where the data of a peer is."""
        return f"s3://{BUCKET}/{owner}/{workload}"


@contextlib.contextmanager
def s3_server(data: dict[str, Data | str], workload: str) -> Iterator[Servers]:
    """Run SeaweedFS with the workload of every peer that reads from S3 in it, and two relays in front of it."""
    import fsspec

    from streamshards.testing.servers import seaweedfs

    with tempfile.TemporaryDirectory(prefix="streamshards-bench-s3-") as scratch, seaweedfs(scratch) as server:
        server.create_bucket(BUCKET)
        fs = fsspec.filesystem("s3", **server.storage_options)
        for owner, one in data.items():
            if isinstance(one, Data) and PEERS[owner].on_s3:
                say(f"{workload}: putting {owner} on S3")
                for name in one.names:
                    fs.pipe_file(f"{BUCKET}/{owner}/{workload}/{name}", (one.folder / name).read_bytes())
        direct = Way(server.endpoint_url, server.access_key, server.secret_key)
        with relayed(direct) as counting, relayed(direct, **FAR) as far:
            yield Servers(direct, counting, far)


@contextlib.contextmanager
def relayed(way: Way, **options: float) -> Iterator[Way]:
    """Run a relay in front of *way*."""
    host, port = way.endpoint_url.removeprefix("http://").split(":")
    command = [sys.executable, str(HERE / "relay.py"), json.dumps({"host": host, "port": int(port), **options})]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        port = json.loads(process.stdout.readline())["port"]
        yield Way(f"http://127.0.0.1:{port}", way.key, way.secret, process)
    finally:
        process.stdin.close()
        try:
            process.wait(SETTLE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


# -- reading the measurements ------------------------------------------------------------------------------------------


def _named(setting: Setting) -> str:
    shuffle = "shuffled" if setting.shuffle else "in order"
    return f"{setting.peer}, {setting.num_workers} workers, {shuffle}"


def speeds(laps: Iterable[dict[str, Any]]) -> list[float]:
    """Return the samples a second of each lap: of further epochs if there were any, else of the first."""
    spans = [lap.get("more") or lap["first"] for lap in laps]
    return [span["samples"] / span["wall_s"] for span in spans]


def summary(row: Row) -> str:
    """Return a line for the terminal."""
    told = f"{row.setting.workload:7} {row.setting.place:5} {_named(row.setting):44}"
    if row.failure:
        return f"{told} failed: {row.failure}"
    values = sorted(speeds(row.laps))
    text = f"{told} {values[len(values) // 2]:>12,.0f} samples/s ({values[0]:,.0f}-{values[-1]:,.0f})"
    return text + (f"; {row.lost}" if row.lost not in ("", "not checked") else "")


if __name__ == "__main__":
    main()
