"""Counted pairs as vectors: the best of their rank, alike in evaluations and exports, and chosen on validation."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from rich.console import Console

from nqf import export
from nqf.config import CountingConfig
from nqf.evaluation.cooccurrence import Cooccurrence, Counting, newest_of_cases, stand_in
from nqf.evaluation.factors import factorize
from nqf.evaluation.ranking import ranks_from_scores
from nqf.evaluation.results import model_ranks
from nqf.serving.recommender import Recommender
from nqf.stages.assess import assess
from nqf.stages.graph import open_for_training, run_stage
from nqf.stages.joint import joint_vectors
from nqf.stages.run import Run, open_run
from nqf.stages.score import (
    SCORE,
    counts_of,
    dense_score_of,
    make_score,
    memory_of,
    read_text,
    weigh_text,
    with_factors,
)


def memory_with(items: int, how: Counting | None = None) -> Cooccurrence:
    pairs = scipy.sparse.random(items, items, density=0.2, random_state=1, format="csr", dtype=np.float32)
    return Cooccurrence(pairs=pairs, how=how or Counting())


@pytest.mark.parametrize(("items", "rank"), [(60, 8), (60, 40), (12, 256)])
def test_factors_are_the_best_of_their_rank(items: int, rank: int) -> None:
    memory = memory_with(items)
    factors = factorize(memory, rank)
    kept = min(rank, items - 1)
    assert factors.history.shape == factors.candidate.shape == (items, kept)
    # Eckart and Young: no matrix of that rank is nearer.
    rest = np.linalg.svd(memory.pairs.toarray(), compute_uv=False)[kept:]
    missed = np.linalg.norm(factors.history @ factors.candidate.T - memory.pairs.toarray())
    assert missed == pytest.approx(np.linalg.norm(rest), rel=1e-3, abs=1e-4)
    again = factorize(memory, rank)
    np.testing.assert_array_equal(again.candidate, factors.candidate)


def test_scores_are_those_of_the_pairs() -> None:
    memory = memory_with(12)
    pairs = memory.pairs.tolil()
    # Of an item without pairs the rank is one less than the number of items, and nothing is lost.
    pairs[5], pairs[:, 5] = 0, 0
    memory = dataclasses.replace(memory, pairs=pairs.tocsr())
    newest = np.array([[3, 4, -1], [-1, -1, -1], [5, 7, 7]])
    expected = memory.scores(newest).toarray()
    np.testing.assert_allclose(factorize(memory).scores(newest), expected, atol=1e-5)
    # Two new items, one of which reads as item 2.
    text = np.zeros((14, 3), np.float32)
    text[[2, 12], 0] = text[[3, 4], 1] = 1
    stood = stand_in(dataclasses.replace(memory, how=Counting(stand_ins=1)), text)
    newest = np.array([[12, 1, 13]])
    found = factorize(stood).scores(newest)
    np.testing.assert_allclose(found, stood.scores(newest).toarray(), atol=1e-5)
    assert found[0, 12] == pytest.approx(found[0, 2], abs=1e-5) and not found[0, 13]


@pytest.mark.parametrize("pairs", [[(1, 2)], [(2, 1), (1, 2), (5, 3)], [(item, item + 1) for item in range(90)]])
def test_few_pairs_of_many_items(pairs: list[tuple[int, int]]) -> None:
    rows, columns = np.transpose(pairs)
    counted = scipy.sparse.csr_matrix((np.ones(len(pairs), np.float32), (rows, columns)), shape=(1_000, 1_000))
    factors = factorize(Cooccurrence(pairs=counted, how=Counting()))
    np.testing.assert_allclose(factors.history @ factors.candidate.T, counted.toarray(), atol=1e-4)


@pytest.mark.parametrize("items", [1, 5])
def test_nothing_counted_has_no_factors(items: int) -> None:
    memory = Cooccurrence(pairs=scipy.sparse.csr_matrix((items, items), dtype=np.float32), how=Counting())
    factors = factorize(memory)
    assert factors.candidate.shape == (items, 0)
    np.testing.assert_array_equal(factors.scores(np.array([[0]])), np.zeros((1, items)))


def with_evaluation(run: Run, **given: Any) -> Run:
    evaluation = dataclasses.replace(run.config.evaluation, **given)
    return dataclasses.replace(run, config=dataclasses.replace(run.config, evaluation=evaluation))


@pytest.fixture(scope="module")
def dense_run(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run with given weights; only its stage `score` is run again."""
    folder = tmp_path_factory.mktemp("dense") / "run"
    shutil.copytree(tiny_run, folder)
    run = with_evaluation(open_run(folder), factor_weight=3.0, text_weight=0.5)
    run_stage(open_for_training(run.config, folder, Console(quiet=True)), "score")
    return folder


