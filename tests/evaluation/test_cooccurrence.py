"""Co-occurrence: what counts, what it adds to a ranking, and that no event outside of what is counted matters."""

import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import scipy.sparse
import yaml

from nqf.data.interactions import Interactions
from nqf.data.splits import Cases
from nqf.evaluation.cooccurrence import WINDOW, add_cooccurrence, count_pairs, newest_of_cases
from nqf.evaluation.ranking import raise_some, ranks_from_scores, top_k, top_k_from_scores
from nqf.evaluation.results import model_ranks
from nqf.pipelines.histories import newest as newest_events
from nqf.serving.recommender import Recommender
from nqf.stages.assess import assess, trained_vectors
from nqf.stages.run import open_run
from nqf.tools.report.users import sample_users


def interactions(*sequences: list[int]) -> Interactions:
    offsets = np.cumsum([0, *map(len, sequences)])
    count = int(offsets[-1])
    return Interactions(
        user_ids=[str(user) for user in range(len(sequences))],
        offsets=offsets,
        items=np.concatenate([np.asarray(sequence, np.int32) for sequence in sequences]),
        times=np.arange(count),
        ratings=np.full(count, np.nan, np.float32),
        reviews=None,
    )


def test_pairs_count_by_distance_direction_and_popularity() -> None:
    pairs = count_pairs(interactions([0, 1, 2], [3, 1]), np.ones(5, bool), 5).pairs.toarray()
    popularity = {0: 1, 1: 2, 2: 1, 3: 1}

    def damped(count: float, history: int, candidate: int) -> float:
        return count / popularity[history] ** 0.5 / popularity[candidate] ** 0.25

    expected = np.zeros((5, 5))
    for before, after, count in ((0, 1, 1), (1, 2, 1), (0, 2, 0.5), (3, 1, 1)):
        expected[before, after] += damped(count, before, after)
        expected[after, before] += damped(0.25 * count, after, before)
    np.testing.assert_allclose(pairs, expected, rtol=1e-6)


def test_only_counted_events_matter() -> None:
    known, other = interactions([0, 1, 2], [3, 1, 4]), interactions([0, 1, 4], [3, 1, 0])
    counted = np.array([1, 1, 0, 1, 1, 0], bool)
    found = (count_pairs(each, counted, 5).pairs.toarray() for each in (known, other))
    np.testing.assert_array_equal(*found)


def test_newer_items_of_the_history_weigh_more() -> None:
    found = interactions([0, 1, 2, 3], list(range(4, 4 + 14)))
    cases = Cases(users=np.array([0, 1]), cuts=np.array([2, 4 + 13]))
    newest = newest_of_cases(found, cases, np.arange(2))
    np.testing.assert_array_equal(newest[0], [1, 0] + [-1] * 8)
    np.testing.assert_array_equal(newest[1], np.arange(16, 6, -1))
    histories = [found.items[:2], found.items[4:17], found.items[:0]]
    of_histories = [newest_events(history, WINDOW)[::-1] for history in histories]
    np.testing.assert_array_equal(of_histories, [*newest, [-1] * 10])
    memory = count_pairs(found, np.ones(18, bool), 18)
    rows = memory.pairs.toarray()
    np.testing.assert_allclose(memory.scores(newest[:1]).toarray()[0], rows[1] + rows[0] / 2, rtol=1e-6)


@pytest.mark.parametrize("seed", range(40))
def test_raised_lists_are_those_of_the_sums(seed: int) -> None:
    rng = np.random.default_rng(seed)
    # In the longer catalogues most raises are too small to be worth a product.
    users, items, k = 7, int(rng.integers(3, 60) if seed < 20 else rng.integers(300, 3_000)), int(rng.integers(1, 12))
    user_vectors, item_vectors = (rng.normal(size=(count, 4)).astype(np.float32) for count in (users, items))
    raised = scipy.sparse.random(users, items, density=rng.choice([0.0, 0.1, 0.9]), random_state=seed, format="csr")
    raised = (3 * raised).power(1 if seed < 20 else 6).astype(np.float32)
    seen = [rng.permutation(items)[: rng.integers(0, items + 1)] for _ in range(users)]
    scores, rows = raise_some(top_k(user_vectors, item_vectors, k, seen), user_vectors, item_vectors, raised, seen)
    expected = top_k_from_scores(user_vectors @ item_vectors.T + raised.toarray(), k, seen)
    np.testing.assert_array_equal(rows, expected[1])
    np.testing.assert_allclose(scores, expected[0], atol=1e-5)
    if raised.nnz:
        with pytest.raises(ValueError, match="only be raised"):
            raise_some((scores, rows), user_vectors, item_vectors, -raised, seen)


