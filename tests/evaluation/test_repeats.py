"""Targets that their users had before: left out and counted, or ranked among all; nothing tells a scorer which."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hand_made import random_interactions
from hypothesis import given, settings
from hypothesis import strategies as st

from nqf.config import Config, ConfigError, EvaluationConfig, from_tree
from nqf.data.interactions import Interactions
from nqf.data.splits import Cases, pasts, repeated
from nqf.evaluation.baselines import popular
from nqf.evaluation.ranking import ranks_from_scores
from nqf.evaluation.results import Results, evaluate, model_ranks, read_results, write_results

ITEMS = 130


def in_the_past(interactions: Interactions, cases: Cases) -> Callable[[np.ndarray], np.ndarray]:
    """Scores of 1 for whatever the user had before, 0 for all else."""
    before = pasts(interactions, cases)

    def score(rows: np.ndarray) -> np.ndarray:
        scores_NxI = np.zeros((len(rows), ITEMS), np.float32)
        for place, row in enumerate(rows):
            scores_NxI[place, before[row]] = 1
        return scores_NxI

    return score


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10_000), share=st.sampled_from([0.3, 0.7, 1.0]))
def test_the_past_tells_no_target(seed: int, share: float) -> None:
    interactions, split = random_interactions(seed % 5)
    rng, cuts, starts = np.random.default_rng(seed), split.test.cuts, interactions.offsets[split.test.users]
    again = rng.random(len(cuts)) < share
    items = interactions.items.copy()
    items[cuts[again]] = items[rng.integers(starts, cuts)][again]
    interactions = dataclasses.replace(interactions, items=items)
    known = np.array([items[cut] in items[start:cut] for start, cut in zip(starts, cuts, strict=True)])
    np.testing.assert_array_equal(repeated(interactions, split.test), known)
    vectors = rng.normal(size=(len(cuts), 4)).astype(np.float32), rng.normal(size=(ITEMS, 4)).astype(np.float32)
    models = {"past": in_the_past(interactions, split.test), "vectors": vectors}

    def results(repeats: bool) -> Results:
        config = EvaluationConfig(ks=(1, 10), bootstrap=20, batch_size=16, repeats=repeats)
        return evaluate(models, interactions, split, split.test, split_name="test", config=config, seed=0)

    kept = results(True)
    assert (kept.repeats, kept.repeated, kept.users) == (True, known.sum(), len(cuts))
    # Nothing is masked: all of the past is level, the target in it.
    level = [(len(np.unique(items[start:cut])) + 1) / 2 for start, cut in zip(starts, cuts, strict=True)]
    np.testing.assert_allclose(model_ranks(kept.frame)["past"][known], np.array(level)[known])
    if known.all():
        with pytest.raises(ValueError, match=r"evaluation\.repeats: true .* data\.duplicates: merge"):
            results(False)
        return
    new = results(False)
    assert (new.repeats, new.repeated, new.users) == (False, known.sum(), (~known).sum())
    assert new.frame["user_id"].to_list() == kept.frame["user_id"].filter(pl.Series(~known)).to_list()
    assert new.models["past"]["all"]["hr@1"][0] < 0.1
    # The ranks of new targets are those that they always had, with the past masked.
    masked = [items[start:cut] for start, cut in zip(starts[~known], cuts[~known], strict=True)]
    scores = vectors[0][~known] @ vectors[1].T
    expected = ranks_from_scores(scores, items[cuts[~known]], masked)
    np.testing.assert_array_equal(model_ranks(new.frame)["vectors"], expected)


def test_results_of_before_are_read(tmp_path: Path) -> None:
    interactions, split = random_interactions(1)
    results = evaluate(
        {"popular": popular(interactions, split, split.test)},
        interactions,
        split,
        split.test,
        split_name="test",
        config=EvaluationConfig(bootstrap=20),
        seed=0,
    )
    assert (results.repeats, results.repeated) == (False, 0)
    write_results(results, tmp_path)
    path = tmp_path / "eval" / "results.json"
    tree = json.loads(path.read_text())
    del tree["repeats"], tree["repeated"], tree["digest"]
    path.write_text(json.dumps(tree | {"mask_seen": True}))
    assert read_results(tmp_path).tree() == results.tree() | {"repeated": None}


def test_mask_seen_of_older_files_means_the_same() -> None:
    for masked in (True, False):
        config = from_tree(Config, {"evaluation": {"mask_seen": masked}})
        assert config.evaluation == EvaluationConfig(repeats=not masked)
    with pytest.raises(ConfigError, match="mask_seen"):
        from_tree(Config, {"evaluation": {"mask_seen": "yes"}})
