"""The Recommender from Python: requests, filters, fallbacks, items that change, many calls at once, a long life."""

import gc
import json
import shutil
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import nqf
from nqf import Recommender
from nqf.data.errors import DataError
from nqf.evaluation.ranking import best_columns, place_items, top_k
from nqf.serving import stock
from nqf.serving.stock import SIZES, sizes_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rec(tiny_run: Path) -> Recommender:
    return Recommender.load(tiny_run)


@pytest.fixture
def changing(tiny_run: Path) -> Recommender:
    return Recommender.load(tiny_run)


def everything(rec: Recommender, history: list[str]) -> pl.DataFrame:
    return rec.recommend(history=history, k=len(rec.item_ids))


def same(left: pl.DataFrame, right: pl.DataFrame, atol: float = 1e-6) -> None:
    """The same lists but for rounding: scores agree, and an item stands elsewhere only beside one of its own score."""
    assert left.height == right.height
    np.testing.assert_allclose(left["score"], right["score"], atol=atol)
    for (here, score), (there, _) in zip(
        left["item_id", "score"].rows(), right["item_id", "score"].rows(), strict=True
    ):
        if here != there:
            assert abs(right.filter(item_id=here)["score"][0] - score) < 2 * atol


@pytest.mark.parametrize("k", [1, 7, 64, 65, 10_000])
def test_one_bare_history_is_answered_by_one_program_with_the_lists_of_the_others(
    rec: Recommender, monkeypatch: pytest.MonkeyPatch, k: int
) -> None:
    ids, kind = rec.item_ids, rec.items(rec.item_ids[:1])[rec.fields("category")[0]][0]
    some = {"only": ids[:50]}, {"exclude": ids[5:90]}, {"where": {rec.fields("category")[0]: kind}}, {"repeats": True}
    for length in (1, 3, 8, 9, 40, 200):
        history = [ids[place % len(ids)] for place in range(0, 7 * length, 7)]
        for options in ({}, *some):
            alone = rec.recommend(history=history, k=k, **options)
            with monkeypatch.context() as patch:
                patch.setattr(stock.Stock, "best_of_one", lambda *arguments: None)
                same(alone, rec.recommend(history=history, k=k, **options))


def test_a_run_that_is_loaded_again_compiles_nothing(tiny_run: Path) -> None:
    def use() -> pl.DataFrame:
        rec = Recommender.load(tiny_run)
        ids = rec.item_ids
        rec.add_items([{"item_id": "new", "title": "something new"}])
        rec.explain(ids[:3], ids[4])
        return pl.concat([rec.recommend(history=ids[:5], k=3), rec.recommend(histories=[ids[:5]] * 3, k=3)[:, 1:]])

    compiled: list[str] = []
    before = use()
    # jax keeps the listener as long as the process lives.
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    assert use().equals(before) and not compiled
    jax.jit(lambda x: x + 1)(1.0)
    assert compiled, "the listener hears what is compiled"


def test_a_request_alone_after_the_catalogue_has_changed(changing: Recommender) -> None:
    history = changing.item_ids[:5]
    before = changing.recommend(history=history, k=3)
    changing.remove_items(before["item_id"][:1].to_list())
    after = changing.recommend(history=history, k=2)
    assert after["item_id"].to_list() == before["item_id"][1:].to_list()
    changing.add_items([{"item_id": "new", "title": "something new"}])
    assert "new" in everything(changing, history)["item_id"].to_list()
    assert "new" in changing.recommend(history=["new", *history], k=10, repeats=True, only=["new"])["item_id"].to_list()


def test_batches_are_the_single_requests(rec: Recommender) -> None:
    histories = [rec.item_ids[start : start + 1 + start % 13] for start in range(70)] + [[]]
    batch = rec.recommend(histories=histories, k=7)
    assert batch.columns == ["history", "rank", "item_id", "title", "score", "basis"]
    for index in (0, 1, 12, 33, 69, 70):
        single = rec.recommend(history=histories[index], k=7)
        same(single, batch.filter(history=index))
        assert single.equals(rec.recommend(history=histories[index], k=7)), "the same request gives the same bits"
    users = rec.user_ids[:9]
    frame = rec.recommend(users=users, k=5)
    assert frame["user_id"].unique(maintain_order=True).to_list() == users
    same(rec.recommend(user=users[4], k=5), frame.filter(user_id=users[4]))
    everybody = pl.concat(rec.recommend_all(k=3))
    assert everybody.height == 3 * len(rec.user_ids)
    same(everybody.filter(user_id=users[4]), frame.filter(pl.col("rank") <= 3, user_id=users[4]))


