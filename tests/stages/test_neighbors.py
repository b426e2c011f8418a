"""Neighbors as a field: who they are, what they look like, what an item without any has, and that nothing leaks."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nqf import Recommender
from nqf.data.interactions import Interactions
from nqf.evaluation.cooccurrence import Counting, count_pairs
from nqf.fields.encoder import unit_rows
from nqf.stages.neighbors import COUNT, features_by_text, find_neighbors, neighbor_features
from nqf.stages.run import open_run

ITEMS = 14


def interactions(sequences: list[list[int]]) -> Interactions:
    offsets = np.cumsum([0, *map(len, sequences)])
    return Interactions(
        user_ids=[str(user) for user in range(len(sequences))],
        offsets=offsets,
        items=np.concatenate([np.zeros(0, np.int32), *(np.asarray(some, np.int32) for some in sequences)]),
        times=np.arange(int(offsets[-1])),
        ratings=np.full(int(offsets[-1]), np.nan, np.float32),
        reviews=None,
    )


@given(st.lists(st.lists(st.integers(0, ITEMS - 2), min_size=1, max_size=16), min_size=1, max_size=8))
def test_neighbors_are_the_strongest_pairs_in_either_direction(sequences: list[list[int]]) -> None:
    events = interactions(sequences)
    counted = np.arange(len(events.items)) % 5 != 4
    neighbors, weights = find_neighbors(events, counted, ITEMS)
    pairs = count_pairs(events, counted, ITEMS, Counting()).pairs.toarray()
    both = pairs + pairs.T
    for item in range(ITEMS):
        order = sorted(np.flatnonzero(both[item]), key=lambda other: (-both[item, other], other))[:COUNT]
        found = neighbors[item][neighbors[item] >= 0]
        assert found.tolist() == order
        share = both[item, order] / max(both[item, order].sum(), 1e-12)
        np.testing.assert_allclose(weights[item, : len(order)], share, rtol=1e-5)
        assert not weights[item, len(order) :].any()


def test_means_and_stand_ins_by_text() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(ITEMS, 6)).astype(np.float16)
    text = unit_rows(rng.normal(size=(ITEMS, 4)).astype(np.float32))
    text[12] = 0
    neighbors, weights = find_neighbors(interactions([[0, 1, 2], [3, 1], [0, 1]]), np.ones(7, bool), ITEMS)
    means = neighbor_features(features, neighbors, weights, text)
    expected = (weights[1][:, None] * features[np.maximum(neighbors[1], 0)].astype(np.float32)).sum(axis=0)
    np.testing.assert_allclose(means[1], expected, atol=2e-3)
    # Four items have neighbors; those of a cold item are mixed by how near the texts are.
    cosine = text[9] @ text[:4].T
    share = np.exp(cosine / 0.05) / np.exp(cosine / 0.05).sum()
    np.testing.assert_allclose(means[9], share @ means[:4].astype(np.float32), atol=2e-3)
    assert not means[12].any(), "neither neighbors nor a text"
    nobody = neighbor_features(features, np.full((ITEMS, COUNT), -1, np.int32), np.zeros((ITEMS, COUNT)), text)
    assert not nobody.any()


def test_what_is_to_be_predicted_is_no_neighbor(tiny_run: Path) -> None:
    run = open_run(tiny_run)
    split, events = run.dataset.split, run.dataset.interactions
    items = len(split.cold)
    alone = interactions([events.items[a:b][split.train[a:b]].tolist() for a, b in zip(events.offsets, events.offsets[1:], strict=False)])  # fmt: skip # noqa: E501
    alone = Interactions(**{**vars(alone), "times": events.times[split.train]})
    neighbors, weights = find_neighbors(alone, np.ones(len(alone.items), bool), items)
    np.testing.assert_array_equal(run.neighbors[0], neighbors)
    np.testing.assert_array_equal(run.neighbors[1], weights)
    assert (run.neighbors[0][split.cold] < 0).all()


@pytest.mark.slow
def test_new_items_have_the_neighbors_of_like_texts_alone_and_among_others(tiny_run: Path) -> None:
    rec = Recommender.load(tiny_run)
    known = rec.items(rec.item_ids[:70])
    own = rec._run.neighbors[0][:, 0] >= 0
    new = [
        {"item_id": f"new-{row}", "title": title, "price": price}
        for row, (title, price) in enumerate(zip(known["title"], known["price"], strict=True))
    ]
    rec.add_items(new)
    stock = rec._stock
    tables = stock.take(np.arange(len(own), len(own) + len(new)))
    assert tables.neighbors.shape[1] == stock.known.neighbors.shape[1] > 0
    expected = features_by_text(unit_rows(tables.text), stock.known.neighbors, own, unit_rows(stock.known.text))
    np.testing.assert_allclose(tables.neighbors, expected, atol=2e-3)
    alone = Recommender.load(tiny_run)
    alone.add_items(new[5:6])
    np.testing.assert_array_equal(alone._stock.take(np.array([len(own)])).neighbors[0], tables.neighbors[5])
    # A known item keeps its own, whatever its text becomes; one without has those of its new text.
    for row in (int(np.flatnonzero(own)[0]), int(np.flatnonzero(~own)[0])):
        rec.update_items([{"item_id": rec.item_ids[row], "title": known["title"][row - 1]}])
        found = rec._stock.take(np.array([row])).neighbors[0]
        same = np.array_equal(found, stock.known.neighbors[row])
        assert same == bool(own[row])
