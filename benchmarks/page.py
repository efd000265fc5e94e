"""Makes docs/benchmarks.md of a recording: python benchmarks/page.py benchmarks/results/DATE-peers-NAME.json

Without a file it writes the page as it is before anything was recorded. Plots are SVG, written by hand.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path
from typing import Any

from compare import PLACES, speeds
from peers import PEERS
from run import HERE

DOCS = HERE.parent / "docs"
ENOUGH_RAW_MB = 128
ENOUGH_REPETITIONS = 3
IDLE_LOAD = 1.0
METHOD = """
## How it is measured

- **The same samples.** Four workloads, made up, the same bytes every time (`benchmarks/workloads.py`). Each peer
  stores them in its own format, as its documentation recommends, and makes its own batches: `benchmarks/peers/` has
  one small file for each.
- **All of them.** After the timed part, one epoch of every row is summed, each sample with all its fields, whatever
  the order. A row whose epoch was not what had been written says so.
- **In turn.** All rows of one workload and place are measured one after the other, then all of them again. Every
  measurement is a process of its own on the cores given. The table has the median and, in brackets, the lowest and
  the highest.
- **Two speeds.** *samples/s* of local, warm files is that of further epochs of the same loader; everywhere else it
  is that of the first epoch, from making the loader on. A span that takes longer than its limit is cut, and counts
  what came by then.
- **Work, not only speed.** *CPU s/GB* is user and system time of all processes for one GB (10⁹ raw bytes); *peak
  MB* the largest sum of proportional memory (PSS) seen, and in brackets what of it is not a mapped file, which the
  kernel may drop.
- **Waiting.** *stall* is the part of the time that a training loop with steps of 20 ms waits for its next batch. A
  step is a wait, as for a GPU, so the loader has the cores.
- **Bytes.** *stored* is the size of the peer's files as a part of the raw bytes. *read* is what came from the disk
  (cold) or through a relay that counts (S3), divided by the stored bytes times the epochs begun; above 1 something
  is read twice.
- **Cold** means `posix_fadvise(DONTNEED)` on each file just before; where *read* is near 0, the file system ignored
  it.
- **S3** is SeaweedFS on loopback, on the same cores as the reader. **Far** is the same server behind a relay
  (`benchmarks/relay.py`) of 30 ms round trip and 1 Gbit/s for all connections together.

## What this does not show

One machine, few cores, no GPU, small data. The order is not compared: a shuffle buffer of 1,000 samples, a
permutation of files and a full permutation are all "on". Neither are checksums: streamshards verifies every shard
in these numbers, most peers verify nothing. Ray's processes start before the clock runs, and its workers are its
own: it has one row. S3 through curl is WebDataset's way; `aws s3 cp` would start a Python for each shard.

Three peers are helped along. LitData is allowed endpoints without TLS, which it refuses as installed. The 5 s that HF
datasets sleep at the end of every epoch are turned off. MosaicML imports torchvision, whose operators do not load
beside a CPU build of torch; they are declared, and not used.