def test_filters_are_exact(rec: Recommender, tiny_run: Path) -> None:
    items = pl.read_parquet(tiny_run / "data" / "items.parquet")
    history = rec.item_ids[:4]
    whole = everything(rec, history)
    brand = items["brand"].explode().drop_nulls()[0]
    having = items.filter(pl.col("brand").list.contains(brand))["item_id"].to_list()
    same(rec.recommend(history=history, k=200, where={"brand": brand}), whole.filter(pl.col("item_id").is_in(having)))
    cheap = items.filter(pl.col("price").is_between(10, 40))["item_id"].to_list()
    both = whole.filter(pl.col("item_id").is_in(list(set(cheap) & set(having))))
    same(rec.recommend(history=history, k=200, where={"brand": [brand], "price": (10, 40)}), both)
    only = rec.item_ids[50:60]
    same(rec.recommend(history=history, k=4, only=only), whole.filter(pl.col("item_id").is_in(only)).head(4))
    best = whole["item_id"].head(20).to_list()
    same(rec.recommend(history=history, k=5, exclude=[*best, "never heard of"]), whole.slice(20, 5))
    assert rec.recommend(history=history, k=5, only=[]).is_empty()
    # What the history holds is left out of what is allowed.
    assert rec.recommend(history=history, k=5, only=history).is_empty()
    assert set(rec.recommend(history=history, k=5, only=history, repeats=True)["item_id"]) == set(history)


