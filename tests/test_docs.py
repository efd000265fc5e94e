"""The code in the documents runs as it stands there."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import streamshards as ss

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(document: str) -> list[str]:
    return BLOCK.findall((ROOT / document).read_text(encoding="utf-8"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGTERM)  # the recipe for preemption sets its own
    yield tmp_path
    signal.signal(signal.SIGTERM, handler)


def test_the_quickstart(here: Path) -> None:
    """README's quickstart: a dozen lines that write, stream, stop and resume."""
    code = blocks("README.md")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 13
    names: dict[str, object] = {}
    exec(code, names)
    assert names["ckpt"]["position"] == 256  # type: ignore[index]  # JSON


def test_usage(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each block of docs/usage.md, in order, over a small dataset of texts."""
    with ss.ShardWriter("data/text") as out:
        for number in range(100):
            out.write({"tokens": torch.arange(number % 7 + 1), "text": str(number)})
    names: dict[str, object] = {"ss": ss, "torch": torch}
    exec(blocks("README.md")[0], names)
    for number, code in enumerate(blocks("docs/usage.md")):
        exec(code, names)
        if number == 0:
            dataset = names["ds"]
            assert isinstance(dataset, ss.StreamingDataset)
            assert next(iter(dataset))["tokens"].shape == (32, 7)
    assert "[{'x': 1}]" in capsys.readouterr().out


def make_ids() -> dict[str, object]:
    """Write the small dataset of docs/integrations.md and return the names that it takes for granted."""
    with ss.ShardWriter("data/train") as out:
        for number in range(300):
            out.write({"id": number})
    return {"ss": ss, "net": torch.nn.Linear(1, 1)}


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torchdata's
def test_integrations_torchdata(here: Path) -> None:
    """torch's DataLoader and torchdata's StatefulDataLoader, as docs/integrations.md shows them."""
    pytest.importorskip("torchdata", reason="torchdata is not installed")
    names = make_ids()
    for code in blocks("docs/integrations.md")[:2]:
        exec(code, names)
    assert names["rest"] == 320 - 32  # the last batch is padded


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable:UserWarning")  # dcp, single process
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")  # Lightning's
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")  # it resumes
@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., callbacks used to create:UserWarning")
def test_integrations(here: Path) -> None:
    """Lightning, Accelerate and torch.distributed.checkpoint, as docs/integrations.md shows them."""
    from accelerate.state import AcceleratorState, GradientState

    from examples.lightning_module import StreamingDataModule
    from tests.integrations.lightning_ranks import Model

    _, _, with_lightning, with_accelerate, with_dcp = blocks("docs/integrations.md")
    names = make_ids()
    model = Model()
    exec(with_lightning, names | {"StreamingDataModule": StreamingDataModule, "model": model})
    assert [step[:2] for step in model.seen] == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4)] + [
        (epoch, step) for epoch in range(2) for step in range(10) if (epoch, step) > (0, 3)
    ]
    names["optimizer"] = torch.optim.SGD(names["net"].parameters(), lr=0.1)  # type: ignore[attr-defined]
    try:
        exec(with_accelerate, names)
    finally:  # it lives in the process
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    assert names["rest"] == 320 - 2 * 32
    exec(with_dcp, names)
    loader = names["loader"]
    assert isinstance(loader, ss.StreamingDataLoader)
    assert (loader.state_dict()["epoch"], loader.state_dict()["position"]) == (1, 32)
