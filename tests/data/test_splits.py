"""Splits against their definitions."""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nqf.data.errors import DataError
from nqf.data.interactions import MISSING_TIME, Interactions, from_frame
from nqf.data.splits import Split, leave_one_out, load_split, temporal

ITEMS = 12


def random_interactions(seed: int, *, users: int = 15, longest: int = 9, timed: bool = True) -> Interactions:
    rng = np.random.default_rng(seed)
    rows = [
        (f"u{user}", int(rng.integers(ITEMS)), int(rng.integers(200)) if timed else None, None)
        for user in range(users)
        for _ in range(rng.integers(1, longest + 1))
    ]
    schema = {"user_id": pl.String, "item": pl.Int32, "timestamp": pl.Int64, "rating": pl.Float32}
    return from_frame(pl.DataFrame(rows, orient="row", schema=schema))


@settings(deadline=None)
@given(st.integers(0, 1000))
def test_leave_one_out(seed: int) -> None:
    interactions = random_interactions(seed)
    split = leave_one_out(interactions, items=ITEMS)
    held_out, users = set(), []
    for user, (start, end) in enumerate(zip(interactions.offsets, interactions.offsets[1:], strict=False)):
        if end - start >= 3:
            users.append(user)
            held_out |= {int(end) - 1, int(end) - 2}
    assert split.valid.users.tolist() == split.test.users.tolist() == users
    np.testing.assert_array_equal(split.test.cuts, interactions.offsets[1:][users] - 1)
    np.testing.assert_array_equal(split.valid.cuts, split.test.cuts - 1)
    assert set(np.flatnonzero(~split.train).tolist()) == held_out
    assert set(np.flatnonzero(~split.cold)) == set(interactions.items[split.train])


@pytest.mark.parametrize("split", [leave_one_out, functools.partial(temporal, valid_share=0.2, test_share=0.2)])
@pytest.mark.parametrize("cold_share", [0.0, 0.3])
def test_a_refit_trains_on_all_that_comes_before_the_test(split: Callable[..., Split], cold_share: float) -> None:
    interactions = random_interactions(2)
    options = {"items": ITEMS, "cold_share": cold_share, "seed": 4}
    plain, refit = split(interactions, **options), split(interactions, refit=True, **options)
    added = np.flatnonzero(refit.train & ~plain.train)
    assert (plain.train <= refit.train).all()
    assert not refit.train[refit.test.cuts].any()
    assert not refit.removed[interactions.items[refit.train]].any()
    held_out = plain.valid.cuts[~plain.removed[interactions.items[plain.valid.cuts]]]
    if split is leave_one_out:
        np.testing.assert_array_equal(added, held_out)
    else:
        assert set(held_out) <= set(added)
        assert interactions.times[added].max() < interactions.times[refit.test.cuts].min()
    for cases in ("valid", "test"):
        np.testing.assert_array_equal(getattr(plain, cases).cuts, getattr(refit, cases).cuts)
    assert any("data.refit" in warning for warning in refit.warnings)


@settings(deadline=None)
@given(st.integers(0, 1000), st.floats(0.05, 0.3), st.floats(0.05, 0.3))
def test_temporal_never_looks_ahead(seed: int, valid_share: float, test_share: float) -> None:
    interactions = random_interactions(seed)
    split = temporal(interactions, items=ITEMS, valid_share=valid_share, test_share=test_share)
    times = interactions.times
    newest_training = times[split.train].max()
    valid, test = times[split.valid.cuts], times[split.test.cuts]
    assert newest_training < valid.min()
    assert valid.max() < test.min()
    assert (times[~split.train] > newest_training).all()
    # The share is kept as nearly as ties allow.
    cut = np.sort(times)[round(len(times) * (1 - test_share))]
    assert valid.max() < cut <= test.min()
    for cases, end in ((split.valid, cut), (split.test, np.inf)):
        assert len(set(cases.users.tolist())) == len(cases.users)
        np.testing.assert_array_equal(interactions.users[cases.cuts], cases.users)
        assert (cases.cuts > interactions.offsets[cases.users]).all()
        # No later event of the user lies in the same window.
        inside = cases.cuts + 1 < interactions.offsets[cases.users + 1]
        assert (times[cases.cuts[inside] + 1] >= end).all()


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_removed_items_are_in_no_training_event_but_in_histories(share: float) -> None:
    interactions = random_interactions(3)
    split = leave_one_out(interactions, items=ITEMS, cold_share=share, seed=5)
    assert split.removed.sum() == round(ITEMS * share)
    assert not split.removed[interactions.items[split.train]].any()
    assert split.cold[split.removed].all()
    whole = leave_one_out(interactions, items=ITEMS)
    np.testing.assert_array_equal(split.test.cuts, whole.test.cuts)
    np.testing.assert_array_equal(split.train, whole.train & ~split.removed[interactions.items])
    again = leave_one_out(interactions, items=ITEMS, cold_share=share, seed=5)
    np.testing.assert_array_equal(split.removed, again.removed)
    other = leave_one_out(interactions, items=ITEMS, cold_share=share, seed=6)
    assert (split.removed != other.removed).any()


def test_warnings_say_what_leaks_and_who_is_left_out() -> None:
    warnings = " ".join(leave_one_out(random_interactions(0), items=ITEMS).warnings)
    assert "leaks the future" in warnings
    assert "fewer than three interactions" in warnings
    untimed = random_interactions(0, timed=False)
    assert (untimed.times == MISSING_TIME).all()
    assert "leaks" not in " ".join(leave_one_out(untimed, items=ITEMS).warnings)


def test_an_event_without_a_time_is_split_with_the_one_before_it() -> None:
    times = [1, 2, None, 30, None, 40, None]
    rows = [("a", item, time, None) for item, time in enumerate(times)] + [("b", 9, 3, None), ("b", 8, 31, None)]
    rows += [("b", 7, 41, None)]
    schema = {"user_id": pl.String, "item": pl.Int32, "timestamp": pl.Int64, "rating": pl.Float32}
    interactions = from_frame(pl.DataFrame(rows, orient="row", schema=schema))
    split = temporal(interactions, items=ITEMS, valid_share=0.3, test_share=0.3)
    assert split.train.tolist() == [True, True, True, False, False, False, False, True, False, False]
    assert split.valid.cuts.tolist() == [4, 8]
    assert split.test.cuts.tolist() == [6, 9]


def test_empty_splits_are_refused() -> None:
    with pytest.raises(DataError, match="training split is empty"):
        leave_one_out(random_interactions(0), items=ITEMS, cold_share=1.0)
    with pytest.raises(DataError, match="validation split is empty"):
        leave_one_out(random_interactions(0, longest=2), items=ITEMS)
    with pytest.raises(DataError, match="validation split is empty"):
        temporal(random_interactions(0, longest=1), items=ITEMS, valid_share=0.2, test_share=0.2)
    with pytest.raises(DataError, match="needs timestamps"):
        temporal(random_interactions(0, timed=False), items=ITEMS, valid_share=0.1, test_share=0.1)


def test_storage_keeps_everything(tmp_path: Path) -> None:
    split = leave_one_out(random_interactions(1), items=ITEMS, cold_share=0.3)
    split.save(tmp_path / "split.npz")
    loaded = load_split(tmp_path / "split.npz")
    for name in ("train", "cold", "removed"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(split, name))
    for name in ("valid", "test"):
        np.testing.assert_array_equal(getattr(loaded, name).users, getattr(split, name).users)
        np.testing.assert_array_equal(getattr(loaded, name).cuts, getattr(split, name).cuts)
    assert loaded.warnings == split.warnings
