"""The built-in catalogue: its bytes, its cold items, and that only content and sequence together predict it."""

import filecmp
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from nqf.config import ConfigError, DataConfig, SyntheticConfig
from nqf.data.lexicon import DEPARTMENTS, STYLES, TIERS
from nqf.data.load import prepare
from nqf.data.synthetic import TOPICS, World, draw_world, generate, next_topic

SMALL = SyntheticConfig(items=150, users=30, min_events=5, max_events=9)


@pytest.fixture(scope="module")
def world() -> World:
    return draw_world(SyntheticConfig(), seed=0)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        (tmp_path / name).mkdir()
        generate(SMALL, seed, tmp_path / name)
    names = files(tmp_path / "a")
    assert len(names) > 100
    assert names == files(tmp_path / "b")
    assert filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", names, shallow=False) == (names, [], [])
    for name in ("items.parquet", "interactions.parquet"):
        assert not filecmp.cmp(tmp_path / "a" / name, tmp_path / "c" / name, shallow=False)


def test_images_do_not_change_the_tables(tmp_path: Path) -> None:
    frames = []
    for images in (True, False):
        folder = tmp_path / str(images)
        folder.mkdir()
        generate(SyntheticConfig(items=150, users=30, images=images), 0, folder)
        frames.append(pl.read_parquet(folder / "items.parquet").select(pl.exclude("image")))
        assert ("image" in pl.read_parquet_schema(folder / "items.parquet")) == images
        assert ("image" in (folder / "schema.yaml").read_text()) == images
    assert frames[0].equals(frames[1])


def test_every_field_has_values_and_some_are_missing(tmp_path: Path) -> None:
    dataset = prepare(DataConfig(synthetic=SMALL), tmp_path / "data")
    missing = dataset.report["items"]["missing"]
    assert missing.pop("title") == 0
    assert set(missing) == {"description", "brand", "categories", "price", "released", "image"}
    # A tenth of 150, five standard deviations wide.
    assert all(0 < count < 34 for count in missing.values())
    assert not dataset.report["items"]["bad_values"]
    assert dataset.interactions.reviews is not None
    assert set(np.unique(dataset.interactions.ratings)) <= {2.0, 3.0, 4.0, 5.0}


def test_unseen_items_are_targets_and_nothing_else(world: World) -> None:
    assert world.unseen.sum() == 300
    for history in world.histories:
        assert len(set(history)) == len(history)
        assert not world.unseen[history[:-2]].any()
    for place in (-1, -2):
        assert sum(world.unseen[history[place]] for history in world.histories) >= 300


def test_users_keep_style_and_tier_and_follow_the_rule(world: World) -> None:
    kept = {"style": [], "tier": [], "topic": []}
    for user, history in enumerate(world.histories):
        kept["style"].append(np.mean(world.styles[history] == world.user_styles[user]))
        kept["tier"].append(np.mean(world.tiers[history] == world.user_tiers[user]))
        kept["topic"] += [
            next_topic(world, history[:end]) == world.topics[history[end]] for end in range(1, len(history))
        ]
    # What is drawn instead of the user's own style or tier may be the same.
    assert np.mean(kept["style"]) == pytest.approx(0.92 + 0.08 / len(STYLES), abs=0.01)
    assert np.mean(kept["tier"]) == pytest.approx(0.92 + 0.08 / len(TIERS), abs=0.01)
    assert np.mean(kept["topic"]) == pytest.approx(0.92, abs=0.01)


def hit_rate(scores: np.ndarray, histories: list[list[int]]) -> float:
    """HR@10 of the last items, everything before masked."""
    ranks = []
    for row, history in zip(scores, histories, strict=True):
        row = row.astype(np.float64)
        row[history[:-1]] = -np.inf
        target = row[history[-1]]
        ranks.append(1 + np.sum(row > target) + 0.5 * (np.sum(row == target) - 1))
    return float(np.mean(np.array(ranks) <= 10))


def knowing(world: World, topics: np.ndarray, *, taste: bool = True) -> np.ndarray:
    """Scores of one who knows which topic comes next, and the tastes of the users."""
    users = range(len(topics))
    own = (world.styles == world.user_styles[users, None]) + 0.0 + (world.tiers == world.user_tiers[users, None])
    return 3.0 * (world.topics == topics[:, None]) + taste * own + 0.1 * np.log(world.popularity)


def test_only_content_and_sequence_together_predict(world: World) -> None:
    histories = world.histories[:1000]
    topics = np.array([next_topic(world, history[:-1]) for history in histories])
    assert hit_rate(knowing(world, topics), histories) > 0.75
    assert hit_rate(knowing(world, topics, taste=False), histories) < 0.15
    assert hit_rate(knowing(world, np.full(len(histories), -1)), histories) < 0.1
    # The last topic alone names the right one of its successors only now and then.
    followers = np.zeros((len(TOPICS), len(TOPICS)))
    for history in world.histories:
        np.add.at(followers, (world.topics[history[:-2]], world.topics[history[1:-1]]), 1)
    likeliest = followers.argmax(axis=1)[world.topics[[history[-2] for history in histories]]]
    assert hit_rate(knowing(world, likeliest), histories) < 0.5
    popularity = np.bincount(np.concatenate([history[:-1] for history in world.histories]), minlength=3000)
    assert hit_rate(np.tile(popularity, (len(histories), 1)), histories) < 0.05


def test_no_noun_belongs_to_two_topics() -> None:
    nouns = [noun for department, topic in TOPICS for noun in DEPARTMENTS[department][topic][0]]
    assert len(nouns) == len(set(nouns)) == 5 * len(TOPICS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"items": 30}, "items: 30 are too few .* at least 40"),
        ({"users": 0}, "users: expected a whole number from 1"),
        ({"min_events": 2}, "min_events: expected a whole number from 3"),
        ({"min_events": 30}, "min_events: 30 is above max_events, 20"),
        ({"unseen_share": 0.6}, "unseen_share: expected a number from 0 to 0.5"),
        ({"missing_share": 1.0}, "missing_share: expected a number from 0, below 1"),
    ],
)
def test_impossible_sizes_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SyntheticConfig(**options)