@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_masked_top_k_is_that_of_what_is_left(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    users, items, k = rng.normal(size=(4, 3)), rng.normal(size=(200, 3)), 16
    users, items = users.astype(np.float32).round(1), items.astype(np.float32).round(1)
    allowed = rng.random(256) < data.draw(st.sampled_from([0.02, 0.5, 1.0]))
    allowed[200:] = False
    left_out = rng.integers(-1, 200, (4, 64)).astype(np.int32)
    scores, rows = map(np.asarray, best_columns(users, place_items(items), allowed, left_out, k=k))
    removed = np.flatnonzero(~allowed[:200])
    expected, at = top_k(users, items, k, [np.append(out[out >= 0], removed) for out in left_out])
    kept = at >= 0
    assert (np.isfinite(scores) == kept).all()
    np.testing.assert_allclose(scores[kept], expected[kept], rtol=1e-6)
    np.testing.assert_array_equal(rows[kept], at[kept])


def test_who_is_unknown_gets_what_is_said(rec: Recommender) -> None:
    interactions, split = rec._run.dataset.interactions, rec._run.dataset.split
    known = np.ones(len(interactions.items), bool)
    known[split.test.cuts] = False
    known[split.valid.cuts[split.cold[interactions.items[split.valid.cuts]]]] = False
    counts = np.bincount(interactions.items[known], minlength=240)
    expected = np.lexsort((np.arange(240), -counts))[:5]
    frame = rec.recommend(history=[], k=5)
    assert frame["item_id"].to_list() == [rec.item_ids[row] for row in expected]
    assert frame["basis"].to_list() == ["popular"] * 5
    np.testing.assert_allclose(frame["score"], counts[expected] / counts.sum(), rtol=1e-6)
    assert rec.recommend(user="nobody", fallback="popular", k=5).equals(frame)
    assert rec.recommend(history=[], k=5, exclude=[frame["item_id"][0]])["item_id"][0] == frame["item_id"][1]
    with pytest.raises(ValueError, match=r"unknown user: 'user-9'.*fallback='popular'"):
        rec.recommend(user="user-9")
    with pytest.raises(ValueError, match="the history is empty"):
        rec.recommend(history=[], fallback="refuse")
    assert rec.recommend(history=rec.item_ids[:1], k=1)["basis"].item() == "history"


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({}, "give either a history or a user"),
        ({"user": "a", "history": ["b"]}, "give either a history or a user"),
        ({"history": "item-00001"}, r"history: one text, 'item-00001'; give a list, such as \['item-00001'\]"),
        ({"histories": ["item-00001"]}, "histories: give a list of lists"),
        ({"history": [17]}, "history: 17 is a int; ids are texts, so write '17'"),
        ({"users": "user-00001"}, "users: one text"),
        ({"user": 3}, "user: 3 is a int"),
        ({"history": ["item-0001"]}, "unknown item ids in the history: 'item-0001'; did you mean 'item-0"),
        ({"history": ["item-00001"], "k": 0}, "k must be at least 1"),
        ({"history": ["item-00001"], "only": ["x"]}, "unknown item ids in only: 'x'"),
        ({"history": ["item-00001"], "exclude": "item-00002"}, "exclude: one text"),
        ({"history": ["item-00001"], "where": {"brnd": "x"}}, "unknown field 'brnd'; did you mean 'brand'"),
        ({"history": ["item-00001"], "where": {"brand": "x"}}, "no item has 'x' in brand"),
        ({"history": ["item-00001"], "where": {"price": "x"}}, "price is a number, but 'x' is a str"),
        ({"history": ["item-00001"], "where": {"image": "x"}}, "image is a image; filters are for"),
        ({"history": ["item-00001"], "fallback": "best"}, "fallback 'best': use 'popular'"),
        ({"history": ["item-00001"], "ratings": [1, 2]}, r"ratings: \[2\] values for histories of \[1\] items"),
        ({"history": ["item-00001"], "ratings": [1000]}, "ratings: 1000 to 1000, but this run was trained on"),
        ({"history": ["item-00001"], "times": ["soon"]}, "times: 'soon' cannot be read"),
        ({"user": "user-00001", "times": [1]}, "times: belongs to a bare history"),
    ],
)
def test_what_cannot_be_asked(rec: Recommender, request_: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rec.recommend(**request_)


def test_a_history_with_all_that_is_known_is_the_user(rec: Recommender) -> None:
    """A user's events given as a bare history with times, ratings and reviews are read as the user's own."""
    interactions, told = rec._run.dataset.interactions, []
    for user in range(6):
        span = slice(interactions.offsets[user], interactions.offsets[user + 1])
        history = [rec.item_ids[row] for row in interactions.items[span]]
        extras = {
            "times": interactions.times[span].tolist(),
            "ratings": [None if np.isnan(rating) else float(rating) for rating in interactions.ratings[span]],
            "reviews": interactions.reviews[span],
        }
        own = rec.recommend(user=rec.user_ids[user], k=20)
        same(rec.recommend(history=history, k=20, **extras), own, atol=2e-6)
        told.append(np.abs(rec.recommend(history=history, k=20)["score"] - own["score"]).max() > 1e-5)
        # Given in another order, times put them right.
        turned = {name: values[::-1] for name, values in extras.items()}
        if len(set(extras["times"])) == len(history):
            same(rec.recommend(history=history[::-1], k=20, **turned), own, atol=2e-6)
    assert any(told), "times, ratings and reviews change nothing"
    many = rec.recommend(histories=[rec.item_ids[:2], [], rec.item_ids[2:5]], ratings=[[5, 2], [], [None] * 3], k=3)
    same(many.filter(history=0), rec.recommend(history=rec.item_ids[:2], ratings=[5, 2], k=3))
    assert many["basis"].to_list() == ["history"] * 3 + ["popular"] * 3 + ["history"] * 3


def test_events_with_all_that_is_known_give_the_ranks_of_the_run(rec: Recommender, tiny_run: Path) -> None:
    events = rec.events()
    assert events.columns == ["user_id", "item_id", "timestamp", "rating", "review", "part"]
    split = rec._run.dataset.split
    assert (events["part"] == "train").sum() == split.train.sum()
    assert (events["part"] == "test").arg_true().to_list() == sorted(split.test.cuts.tolist())
    names = {"times": "timestamp", "ratings": "rating", "reviews": "review"}
    histories, targets, extras = [], [], {name: [] for name in names}
    for own in events.partition_by("user_id", maintain_order=True):
        if (cut := own["part"].index_of("test")) is not None:
            histories.append(own["item_id"][:cut].to_list())
            targets.append(own["item_id"][cut])
            for name, column in names.items():
                extras[name].append(own[column][:cut].to_list())
    ranks = rec.rank(histories, targets, left_out=histories, **extras)
    found = json.loads((tiny_run / "eval" / "results.json").read_text())["models"]["joint"]["all"]["mrr"][0]
    np.testing.assert_allclose((1 / ranks).mean(), found, rtol=1e-3)
    one = rec.encode_users(histories[:2], **{name: values[:2] for name, values in extras.items()})
    assert np.abs(one - rec.encode_users(histories[:2])).max() > 1e-6


def test_cards_show_what_is_given(changing: Recommender) -> None:
    changing.add_items([{"item_id": "new", "title": "Oak <b>"}])
    best = changing.recommend(history=changing.item_ids[:2], k=2)
    shown = nqf.cards(changing, {"Best": best, "Others": ["new"]}, marked=["new"])
    html = shown._repr_html_()
    assert repr(shown) == "<cards>" and "Oak &lt;b&gt;" in html and f"score {best['score'][0]:.2f}" in html
    with pytest.raises(ValueError, match="unknown item ids"):
        nqf.cards(changing, {"None": ["never heard of"]})


def test_similar_items_and_profiles(rec: Recommender) -> None:
    near = rec.similar_items(rec.item_ids[7], k=5)
    unit = rec.item_vectors / np.linalg.norm(rec.item_vectors, axis=1, keepdims=True)
    cosine = unit @ unit[7]
    cosine[7] = -2
    assert near["item_id"].to_list() == [rec.item_ids[row] for row in np.argsort(-cosine, kind="stable")[:5]]
    assert rec.item_ids[7] not in near["item_id"]
    title = rec.recommend(history=rec.item_ids[:1], k=1)["title"].item()
    assert rec.profile(text=title, k=4).height == 4
    rated = rec.profile(ratings={rec.item_ids[0]: 5, rec.item_ids[1]: 2}, k=4)
    same(rated, rec.recommend(history=rec.item_ids[:2], ratings=[5, 2], k=4))
    before = len(rec.item_ids)
    both = rec.profile(text=title, ratings={rec.item_ids[0]: 5}, k=4)
    assert not {rec.item_ids[0]} & set(both["item_id"]) and len(rec.item_ids) == before
    # The words are an item of that title: adding it for real is the same thing.
    with pytest.raises(ValueError, match="give a text"):
        rec.profile()
    with pytest.raises(ValueError, match="says anything to this run's encoders"):
        rec.profile(text="qqqq xxxx")


def test_a_profile_is_an_item_of_that_title(changing: Recommender) -> None:
    title = "Walnut desk lamp"
    spoken = changing.profile(text=title, k=10)
    changing.add_items([{"item_id": "spoken", "title": title}])
    same(spoken, changing.recommend(history=["spoken"], k=10))


def test_items_change_in_memory_and_on_disk(tiny_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    here, there = Recommender.load(run), Recommender.load(run)
    for rec, save in ((here, False), (there, True)):
        rec.add_items([{"item_id": "new", "title": "Walnut desk", "price": 3.0}], save=save)
        rec.update_items([{"item_id": "new", "price": 5.0}, {"item_id": rec.item_ids[3], "title": "Else"}], save=save)
        rec.remove_items([rec.item_ids[5]], save=save)
    assert "241 items (1 added, 1 removed)" in repr(here) and "stage joint" in repr(here)
    again = Recommender.load(run)
    for rec in (there, again):
        assert rec.item_ids == here.item_ids
        np.testing.assert_array_equal(rec.available, here.available)
        np.testing.assert_allclose(rec.item_vectors, here.item_vectors, atol=1e-6)
        assert rec.items(["new"]).equals(here.items(["new"]))
    assert here.items(["new"])["price"].item() == 5 and here.items(["new"])["title"].item() == "Walnut desk"
    assert here.recommend(history=here.item_ids[:2], k=3, where={"price": (5, 5)}, only=["new"]).height == 1
    for change, message in (
        (lambda: here.add_items([{"item_id": "x"}]), "none of the run's columns"),
        (lambda: here.add_items([{"item_id": "x", "titel": "a"}]), "a column 'titel'.*did you mean 'title'"),
        (lambda: here.update_items([{"item_id": "new", "titel": "a"}]), "a column 'titel'.*did you mean 'title'"),
        (lambda: here.update_items([{"item_id": "x", "title": "a"}]), "not in the catalogue or were removed"),
        (lambda: here.add_items([{"item_id": "new", "title": "a"}]), "in the catalogue already"),
        (lambda: here.remove_items([here.item_ids[5]]), "not in the catalogue or were removed"),
        (lambda: here.add_items([{"title": "a"}]), "no column 'item_id'"),
    ):
        with pytest.raises(DataError, match=message):
            change()
    here.add_items([{"item_id": here.item_ids[5], "title": "Back again"}])
    assert here.available.all() and len(here.item_ids) == 241


def test_saved_is_what_was_loaded(changing: Recommender, tmp_path: Path) -> None:
    changing.add_items([{"item_id": "new", "title": "Walnut desk", "price": 3.0}])
    changing.remove_items([changing.item_ids[5]])
    folder = changing.save(tmp_path / "shop")
    again = Recommender.load(folder)
    for request in ({"history": ["new", again.item_ids[0]]}, {"user": again.user_ids[0]}):
        assert again.recommend(**request, k=50).equals(changing.recommend(**request, k=50))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    before = sum(path.stat().st_size for path in changing._run.folder.rglob("*") if path.is_file())
    assert size < before and not (folder / "tensorboard").exists()
    with pytest.raises(ValueError, match="there already"):
        changing.save(folder)


def test_evaluate_is_that_of_the_command(tiny_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    frame = Recommender.load(run).evaluate(split="valid")
    assert {"model", "segment", "users", "ndcg@10"} <= set(frame.columns)
    assert {"joint", "popular"} <= set(frame["model"]) and (run / "eval" / "valid" / "results.json").is_file()


@pytest.mark.ci
def test_a_long_life(changing: Recommender, monkeypatch: pytest.MonkeyPatch) -> None:
    """Items added and updated one by one, and requests of varied length, compile a few programs and then no more."""
    monkeypatch.setattr(stock, "_PIECE", 64)
    rng = np.random.default_rng(0)

    def live(number: int) -> None:
        changing.add_items([{"item_id": f"new-{number}", "title": f"Walnut desk {number}", "price": 1.0 + number}])
        changing.update_items([{"item_id": "new-0", "price": float(number)}])
        ids = changing.item_ids
        history = [ids[row] for row in rng.choice(len(ids), rng.integers(1, 60))]
        changing.recommend(history=[*history, f"new-{number}"], k=int(rng.integers(1, 16)))

    for number in range(40):
        live(number)
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    gc.collect()
    arrays = len(jax.live_arrays())
    tracemalloc.start()
    sizes = []
    for number in range(40, 140):
        live(number)
        if number % 25 == 14:
            gc.collect()
            sizes.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert not compiled
    # On the devices, only the vectors of the three pieces that were begun.
    assert len(jax.live_arrays()) <= arrays + 3
    # What remains of an item is its row, its vectors and its title: a few kilobytes.
    growth = np.diff(sizes) / 25
    # The counts that an item takes of its neighbors, in rows and columns, are some thousands of bytes of it.
    assert growth.max() < 20_000, growth
    assert len(changing.item_ids) == 240 + 140


@pytest.mark.ci
def test_concurrent_calls_are_equal(changing: Recommender) -> None:
    histories = [changing.item_ids[start : start + 1 + start % 9] for start in range(50)]
    alone = [changing.recommend(history=history, k=5) for history in histories]
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda at: changing.recommend(history=histories[at % 50], k=5), range(200)))
    assert all(frame.equals(alone[at % 50]) for at, frame in enumerate(found))
    # The same beside items that come and change: what is asked for does not.
    only, failed = changing.item_ids[:100], []
    alone = [changing.recommend(history=history, k=5, only=only) for history in histories]
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            for history, frame in zip(histories[:10], alone[:10], strict=True):
                if not changing.recommend(history=history, k=5, only=only).equals(frame):
                    failed.append(history)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in range(30):
        changing.add_items([{"item_id": f"new-{number}", "title": "Walnut desk"}])
        changing.update_items([{"item_id": f"new-{number}", "price": 2.0}])
    stop.set()
    for thread in threads:
        thread.join()
    assert not failed


@given(count=st.integers(1, 3_000), most=st.integers(1, 600))
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_batches_are_few_and_hold_everybody(count: int, most: int) -> None:
    plan = sizes_of(count, most)
    assert set(plan) <= set(SIZES) and max(plan) <= most
    assert sum(plan[:-1]) < count <= sum(plan) <= 2 * count
