"""Co-occurrence: what counts, what it adds to a ranking, and that no event outside of what is counted matters."""

import contextlib
import dataclasses
import io
import re
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import scipy.sparse
import yaml
from hypothesis import given
from hypothesis import strategies as st

from nqf import export
from nqf.data.interactions import Interactions
from nqf.data.splits import Cases
from nqf.evaluation.choice import Score, Trial, ascend, choose_counting, choose_weights, counting_ways
from nqf.evaluation.cooccurrence import Counting, add_cooccurrence, count_pairs, newest_of_cases, stand_in
from nqf.evaluation.ranking import raise_some, ranks_from_scores, top_k, top_k_from_scores
from nqf.evaluation.results import model_ranks
from nqf.pipelines.histories import newest as newest_events
from nqf.serving.recommender import Recommender
from nqf.stages.assess import assess, trained_vectors
from nqf.stages.joint import joint_vectors
from nqf.stages.rank import case_vectors
from nqf.stages.run import open_run
from nqf.stages.score import load_with_text, read_text, score_of, with_text
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
    pairs = count_pairs(interactions([0, 1, 2], [3, 1]), np.ones(5, bool), 5, Counting()).pairs.toarray()
    popularity = {0: 1, 1: 2, 2: 1, 3: 1}

    def damped(count: float, history: int, candidate: int) -> float:
        return count / popularity[history] ** 0.5 / popularity[candidate] ** 0.25

    expected = np.zeros((5, 5))
    for before, after, count in ((0, 1, 1), (1, 2, 1), (0, 2, 0.5), (3, 1, 1)):
        expected[before, after] += damped(count, before, after)
        expected[after, before] += damped(0.25 * count, after, before)
    np.testing.assert_allclose(pairs, expected, rtol=1e-6)


def test_one_history_is_a_row_of_all_scores() -> None:
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 30, 12).tolist() for _ in range(20)]
    found = interactions(*sequences)
    memory = count_pairs(found, np.ones(len(found.items), bool), 40, Counting(newest=4, stand_ins=3))
    # The last ten items of the catalogue, and five more, are in no event.
    text = np.eye(45, 8, dtype=np.float32) + rng.normal(size=(45, 8)).astype(np.float32)
    for counts, items in ((memory, 40), (stand_in(memory, text), 45)):
        for _ in range(20):
            history = rng.integers(0, items, rng.integers(1, 9))
            expected = counts.scores(newest_events(history, 4)[::-1][None]).toarray()[0]
            rows, scores = counts.raises(history)
            assert scores.dtype == np.float32 and (np.diff(rows) > 0).all()
            np.testing.assert_array_equal(rows, np.flatnonzero(expected))
            np.testing.assert_allclose(scores, expected[rows], rtol=1e-5)


def test_only_counted_events_matter() -> None:
    known, other = interactions([0, 1, 2], [3, 1, 4]), interactions([0, 1, 4], [3, 1, 0])
    counted = np.array([1, 1, 0, 1, 1, 0], bool)
    found = (count_pairs(each, counted, 5, Counting()).pairs.toarray() for each in (known, other))
    np.testing.assert_array_equal(*found)


def test_newer_items_of_the_history_weigh_more() -> None:
    found = interactions([0, 1, 2, 3], list(range(4, 4 + 14)))
    cases = Cases(users=np.array([0, 1]), cuts=np.array([2, 4 + 13]))
    newest = newest_of_cases(found, cases, np.arange(2), 10)
    np.testing.assert_array_equal(newest[0], [1, 0] + [-1] * 8)
    np.testing.assert_array_equal(newest[1], np.arange(16, 6, -1))
    histories = [found.items[:2], found.items[4:17], found.items[:0]]
    of_histories = [newest_events(history, 10)[::-1] for history in histories]
    np.testing.assert_array_equal(of_histories, [*newest, [-1] * 10])
    memory = count_pairs(found, np.ones(18, bool), 18, Counting())
    rows = memory.pairs.toarray()
    np.testing.assert_allclose(memory.scores(newest[:1]).toarray()[0], rows[1] + rows[0] / 2, rtol=1e-6)


def with_times(found: Interactions, *times: int) -> Interactions:
    return dataclasses.replace(found, times=np.array(times))


