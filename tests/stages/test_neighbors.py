"""Neighbors as a field: who they are, what they look like, and that nothing leaks."""

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nqf import Recommender
from nqf.data.interactions import Interactions
from nqf.evaluation.baselines import known_events
from nqf.evaluation.cooccurrence import Counting, count_pairs
from nqf.stages.neighbors import COUNT, find_neighbors, neighbor_features
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


def test_features_are_means_and_zero_without_neighbors() -> None:
    features = np.random.default_rng(0).normal(size=(ITEMS, 6)).astype(np.float16)
    neighbors, weights = find_neighbors(interactions([[0, 1, 2], [3, 1], [0, 1]]), np.ones(7, bool), ITEMS)
    means = neighbor_features(features, neighbors, weights)
    assert means.dtype == np.float16
    for item in range(4):
        expected = (weights[item][:, None] * features[np.maximum(neighbors[item], 0)].astype(np.float32)).sum(axis=0)
        np.testing.assert_allclose(means[item], expected, atol=2e-3)
    assert means[:4].any(axis=1).all() and not means[4:].any()


def test_what_is_to_be_predicted_is_no_neighbor(tiny_run: Path) -> None:
    run = open_run(tiny_run)
    split, events = run.dataset.split, run.dataset.interactions
    items, tokens = len(split.cold), run.folder / "tokens"
    # A model that is tried knows what happened before, as counts do; one that is trained or chosen does not.
    known = split.train.copy()
    known[split.valid.cuts[~split.cold[events.items[split.valid.cuts]]]] = True
    found = []
    for before, counted in ((None, split.train), (split.valid, split.train), (split.test, known)):
        users = zip(events.offsets, events.offsets[1:], strict=False)
        alone = interactions([events.items[a:b][counted[a:b]].tolist() for a, b in users])
        alone = Interactions(**{**vars(alone), "times": events.times[counted]})
        neighbors, weights = find_neighbors(alone, np.ones(len(alone.items), bool), items)
        tables = run.tables(tokens, before=before)
        np.testing.assert_array_equal(tables.neighbors, neighbor_features(tables.fields, neighbors, weights))
        assert (neighbors[split.cold] < 0).all()
        found.append(tables.neighbors)
    assert not known[split.test.cuts].any() and (found[2] != found[0]).any()
    np.testing.assert_array_equal(found[0], found[1])


def test_new_items_have_none_and_known_ones_keep_theirs(tiny_run: Path) -> None:
    rec = Recommender.load(tiny_run)
    dataset = open_run(tiny_run).dataset
    counted = known_events(dataset.interactions, dataset.split, dataset.split.test)
    known = rec.items(rec.item_ids[:70])
    own = find_neighbors(dataset.interactions, counted, len(dataset.split.cold))[0][:, 0] >= 0
    titles = zip(known["title"], known["price"], strict=True)
    rec.add_items(
        [{"item_id": f"new-{row}", "title": title, "price": price} for row, (title, price) in enumerate(titles)]
    )
    stock = rec._stock
    tables = stock.take(np.arange(len(own), len(own) + 70))
    assert tables.neighbors.shape[1] == stock.known.neighbors.shape[1] > 0 and not tables.neighbors.any()
    assert stock.known.neighbors[own].any(axis=1).all() and not stock.known.neighbors[~own].any()
    row = int(np.flatnonzero(own)[0])
    rec.update_items([{"item_id": rec.item_ids[row], "title": "Another title"}])
    np.testing.assert_array_equal(rec._stock.take(np.array([row])).neighbors[0], stock.known.neighbors[row])
