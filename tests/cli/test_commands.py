"""Every command in this process: what it prints where, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from streamshards import ShardWriter
from streamshards.cli import commands
from streamshards.cli.codes import MEANINGS, ExitCode, code_of
from streamshards.cli.outcome import line_of
from streamshards.convert import reading
from streamshards.errors import StreamShardsError
from streamshards.options import RetryOptions
from streamshards.storage import open_store
from streamshards.testing.servers import S3Server
from tests.cli.conftest import assert_error
from tests.conftest import BUCKET, StoreUrl
from tests.datasets import sample
from tests.pt_files import LAYOUTS, Custom, fill, payload, pt_bytes


def write(url: object, num_samples: int = 40, **options: Any) -> None:
    """Write a dataset of several shards."""
    with ShardWriter(str(url), shard_bytes=1_000, **options) as out:
        for number in range(num_samples):
            out.write(sample(number))


# ---- what works ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_from_files_to_a_checked_dataset(tmp_path: Path, call: Any, layout: str) -> None:
    """pack, inspect, cat and verify, and the same through index, for every layout; stderr stays silent."""
    src, dst = fill(tmp_path / "src", layout), tmp_path / "dst"
    packed = call("pack", src, dst, "--json")
    assert (packed.code, packed.err) == (0, "")
    assert packed.json["packed"] == {"files": 12, "samples": packed.json["num_samples"], "layout": LAYOUTS[layout]}
    indexed = call("index", src, "--json")
    assert (indexed.code, indexed.err) == (0, "")
    assert indexed.json["num_samples"] == packed.json["num_samples"]
    assert indexed.json["layout"] == LAYOUTS[layout]
    seen = [call("cat", url, "--limit", 1000, "--json") for url in (src, dst)]
    assert seen[0].out == seen[1].out
    assert len([json.loads(line) for line in seen[0].out.splitlines()]) == packed.json["num_samples"]
    for url in (src, dst):
        assert call("verify", url).out.startswith("ok: ")
        assert call("inspect", url, "--json").json["num_samples"] == packed.json["num_samples"]


def test_every_store(store_url: StoreUrl, tmp_path: Path, call: Any) -> None:
    """The commands take any url, with the options of its file system as JSON."""
    how = ["--storage-options", json.dumps(store_url.storage_options or {})]
    src, url = fill(tmp_path / "src", "samples"), f"{store_url.url}/train"
    assert call("pack", src, url, *how).out == (
        f"packed 12 files of layout samples, 48 samples, into {url}: {_stored(call, url, how)}\n"
    )
    assert call("verify", url, "--orphans", *how).out.splitlines()[0].startswith("ok: 1 shard, 48 samples, ")
    assert call("cat", url, "--start", -1, "--columns", "row", "--json", *how).json == {"row": 113}
    assert call("pack", url, f"{store_url.url}/again", "--shard-bytes", "500", *how).code == 0
    assert call("inspect", f"{store_url.url}/again", "--json", *how).json["num_samples"] == 48


def _stored(call: Any, url: str, how: list[str]) -> str:
    from streamshards.cli.show import counted, human_bytes

    summary = call("inspect", url, "--json", *how).json
    return f"{counted(summary['num_shards'], 'shard')}, {human_bytes(summary['stored_bytes'])}"


def test_s3_by_endpoint_and_environment(
    seaweedfs_server: S3Server, tmp_path: Path, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--endpoint-url leads to an S3 server, the credentials come from AWS_* as everywhere."""
    for name, value in seaweedfs_server.environment().items():
        if name != "AWS_ENDPOINT_URL":
            monkeypatch.setenv(name, value)
    url, where = f"s3://{BUCKET}/cli", ["--endpoint-url", seaweedfs_server.endpoint_url]
    assert call("pack", fill(tmp_path, "rows"), url, *where).code == 0
    assert call("verify", url, *where).out.startswith("ok: 1 shard, 48 samples")


def test_inspect_shows_schema_counts_and_sizes(tmp_path: Path, call: Any) -> None:
    """For people: a line per fact, a line per field, a bar per size."""
    write(tmp_path)
    text = call("inspect", tmp_path).out
    summary = call("inspect", tmp_path, "--json").json
    for line in (
        "samples      40",
        f"fingerprint  {summary['fingerprint']}",
        "meta.flag   bool",
        "tokens      int32 (*,)",
    ):
        assert line in text
    assert f"ratio {summary['raw_bytes'] / summary['stored_bytes']:.2f}" in text
    assert text.count("█") > 0
    assert {field["name"]: field["type"] for field in summary["schema"]}["x"] == "float32 (3,)"


