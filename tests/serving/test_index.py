"""Approximate search: what is found is of the exact lists, and filters, changes and counts are exact with it."""

import dataclasses
import logging
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from starlette.testclient import TestClient

pytest.importorskip("faiss", reason="pip install 'nqf[index]'")

from nqf import Recommender
from nqf.config import ConfigError
from nqf.fields.encoder import unit_rows
from nqf.pipelines.batches import ItemTables
from nqf.serving import stock as module
from nqf.serving.app import make_app
from nqf.serving.index import Index, recall
from nqf.serving.service import Service
from nqf.serving.stock import Changed, Stock

ITEMS, WIDTH, USERS = 12_000, 24, 256


def clustered(rng: np.random.Generator, count: int, *, norms: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of topics, and the topics; norms are spread by a factor e to the power of `norms` times a normal."""
    centers = rng.normal(size=(60, WIDTH))
    topics = rng.integers(0, 60, count)
    vectors = unit_rows((centers[topics] + 0.5 * rng.normal(size=(count, WIDTH))).astype(np.float32))
    return vectors * np.exp(norms * rng.normal(size=(count, 1))).astype(np.float32), topics


def tables_of(count: int) -> ItemTables:
    nothing = np.zeros((count, 0), np.float32)
    return ItemTables(
        tokens=nothing[:, None],
        vectors=nothing,
        fields=nothing,
        neighbors=nothing,
        text=nothing,
        has_text=np.zeros(count, bool),
        trained=np.ones(count, bool),
        titles=nothing.astype(np.int32),
    )


def stock_of(vectors: np.ndarray) -> Stock:
    ids = [f"i{row}" for row in range(len(vectors))]
    return Stock.of(ids, [""] * len(ids), tables_of(len(ids)), vectors.astype(np.float32))


def put(stock: Stock, ids: list[str], vectors: np.ndarray) -> Stock:
    frame = pl.DataFrame({"item_id": ids, "title": [""] * len(ids)})
    return stock.put(frame, [Changed(row={}, encoded={})] * len(ids), tables_of(len(ids)), vectors)


def same(left: pl.DataFrame, right: pl.DataFrame, atol: float = 2e-6) -> None:
    """The same lists but for rounding: scores agree, and another item stands only where two have one score."""
    assert left.height == right.height
    np.testing.assert_allclose(left["score"], right["score"], atol=atol)
    for place in np.flatnonzero((left["item_id"] != right["item_id"]).to_numpy()):
        assert (np.abs(right["score"].to_numpy() - right["score"][int(place)]) < 2 * atol).sum() > 1


@dataclasses.dataclass(frozen=True)
class Case:
    exact: Stock
    indexed: Stock
    topics: np.ndarray
    users: np.ndarray
    seen: list[np.ndarray]


def case(norms: float = 0.0) -> Case:
    rng = np.random.default_rng(0)
    vectors, topics = clustered(rng, ITEMS, norms=norms)
    near = unit_rows(vectors[rng.integers(0, ITEMS, 2 * USERS)] + 0.3 * unit_rows(rng.normal(size=(2 * USERS, WIDTH))))
    seen = [rng.integers(0, ITEMS, rng.integers(0, 40)) for _ in near]
    exact = stock_of(vectors)
    return Case(exact, exact.indexed(near[:USERS], seen[:USERS]), topics, near[USERS:], seen[USERS:])


@pytest.fixture(scope="module")
def made() -> Case:
    return case()


def compared(made: Case, allowed: np.ndarray, k: int = 10) -> float:
    """Recall of the exact lists; what may not be recommended is in no list, and each is full if it can be."""
    scores, rows = made.indexed.best(made.users, k, allowed, made.seen)
    best, at = made.exact.best(made.users, k, allowed, made.seen)
    for own, out in zip(rows, made.seen, strict=True):
        own = own[own >= 0]
        assert allowed[own].all() and not set(own) & set(out) and len(set(own)) == len(own)
    np.testing.assert_array_equal(rows < 0, at < 0)
    np.testing.assert_array_equal(scores > -np.inf, rows >= 0)
    products = np.einsum("nkd,nd->nk", made.exact.vectors[np.maximum(rows, 0)], made.users)
    np.testing.assert_allclose(scores[rows >= 0], products[rows >= 0], atol=1e-5)
    assert all((np.diff(own[own > -np.inf]) <= 0).all() for own in scores)
    return recall(scores, best)


@pytest.mark.parametrize("norms", [0.0, 1.0])
def test_most_of_the_exact_lists_is_found_whatever_the_norms(norms: float, made: Case) -> None:
    found = made if not norms else case(norms)
    index = found.indexed.index
    assert index is not None and index.recall >= 0.95 and index.probes[10] < len(index.centers)
    assert index.held == index.count == ITEMS and index.list_of.min() >= 0
    for k in (1, 10, 100):
        assert compared(found, found.exact.available, k) >= 0.95


@pytest.mark.parametrize("k", [1, 10, 100, 101, 300])
@pytest.mark.parametrize("name", ["most", "half", "some", "few", "one topic", "no near ones", "five", "none"])
def test_filters_leave_full_lists_and_nothing_masked(made: Case, name: str, k: int) -> None:
    rng = np.random.default_rng(1)
    if name == "no near ones":
        # All that stands near any of the users is filtered out, so that what its lists hold is of no use.
        allowed = made.exact.available.copy()
        allowed[made.exact.best(made.users, 100, allowed, made.seen)[1].ravel()] = False
    elif name == "one topic":
        allowed = np.isin(made.topics, np.arange(28))
    else:
        share = {"most": 0.97, "half": 0.5, "some": 0.37, "few": 0.02, "five": 5 / ITEMS, "none": 0}[name]
        allowed = np.zeros(ITEMS, bool)
        allowed[rng.permutation(ITEMS)[: round(share * ITEMS)]] = True
    assert compared(made, allowed, k) >= 0.95


def test_the_index_is_asked_where_many_are_allowed(made: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = made.topics < 30
    monkeypatch.setattr(Stock, "_exact", lambda *arguments: pytest.fail("compared all"))
    scores, rows = made.indexed.best(made.users, 10, allowed, made.seen)
    assert (rows >= 0).all() and allowed[rows].all() and np.isfinite(scores).all()


def test_who_has_seen_most_of_the_items_gets_the_others(made: Case) -> None:
    rng = np.random.default_rng(2)
    seen = [rng.permutation(ITEMS)[:size] for size in (ITEMS, ITEMS - 4, ITEMS // 2, 300, 256, 0)]
    rows = made.indexed.best(made.users[:6], 10, made.exact.available, seen)[1]
    at = made.exact.best(made.users[:6], 10, made.exact.available, seen)[1]
    np.testing.assert_array_equal((rows >= 0).sum(axis=1), [0, 4, 10, 10, 10, 10])
    np.testing.assert_array_equal(rows[:2], at[:2])
    assert not any(set(own) & set(out) for own, out in zip(rows, seen, strict=True))


def test_what_changes_is_found_at_once(made: Case) -> None:
    """Items that are added or updated later stand where they belong, one by one and in numbers."""
    # A fresh pair: ids of later states are known to all of one catalogue.
    exact = stock_of(made.exact.vectors)
    indexed = dataclasses.replace(stock_of(made.exact.vectors), index=made.indexed.index)
    # Beside each of some users an item of their own direction, which is the best for them.
    target = 1.2 * made.users[:5]
    for ids in ([f"new-{user}" for user in range(5)], [f"i{row}" for row in range(100, 105)]):
        changed, plain = (put(stock, ids, target) for stock in (indexed, exact))
        rows, at = (stock.best(made.users[:5], 3, stock.available, made.seen[:5])[1] for stock in (changed, plain))
        np.testing.assert_array_equal(rows[:, 0], [changed.row_of(item_id) for item_id in ids])
        np.testing.assert_array_equal(rows[:, 0], at[:, 0])
        # The state before knows nothing of it.
        assert len(indexed.behind) == 0 and len(changed.behind) == 5
        # What was removed is gone, and what a vector no longer says is not found by it.
        gone = changed.without(np.array([changed.row_of(ids[0])]))
        assert gone.best(made.users[:1], 3, gone.available, [made.seen[0]])[1][0, 0] != rows[0, 0]
        masked = changed.available.copy()
        masked[changed.row_of(ids[1])] = False
        assert changed.row_of(ids[1]) not in changed.best(made.users[1:2], 3, masked, [made.seen[1]])[1]
    best = exact.best(made.users[:1], 1, exact.available, [made.seen[0]])[1].item()
    moved = put(indexed, [f"i{best}"], -made.users[:1])
    assert best not in moved.best(made.users[:1], 50, moved.available, [made.seen[0]])[1]


def test_many_changes_are_compared_one_by_one_and_then_all(made: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_COMPARED", 0)
    monkeypatch.setattr(Stock, "_exact", lambda *arguments: ("all", "all"))
    stock, room = dataclasses.replace(stock_of(made.exact.vectors), index=made.indexed.index), ITEMS // 16
    vectors = made.exact.vectors[:room]
    stock = put(stock, [f"i{row}" for row in range(room)], vectors)
    assert stock.best(made.users[:2], 10, stock.available, made.seen[:2])[1].shape == (2, 10)
    stock = put(stock, [f"new-{row}" for row in range(room)], vectors)
    assert stock.best(made.users[:2], 10, stock.available, made.seen[:2]) == ("all", "all")


def test_removed_items_are_not_held_and_come_back(made: Case) -> None:
    out = np.arange(0, ITEMS, 7)
    removed = made.exact.without(out)
    indexed = removed.indexed(made.users, made.seen)
    assert indexed.index is not None and indexed.index.held == ITEMS - len(out) and indexed.index.recall >= 0.95
    assert removed.available[indexed.best(made.users, 10, removed.available, made.seen)[1]].all()
    back = put(indexed, ["i0"], 2 * made.users[:1])
    assert back.best(made.users[:1], 1, back.available, [np.zeros(0, np.int64)])[1].item() == 0


def test_ties_go_to_the_lower_row() -> None:
    vectors = np.repeat(unit_rows(np.random.default_rng(0).normal(size=(600, 8))), 10, axis=0)
    stock = stock_of(vectors)
    users = vectors[::10][:USERS]
    indexed = stock.indexed(users, [np.zeros(0, np.int64)] * len(users))
    rows = indexed.best(users[:20], 5, stock.available, [np.zeros(0, np.int64)] * 20)[1]
    np.testing.assert_array_equal(rows, 10 * np.arange(20)[:, None] + np.arange(5))


def test_vectors_that_are_not_finite_are_refused(made: Case) -> None:
    vectors = made.exact.vectors.copy()
    vectors[7, 3] = np.nan
    with pytest.raises(ValueError, match="item 7 is not finite"):
        stock_of(vectors).indexed(made.users, made.seen)


def test_recall_counts_scores() -> None:
    best = np.array([[3.0, 2.0, 1.0], [3.0, -np.inf, -np.inf], [-np.inf] * 3], np.float32)
    assert recall(best, best) == 1
    # Another item of the same score is as good; one that is worse is not.
    assert recall(np.array([[3, 1, 0.5], [3, 1, 0], [0, 0, 0]], np.float32), best) == 3 / 4
    assert np.isclose(recall(np.array([[3, 2, 1 - 1e-7], [2, 0, 0], [0, 0, 0]], np.float32), best), 3 / 4)


@pytest.mark.slow
class TestRecommender:
    """With few items, all of which an index is made to hold and to search."""

    @pytest.fixture(autouse=True)
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "_COMPARED", 0)

    @pytest.fixture
    def indexed(self, tiny_run: Path, asked: None) -> Recommender:
        return Recommender.load(tiny_run, index="approximate")

    def test_it_says_so(self, tiny_run: Path, indexed: Recommender) -> None:
        facts = indexed.search
        assert facts["kind"] == "approximate" and facts["recall@10"] >= 0.95 and facts["items"] == 240
        assert f"search approximate, recall@10 {facts['recall@10']:.3f}" in repr(indexed)
        exact = Recommender.load(tiny_run)
        assert exact.search == {"kind": "exact"} and "approximate" not in repr(exact)
        indexed.add_items([{"item_id": "new", "title": "Walnut desk"}])
        assert indexed.search["behind"] == 1
        with pytest.raises(ConfigError, match="index 'hnsw': use 'exact' or 'approximate'"):
            Recommender.load(tiny_run, index="hnsw")  # type: ignore[arg-type]

    def test_lists_are_those_of_an_index_that_reads_all(self, tiny_run: Path, indexed: Recommender) -> None:
        """Counts, filters, fallbacks and profiles included; then nothing but rounding is different."""
        exact, index = Recommender.load(tiny_run), indexed._stock.index
        assert index is not None and exact.memory is not None and exact.score.cooccurrence
        everything = dataclasses.replace(index, probes=dict.fromkeys((10, 300), len(index.centers)))
        indexed._stock = dataclasses.replace(indexed._stock, index=everything)
        ids, users = exact.item_ids, exact.user_ids
        for rec in (exact, indexed):
            rec.add_items([{"item_id": "new", "title": "Walnut desk", "price": 3.0}])
            rec.update_items([{"item_id": ids[3], "title": "Else"}])
            rec.remove_items([ids[5]])
        for request in (
            {"history": ids[:4], "k": 7},
            {"history": ["new", ids[0]], "k": 50},
            {"user": users[0], "k": 300},
            {"users": users[:70], "k": 5},
            {"histories": [ids[:3], [], ids[7:30]], "k": 9, "where": {"price": (10, 40)}},
            {"history": ids[:2], "k": 20, "exclude": ids[20:90]},
            {"history": ids[:2], "k": 4, "only": ["new", *ids[40:44]]},
            {"history": ids[:9], "k": 9, "only": ids[:9], "repeats": True},
        ):
            same(indexed.recommend(**request), exact.recommend(**request))
        same(indexed.profile(text=exact.titles[0], k=8), exact.profile(text=exact.titles[0], k=8))
        assert indexed.similar_items(ids[7], k=5).equals(exact.similar_items(ids[7], k=5))
        assert indexed.explain(ids[:3], ids[9]).rank == exact.explain(ids[:3], ids[9]).rank
        ranks = [rec.rank([ids[:3]], [ids[9]], left_out=[[]]) for rec in (indexed, exact)]
        np.testing.assert_array_equal(*ranks)

    def test_counts_raise_what_the_index_did_not_find(self, tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """An index that finds nothing but the worst: what is counted still stands where it belongs."""
        indexed, exact = Recommender.load(tiny_run, index="approximate"), Recommender.load(tiny_run)
        histories = [exact.item_ids[start : start + 6] for start in range(0, 60, 6)]

        def worst(self: Index, users: np.ndarray, k: int, wanted: int, allowed: np.ndarray) -> np.ndarray:
            return np.argsort(np.where(allowed, users @ exact.item_vectors.T, np.inf), axis=1)[:, :wanted]

        monkeypatch.setattr(Index, "search", worst)
        stock = exact._stock
        for asked in (histories, histories[:1]):
            found = indexed.recommend(histories=asked, k=10)
            best = exact.recommend(histories=asked, k=240)
            for number, history in enumerate(asked):
                rows = np.array([stock.row_of(item_id) for item_id in history])
                counted = exact._counted(stock, exact.memory).raises(rows)[0]
                among = [exact.item_ids[row] for row in counted]
                assert len(among) > 10
                whole = best.filter(pl.col("item_id").is_in(among), history=number).head(10)
                # Those with counts are all there are among the best: the others are the worst.
                same(found.filter(history=number).drop("rank"), whole.drop("rank"))

    def test_a_poor_index_is_not_used(
        self, tiny_run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def poor(self: Index, users: np.ndarray, k: int, wanted: int, allowed: np.ndarray) -> np.ndarray:
            return np.resize(np.flatnonzero(allowed)[-wanted:], (len(users), wanted))

        monkeypatch.setattr(Index, "search", poor)
        with caplog.at_level(logging.WARNING, "nqf"):
            rec = Recommender.load(tiny_run, index="approximate")
        assert rec.search == {"kind": "exact"} and "all items are compared" in caplog.text

    def test_without_the_library(self, tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "faiss", None)
        with pytest.raises(RuntimeError, match=r"faiss is not installed; pip install 'nqf\[index\]'"):
            Recommender.load(tiny_run, index="approximate")

    def test_the_service_says_so(self, tiny_run: Path) -> None:
        service = Service(tiny_run, index="approximate")
        with TestClient(make_app(service)) as client:
            assert client.get("/health").json()["search"] == service.recommender.search
            body = {"history": service.recommender.item_ids[:3], "k": 5}
            assert len(client.post("/v1/recommend", json=body).json()["items"]) == 5
