"""Customers with too few events to be trained on are served, and change nothing of what is trained."""

import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from nqf import Recommender
from nqf.config import DataConfig
from nqf.data.load import open_short_users, prepare

EVENTS = [
    # user, item, time, rating, review
    *[(user, item, 10 * at, 4.0, "fine") for user in ("ana", "bert", "carl") for at, item in enumerate("abcd")],
    ("short", "b", 7, 1.0, "dreadful"),
    ("short", "a", 5, None, None),
    ("twice", "c", 3, 5.0, "lovely"),
]


def tables(folder: Path, events: list) -> DataConfig:
    folder.mkdir()
    pl.DataFrame({"item_id": list("abcdef"), "title": [f"thing {name}" for name in "abcdef"]}).write_csv(
        folder / "items.csv"
    )
    columns = ["user_id", "item_id", "timestamp", "rating", "review"]
    pl.DataFrame(events, schema=columns, orient="row").write_parquet(folder / "events.parquet")
    (folder / "schema.yaml").write_text("title: title\nfields: {title: text}\n")
    return DataConfig(
        format="table",
        items=str(folder / "items.csv"),
        interactions=str(folder / "events.parquet"),
        schema=str(folder / "schema.yaml"),
    )


def test_short_users_are_kept_apart(tmp_path: Path) -> None:
    whole = prepare(tables(tmp_path / "whole", EVENTS), tmp_path / "a")
    short = open_short_users(tmp_path / "a")
    assert short is not None and short.user_ids == ["short", "twice"]
    assert short.items.tolist() == [0, 1, 2] and short.times.tolist() == [5, 7, 3]
    np.testing.assert_array_equal(short.ratings, [np.nan, 1, 5])
    assert short.reviews == [None, "dreadful", "lovely"]
    # Without them, everything that is trained on is the same, byte for byte.
    rest = prepare(tables(tmp_path / "rest", EVENTS[:-3]), tmp_path / "b")
    assert open_short_users(tmp_path / "b") is None
    assert whole.interactions.user_ids == rest.interactions.user_ids == ["ana", "bert", "carl"]
    for name in ("train", "cold", "removed"):
        np.testing.assert_array_equal(getattr(whole.split, name), getattr(rest.split, name))
    for name in ("valid", "test"):
        np.testing.assert_array_equal(getattr(whole.split, name).cuts, getattr(rest.split, name).cuts)
    for name in ("items.parquet", "interactions.parquet", "schema.yaml"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert any("they are served" in warning for warning in whole.report["warnings"])


@pytest.mark.slow
def test_short_users_are_served(tiny_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    before = Recommender.load(run)
    frame = pl.read_parquet(run / "data" / "interactions.parquet").head(2)
    frame = frame.with_columns(user_id=pl.lit("short"), timestamp=pl.Series([300, 200]))
    frame.write_parquet(run / "data" / "short.parquet")
    rec = Recommender.load(run)
    assert rec.user_ids == [*before.user_ids, "short"]
    found = rec.recommend(user="short", k=5)
    history = [rec.item_ids[row] for row in frame["item"][::-1]]
    extras = {"times": [200, 300], "ratings": frame["rating"][::-1].to_list()}
    if "review" in frame.columns:
        extras["reviews"] = frame["review"][::-1].to_list()
    given = rec.recommend(history=history, k=5, **extras)
    assert found.equals(given) and not set(history) & set(found["item_id"])
    everybody = pl.concat(rec.recommend_all(k=5))
    assert everybody.filter(user_id="short")["item_id"].to_list() == found["item_id"].to_list()
    mixed = rec.recommend(users=["short", before.user_ids[0]], k=5)
    assert mixed.filter(user_id="short")["item_id"].to_list() == found["item_id"].to_list()
    # Nobody else sees anything of them.
    first = before.user_ids[0]
    assert rec.recommend(user=first, k=9).equals(before.recommend(user=first, k=9))
    assert rec.recommend(history=[], k=9).equals(before.recommend(history=[], k=9))
