"""How fast whole shuffled epochs are, beside pure zstd decoding of the very same shards in the same run.

    make bench                                   # or: python benchmarks/run.py
    python benchmarks/run.py --quick             # about a minute; too little data for numbers to quote
    python benchmarks/run.py --record laptop     # also writes benchmarks/results/DATE-laptop.json

benchmarks/README.md says how to read it.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from workloads import WORKLOADS

HERE = Path(__file__).parent
MIB = 1024 * 1024
ON_S3 = ("images", "tokens")
BUCKET = "bench"
PACKAGES = ("torch", "zstandard", "numpy", "fsspec", "s3fs", "streamshards")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is measured."""

    raw_bytes: int
    repetitions: int
    passes: int
    threads: int

    @property
    def connections(self) -> int:
        """As many as the library opens by default on that many cores."""
        return min(8, max(2, 2 * self.threads))


@dataclass
class Measured:
    """All that was measured of one workload in one place."""

    samples: int
    shards: int
    raw_bytes: int
    stored_bytes: int
    decode: list[dict[str, Any]] = field(default_factory=list)
    epoch: list[dict[str, Any]] = field(default_factory=list)
    get: list[dict[str, Any]] = field(default_factory=list)


def main() -> None:
    """Generate, measure, print, and record if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="an eighth of the data, 3 repetitions")
    parser.add_argument(
        "--cache", type=Path, help="folder that keeps the data for the next run; default: a temporary one"
    )
    parser.add_argument("--record", metavar="NAME", help="write benchmarks/results/DATE-NAME.json")
    parser.add_argument("--only", choices=sorted(WORKLOADS), nargs="+", default=list(WORKLOADS), help="these workloads")
    parser.add_argument("--threads", type=int, default=2, help="cores each measured process may use")
    parser.add_argument("--no-s3", action="store_true", help="leave the S3 server out")
    options = parser.parse_args()
    # A polite kill takes the same way out as Ctrl-C: through every `with`, which stop the server and remove the data.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    size = 128 * MIB if options.quick else 1024 * MIB
    plan = Plan(
        raw_bytes=size, repetitions=3 if options.quick else 5, passes=2, threads=min(options.threads, usable_cores())
    )
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    machine = describe_machine(plan)
    console.print(*(f"[dim]{name:>12}[/] {value}" for name, value in machine.items()), sep="\n")
    with folder_or_temporary(options.cache) as cache:
        folders = {name: generate(name, cache, plan) for name in options.only}
        local = {name: measure_local(name, folder, plan) for name, folder in folders.items()}
        console.print(local_table(local, plan))
        on_s3 = {} if options.no_s3 else measure_s3({k: v for k, v in folders.items() if k in ON_S3}, local, plan)
        if on_s3:
            console.print(s3_table(on_s3, local, plan))
    machine["load, end"] = load_average() + " (our own processes, and whatever else ran)"
    console.print(f"[dim]{'load, end':>12}[/] {machine['load, end']}")
    if options.record:
        path = record(options.record, machine, plan, local, on_s3)
        console.print(f"recorded in {path}")


# -- measuring ---------------------------------------------------------------------------------------------------------


def generate(name: str, cache: Path, plan: Plan) -> Path:
    """Return the folder of a workload's shards; made unless it is there."""
    folder = cache / f"{name}-{plan.raw_bytes // MIB}MiB"
    if not (folder / "index.json").exists():
        say(f"generating {name}")
        command = [sys.executable, str(HERE / "workloads.py"), name, str(folder), str(plan.raw_bytes)]
        subprocess.run(command, check=True)
    return folder


def measure_local(name: str, folder: Path, plan: Plan) -> Measured:
    """Measure decoding and epochs in turn, so that whatever else the machine does meets both."""
    measured = _described(folder)
    arguments = _arguments(name, str(folder), plan)
    for number in range(plan.repetitions):
        say(f"{name}, local: {number + 1} of {plan.repetitions}")
        measured.decode.append(_run("decode", arguments))
        measured.epoch.append(_run("epoch", arguments))
    return measured


