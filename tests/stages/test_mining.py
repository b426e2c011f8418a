"""Mined negatives: the best below the margin, never the user's own items, the same after an interruption."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from nqf.config import LossConfig, MiningConfig
from nqf.stages import mining
from nqf.stages.run import Run, open_run


@pytest.mark.parametrize("margin", [1.0, 0.9, 0.5])
def test_the_hardest_are_the_best_below_the_margin(margin: float) -> None:
    rng = np.random.default_rng(0)
    users, items = rng.normal(size=(3, 4, 5)).astype(np.float32), rng.normal(size=(20, 5)).astype(np.float32)
    targets, trained = rng.integers(0, 20, (3, 4)), np.arange(20) < 18
    seen = np.array([[1, 2, 20], [3, 20, 20], [4, 5, 6]])
    found = np.asarray(mining.hardest(users, items, targets, seen, trained, margin, 6))
    scores = users @ items.T
    for row in range(3):
        for place in range(4):
            score, target = scores[row, place], targets[row, place]
            limit = score[target] - (1 - margin) * abs(score[target])
            kept = [
                item
                for item in np.argsort(-score)
                if trained[item] and item not in seen[row] and item != target and score[item] <= limit
            ][:6]
            np.testing.assert_array_equal(found[row, place], kept + [-1] * (6 - len(kept)))


def test_more_than_there_are_is_padded() -> None:
    found = mining.hardest(
        np.ones((1, 1, 2), np.float32),
        np.eye(3, 2, dtype=np.float32),
        np.array([[0]]),
        np.array([[3]]),
        np.ones(3, bool),
        1.0,
        5,
    )
    np.testing.assert_array_equal(found, [[[1, 2, -1, -1, -1]]])


@pytest.fixture(scope="module")
def run(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("mining") / "run"
    shutil.copytree(tiny_run, folder)
    run = open_run(folder)
    joint = dataclasses.replace(
        run.config.joint, mining=MiningConfig(count=4, margin=0.9), loss=LossConfig(negatives="sampled")
    )
    return dataclasses.replace(run, config=dataclasses.replace(run.config, joint=joint))


@pytest.mark.slow
def test_every_training_target_has_negatives_of_its_own(run: Run) -> None:
    mined = mining.mined_negatives(run)
    interactions, split = run.dataset.interactions, run.dataset.split
    first = np.zeros(len(interactions.items), bool)
    first[interactions.offsets[:-1]] = True
    assert np.all(mined[~split.train | first] == -1)
    assert (mined[split.train & ~first, 0] >= 0).mean() > 0.9
    for event in np.flatnonzero(split.train & ~first)[::7]:
        user = interactions.users[event]
        own = interactions.items[np.flatnonzero(split.train & (interactions.users == user))]
        kept = mined[event][mined[event] >= 0]
        assert not np.isin(kept, own).any() and not split.cold[kept].any() and len(set(kept)) == len(kept)


@pytest.mark.slow
def test_what_was_mined_is_kept_and_can_be_made_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    mined = np.array(mining.mined_negatives(run))
    np.testing.assert_array_equal(mining.mine(run), mined)
    monkeypatch.setattr(mining, "mine", None)
    np.testing.assert_array_equal(mining.mined_negatives(run), mined)