def test_cat_shows_values(tmp_path: Path, call: Any) -> None:
    """For people: dtype, shape and a few values of a tensor; everything else as Python shows it."""
    with ShardWriter(tmp_path) as out:
        out.write({"x": torch.arange(12.0).view(3, 4), "flag": True, "text": "ü" * 200, "none": None, "in": {"e": {}}})
    lines = call("cat", tmp_path).out.splitlines()
    assert lines[0] == "sample 0"
    assert lines[1] == "  x     float32 (3, 4) [0, 1, 2, 3, 4, 5, …]"
    assert lines[2] == "  flag  True"
    assert lines[3].endswith("… (202 characters)")
    assert lines[4:] == ["  none  None", "  in.e  {}"]


def test_cat_json_has_whole_values_of_every_kind(tmp_path: Path, call: Any) -> None:
    """Each line is strict JSON, whatever the dtype; NaN and infinities are words, bytes base64."""
    values = torch.tensor([0.5, float("nan"), float("inf"), float("-inf")])
    content: dict[str, Any] = {
        "float": values,
        "complex": torch.tensor([1 + 2j]),
        "bytes": b"\x00\xff",
        "python": float("nan"),
        "list": [1, {"a": None}],
        "u64": torch.tensor([2**63 - 1]).to(torch.uint64) if hasattr(torch, "uint64") else torch.tensor([1]),
    }
    for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float16"):
        if hasattr(torch, name):
            content[name] = torch.tensor([0.5]).to(getattr(torch, name))
    with ShardWriter(tmp_path) as out:
        out.write(content)

    def refuse(word: str) -> Any:
        raise AssertionError(word)

    got = json.loads(call("cat", tmp_path, "--json").out, parse_constant=refuse)
    assert got["float"] == [0.5, "NaN", "Infinity", "-Infinity"]
    assert got["complex"] == [[1.0, 2.0]]
    assert (got["bytes"], got["python"], got["list"]) == ("AP8=", "NaN", [1, {"a": None}])
    assert got["bfloat16"] == got["float16"] == [0.5]
    assert call("cat", tmp_path).code == 0


def test_verify_lists_bad_shards_and_exits_with_1(tmp_path: Path, call: Any) -> None:
    """Name and cause of each on stdout, for people and for machines; a good dataset exits with 0."""
    write(tmp_path)
    victim = sorted(tmp_path.glob("*.zst"))[2]
    victim.write_bytes(victim.read_bytes()[:-1])
    ended = call("verify", tmp_path, "--threads", 2)
    assert (ended.code, ended.err) == (ExitCode.BAD_SHARDS, "")
    bad, total = ended.out.splitlines()
    assert bad.startswith(f"bad  {victim.name}  ")
    assert "bytes promised by the index" in bad
    assert total.startswith("1 of ")
    ended = call("verify", tmp_path, "--json", "--orphans")
    assert ended.code == ExitCode.BAD_SHARDS
    assert [entry["name"] for entry in ended.json["bad"]] == [victim.name]
    assert ended.json["orphans"] == []


def test_orphans_are_listed(tmp_path: Path, call: Any) -> None:
    """They are no reason to fail."""
    write(tmp_path)
    (tmp_path / "left.pt.zst").write_bytes(b"1234")
    ended = call("verify", tmp_path, "--orphans")
    assert ended.code == 0
    assert "orphan  left.pt.zst  4 B\n" in ended.out


def test_help_has_the_exit_codes(call: Any) -> None:
    """Each of them, with what it means; without any word the help is shown, too."""
    text = call("--help").out
    for code, meaning in MEANINGS.items():
        assert f"{int(code)}  {meaning}" in text
    assert call().out == text
    assert set(MEANINGS) == set(ExitCode)


