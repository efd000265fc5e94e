"""``streamshards cache``: what it prints, what it removes, and how it ends."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import streamshards as ss
from streamshards.cli.codes import ExitCode
from tests.cli.conftest import assert_error
from tests.datasets import write


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """A cache with all shards of a dataset, decoded, and as they came."""
    write(str(tmp_path / "train"), range(300))
    for mode in ("raw", "compressed"):
        options = ss.CacheOptions(directory=tmp_path / "cache", mode=mode, keep_free_bytes=0)  # type: ignore[arg-type]
        assert len(list(ss.StreamingDataset(str(tmp_path / "train"), cache=options))) == 300
    return tmp_path / "cache"


def entries(cache: Path) -> list[Path]:
    return sorted(path for path in cache.rglob("*") if path.suffix in (".raw", ".object"))


def test_info_says_what_is_there(filled: Path, call: Any) -> None:
    """The user's folder, how many shards, how much disk; the same as JSON; an empty cache is no error."""
    num = len(entries(filled))
    ended = call("cache", "info", "--directory", filled)
    assert (ended.code, ended.err) == (0, "")
    home = filled / f"user-{os.geteuid()}"
    assert ended.out.startswith(f"{home}\n  shards  {num}, {num // 2} of them decoded\n  disk    ")
    info = call("cache", "info", "--directory", filled, "--json").json
    assert info == {"directory": str(home), "entries": num, "raw": num // 2, "bytes": info["bytes"]}
    assert info["bytes"] >= sum(path.stat().st_size for path in entries(filled))
    assert call("cache", "info", "--directory", filled / "none", "--json").json["entries"] == 0
    assert not (filled / "none").exists(), "looking makes nothing"


def test_the_default_is_that_of_training(filled: Path, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --directory, XDG_CACHE_HOME decides."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(filled))
    assert call("cache", "info", "--json").json["directory"].startswith(str(filled / "streamshards"))


def test_clear_removes_all(filled: Path, call: Any) -> None:
    """Nothing is left but the user's empty folder; a second time there is nothing to do."""
    num = len(entries(filled))
    assert call("cache", "clear", "--directory", filled).out.startswith(f"removed {num} shards, ")
    assert os.listdir(filled / f"user-{os.geteuid()}") == []
    assert call("cache", "clear", "--directory", filled, "--json").json["entries"] == 0


def test_verify_finds_and_removes_the_damaged(filled: Path, call: Any) -> None:
    """A flipped bit in each kind of entry, and a link: listed, removed, exit code 1; then all is good."""
    found = entries(filled)
    bad = [next(path for path in found if path.suffix == suffix) for suffix in (".raw", ".object")]
    for path in bad:
        data = bytearray(path.read_bytes())
        data[len(data) // 3] ^= 1
        path.write_bytes(data)
    link = next(path for path in found if path not in bad)
    link.unlink()
    link.symlink_to("/etc/hostname")
    ended = call("cache", "verify", "--directory", filled)
    assert ended.code == ExitCode.BAD_SHARDS
    lines = ended.out.splitlines()
    assert sorted(line.partition(": ")[0] for line in lines[:-1]) == sorted(f"bad  {path}" for path in [*bad, link])
    assert lines[-1] == f"{len(found)} shards, 3 bad, removed"
    again = call("cache", "verify", "--directory", filled)
    assert (again.code, again.out) == (0, f"{len(found) - 3} shards, all good\n")
    assert call("cache", "verify", "--directory", filled, "--json").json == {"entries": len(found) - 3, "bad": []}


@pytest.mark.parametrize("command", ["info", "clear", "verify"])
def test_an_unsafe_cache_is_refused(filled: Path, call: Any, command: str) -> None:
    """A folder that others can write to is neither believed nor cleared."""
    (filled / f"user-{os.geteuid()}").chmod(0o770)
    assert_error(call("cache", command, "--directory", filled), ExitCode.USAGE, "is open to others", "chmod 700")
    assert entries(filled)


def test_a_url_is_no_folder(call: Any) -> None:
    """The cache is on this machine."""
    assert_error(call("cache", "info", "--directory", "s3://bucket/cache"), ExitCode.USAGE, "a folder of this machine")


def test_the_page_shows_what_is_printed(tmp_path: Path, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/cli.md, but for the folder and the sizes: after an epoch of its dataset of twelve files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    os.mkdir("digits")
    rng = torch.Generator().manual_seed(0)
    for number in range(12):
        image = torch.randint(0, 17, (150, 8, 8), generator=rng).to(torch.uint8)
        label = torch.randint(0, 10, (150,), generator=rng)
        torch.save({"image": image, "label": label, "source": [f"page {number}"] * 150}, f"digits/part-{number}.pt")
    assert call("pack", "digits", "train", "--shard-bytes", "32KiB").code == 0
    assert len(list(ss.StreamingDataset("train", cache=ss.CacheOptions(keep_free_bytes=0)))) == 1800
    page = (Path(__file__).resolve().parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
    shown = page.split("## cache: ")[1].split("```console\n")[1].split("```")[0]
    shown = shown.replace(
        "/home/me/.cache/streamshards/user-1000", str(tmp_path / f"cache/streamshards/user-{os.geteuid()}")
    )
    printed = "".join(
        f"$ {command}\n{call(*command.split()[1:]).out}" for command in re.findall(r"^\$ (.*)$", shown, re.M)
    )
    sizes = re.compile(r"[\d.]+ KiB")
    assert sizes.sub("size", printed) == sizes.sub("size", shown)
