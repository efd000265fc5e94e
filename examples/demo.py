"""Train two models from a real S3 server; kill one and resume it, corrupt a shard under the other.

    make demo            # or: python examples/demo.py --out demo-out

1. Starts an S3 server (SeaweedFS) on this machine and packs real data into shards there: the Python standard
   library's source, and scikit-learn's digits.
2. Trains a language model in a process of its own, kills it with SIGKILL in the middle, starts it again, and compares
   the ids of every batch of both lives with the order of an uninterrupted epoch.
3. Trains a digit classifier, flips bytes of one shard after the first epoch, trains on, repairs it, trains on.

Nothing stays behind but the folder: loss.png, summary.json, demo.log and the last checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import demo_digits
import demo_lm
import fsspec
from demo_checks import Check, check, mean
from demo_lm import Life
from demo_report import draw, print_checks, print_measures
from rich.console import Console

import streamshards as ss
from streamshards.events import Event, ShardSkipped
from streamshards.testing.servers import S3Server, seaweedfs

BUCKET = "demo"
WINDOW_SHARD_BYTES = "64KiB"
"""Small, so that one MB of windows fills more than a dozen shards."""
KILL_AT_STEP = 110
"""A little before the middle, and between two checkpoints."""

log = logging.getLogger("demo")


class Failed(Exception):
    """The demo did not show what it promises."""


def main() -> None:
    """Run the demo; exit 1 if anything is not as promised."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="where the results go")
    out: Path = parser.parse_args().out
    started = time.perf_counter()
    # A polite kill takes the same way out as Ctrl-C: through every `with`.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("make demo: FAILED: terminated"))
    try:
        prepare(out)
        with tempfile.TemporaryDirectory(prefix="streamshards-demo-") as scratch, seaweedfs(scratch) as server:
            log.info("SeaweedFS answers on %s", server.endpoint_url)
            server.create_bucket(BUCKET)
            language_model = show_kill_and_resume(server, out)
            digits = show_corruption(server)
        sentence = report(out, language_model, digits, seconds=time.perf_counter() - started)
    except KeyboardInterrupt:
        sys.exit("make demo: FAILED: interrupted")
    except (Failed, ss.StreamShardsError, OSError) as error:
        sys.exit(f"make demo: FAILED: {error}")
    print(sentence)


def prepare(out: Path) -> None:
    """Make *out*, clear it of an earlier run, and send all log lines there; from INFO on they go to stderr, too."""
    out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out / "checkpoint", ignore_errors=True)
    for name in ("loss.png", "summary.json", "demo.log"):
        (out / name).unlink(missing_ok=True)
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname)-7s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        handlers=[logging.StreamHandler(), logging.FileHandler(out / "demo.log", encoding="utf-8")],
    )
    logging.getLogger("matplotlib").setLevel(logging.WARNING)


# -- the language model ------------------------------------------------------------------------------------------------


def show_kill_and_resume(server: S3Server, out: Path) -> dict[str, Any]:
    """Train the language model through a SIGKILL; return what was seen."""
    url = f"s3://{BUCKET}/code"
    files = demo_lm.pack_windows(url, shard_bytes=WINDOW_SHARD_BYTES, storage_options=server.storage_options)
    reference, reading = read_uninterrupted(url, server)
    log.info(
        "packed %s windows of %s files into %s shards; reading them all takes %.2f s",
        f"{demo_lm.WINDOWS:,}", files, reading["shards"], reading["seconds"],
    )  # fmt: skip
    killed = live(url, server, out, kill_at_step=KILL_AT_STEP)
    log.info("killed with SIGKILL after step %s of %s", killed.steps[-1], killed.last_step)
    resumed = live(url, server, out, kill_at_step=None)
    log.info("resumed after step %s, finished step %s", resumed.resumed_after, resumed.steps[-1])
    return {"files": files, "reference": reference, "reading": reading, "killed": killed, "resumed": resumed}


def read_uninterrupted(url: str, server: S3Server) -> tuple[list[list[int]], dict[str, Any]]:
    """Return the ids of each batch of all epochs as a fresh dataset gives them, and how fast that was."""
    dataset = demo_lm.open_windows(url, server.storage_options)
    started = time.perf_counter()
    order = [batch["id"].tolist() for _ in range(demo_lm.EPOCHS) for batch in dataset]
    seconds = time.perf_counter() - started
    shards = dataset.index.num_shards
    return order, {"seconds": seconds, "shards": shards, "stats": dataset.stats()}


