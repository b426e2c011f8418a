"""Interactions put in order piece by piece are those that are put in order at once."""

import tempfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nqf.config import DataConfig
from nqf.data import events
from nqf.data.errors import DataError
from nqf.data.interactions import MAPPED, SHORT, Interactions, load_interactions, open_interactions

ITEMS = pl.Series("item_id", [f"i{row}" for row in range(6)])
EVENTS = st.lists(
    st.tuples(
        st.sampled_from([None, "a", "b", "c", "d", "e"]),
        st.sampled_from([None, *ITEMS, "unknown"]),
        st.none() | st.integers(1_500_000_000, 1_500_000_005),
        st.none() | st.sampled_from([1.0, 2.5]),
        st.none() | st.sampled_from(["good", "a longer text of somebody who writes a lot"]),
    ),
    min_size=1,
    max_size=60,
)


def written(rows: list[tuple], folder: Path, config: DataConfig) -> dict:
    names = ("user_id", "item_id", "timestamp", "rating", "review")
    dtypes = (pl.String, pl.String, pl.Int64, pl.Float64, pl.String)
    table = pl.DataFrame(rows, orient="row", schema=dict(zip(names, dtypes, strict=True))).lazy()
    scratch = folder / "scratch"
    scratch.mkdir(parents=True)
    return events.write_interactions(
        table, ITEMS, config, folder=folder, scratch=scratch, where=("events.csv", "items.csv")
    )[1]


def lines(interactions: Interactions) -> tuple[list[str], list[tuple]]:
    with tempfile.TemporaryDirectory() as folder:
        interactions.save(Path(folder) / "x.parquet")
        return interactions.user_ids, pl.read_parquet(Path(folder) / "x.parquet").rows()


@settings(deadline=None, max_examples=25)
@given(
    EVENTS,
    st.sampled_from(["keep", "merge"]),
    st.integers(1, 3),
    st.booleans(),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 60),
)
def test_pieces_and_shares_change_nothing(rows, duplicates, least, shuffle, piece, share, share_bytes) -> None:
    config = DataConfig(
        duplicates=duplicates, min_interactions=least, shuffle_ties=shuffle, missing_ids="drop", unknown_items="drop"
    )
    outcomes = []
    for sizes in ((500_000, 2_000_000, 2**27), (piece, share, share_bytes)):
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            for name, size in zip(("_PIECE", "_SHARE", "_SHARE_BYTES"), sizes, strict=True):
                patch.setattr(events, name, size)
            try:
                report = written(rows, Path(folder), config)
            except DataError as error:
                outcomes.append(str(error))
                continue
            opened = open_interactions(Path(folder))
            # What is mapped is what the table says.
            whole = load_interactions(Path(folder) / "interactions.parquet")
            assert whole.user_ids == opened.user_ids
            for name in ("offsets", *MAPPED):
                np.testing.assert_array_equal(getattr(whole, name), getattr(opened, name))
                assert getattr(whole, name).dtype == getattr(opened, name).dtype
            short = Path(folder) / SHORT
            outcomes.append((report, lines(opened), lines(load_interactions(short)) if short.exists() else None))
    if shuffle and not isinstance(outcomes[0], str):
        # Each size draws its own order of ties; all else is the same.
        outcomes = [
            (report, opened[0], sorted(opened[1], key=str), short and (short[0], sorted(short[1], key=str)))
            for report, opened, short in outcomes
        ]
        outcomes[1][0]["warnings"] = outcomes[0][0]["warnings"]
    assert outcomes[0] == outcomes[1]


def test_users_stand_by_their_first_usable_event(tmp_path: Path) -> None:
    rows = [("a", "unknown", 5, None, None), ("b", "i1", 9, None, None), ("a", "i2", 1, None, None)]
    report = written(rows, tmp_path, DataConfig(unknown_items="drop", min_interactions=1))
    opened = open_interactions(tmp_path)
    assert opened.user_ids == ["b", "a"] and opened.items.tolist() == [1, 2]
    assert isinstance(opened.times, np.memmap) and report["unknown_items"] == 1


def test_a_folder_without_arrays_opens(tmp_path: Path) -> None:
    """As those of before version 0.3 are."""
    written([("a", "i1", 3, 1.0, "good"), ("a", "i2", 2, None, None)], tmp_path, DataConfig(min_interactions=1))
    mapped = lines(open_interactions(tmp_path))
    for path in tmp_path.glob("events-*"):
        path.unlink()
    assert lines(open_interactions(tmp_path)) == mapped


def test_reviews_are_read_as_a_list_is(tmp_path: Path) -> None:
    texts = ["one", None, "three", "four", None]
    rows = [("a", "i1", 1_500_000_000 + at, None, text) for at, text in enumerate(texts)]
    written(rows, tmp_path, DataConfig(min_interactions=1))
    stored = open_interactions(tmp_path).reviews
    assert stored == texts and list(stored) == texts and len(stored) == 5
    for at in (slice(1, 3), slice(None), slice(-2, None), slice(4, 1), slice(None, None, 2), slice(None, None, -1)):
        assert stored[at] == texts[at]
    assert [stored[at] for at in (0, 4, -1, -5)] == [texts[at] for at in (0, 4, -1, -5)]
    with pytest.raises(IndexError):
        stored[5]