def measure_s3(folders: dict[str, Path], local: dict[str, Measured], plan: Plan) -> dict[str, Measured]:
    """Measure plain GETs and epochs in turn, from SeaweedFS on this machine."""
    import fsspec

    from streamshards.testing.servers import seaweedfs

    found = {}
    with tempfile.TemporaryDirectory(prefix="streamshards-bench-s3-") as scratch, seaweedfs(scratch) as server:
        server.create_bucket(BUCKET)
        fs = fsspec.filesystem("s3", **server.storage_options)
        for name, folder in folders.items():
            for path in sorted(folder.iterdir()):
                fs.pipe_file(f"{BUCKET}/{name}/{path.name}", path.read_bytes())
            measured = _described(folder)
            measured.decode = local[name].decode
            arguments = _arguments(name, f"s3://{BUCKET}/{name}", plan) | {"storage_options": server.storage_options}
            for number in range(plan.repetitions):
                say(f"{name}, S3: {number + 1} of {plan.repetitions}")
                measured.get.append(_run("get", arguments))
                measured.epoch.append(_run("epoch", arguments))
            found[name] = measured
    return found


def _described(folder: Path) -> Measured:
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    shards = index["shards"]
    return Measured(
        samples=index["num_samples"],
        shards=len(shards["name"]),
        raw_bytes=sum(shards["raw_bytes"]),
        stored_bytes=sum(shards["bytes"]),
    )


def _arguments(name: str, url: str, plan: Plan) -> dict[str, Any]:
    return {
        "url": url,
        "batch_size": WORKLOADS[name].batch_size,
        "threads": plan.threads,
        "connections": plan.connections,
        "passes": plan.passes,
    }


