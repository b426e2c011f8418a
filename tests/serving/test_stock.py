"""The items of a recommender that change: every state stays what its changes made of it, and leaves nothing behind."""

import gc
import tracemalloc

import jax
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nqf.evaluation.ranking import best_columns, top_k
from nqf.pipelines.batches import ItemTables
from nqf.serving import stock as module
from nqf.serving.stock import Changed, Stock

WIDTH = 3


def tables_of(marks: np.ndarray) -> ItemTables:
    """Item tables that hold a number for each item."""
    wide = np.repeat(marks[:, None], WIDTH, axis=1).astype(np.float32)
    return ItemTables(
        tokens=np.repeat(wide[:, None], 2, axis=1).astype(np.float16),
        vectors=wide,
        fields=wide[:, :0],
        neighbors=wide[:, :0],
        text=wide,
        has_text=marks > 0,
        trained=marks > 0,
        titles=np.repeat(marks[:, None], 4, axis=1).astype(np.int32),
    )


def vectors_of(marks: np.ndarray) -> np.ndarray:
    # Few different values, so that there are ties.
    return np.stack([marks % 3, marks % 5, marks % 2], axis=1).astype(np.float32)


def new_stock(count: int) -> Stock:
    marks = np.arange(1, count + 1)
    return Stock.of([f"i{row}" for row in range(count)], [""] * count, tables_of(marks), vectors_of(marks))


def put(stock: Stock, ids: list[str], marks: np.ndarray) -> Stock:
    frame = pl.DataFrame({"item_id": ids, "title": [f"title {mark}" for mark in marks]})
    changed = [Changed(row={"mark": int(mark)}, encoded={}) for mark in marks]
    return stock.put(frame, changed, tables_of(marks), vectors_of(marks))


def check(stock: Stock, marks: list[int], gone: set[int]) -> None:
    """A state holds these marks and ranks by them."""
    assert stock.count == len(marks)
    rows, expected = np.arange(len(marks)), tables_of(np.array(marks))
    jax.tree.map(np.testing.assert_array_equal, stock.take(rows[::-1]), expected.take(rows[::-1]))
    np.testing.assert_array_equal(stock.vectors, vectors_of(np.array(marks)))
    assert set(np.flatnonzero(~stock.available)) == gone
    users, left_out = np.array([[1, 2, 3], [1, -1, 0]], np.float32), [np.array([0]), np.array([], np.int64)]
    for k in (2, 20):
        scores, found = stock.best(users, k, stock.available, left_out)
        removed = [np.append(out, sorted(gone)).astype(np.int64) for out in left_out]
        best, at = top_k(users, stock.vectors, k, removed)
        np.testing.assert_array_equal(found[:, : at.shape[1]], at)
        np.testing.assert_array_equal(scores[:, : at.shape[1]], best)
        assert (found[:, at.shape[1] :] == -1).all()


@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_every_state_is_what_its_changes_make_of_it(data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PIECE", 8)
        stock, marks, gone, next_mark = new_stock(6), list(range(1, 7)), set(), 100
        states = [(stock, list(marks), set(gone))]
        for _ in range(data.draw(st.integers(1, 8))):
            if data.draw(st.booleans()):
                old = data.draw(st.lists(st.integers(0, len(marks) - 1), unique=True, max_size=3))
                new = range(len(marks), len(marks) + data.draw(st.integers(0 if old else 1, 9)))
                rows = [*old, *new]
                added = np.arange(next_mark, next_mark + len(rows))
                next_mark += len(rows)
                marks = [*marks, *new]
                for row, mark in zip(rows, added.tolist(), strict=True):
                    marks[row] = mark
                stock, gone = put(stock, [f"i{row}" for row in rows], added), gone - set(rows)
            else:
                removed = data.draw(st.sets(st.integers(0, len(marks) - 1), max_size=3))
                stock, gone = stock.without(np.array(sorted(removed), np.int64)), gone | removed
            states.append((stock, list(marks), set(gone)))
            # Now, and once the states after it have been made.
            check(*states[data.draw(st.integers(0, len(states) - 1))])
        for state in states:
            check(*state)


def test_many_changes_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """One by one: no program more than for the first two items, nothing on the devices but a piece for every so many,
    and no memory for what was replaced."""
    monkeypatch.setattr(module, "_PIECE", 256)
    stock = new_stock(500)
    user = np.ones((1, WIDTH), np.float32)

    def live(number: int) -> None:
        nonlocal stock
        stock = put(stock, [f"new-{number}"], np.array([number + 1]))
        stock = put(stock, ["i3", "new-0"], np.array([number + 1, number + 2]))
        stock.best(user, 10, stock.available, [np.array([number])])

    for number in range(2):
        live(number)
    gc.collect()
    programs, arrays, lives = best_columns._cache_size(), len(jax.live_arrays()), 800
    for number in range(2, lives):
        live(number)
        if number == 300:
            gc.collect()
            tracemalloc.start()
    gc.collect()
    growth = tracemalloc.get_traced_memory()[0] / (lives - 300)
    tracemalloc.stop()
    assert best_columns._cache_size() == programs
    assert len(jax.live_arrays()) == arrays + 3
    # The rows of tables and vectors with their spare room (150 bytes), id, title and what was made of the item.
    assert growth < 2_000, growth
    assert len(stock.more.has_text) < 1.25 * (lives + 4) + 300


@given(st.dictionaries(st.integers(0, 5), st.integers(1, 30), max_size=6))
def test_every_history_is_in_one_batch_of_its_length_or_a_longer_one(counts: dict[int, int]) -> None:
    groups = {bucket: [bucket * 100 + at for at in range(count)] for bucket, count in counts.items()}
    made = list(module.together(groups))
    assert sorted(one for _, members in made for one in members) == sorted(
        one for members in groups.values() for one in members
    )
    assert [bucket for bucket, _ in made] == sorted({bucket for bucket, _ in made})
    assert all(one // 100 <= bucket for bucket, members in made for one in members)
    assert all(bucket in groups for bucket, _ in made)


def test_few_histories_of_many_lengths_are_one_batch() -> None:
    assert list(module.together({0: [1, 2, 3], 1: [4], 2: [5, 6, 7, 8]})) == [(2, [1, 2, 3, 4, 5, 6, 7, 8])]
    assert list(module.together({0: [1], 2: [2]})) == [(0, [1]), (2, [2])]
