"""Order, ties and storage of interactions."""

import itertools
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nqf.data.errors import DataError
from nqf.data.interactions import MISSING_TIME, Interactions, from_frame, load_interactions

EVENTS = st.lists(
    st.tuples(st.sampled_from("abcd"), st.integers(0, 9), st.none() | st.integers(0, 5), st.none() | st.floats(0, 5)),
    min_size=1,
    max_size=40,
)


def frame_of(events: list[tuple]) -> pl.DataFrame:
    return pl.DataFrame(
        events,
        orient="row",
        schema={"user_id": pl.String, "item": pl.Int32, "timestamp": pl.Int64, "rating": pl.Float32},
    )


def events_of(interactions: Interactions, user: str) -> list[tuple[int, int]]:
    row = interactions.user_row(user)
    span = slice(interactions.offsets[row], interactions.offsets[row + 1])
    return list(zip(interactions.items[span].tolist(), interactions.times[span].tolist(), strict=True))


@settings(deadline=None)
@given(EVENTS)
def test_order_is_time_then_source(events: list[tuple]) -> None:
    interactions = from_frame(frame_of(events))
    assert interactions.user_ids == list(dict.fromkeys(user for user, *_ in events))
    for user in interactions.user_ids:
        mine, latest = [], MISSING_TIME
        for name, item, time, _ in events:
            if name == user:
                latest = latest if time is None else time
                mine.append((latest, item, MISSING_TIME if time is None else time))
        assert events_of(interactions, user) == [event[1:] for event in sorted(mine, key=lambda event: event[0])]


@settings(deadline=None)
@given(EVENTS)
def test_tied_share_counts_pairs(events: list[tuple]) -> None:
    interactions = from_frame(frame_of(events))
    pairs = tied = 0
    for user in interactions.user_ids:
        times = [time for _, time in events_of(interactions, user)]
        pairs += len(times) - 1
        tied += sum(left == right != MISSING_TIME for left, right in itertools.pairwise(times))
    assert interactions.tied_share == (tied / pairs if pairs else 0)


def test_storage_keeps_everything(tmp_path: Path) -> None:
    frame = frame_of([("b", 3, 7, 4.5), ("a", 1, None, None), ("b", 2, 5, None)])
    interactions = from_frame(frame.with_columns(review=pl.Series([None, "good", "bad"])))
    interactions.save(tmp_path / "interactions.parquet")
    loaded = load_interactions(tmp_path / "interactions.parquet")
    assert loaded.user_ids == ["b", "a"]
    for name in ("offsets", "items", "times", "ratings"):
        stored, original = getattr(loaded, name), getattr(interactions, name)
        np.testing.assert_array_equal(stored, original)
        assert stored.dtype == original.dtype
    assert loaded.reviews == interactions.reviews == ["bad", None, "good"]


def test_no_reviews_is_none() -> None:
    frame = frame_of([("a", 1, 0, 1.0)]).with_columns(review=pl.lit(None, dtype=pl.String))
    assert from_frame(frame).reviews is None


def test_unknown_user_gets_the_nearest_name() -> None:
    interactions = from_frame(frame_of([("anna", 1, 0, 1.0), ("bert", 1, 0, 1.0)]))
    assert interactions.user_row("bert") == 1
    with pytest.raises(DataError, match="unknown user 'ana'; did you mean 'anna'"):
        interactions.user_row("ana")