def test_the_page_about_the_command_line_has_the_exit_codes() -> None:
    """docs/cli.md and --help say the same."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "cli.md").read_text()
    for code, meaning in MEANINGS.items():
        assert f"| {int(code)} | {meaning} |" in page


def test_version(call: Any) -> None:
    """One line on stdout."""
    assert call("--version").out.startswith("streamshards ")


# ---- what does not ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["inspect", "cat", "verify"])
def test_not_a_dataset(tmp_path: Path, call: Any, command: str) -> None:
    """What was found instead, and the command that makes one."""
    assert_error(call(command, tmp_path), ExitCode.NO_DATASET, "empty", "streamshards pack SRC")
    fill(tmp_path, "rows")
    assert_error(call(command, tmp_path), ExitCode.NO_DATASET, "12 .pt files", f"streamshards index {tmp_path}")


@pytest.mark.parametrize("command", ["pack", "index"])
def test_nothing_to_read(tmp_path: Path, call: Any, command: str) -> None:
    """An empty folder and one without .pt files."""
    words = [command, tmp_path / "src", *([tmp_path / "dst"] if command == "pack" else [])]
    assert_error(call(*words), ExitCode.NO_DATASET, "empty, or it does not exist")
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.csv").write_text("1")
    assert_error(call(*words), ExitCode.NO_DATASET, "no .pt or .pth files", "a.csv")


def test_indexes_that_do_not_hold(tmp_path: Path, call: Any) -> None:
    """From a newer version, cut off, not ours, and edited by hand."""
    write(tmp_path)
    path = tmp_path / "index.json"
    good = json.loads(path.read_text())
    for text, told in {
        json.dumps({**good, "version": 99}): "index version 99, this streamshards reads up to 1; upgrade",
        path.read_text()[:-50]: "not JSON",
        '{"version": 2, "shards": []}': "not a streamshards index",
        json.dumps({**good, "num_samples": 41}): "num_samples says 41",
        json.dumps({**good, "codec": None}): "'codec' must be a str",
    }.items():
        path.write_text(text)
        for command in ("inspect", "cat", "verify", "index"):
            assert_error(call(command, tmp_path), ExitCode.NO_DATASET, told)


def test_wrong_words(tmp_path: Path, call: Any) -> None:
    """Unknown commands, options, values, columns and samples."""
    write(tmp_path)
    for words, told in {
        ("catt", tmp_path): "No such command 'catt'",
        ("cat",): "Missing argument 'URL'",
        ("cat", tmp_path, "--colums", "x"): "--colums",
        ("cat", tmp_path, "--limit", "many"): "--limit",
        ("cat", tmp_path, "--limit", -1): "limit=-1",
        ("cat", tmp_path, "--columns", "y"): "there is no 'y'; the dataset has id, x",
        ("cat", tmp_path, "--start", 40): "has 40 samples",
        ("verify", tmp_path, "--threads", 0): "threads=0",
        ("inspect", tmp_path, "--storage-options", "[1"): "--storage-options is not JSON",
        ("inspect", tmp_path, "--storage-options", "[1]"): "must be a JSON object, not list",
        ("inspect", "foo://x"): "no filesystem is called 'foo'",
        ("inspect", "s3://"): "names no bucket",
        ("pack", tmp_path, tmp_path / "x", "--shard-bytes", "huge"): "shard_bytes='huge' is not a size",
        ("pack", tmp_path, tmp_path / "x", "--compression", "lz4"): "lz4",
        ("pack", tmp_path, tmp_path / "x", "--mode", "merge"): "--mode",
        ("pack", tmp_path, tmp_path / "x", "--layout", "heap"): "--layout",
        ("pack", tmp_path, tmp_path): "the same place",
    }.items():
        assert_error(call(*words), ExitCode.USAGE, told)


def test_a_dataset_is_there_already(tmp_path: Path, call: Any) -> None:
    """Neither pack nor index touch it without being told to, and both say how."""
    src, dst = fill(tmp_path / "src", "rows"), tmp_path / "dst"
    assert call("pack", src, dst).code == call("index", src).code == 0
    assert_error(call("pack", src, dst), ExitCode.USAGE, "48 samples", "--mode append", "--mode replace")
    assert_error(call("index", src), ExitCode.USAGE, "48 samples", "--mode replace")
    assert "now 96 samples in 2 shards" in call("pack", src, dst, "--mode", "append").out
    assert "48 samples" in call("pack", src, dst, "--mode", "replace").out
    assert call("index", src, "--mode", "replace").code == 0


def test_bad_files(tmp_path: Path, call: Any) -> None:
    """A damaged one, one of another layout and an unsafe one in the middle: each named, with the ways out."""
    src = fill(tmp_path / "src", "rows")
    for data, texts in (
        (b"hello", ("part-5.pt", "torch.load cannot read it")),
        (pt_bytes([{"x": 1}]), ("part-5.pt", "layout 'rows' is a tensor, not list", "looks like layout 'samples'")),
        (pt_bytes({"x": Custom()}), ("part-5.pt", "tests.pt_files.Custom", "--trust-pickle")),
    ):
        (src / "part-5.pt").write_bytes(data)
        assert_error(call("pack", src, tmp_path / "dst"), ExitCode.BAD_DATA, *texts)
        assert_error(call("index", src), ExitCode.BAD_DATA, *texts)


def test_a_bad_shard_ends_cat(tmp_path: Path, call: Any) -> None:
    """A damaged and a missing shard are bad data, not a bad store."""
    write(tmp_path)
    victim = tmp_path / json.loads((tmp_path / "index.json").read_text())["shards"]["name"][0]
    good = victim.read_bytes()
    victim.write_bytes(good[:200] + b"\0\0\0\0" + good[204:])
    assert_error(call("cat", tmp_path), ExitCode.BAD_DATA, victim.name, "digest")
    victim.unlink()
    assert_error(call("cat", tmp_path), ExitCode.BAD_DATA, victim.name, "does not have it", "streamshards verify")


def test_s3_that_refuses(seaweedfs_server: S3Server, call: Any, tmp_path: Path) -> None:
    """A wrong secret, no credentials, and a bucket that does not exist; no secret is shown."""
    good = seaweedfs_server.storage_options
    where = f"s3://{BUCKET}/nothing"
    wrong = json.dumps({**good, "secret": "very-wrong-secret"})
    for command in (["inspect", where], ["pack", fill(tmp_path, "rows"), where], ["index", where]):
        ended = call(*command, "--storage-options", wrong)
        assert_error(ended, ExitCode.STORE, where, "AWS_ACCESS_KEY_ID")
        assert "very-wrong-secret" not in ended.err
    keyless = json.dumps({"endpoint_url": good["endpoint_url"]})
    assert_error(call("inspect", where, "--storage-options", keyless), ExitCode.STORE, "AWS_ACCESS_KEY_ID", "anon")
    ended = call("inspect", "s3://no-such-bucket/x", "--storage-options", json.dumps(good))
    assert_error(ended, ExitCode.STORE, "no-such-bucket", "check the bucket's name")


@pytest.mark.parametrize(
    "words",
    [["inspect"], ["cat"], ["verify"], ["index"], ["pack", "SRC"], ["pack", "SRC", "--mode", "replace"]],
    ids=" ".join,
)
def test_a_wrong_endpoint_is_known_soon(
    words: list[str], tmp_path: Path, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing ever answers, every command ends with the deadline for a first contact, which is below 30 s."""
    assert commands._RETRY.first_contact_s <= 25
    monkeypatch.setattr(commands, "_RETRY", RetryOptions(first_contact_s=0.3))
    fill(tmp_path, "rows")
    words = [str(tmp_path) if word == "SRC" else word for word in words]
    where = [
        "s3://bucket/x",
        "--endpoint-url",
        "http://127.0.0.1:9",
        "--storage-options",
        '{"key": "a", "secret": "b"}',
    ]
    at = 2 if words[0] == "pack" else 1
    ended = call(*words[:at], *where, *words[at:])
    assert_error(ended, ExitCode.STORE, "s3://bucket/x", "gave up after")