def live(url: str, server: S3Server, out: Path, *, kill_at_step: int | None) -> Life:
    """Run the training in a process until it ends, or until it is killed at that step; return what it told."""
    life = Life()
    first_told = last_told = 0.0
    with training_process(url, server, out) as process:
        assert process.stdout is not None  # a pipe was asked for
        for line in process.stdout:
            if not line.endswith("\n"):
                break  # cut off by the kill
            fact = json.loads(line)
            if "step" in fact:
                last_told = time.perf_counter()
                first_told = first_told or last_told
                life.steps.append(fact["step"])
                life.losses.append(fact["loss"])
                life.batches.append(fact["ids"])
                life.stats = fact["stats"]
                if fact["step"] % demo_lm.SAVE_EVERY == 0:
                    log.info("step %s of %s, loss %.2f", fact["step"], life.last_step, fact["loss"])
                if fact["step"] == kill_at_step:
                    process.kill()  # SIGKILL; what it had told by then still comes
            else:
                for name in fact.keys() - {"done"}:
                    setattr(life, name, fact[name])
        life.exit_status = process.wait()
    life.seconds = last_told - first_told
    expected = 0 if kill_at_step is None else -signal.SIGKILL
    if life.exit_status != expected or not life.steps:
        raise Failed(f"the training ended with status {life.exit_status}, not {expected}; see {out / 'demo.log'}")
    return life


@contextlib.contextmanager
def training_process(url: str, server: S3Server, out: Path) -> Iterator[subprocess.Popen[str]]:
    """Yield the running training process; whatever happens, it has ended on leaving."""
    script = Path(__file__).with_name("demo_lm.py")
    with (out / "demo.log").open("a", encoding="utf-8") as its_log:
        process = subprocess.Popen(
            [sys.executable, str(script), "--url", url, "--checkpoints", str(out / "checkpoint")],
            # Passive: on a busy machine OpenMP's threads would burn the cores they wait for.
            env={"OMP_WAIT_POLICY": "PASSIVE"} | os.environ | server.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=its_log,
            text=True,
            start_new_session=True,  # Ctrl-C is for the parent, which then ends this one
        )
        try:
            yield process
        finally:
            process.kill()
            process.communicate()


# -- the digits --------------------------------------------------------------------------------------------------------


def show_corruption(server: S3Server) -> dict[str, Any]:
    """Train on the digits while one of their shards is corrupt; return what was seen."""
    digits = demo_digits.read_digits()
    train_url, test_url = f"s3://{BUCKET}/digits/train", f"s3://{BUCKET}/digits/test"
    demo_digits.pack(digits, digits.train, train_url, server.storage_options)
    demo_digits.pack(digits, digits.test, test_url, server.storage_options)
    events: list[Event] = []
    errors: list[str] = []
    skips: list[int] = []
    seen: dict[str, Any] = {}

    def after_epoch(number: int, dataset: ss.StreamingDataset) -> None:
        skips.append(sum(isinstance(event, ShardSkipped) for event in events) - sum(skips))
        seen["shards"] = dataset.index.num_shards
        seen["bad_url"] = f"{train_url}/{dataset.index.names[demo_digits.CORRUPTED_SHARD]}"
        if number in (demo_digits.CORRUPT_AFTER, demo_digits.REPAIR_AFTER):
            flip_bytes(seen["bad_url"], server.storage_options)  # twice is as if it had never been
            what = "flipped" if number == demo_digits.CORRUPT_AFTER else "restored"
            log.info("%s 16 bytes in the middle of %s", what, seen["bad_url"])

    with collected_errors(errors):
        course = demo_digits.train(
            digits,
            train_url,
            test_url,
            storage_options=server.storage_options,
            observer=events.append,
            after_epoch=after_epoch,
        )
    log.info("digits: %.1f %% of the held-out ones right", 100 * course.accuracies[-1])
    return {"course": course, "skips": skips, "errors": errors, "train": digits.train, **seen}


def flip_bytes(url: str, storage_options: dict[str, Any]) -> None:
    """Invert 16 bytes in the middle of an object, as a bad disk might."""
    protocol, _, path = url.partition("://")
    fs = fsspec.filesystem(protocol, **storage_options)
    data = bytearray(fs.cat_file(path))
    middle = len(data) // 2
    data[middle : middle + 16] = bytes(byte ^ 0xFF for byte in data[middle : middle + 16])
    fs.pipe_file(path, bytes(data))


@contextlib.contextmanager
def collected_errors(texts: list[str]) -> Iterator[None]:
    """Append every ERROR line of the library's logger to *texts*."""
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign] # a class for a line
    logger = logging.getLogger("streamshards")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