def test_a_weight_is_added_to_the_inner_products() -> None:
    found = interactions([0, 1, 2], [1, 2, 3])
    memory = count_pairs(found, np.ones(6, bool), 4)
    cases = Cases(users=np.array([0, 1]), cuts=np.array([2, 5]))
    rng = np.random.default_rng(0)
    users, items = rng.normal(size=(2, 3)).astype(np.float32), rng.normal(size=(4, 3)).astype(np.float32)
    score = add_cooccurrence(users, items, 2.5, memory, found, cases)
    pairs = memory.scores(newest_of_cases(found, cases, np.array([1]))).toarray()
    np.testing.assert_allclose(score(np.array([1])), users[1:] @ items.T + 2.5 * pairs, rtol=1e-6)


@pytest.fixture(scope="module")
def counting_run(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run with co-occurrence in its score: nothing has to be trained again."""
    folder = tmp_path_factory.mktemp("counting") / "run"
    shutil.copytree(tiny_run, folder)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["evaluation"]["cooccurrence_weight"] = config["baselines"]["sasrec_cooccurrence_weight"] = 5.0
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_what_is_recommended_ranks_first(counting_run: Path) -> None:
    recommender = Recommender.load(counting_run)
    data = open_run(counting_run).dataset.interactions
    user = int(np.argmax(np.diff(data.offsets)))
    history = [recommender.item_ids[row] for row in data.items[data.offsets[user] : data.offsets[user + 1]]]
    recommender.add_items(pl.DataFrame([{"item_id": "new", "title": "a new item"}]))
    history.insert(len(history) - 1, "new")
    found = recommender.recommend(history=history, k=12)
    ranks = recommender.rank([history] * 12, found["item_id"], left_out=[history] * 12)
    np.testing.assert_array_equal(ranks, range(1, 13))
    assert [recommender.explain(history, item).rank for item in found["item_id"][:3]] == [1, 2, 3]
    # With the pairs of the known events, and their scores fall.
    alone = recommender.encode_users([history])[0] @ recommender.item_vectors.T
    above = found["score"].to_numpy() - alone[[recommender.item_ids.index(item) for item in found["item_id"]]]
    assert (above >= -1e-5).all() and above.max() > 1e-3
    assert (np.diff(found["score"]) <= 0).all()
    assert Recommender.load(counting_run, stage="user").recommend(history=history[:-2], k=3).height == 3


def test_evaluation_has_both_scores_and_the_report_the_first(counting_run: Path) -> None:
    run = open_run(counting_run)
    results = assess(run, into="trial")
    assert list(results.models)[:3] == ["joint", "joint_vectors", "user"] and "sasrec_cooccurrence" in results.models
    interactions, split = run.dataset.interactions, run.dataset.split
    users, items = trained_vectors(run, split.test)["joint"]
    # Test targets count for nothing.
    counted = np.ones(len(interactions.items), bool)
    counted[split.test.cuts] = False
    counted[split.valid.cuts[split.cold[interactions.items[split.valid.cuts]]]] = False
    pairs = count_pairs(interactions, counted, len(split.cold))
    newest = newest_of_cases(interactions, split.test, np.arange(len(users)))
    scores = users @ items.T + 5 * pairs.scores(newest).toarray()
    cuts = zip(split.test.users, split.test.cuts, strict=True)
    seen = [interactions.items[interactions.offsets[user] : cut] for user, cut in cuts]
    expected = ranks_from_scores(scores, interactions.items[split.test.cuts], seen)
    ranks = model_ranks(results.frame)
    np.testing.assert_allclose(ranks["joint"], expected)
    assert (ranks["joint"] != ranks["joint_vectors"]).any() and (ranks["sasrec"] != ranks["sasrec_cooccurrence"]).any()
    shown = sample_users(run, results, 6)[0]
    for user in shown:
        first = [place for place, card in enumerate(user.recommended, 1) if card.marked]
        rank = float(user.target.note.removeprefix("rank ").replace(",", ""))
        assert first == ([rank] if rank <= len(user.recommended) else [])