def test_items_of_one_moment_are_a_set() -> None:
    how = Counting(ties="set", backward=0.0, damp_history=0.0, damp_candidate=0.0)
    one, other = interactions([0, 1, 2, 3, 4]), interactions([1, 0, 4, 2, 3])
    counts = [
        count_pairs(with_times(found, 5, 5, 7, 7, 7), np.ones(5, bool), 6, how).pairs.toarray()
        for found in (one, other)
    ]
    np.testing.assert_array_equal(*counts)
    expected = np.zeros((6, 6))
    for basket in ((0, 1), (2, 3, 4)):
        for item in basket:
            expected[item, [each for each in basket if each != item]] = 1
    # Nothing lies between the two baskets.
    expected[np.ix_((0, 1), (2, 3, 4))] = 1
    np.testing.assert_array_equal(counts[0], expected)


@given(data=st.data())
def test_without_ties_a_set_is_a_sequence(data: st.DataObject) -> None:
    sequences = data.draw(st.lists(st.lists(st.integers(0, 8), max_size=12), min_size=1, max_size=5))
    found = interactions(*sequences)
    how = Counting(window=data.draw(st.integers(1, 12)), decay=data.draw(st.sampled_from([0.0, 0.9])))
    counted = np.ones(len(found.items), bool)
    pairs = [count_pairs(found, counted, 9, dataclasses.replace(how, ties=ties)).pairs for ties in ("sequence", "set")]
    np.testing.assert_allclose(pairs[0].toarray(), pairs[1].toarray(), rtol=1e-5)


def test_scale_enters_by_the_logarithm() -> None:
    found, counted = interactions([0, 1, 2], [3, 1]), np.ones(5, bool)
    plain, log = (count_pairs(found, counted, 4, Counting(scale=scale)).pairs.toarray() for scale in (0.0, 0.02))
    np.testing.assert_allclose(log, np.log1p(plain / 0.02), rtol=1e-5)


