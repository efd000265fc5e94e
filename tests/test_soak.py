"""The soak in small: killed and resized real trainers, and a check that finds what is wrong."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.soak import cluster


def test_killed_and_resized_trainers_receive_each_sample_once(tmp_path: Path) -> None:
    """Two runs of three epochs, killed at random and resized: nothing lost, repeated or out of order, nothing left."""
    lines: list[str] = []
    figures = cluster.soak(
        tmp_path, chains=2, seconds=math.inf, seed=1, max_ranks=2, num_samples=301, report=lines.append
    )
    assert figures.faults == 0, lines
    assert figures.chains == len(lines) == 2
    assert figures.lives > figures.chains
    assert figures.killed_all_ranks + figures.killed_one_rank >= figures.lives - figures.chains
    tail = figures.kept - 2 * cluster.NUM_EPOCHS * 301
    assert abs(tail) < 2 * cluster.NUM_EPOCHS * 2 * max(cluster.BATCH_SIZES)


def drop_a_batch(lines: list[str]) -> None:
    del lines[-1]


def repeat_a_batch(lines: list[str]) -> None:
    lines[-1] = lines[-2]


def swap_two_samples(lines: list[str]) -> None:
    ids = json.loads(lines[-1])["ids"]
    ids[0], ids[1] = ids[1], ids[0]
    lines[-1] = json.dumps({"ids": ids})


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> list[cluster.Life]:
    """The two lives of one run, with their logs: one is killed in its fifth step, the other goes on to the end."""
    folder = tmp_path_factory.mktemp("chain")
    url = cluster.write_dataset(folder, 301)
    rng = random.Random(4)
    figures = cluster.Figures()
    lives: list[cluster.Life] = []
    for kill in (cluster.Kill(5, 0, 0.0, is_single=False), None):
        life = cluster.next_life(url, folder, len(lives), lives[-1] if lives else None, rng, 2)
        is_over, processes = cluster.live(life, kill, rng, figures)
        assert is_over is (kill is None), cluster.complaints(folder)
        assert processes.end() == 0
        lives.append(life)
    assert figures.faults == 0
    return lives


def test_the_check_is_content_with_the_truth(chain: list[cluster.Life]) -> None:
    """The logs of a run that went well have no faults."""
    figures = cluster.Figures()
    cluster.check_chain(chain, figures)
    assert figures.faults == 0


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (drop_a_batch, ("lost",)),
        (repeat_a_batch, ("lost", "repeated", "out_of_order")),
        (swap_two_samples, ("out_of_order",)),
    ],
)
def test_the_check_finds_what_is_wrong(
    chain: list[cluster.Life], damage: Callable[[list[str]], None], found: tuple[str, ...]
) -> None:
    """A batch that is missing, one that came twice, and two samples in each other's places are all noticed."""
    log = chain[-1].log(0)
    truth = log.read_text()
    lines = truth.splitlines()
    damage(lines)
    log.write_text("\n".join([*lines, ""]))
    try:
        figures = cluster.Figures()
        cluster.check_chain(chain, figures)
    finally:
        log.write_text(truth)
    assert all(getattr(figures, name) > 0 for name in found), figures.table()