def _run(what: str, arguments: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, str(HERE / "measure.py"), what, json.dumps(arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


# -- reading the measurements ------------------------------------------------------------------------------------------


def wall_s(results: list[dict[str, Any]]) -> list[float]:
    """Return the best pass of each process: a pass is a whole epoch, or all shards decoded or fetched."""
    return [min(one["wall_s"] for one in result["passes"]) for result in results]


def cpu_s(results: list[dict[str, Any]]) -> float:
    """Return the median CPU seconds of a pass."""
    return statistics.median(one["cpu_s"] for result in results for one in result["passes"])


def ratios(numerators: list[float], denominators: list[float]) -> list[float]:
    """Return the ratio of each pair of neighbours."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def _spread(values: list[float], unit: str = ".2f") -> str:
    return f"{statistics.median(values):{unit}} [dim]({min(values):{unit}}-{max(values):{unit}})[/]"


def _table(title: str, rows: dict[str, dict[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column("")
    for name in rows:
        table.add_column(f"{name}\n[dim]{WORKLOADS[name].what}[/]", justify="right")
    for label in next(iter(rows.values())):
        table.add_row(label, *(row[label] for row in rows.values()))
    return table


def local_table(found: dict[str, Measured], plan: Plan) -> Table:
    """Return what was measured from local files."""
    title = f"Local files, warm: median (lowest-highest) of {plan.repetitions} interleaved runs; MB and GB are raw"
    return _table(title, {name: _data_rows(m) | _epoch_rows(m) | _decode_rows(m) for name, m in found.items()})


def s3_table(found: dict[str, Measured], local: dict[str, Measured], plan: Plan) -> Table:
    """Return what was measured from the S3 server."""
    title = f"SeaweedFS on loopback, on the same cores; {plan.connections} connections"
    rows = {}
    for name, m in found.items():
        epochs, gets, at_home = wall_s(m.epoch), wall_s(m.get), statistics.median(wall_s(local[name].epoch))
        rows[name] = _epoch_rows(m) | {
            "stored MB/s, GETs alone": _spread([m.stored_bytes / 1e6 / s for s in gets], ",.0f"),
            "stored MB/s, epoch": _spread([m.stored_bytes / 1e6 / s for s in epochs], ",.0f"),
            "epoch / GETs alone": _spread(ratios(gets, epochs)),
            "epoch / local epoch": f"{at_home / statistics.median(epochs):.2f}",
        }
    return _table(title, rows)


def _data_rows(m: Measured) -> dict[str, str]:
    return {
        "samples": f"{m.samples:,}",
        "shards": f"{m.shards}",
        "raw MB": f"{m.raw_bytes / 1e6:,.0f}",
        "compression ratio": f"{m.raw_bytes / m.stored_bytes:.2f}",
    }


def _epoch_rows(m: Measured) -> dict[str, str]:
    epochs = wall_s(m.epoch)
    return {
        "samples/s": f"{m.samples / statistics.median(epochs):,.0f}",
        "epoch, MB/s": _spread([m.raw_bytes / 1e6 / s for s in epochs], ",.0f"),
        "first epoch, MB/s": _spread([m.raw_bytes / 1e6 / one["first_epoch_s"] for one in m.epoch], ",.0f"),
        "first batch, ms": _spread([1e3 * one["first_batch_s"] for one in m.epoch], ",.0f"),
        "epoch, CPU s/GB": f"{cpu_s(m.epoch) / (m.raw_bytes / 1e9):.2f}",
        "peak RSS, MB": f"{max(one['peak_rss_bytes'] for one in m.epoch) / 1e6:,.0f}",
        "  of it before opening": f"{statistics.median(one['base_rss_bytes'] for one in m.epoch) / 1e6:,.0f}",
    }


def _decode_rows(m: Measured) -> dict[str, str]:
    decodes, epochs = wall_s(m.decode), wall_s(m.epoch)
    return {
        "pure zstd, MB/s": _spread([m.raw_bytes / 1e6 / s for s in decodes], ",.0f"),
        "pure zstd, CPU s/GB": f"{cpu_s(m.decode) / (m.raw_bytes / 1e9):.2f}",
        "[bold]epoch / pure zstd[/]": f"[bold]{_spread(ratios(decodes, epochs))}[/]",
        "the same in CPU time": f"{cpu_s(m.decode) / cpu_s(m.epoch):.2f}",
        "first epoch / pure": _spread(ratios(decodes, [one["first_epoch_s"] for one in m.epoch])),
    }


# -- where, and what with ----------------------------------------------------------------------------------------------


def describe_host() -> dict[str, str]:
    """Return what a reader must know of the machine and the versions."""
    packages = ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    cores = f"{usable_cores()} of {os.cpu_count()} cores"
    return {
        "machine": f"{_cpu_model()}, {cores}, {_memory_gb()} GB, {platform.platform()}",
        "load, start": load_average() + " (over 1, 5, 15 minutes)",
        "python": f"{platform.python_implementation()} {platform.python_version()}, {packages}",
        "commit": _commit(),
    }


def describe_machine(plan: Plan) -> dict[str, str]:
    """Return what a reader must know to judge or repeat the numbers."""
    return describe_host() | {
        "command": shlex.join(["python", *sys.argv]),
        "measured": f"{plan.raw_bytes // MIB:,} MiB a workload, {plan.repetitions} runs of {plan.passes} epochs on "
        f"{plan.threads} cores, each in a fresh process",
    }


def record(
    name: str, machine: dict[str, str], plan: Plan, local: dict[str, Measured], on_s3: dict[str, Measured]
) -> Path:
    """Write every single measurement; return where."""
    path = HERE / "results" / f"{datetime.date.today().isoformat()}-{name}.json"
    path.parent.mkdir(exist_ok=True)
    result = {
        "machine": machine,
        "plan": vars(plan),
        "local": {name: vars(m) for name, m in local.items()},
        "s3": {name: {key: value for key, value in vars(m).items() if key != "decode"} for name, m in on_s3.items()},
    }
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


def say(text: str) -> None:
    """Tell a waiting person what goes on; on stderr, so that stdout is the result."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def folder_or_temporary(cache: Path | None) -> Iterator[Path]:
    """Yield the folder for the data: a given one stays, a temporary one goes."""
    if cache is None:
        with tempfile.TemporaryDirectory(prefix="streamshards-bench-") as folder:
            yield Path(folder)
    else:
        cache.mkdir(parents=True, exist_ok=True)
        yield cache


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(HERE), *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no", "--", "../streamshards")
        return git("rev-parse", "--short=12", "HEAD") + (", streamshards/ changed since" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def load_average() -> str:
    """Return how many threads wanted a core, over 1, 5 and 15 minutes."""
    return " ".join(f"{load:.2f}" for load in os.getloadavg())


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gb() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.0f}"
    except (ValueError, OSError):
        return "?"


if __name__ == "__main__":
    main()