def test_what_fits_is_chosen() -> None:
    """Baskets in random order, whose next item is one that shares them, against chains that run one way."""
    rng = np.random.default_rng(0)
    groups = rng.permutation(60).reshape(12, 5)
    baskets = [np.concatenate([rng.permutation(groups[g]) for g in rng.permutation(12)[:3]]) for _ in range(200)]
    chains = [(start + np.arange(15)) % 60 for start in rng.integers(0, 60, 200)]
    chosen, usual = {}, {}
    for name, sequences in (("baskets", baskets), ("chains", chains)):
        found = interactions(*(list(sequence) for sequence in sequences))
        times = np.concatenate([np.arange(15) // 5 + 100 * user for user in range(200)])
        found = with_times(found, *times)
        cases = Cases(users=np.arange(200), cuts=found.offsets[1:] - 1)
        known = np.ones(len(found.items), bool)
        known[cases.cuts] = False
        trial = Trial(found, known, cases, 60, repeats=True)
        chosen[name] = choose_counting(trial, ties=True, text=False)
        usual[name] = trial.value(Score(cooccurrence=1.0), None, None)
    assert chosen["chains"].ndcg == usual["chains"] == 1.0 and chosen["chains"].counting.ties == "sequence"
    assert chosen["baskets"].ndcg > usual["baskets"] + 0.05 and chosen["baskets"].counting != Counting()


def test_ascent_finds_the_top_of_a_hill() -> None:
    def value(score: Score) -> float:
        return -abs(np.log2(score.cooccurrence + 1e-9) - 3) - abs(score.text) - abs(score.counting.backward - 0.5)

    grid = {"backward": [{"backward": share} for share in (0.0, 0.5, 1.0)]}
    found = ascend(value, Score(text=1.0), grid, ("cooccurrence", "text"))
    assert (found.cooccurrence, found.text, found.counting.backward) == (8.0, 0.0, 0.5)


def test_ascent_follows_a_ridge() -> None:
    def value(score: Score) -> float:
        # What weighs matters less than that both weigh the same.
        counts, text = np.log2(score.cooccurrence + 1e-9), np.log2(score.text + 1e-9)
        return -4 * abs(counts - text) - abs(counts + text - 10)

    found = ascend(value, Score(cooccurrence=1.0, text=1.0), {}, ("cooccurrence", "text"))
    assert (found.cooccurrence, found.text) == (32.0, 32.0)


def test_weights_that_help_only_together_are_found() -> None:
    def value(score: Score) -> float:
        hint = 0.5 - abs(np.log2(score.cooccurrence + 1e-9) + 2) - score.text
        together = 1 - abs(np.log2(score.cooccurrence + 1e-9) - 3) / 4 - abs(np.log2(score.text + 1e-9) - 2) / 4
        return max(hint, together)

    found = choose_weights(value, Score(), ("cooccurrence", "text"))
    assert (found.cooccurrence, found.text) == (8.0, 4.0)


def test_pairs_that_count_best_by_themselves_are_chosen_again_beside_vectors() -> None:
    def value(score: Score) -> float:
        beside = score.cooccurrence > 0
        return beside - abs(score.cooccurrence - 2) / 100 - abs(score.counting.backward - 1) * beside / 10

    assert choose_weights(value, Score(), ("cooccurrence",)).counting == Counting()
    found = choose_weights(value, Score(), ("cooccurrence",), counting_ways(ties=False))
    assert (found.cooccurrence, found.counting.backward) == (2.0, 1.0)
    # Of a weight that is given, how pairs count is left, too.
    given = Score(cooccurrence=2.0)
    assert choose_weights(value, given, (), counting_ways(ties=False)).counting == Counting()


@pytest.mark.parametrize("higher", [10, 30])
def test_of_two_hills_the_higher_is_chosen(higher: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def value(trial: Trial, score: Score, base_NxI: None, text_NxI: None) -> float:
        newest = {10: 0.5, 30: 0.5, higher: 0.6}[score.counting.newest]
        # Between them is a valley.
        return newest if score.counting.window == score.counting.newest else 0.1

    found = interactions([0, 1, 2], [3, 1])
    monkeypatch.setattr(Trial, "value", value)
    trial = Trial(found, np.ones(5, bool), Cases(users=np.arange(2), cuts=found.offsets[1:] - 1), 4, repeats=True)
    assert choose_counting(trial, ties=False, text=False).counting.newest == higher


def test_texts_that_are_added_count_alike_for_known_and_new_items(tiny_run: Path) -> None:
    score, weight = Score(text=4.0, gate=1.0), 3.0
    assert score.new_item_weight(weight) == pytest.approx((1 * 3 + 4) / (1 + 4))
    # Of an unknown gate, as in runs of before, everything is multiplied; and nothing else than the gate's is there.
    assert Score(text=4.0).new_item_weight(weight) == Score(gate=2.0).new_item_weight(weight) == weight
    run = open_run(tiny_run)
    cases, width = run.dataset.split.test, run.config.candidates.width
    assert run.dataset.split.cold.any()
    trained = load_with_text(run, score, cases)
    expected = case_vectors(run, "joint", trained.ranker, trained.variables, cases)
    for found, same in zip(with_text(run, joint_vectors(run, cases), score), expected, strict=True):
        np.testing.assert_allclose(found, same, atol=2e-5)
    lengths = np.linalg.norm(expected[1][:, width:], axis=1)
    factor = score.new_item_weight(run.config.evaluation.new_item_weight)
    assert 1 < factor < run.config.evaluation.new_item_weight
    np.testing.assert_allclose(lengths, np.where(run.dataset.split.cold, factor, 1), atol=1e-4)


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
    # From longer lists, fewer products; from lists that miss some, all that is raised.
    given = user_vectors, item_vectors, raised, seen
    for longer in (k + 1, 5 * k, items):
        found = raise_some(top_k(user_vectors, item_vectors, longer, seen), *given, k=min(k, items))
        np.testing.assert_array_equal(found[1], expected[1])
        np.testing.assert_allclose(found[0], expected[0], atol=1e-5)
    lost = [np.append(out, at[::2][at[::2] >= 0]) for out, at in zip(seen, rows, strict=True)]
    poor = top_k(user_vectors, item_vectors, k, lost)
    found = raise_some(poor, *given, certain=False)
    for user, (own, best) in enumerate(zip(found[1], expected[1], strict=True)):
        there = set(raised[user].indices) - set(seen[user])
        missing = (set(best) - {-1}) - set(own)
        assert not missing & there, "an item that is raised is missing"


def test_a_weight_is_added_to_the_inner_products() -> None:
    found = interactions([0, 1, 2], [1, 2, 3])
    memory = count_pairs(found, np.ones(6, bool), 4, Counting())
    cases = Cases(users=np.array([0, 1]), cuts=np.array([2, 5]))
    rng = np.random.default_rng(0)
    users, items = rng.normal(size=(2, 3)).astype(np.float32), rng.normal(size=(4, 3)).astype(np.float32)
    score = add_cooccurrence(users, items, 2.5, memory, found, cases)
    pairs = memory.scores(newest_of_cases(found, cases, np.array([1]), 10)).toarray()
    np.testing.assert_allclose(score(np.array([1])), users[1:] @ items.T + 2.5 * pairs, rtol=1e-6)


@pytest.fixture(scope="module")
def counting_run(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run with co-occurrence in its score: nothing has to be trained again."""
    folder = tmp_path_factory.mktemp("counting") / "run"
    shutil.copytree(tiny_run, folder)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["evaluation"]["cooccurrence_weight"] = config["baselines"]["sasrec_cooccurrence_weight"] = 5.0
    config["evaluation"]["text_weight"] = 2.0
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
    score = score_of(run)
    assert score.cooccurrence == 5 and score.text == 2
    pairs = stand_in(count_pairs(interactions, counted, len(split.cold), score.counting), read_text(run))
    newest = newest_of_cases(interactions, split.test, np.arange(len(users)), score.counting.newest)
    width = run.config.candidates.width
    text = 2 * users[:, width:] / np.linalg.norm(users[:, width:], axis=1, keepdims=True)
    scores = users @ items.T + text @ items[:, width:].T + 5 * pairs.scores(newest).toarray()
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


def test_exported_index_has_the_whole_score(counting_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "index"
    export.main([str(counting_run), "--format", "index", "--output", str(folder)])
    program = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    assert program is not None
    printed = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        exec(program[1], read := {})
    recommender = Recommender.load(counting_run)
    vectors, queries = np.load(folder / "vectors.npy"), np.load(folder / "users.npy")
    changed = 0
    for row, user in enumerate(read["users"]):
        alone = queries[row] @ vectors.T
        scores = alone + (read["newest"][[row]] @ read["pairs"]).toarray()[0]
        for found in (alone, scores):
            found[read["seen"][[row]].indices] = -np.inf
        expected = recommender.recommend(user=user, k=5)
        best = np.argsort(-scores, kind="stable")[:5]
        assert [read["items"][item] for item in best] == expected["item_id"].to_list()
        np.testing.assert_allclose(scores[best] / np.linalg.norm(queries[row]), expected["score"], atol=1e-5)
        changed += list(best) != list(np.argsort(-alone, kind="stable")[:5])
    assert changed, "counts change no list, so this shows nothing"
    first = recommender.recommend(user=read["users"][0], k=10)["item_id"].to_list()
    assert printed.getvalue() == f"{read['users'][0]} {first}\n"


def test_new_items_take_the_counts_of_their_neighbors() -> None:
    found, text = interactions([0, 1, 2, 0, 1]), np.zeros((5, 3), np.float32)
    text[[0, 1, 2], [0, 1, 2]] = 1
    text[3] = text[1]
    memory = count_pairs(found, np.ones(5, bool), 3, Counting(stand_ins=1))
    pairs = memory.pairs.toarray()
    # Item 3 is new and reads as item 1; item 4 has no text.
    all_pairs = stand_in(memory, text).all_pairs().toarray()
    np.testing.assert_array_equal(all_pairs[:3, :3], pairs)
    np.testing.assert_allclose(all_pairs[:3, 3], pairs[:, 1], rtol=1e-6)
    np.testing.assert_allclose(all_pairs[3, :3], pairs[1], rtol=1e-6)
    assert not all_pairs[4].any() and not all_pairs[:, 4].any()
    # Whose text is the same is not compared again: here with what would else be found.
    before = text.copy(), stand_in(memory, text).counts_as.copy()
    before[1].data[before[1].indptr[3]] = 0.5
    changed = text.copy()
    changed[4] = text[2]
    again = stand_in(memory, changed, before).counts_as.toarray()
    np.testing.assert_array_equal(again, [*np.eye(3), [0, 0.5, 0], [0, 0, 1]])
    none = stand_in(dataclasses.replace(memory, how=Counting()), text).all_pairs().toarray()
    np.testing.assert_array_equal(none, np.pad(pairs, ((0, 2), (0, 2))))


def test_what_is_saved_has_the_whole_score(counting_run: Path, tmp_path: Path) -> None:
    recommender = Recommender.load(counting_run)
    saved = Recommender.load(recommender.save(tmp_path / "saved"))
    assert saved.score == recommender.score and saved.score.counting.stand_ins
    user = open_run(counting_run).dataset.interactions.user_ids[0]
    assert saved.recommend(user=user, k=8).equals(recommender.recommend(user=user, k=8))
