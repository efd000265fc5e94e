"""The code in the documents runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import streamshards as ss
from streamshards.testing.servers import ServerNotInstalled

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(document: str) -> list[str]:
    return BLOCK.findall((ROOT / document).read_text(encoding="utf-8"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_quickstart(here: Path) -> None:
    """README's quickstart: 12 lines that write, stream, stop and resume."""
    code = blocks("README.md")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    names: dict[str, object] = {}
    exec(code, names)
    assert names["ckpt"]["position"] == 10_000  # type: ignore[index]


def test_usage(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each block of docs/usage.md, in order, over a small dataset of texts."""
    with ss.ShardWriter("data/text") as out:
        for number in range(100):
            out.write({"tokens": torch.arange(number % 7 + 1), "text": str(number)})
    names: dict[str, object] = {"ss": ss}
    for number, code in enumerate(blocks("docs/usage.md")):
        try:
            exec(code, names)
        except ServerNotInstalled as error:
            pytest.skip(str(error))
        if number == 0:
            dataset = names["ds"]
            assert isinstance(dataset, ss.StreamingDataset)
            assert next(iter(dataset))["tokens"].shape == (32, 7)
    assert "[{'x': 1}]" in capsys.readouterr().out