def test_rows_of_an_evaluation(dense_run: Path) -> None:
    run = open_run(dense_run)
    dense, cases, interactions = dense_score_of(run), run.dataset.split.test, run.dataset.interactions
    assert dense.cooccurrence == 3 and dense.text == 0.5
    results = assess(run, into="trial")
    assert list(results.models)[:4] == ["joint", "joint_vectors", "joint_learned", "user"]
    ranks = model_ranks(results.frame)
    vectors = joint_vectors(run, cases)
    cuts = zip(cases.users, cases.cuts, strict=True)
    seen = [interactions.items[interactions.offsets[user] : cut] for user, cut in cuts]
    targets, (users, items), width = interactions.items[cases.cuts], vectors, run.config.candidates.width
    np.testing.assert_allclose(ranks["joint_learned"], ranks_from_scores(users @ items.T, targets, seen))
    # Factors, and texts that count alike for known and new items.
    factors = factorize(memory_of(run, cases, dense.counting))
    newest = newest_of_cases(interactions, cases, np.arange(len(users)), dense.counting.newest)
    text = users[:, width:] / np.linalg.norm(users[:, width:], axis=1, keepdims=True)
    scaled = items.copy()
    new = run.dataset.split.cold
    scaled[new, width:] *= dense.new_item_weight(1.75) / 1.75
    assert new.any() and run.config.evaluation.new_item_weight == 1.75
    scores = users @ scaled.T + 0.5 * text @ scaled[:, width:].T + 3 * factors.scores(newest)
    np.testing.assert_allclose(ranks["joint_vectors"], ranks_from_scores(scores, targets, seen), atol=0.5)
    assert (ranks["joint_vectors"] != ranks["joint_learned"]).any()


def test_export_ranks_as_the_evaluation(dense_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "index"
    export.main([str(dense_run), "--format", "index", "--output", str(folder)])
    users, items, history = (np.load(folder / f"dense_{name}.npy") for name in ("users", "vectors", "history"))
    newest, width = scipy.sparse.load_npz(folder / "newest.npz"), history.shape[1]
    assert width and f"last {width} columns" in (folder / "README.md").read_text()
    np.testing.assert_allclose(users[:, -width:], newest @ history, atol=1e-5)
    # Of whole histories, as of a case whose target comes after them.
    run = open_run(dense_run)
    data, dense = run.dataset.interactions, dense_score_of(run)
    assert json.loads((folder / "user_ids.json").read_text()) == list(data.user_ids)
    ends = dataclasses.replace(run.dataset.split.test, users=np.arange(len(data.user_ids)), cuts=data.offsets[1:])
    memory = memory_of(run, run.dataset.split.test, dense.counting)
    factors = factorize(memory).users(newest_of_cases(data, ends, ends.users, dense.counting.newest))
    known, of_items = with_factors(run, run.dataset.split.test, joint_vectors(run, run.dataset.split.test), dense)
    np.testing.assert_allclose(items, of_items, atol=2e-5)
    np.testing.assert_allclose(users[:, -width:], 3 * factors, atol=1e-4)
    # The part that was learned does not depend on weights.
    learned = run.config.candidates.width
    whole = Recommender.load(dense_run).user_side()[1]
    np.testing.assert_allclose(users[:, :learned], whole[:, :learned], atol=1e-6)
    assert known.shape[1] == users.shape[1]


def test_weights_of_texts_are_changed_and_not_added_up(dense_run: Path) -> None:
    run = open_run(dense_run)
    new, dense = run.dataset.split.cold, dense_score_of(run)
    more = dataclasses.replace(dense, text=4.0)
    text = read_text(run)[new]
    once = weigh_text(run, joint_vectors(run, run.dataset.split.test), dense, new=new, text_JxT=text)
    twice = weigh_text(run, once, more, new=new, text_JxT=text, before=dense.text)
    directly = weigh_text(run, joint_vectors(run, run.dataset.split.test), more, new=new, text_JxT=text)
    for found, expected in zip(twice, directly, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_what_is_chosen_is_no_worse_than_what_was_learned(tiny_run: Path) -> None:
    record = make_score(with_evaluation(open_run(tiny_run), new_item_weight=1.75))
    assert record["dense"]["ndcg"] >= record["alone"] and record["dense"]["counting"] == record["counting"]
    assert "dense" not in make_score(with_evaluation(open_run(tiny_run), factor_weight=0.0))
    assert "evaluation.factor_weight" in SCORE.reads


def test_how_pairs_count_can_be_given(tiny_run: Path) -> None:
    """What is not given is chosen; where there is nothing to choose on, it is the baseline's."""
    given = CountingConfig(window=7, damp_candidate=0.3)
    run = with_evaluation(open_run(tiny_run), counting=given, factor_weight=0.0, cooccurrence_weight=2.0)
    for refit in (False, True):
        data = dataclasses.replace(run.config.data, refit=refit)
        found = make_score(dataclasses.replace(run, config=dataclasses.replace(run.config, data=data)))["counting"]
        assert found == dataclasses.asdict(counts_of(run)["text"].counting) | {"window": 7, "damp_candidate": 0.3}
    found = make_score(with_evaluation(open_run(tiny_run), counting=given, factor_weight=0.0))["counting"]
    assert (found["window"], found["damp_candidate"]) == (7, 0.3)
    assert "evaluation.counting" in SCORE.reads


def test_a_run_of_before_has_the_learned_vectors(tiny_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(tiny_run, folder)
    path = folder / "score" / "stage.json"
    record = json.loads(path.read_text())
    # Records of then had no checksum either.
    del record["result"]["dense"], record["sha256"]
    path.write_text(json.dumps(record))
    assert dense_score_of(open_run(folder)).cooccurrence == dense_score_of(open_run(folder)).text == 0