def test_a_defect_is_one_line_too(tmp_path: Path, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody foresaw asks to be reported; --debug, anywhere, shows the traceback."""

    def broken(*_args: object, **_options: object) -> None:
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr(reading, "read_samples", broken)
    assert_error(call("cat", tmp_path), ExitCode.INTERNAL, "defect: RuntimeError: first second", "--debug")
    for words in (["--debug", "cat", tmp_path], ["cat", tmp_path, "--debug"]):
        ended = call(*words)
        assert ended.code == ExitCode.INTERNAL
        assert "Traceback" in ended.err


def test_debug_shows_the_traceback_of_an_error(tmp_path: Path, call: Any) -> None:
    """The one line stays the last."""
    ended = call("inspect", tmp_path, "--debug")
    assert ended.code == ExitCode.NO_DATASET
    assert "Traceback" in ended.err
    assert ended.err.splitlines()[-1].startswith("streamshards: ")


def test_ctrl_c(tmp_path: Path, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """130, as of any program that Ctrl-C stopped."""

    def interrupted(*_args: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(reading, "read_samples", interrupted)
    assert_error(call("cat", tmp_path), ExitCode.INTERRUPTED, "interrupted")


def _all_errors(kind: type[StreamShardsError]) -> list[type[StreamShardsError]]:
    return [kind, *(found for below in kind.__subclasses__() for found in _all_errors(below))]


def test_every_error_has_a_code_and_a_line() -> None:
    """No error of the tree is taken for a defect, and the library's advice is given in flags."""
    import streamshards.errors

    for kind in _all_errors(StreamShardsError):
        if kind.__module__ == streamshards.errors.__name__ and kind is not StreamShardsError:
            assert code_of(kind("x")) not in (ExitCode.OK, ExitCode.BAD_SHARDS, ExitCode.INTERNAL), kind
    text = 'a\nb: pass trust_pickle=True, or storage_options={"anon": True}, or mode="append"'
    assert line_of(StreamShardsError(text)) == (
        "a b: pass --trust-pickle, or --storage-options '{\"anon\": true}', or --mode append"
    )


def test_unsafe_files_in_a_store(tmp_path: Path, call: Any) -> None:
    """Files that were indexed with --trust-pickle are read with it, and named as bad without."""
    store = open_store(tmp_path)
    store.put("a.pt", pt_bytes(payload("rows", 0)), timeout_s=30)
    assert call("index", tmp_path, "--trust-pickle").code == 0
    assert call("verify", tmp_path, "--trust-pickle").code == 0
    assert call("verify", tmp_path).code == 0