# -- what it showed ----------------------------------------------------------------------------------------------------


def report(out: Path, lm: dict[str, Any], digits: dict[str, Any], *, seconds: float) -> str:
    """Print the tables, write the files, and return the last line.

    Raises:
        Failed: Something is not as promised.
    """
    checks = check(lm, digits)
    killed, resumed, course = lm["killed"], lm["resumed"], digits["course"]
    draw(
        out / "loss.png",
        lives=[{"steps": life.steps, "losses": life.losses} for life in (killed, resumed)],
        digits={"losses": course.losses, "accuracies": course.accuracies, "skips": digits["skips"]},
    )
    write_summary(out / "summary.json", checks, lm, digits, seconds=seconds)
    console = Console(width=None if sys.stdout.isatty() else 120)
    print_measures(console, ["until the kill", "after it", "digits", "reading alone"], measures(lm, digits))
    print_checks(console, checks)
    console.print(f"{out / 'loss.png'}, {out / 'summary.json'}, {out / 'demo.log'}", style="dim")
    failed = [f"{check.claim}: {check.seen}" for check in checks if not check.holds]
    if failed:
        raise Failed(f"not true: {'; '.join(failed)}")
    return (
        f"make demo: all {len(checks)} checks passed in {seconds:.0f} s: killed at step {killed.steps[-1]}, resumed "
        f"after step {resumed.resumed_after}, {len(lm['reference'])} batches exactly as uninterrupted; "
        f"{sum(digits['skips'])} skips of a corrupt shard logged, {course.promised} batches in every epoch, "
        f"{100 * course.accuracies[-1]:.1f} % of digits right"
    )


def measures(lm: dict[str, Any], digits: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Return the rows of the table of measures."""
    killed, resumed, course = lm["killed"], lm["resumed"], digits["course"]
    parts = [killed.stats, resumed.stats, course.stats, lm["reading"]["stats"]]
    seconds = [killed.seconds, resumed.seconds, course.seconds, lm["reading"]["seconds"]]
    rows = [
        ("samples", [f"{stats['samples']:,}" for stats in parts]),
        ("raw MB decoded", [f"{stats['bytes_decoded'] / 1e6:,.2f}" for stats in parts]),
        ("seconds", [f"{value:,.2f}" for value in seconds]),
        ("MB/s", [f"{stats['bytes_decoded'] / 1e6 / s:,.2f}" for stats, s in zip(parts, seconds, strict=True)]),
        ("seconds waiting for data", [f"{stats['wait_s']:,.2f}" for stats in parts]),
        ("retries", [f"{stats['retries']:,}" for stats in parts]),
        ("shards skipped", [f"{stats['shards_skipped']:,}" for stats in parts]),
    ]
    return [
        *rows,
        ("loss, first and last", [*(f"{mean(x[:5]):.2f} - {mean(x[-5:]):.2f}" for x in (killed.losses, resumed.losses)),
                                  f"{course.losses[0]:.2f} - {course.losses[-1]:.2f}", "-"]),
        ("accuracy, held out", ["-", "-", f"{100 * course.accuracies[-1]:.1f} %", "-"]),
    ]  # fmt: skip


def write_summary(
    path: Path, checks: list[Check], lm: dict[str, Any], digits: dict[str, Any], *, seconds: float
) -> None:
    """Write everything that was measured as JSON."""
    killed, resumed, course = lm["killed"], lm["resumed"], digits["course"]
    summary = {
        "passed": all(check.holds for check in checks),
        "seconds": round(seconds, 1),
        "versions": {"streamshards": ss.__version__, "python": sys.version.split()[0]},
        "checks": [vars(check) for check in checks],
        "language_model": {
            "parameters": killed.parameters,
            "windows": demo_lm.WINDOWS,
            "files": lm["files"],
            "shards": lm["reading"]["shards"],
            "reading_alone": lm["reading"],
            "lives": [
                {
                    "resumed_after": life.resumed_after,
                    "exit_status": life.exit_status,
                    "first_batch_s": life.first_batch_s,
                    "seconds": life.seconds,
                    "stats": life.stats,
                    "steps": life.steps,
                    "losses": life.losses,
                }
                for life in (killed, resumed)
            ],
        },
        "digits": {
            "samples": len(digits["train"]),
            "shards": digits["shards"],
            "corrupt_shard": digits["bad_url"],
            "skips": digits["skips"],
            "batches": course.batches,
            "losses": course.losses,
            "accuracies": course.accuracies,
            "stats": course.stats,
        },
    }
    path.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
