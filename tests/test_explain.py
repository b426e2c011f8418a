"""Explanations: occlusion equals leaving out for real, attention adds up, and planted preferences are found."""

import dataclasses
import fcntl
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import polars as pl
import pytest
import scipy.sparse
from faithfulness import faithfulness

from nqf.config import QFormerConfig, load_config
from nqf.data.synthetic import draw_world, next_topic
from nqf.models.qformer import QFormer, cross_attention
from nqf.serving.explain import _standing
from nqf.serving.recommender import Recommender

TESTS = Path(__file__).parent
NEW = {
    "item_id": "new",
    "title": "Fjord Desk Lamp No. 7",
    "description": "Desk Lamp for warm evenings, with light wood and calm northern lines.",
    "categories": "Home|Lighting",
    "price": 31.5,
}


@pytest.fixture(scope="module")
def tiny(tiny_run: Path) -> Recommender:
    recommender = Recommender.load(tiny_run)
    recommender.add_items(pl.DataFrame([NEW]))
    return recommender


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Recommender:
    """A run that has learned the rule of the built-in catalogue, trained once for all workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "planted"
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "eval" / "results.json").is_file():
            command = [sys.executable, "-m", "nqf.train", "--config", str(TESTS / "planted.yaml"), "--run", str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent)
            assert done.returncode == 0, done.stdout + done.stderr
    return Recommender.load(folder)


def history_of(recommender: Recommender, count: int) -> list[str]:
    return recommender.item_ids[10 : 10 + count]


def test_removed_items_and_ranks_are_those_of_the_recommender(tiny: Recommender) -> None:
    history = history_of(tiny, 6)
    top = tiny.recommend(history=history, k=3)["item_id"][2]
    explanation = tiny.explain(history, top)
    assert explanation.rank == 3 and explanation.item_id == top
    assert explanation.history["position"].to_list() == [1, 2, 3, 4, 5, 6]
    assert explanation.history["item_id"].to_list() == history
    shorter = [history[:at] + history[at + 1 :] for at in range(6)]
    expected = tiny.rank(shorter, [top] * 6, left_out=[history] * 6)
    np.testing.assert_array_equal(explanation.history["rank_without"], expected)
    # Removing an item and giving it in another place are not the same thing.
    assert len(set(explanation.history["effect"])) == 6


def test_attention_adds_up(tiny: Recommender) -> None:
    history = history_of(tiny, 5)
    explanation = tiny.explain(history, "new")
    layers, heads, _, items, _ = explanation.user_attention.shape
    assert (layers, heads, items) == (1, 2, 5) and explanation.item_attention.shape[0] == 6
    np.testing.assert_allclose(explanation.user_attention.sum(axis=(-1, -2)), 1, rtol=1e-5)
    np.testing.assert_allclose(explanation.history["attention"].sum(), 1, rtol=1e-5)
    own = explanation.fields.filter(side="item")
    np.testing.assert_allclose(own["attention"].sum(), 1, rtol=1e-5)
    # What the item does not have can neither be read nor be missed.
    absent = own.filter(pl.col("field").is_in(["brand", "released", "image"]))
    assert (absent["attention"] == 0).all()
    np.testing.assert_allclose(absent["effect"], 0, atol=1e-5)
    assert (own.filter(~pl.col("field").is_in(absent["field"].implode()))["attention"] > 0).all()


@pytest.mark.parametrize("field", ["description", "price"])
def test_a_hidden_field_is_as_good_as_a_missing_one(
    tiny: Recommender, tiny_run: Path, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    poorer = Recommender.load(tiny_run)
    # A field is hidden from the models; the counts that stand in for those of a new item stay.
    for recommender in (tiny, poorer):
        monkeypatch.setattr(recommender, "memory", None)
    poorer.add_items(pl.DataFrame([NEW | {field: None}], schema_overrides={"price": pl.Float64}))
    history = history_of(tiny, 4)
    hidden = tiny.explain(history, "new").fields.filter(side="item", field=field).row(0, named=True)
    missing = poorer.explain(history, "new")
    whole = tiny.explain(history, "new").log_probability
    assert hidden["rank_without"] == missing.rank
    np.testing.assert_allclose(whole - hidden["effect"], missing.log_probability, rtol=1e-5)
    # The same on the side of the history.
    target = tiny.item_ids[0]
    explanation, missing = tiny.explain(["new"], target), poorer.explain(["new"], target)
    hidden = explanation.fields.filter(side="history", field=field).row(0, named=True)
    assert hidden["rank_without"] == missing.rank
    np.testing.assert_allclose(explanation.log_probability - hidden["effect"], missing.log_probability, rtol=1e-5)


def test_short_long_and_wrong_histories(tiny: Recommender) -> None:
    one = tiny.explain(history_of(tiny, 1), "new")
    assert len(one.history) == 1 and one.history["attention"][0] == pytest.approx(1)
    assert np.isfinite(one.history["effect"][0]) and np.isfinite(one.history["rank_without"][0])
    long = tiny.explain(tiny.item_ids[:60], "new").history
    # The model reads the newest 50.
    assert long["position"].to_list() == list(range(11, 61)) and long["item_id"][0] == tiny.item_ids[10]
    with pytest.raises(ValueError, match="history is empty"):
        tiny.explain([], "new")
    with pytest.raises(ValueError, match="unknown item ids in the history: 'nothing'"):
        tiny.explain(history_of(tiny, 2), "nothing")
    with pytest.raises(ValueError, match="cannot lose 2"):
        faithfulness(tiny, [(history_of(tiny, 2), "new")])


def test_the_user_stage_is_explained_too(tiny_run: Path) -> None:
    recommender = Recommender.load(tiny_run, stage="user")
    history = history_of(recommender, 4)
    top = recommender.recommend(history=history, k=1)["item_id"][0]
    explanation = recommender.explain(history, top)
    assert explanation.rank == 1 and explanation.user_attention.shape[3] == 4


def test_a_model_without_user_tokens_has_no_user_attention(tiny: Recommender, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cross_attention({"qwen3": {}}, ("user_qformer", "qformer")) is None
    ranker = tiny._ranker
    blind = dataclasses.replace(ranker, explained=lambda *arguments: (ranker.users(*arguments), None))
    monkeypatch.setattr(tiny, "_ranker", blind)
    explanation = tiny.explain(history_of(tiny, 3), "new")
    assert explanation.user_attention is None and explanation.history["attention"].null_count() == 3


def test_standing_is_a_softmax_and_a_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nqf.serving.explain._CHUNK", 4)
    rng = np.random.default_rng(0)
    users, items = rng.normal(size=(3, 5)).astype(np.float32), rng.normal(size=(11, 5)).astype(np.float32)
    items[7] = items[2]
    added = scipy.sparse.csr_matrix(([3.0, 2.0, 1.0], ([0, 1, 2], [4, 2, 9])), shape=(3, 11), dtype=np.float32)
    targets = users @ items[2] + added[:, [2]].toarray()[:, 0]
    logs, ranks = _standing(users, targets, items, added, 2, np.array([0, 5, 2]))
    kept = [row for row in range(11) if row not in (0, 5)]
    scores = (users @ items.T + added.toarray()).astype(np.float64)
    expected = scores[:, 2] - np.log(np.exp(scores[:, kept]).sum(axis=1))
    np.testing.assert_allclose(logs, expected, rtol=1e-5)
    # Item 7 is item 2 again, but what was added to 2 it lacks.
    ahead = (scores[:, kept] > scores[:, [2]] + 1e-6).sum(axis=1)
    np.testing.assert_array_equal(ranks, np.array([1.5, 1, 1.5]) + ahead)


def test_nothing_changes_for_those_who_do_not_ask_for_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    module = QFormer(config=QFormerConfig(width=8, layers=2, heads=2, mlp_width=16))
    queries, states = np.ones((2, 3, 8), np.float32), np.ones((2, 5, 4), np.float32)
    variables = module.init(jax.random.key(0), queries, states)
    assert set(variables) == {"params"}

    def program() -> str:
        return jax.jit(lambda variables: module.apply(variables, queries, states)).lower(variables).as_text()

    sown = program()
    monkeypatch.setattr(nn.Module, "sow", lambda *arguments, **options: False)
    assert program() == sown


@pytest.mark.slow
@pytest.mark.ci
def test_planted_preferences_are_found(planted: Recommender) -> None:
    config = load_config(TESTS / "planted.yaml").data
    world = draw_world(config.synthetic, config.seed)
    ids = planted.item_ids
    # Last items that follow the rule: the last two items decide about their topic.
    cases = [
        ([ids[item] for item in history[:-1]], ids[history[-1]])
        for history in world.histories[:150]
        if world.topics[history[-1]] == next_topic(world, history[:-1])
        and world.topics[history[-1]] != world.topics[history[-2]]
    ]
    ranks = planted.rank([history for history, _ in cases], [item for _, item in cases], left_out=[h for h, _ in cases])
    assert np.median(ranks) < 10, "the run has not learned the rule, so there is nothing to explain"
    cases = [case for case, rank in zip(cases, ranks, strict=True) if rank <= 20][:60]
    explanations = [planted.explain(history, item) for history, item in cases]

    # Two named items of seven to eleven: by chance a quarter of them would be the last two.
    named = [explanation.history.top_k(2, by="effect")["position"].to_list() for explanation in explanations]
    hits = [len({len(history), len(history) - 1} & set(two)) for (history, _), two in zip(cases, named, strict=True)]
    assert np.mean(hits) / 2 > 0.75

    # The description tells topic, style and tier; the day of release was drawn at random.
    effects = (
        pl.concat([explanation.fields for explanation in explanations])
        .group_by("side", "field")
        .agg(pl.col("effect").mean())
    )
    effect = {(side, field): value for side, field, value in effects.rows()}
    for side in ("history", "item"):
        assert effect[side, "description"] > 0.2 > 5 * abs(effect[side, "released"])

    found = faithfulness(planted, cases, seed=1)
    assert len(found.cases) == len(cases)
    # Without the named items the rank is at least four times worse than without others, with 95 % confidence.
    assert found.difference[1] > 2
    assert found.named[0] - found.random[0] == pytest.approx(found.difference[0])