```sh
make bench-peers                                                     # everything
make bench-peers BENCH_ARGS="--only images --places warm s3 --record laptop"
.venv/bin/python benchmarks/page.py benchmarks/results/DATE-peers-laptop.json
```
"""


def page(result: dict[str, Any] | None, source: str, folder: Path) -> str:
    """Return the page; plots go to *folder*."""
    head = ["# Benchmarks: streamshards and its peers", ""]
    if result is None:
        head += [
            'Nothing is recorded yet: `make bench-peers BENCH_ARGS="--record NAME"`, then `benchmarks/page.py`.',
            "",
        ]
        return "\n".join(head).rstrip() + "\n" + METHOD
    head += [*_warnings(result), f"Made by `benchmarks/page.py` of `{source}`, which has every single measurement.", ""]
    head += _facts(result)
    return "\n".join([*head, *_tables(result, folder), *_left_out(result)]).rstrip() + "\n" + METHOD


def _warnings(result: dict[str, Any]) -> Iterator[str]:
    plan, machine = result["plan"], result["machine"]
    reasons = []
    if plan["raw_mb"] < ENOUGH_RAW_MB:
        reasons.append(f"{plan['raw_mb']} MiB a workload are too little")
    if plan["repetitions"] < ENOUGH_REPETITIONS:
        reasons.append(f"{plan['repetitions']} repetitions are too few")
    if float(machine["load, start"].split()[0]) > IDLE_LOAD:
        reasons.append("the machine was busy with something else")
    if reasons:
        yield f"**Not for quoting:** {'; '.join(reasons)}."
        yield ""


def _facts(result: dict[str, Any]) -> Iterator[str]:
    plan = result["plan"]
    yield "| | |"
    yield "|---|---|"
    for name, value in result["machine"].items():
        yield f"| {name} | {value} |"
    yield (
        f"| measured | {plan['raw_mb']} MiB a workload (small rows a quarter), {plan['repetitions']} repetitions,"
        f" {plan['threads']} cores, spans of at most {plan['max_s']:g} s; {result['took_s'] / 60:.0f} minutes in all |"
    )
    for name, versions in result["versions"].items():
        yield f"| {name} | {result['peers'][name]['what']}; {', '.join(f'{n} {v}' for n, v in versions.items())} |"
    yield ""


def _tables(result: dict[str, Any], folder: Path) -> Iterator[str]:
    for workload, facts in result["workloads"].items():
        yield f"## {workload}: {facts['what']}"
        yield ""
        raw_mb, batch_size = facts["raw_bytes"] / 1e6, facts["batch_size"]
        yield f"{facts['samples']:,} samples, {raw_mb:,.0f} MB raw, batches of {batch_size:,}."
        yield ""
        for place, told in PLACES.items():
            rows = [
                row
                for row in result["rows"]
                if (row["setting"]["workload"], row["setting"]["place"]) == (workload, place)
            ]
            if rows:
                yield f"### {workload}, {told}"
                yield ""
                yield from _table(rows, facts, place)
                name = f"benchmarks-{workload}-{place}.svg"
                (folder / name).write_text(bars(list(_best(rows)), f"{workload}, {told}"), encoding="utf-8")
                yield f"![samples/s, {workload}, {told}]({name})"
                yield ""


def _table(rows: list[dict[str, Any]], facts: dict[str, Any], place: str) -> Iterator[str]:
    yield (
        "| | workers | shuffle | samples/s | MB/s | CPU s/GB | first batch, s | peak MB | stall | stored | read | |\n"
        "|---|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|---|"
    )
    for row in sorted(rows, key=lambda row: -_median(speeds(row["laps"]))):
        setting = row["setting"]
        who = f"| {setting['peer']} | {setting['num_workers']} | {'on' if setting['shuffle'] else 'off'} "
        yield who + "| " + " | ".join(_cells(row, facts, place)) + " |"
    yield ""


def _cells(row: dict[str, Any], facts: dict[str, Any], place: str) -> list[str]:
    laps = row["laps"]
    if row["failure"] or not laps:
        return [""] * 8 + [f"failed: {escape(row['failure'])}".replace("|", "/")]
    sample_bytes = facts["raw_bytes"] / facts["samples"]
    rates = speeds(laps)
    spans = [lap.get("more") or lap["first"] for lap in laps]
    cpu = [span["cpu_s"] / (span["samples"] * sample_bytes / 1e9) for span in spans]
    peak = max(lap["peak_pss_bytes"] or 0 for lap in laps) / 1e6
    held = max(lap["peak_unreclaimable_bytes"] or 0 for lap in laps) / 1e6
    return [
        f"**{_median(rates):,.0f}** ({min(rates):,.0f}-{max(rates):,.0f})",
        f"{_median(rates) * sample_bytes / 1e6:,.0f}",
        f"{_median(cpu):.2f}",
        f"{_median([lap['first']['first_batch_s'] for lap in laps]):.2f}",
        f"{peak:,.0f} ({held:,.0f})",
        f"{_median([lap['stall']['part'] for lap in laps]):.0%}",
        f"{row['stored_bytes'] / facts['raw_bytes']:.0%}",
        _read(row, place),
        "" if row["lost"] in ("", "not checked") else f"**lost: {row['lost']}**",
    ]


def _read(row: dict[str, Any], place: str) -> str:
    """Return bytes read / bytes stored, where that was counted over a known number of epochs."""
    stored = row["stored_bytes"]
    if place == "cold":
        whole = [lap["first"]["disk_read_bytes"] / stored for lap in row["laps"] if lap["first"]["whole"]]
        return f"{_median(whole):.2f}" if whole else "cut"
    if place in ("s3", "far") and (counted := [lap["check_relayed"] for lap in row["laps"] if "check_relayed" in lap]):
        return f"{counted[0]['down_bytes'] / stored:.2f} in {counted[0]['requests']:,} requests"
    return ""


def _left_out(result: dict[str, Any]) -> Iterator[str]:
    gaps = [
        f"- {name}, {what}: {why}." for name, peer in result["peers"].items() for what, why in peer["lacks"].items()
    ]
    gaps += [f"- {name}: {why}." for name, why in result["absent"].items()]
    if gaps:
        yield "## Left out"
        yield ""
        yield from gaps


def _best(rows: Iterable[dict[str, Any]]) -> Iterator[tuple[str, float]]:
    """Yield each peer and its best row, the fastest first."""
    best: dict[str, float] = {}
    for row in rows:
        name = row["setting"]["peer"]
        best[name] = max(best.get(name, 0.0), _median(speeds(row["laps"])))
    yield from sorted(best.items(), key=lambda item: -item[1])


def bars(values: list[tuple[str, float]], title: str) -> str:
    """Return horizontal bars as SVG, readable on light and dark pages."""
    line, left, width = 22, 150, 420
    most = max((value for _, value in values), default=0) or 1
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 110}" height="{line * (len(values) + 2)}"'
        ' font-family="sans-serif" font-size="13" fill="#777">',
        f'<text x="4" y="{line - 6}" font-weight="bold">samples/s, best row of each: {escape(title)}</text>',
    ]
    for number, (name, value) in enumerate(values, 1):
        y, length = line * number + 6, max(1, round(width * value / most))
        color = "#2a7ae2" if PEERS[name].module.startswith("ours") else "#999"
        parts += [
            f'<text x="{left - 6}" y="{y + 13}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{left}" y="{y}" width="{length}" height="{line - 6}" fill="{color}"/>',
            f'<text x="{left + length + 6}" y="{y + 13}">{value:,.0f}</text>',
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _median(values: list[float]) -> float:
    return statistics.median(values) if values else 0.0


def main() -> None:
    """Write the page and its plots."""
    source = sys.argv[1] if len(sys.argv) > 1 else ""
    folder = Path(sys.argv[2]) if len(sys.argv) > 2 else DOCS
    result = json.loads(Path(source).read_text(encoding="utf-8")) if source else None
    shown = f"benchmarks/results/{Path(source).name}"
    path = folder / "benchmarks.md"
    path.write_text(page(result, shown, folder), encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
