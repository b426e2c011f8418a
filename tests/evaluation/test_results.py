"""The whole evaluation of small models: what is written, printed and compared."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hand_made import random_interactions
from rich.console import Console

from nqf.compare import CompareArguments, compare
from nqf.config import EvaluationConfig
from nqf.evaluation.baselines import cooccurrence, popular
from nqf.evaluation.cooccurrence import Counting
from nqf.evaluation.legacy import NEGATIVES, draw_candidates
from nqf.evaluation.ranking import ranks_from_scores
from nqf.evaluation.results import (
    Results,
    evaluate,
    format_interval,
    markdown_table,
    model_ranks,
    print_results,
    read_results,
    write_results,
)

CONFIG = EvaluationConfig(ks=(5, 10), bootstrap=50, batch_size=16)


def run(protocol: str = "full", seed: int = 0, **changes: object) -> Results:
    interactions, split = random_interactions(1)
    models = {
        "cooccurrence": cooccurrence(interactions, split, split.test, Counting()),
        "popular": popular(interactions, split, split.test),
    }
    return evaluate(
        models,
        interactions,
        split,
        split.test,
        split_name="test",
        config=dataclasses.replace(CONFIG, **changes),
        seed=seed,
        protocol=protocol,
        command="python -m nqf.evaluate runs/x",
    )


def test_vectors_and_function_of_the_same_model_agree() -> None:
    interactions, split = random_interactions(2)
    rng = np.random.default_rng(0)
    users, items = rng.integers(-3, 4, (60, 4)).astype(np.float32), rng.integers(-3, 4, (130, 4)).astype(np.float32)
    results = evaluate(
        {"pair": (users, items), "function": lambda rows: users[rows] @ items.T},
        interactions,
        split,
        split.test,
        split_name="test",
        config=CONFIG,
        seed=0,
    )
    assert results.models["pair"] == results.models["function"]
    assert results.recommended["pair"] == results.recommended["function"]
    seen = [interactions.items[interactions.offsets[user] : cut] for user, cut in enumerate(split.test.cuts)]
    ranks = ranks_from_scores(users @ items.T, interactions.items[split.test.cuts], seen)
    np.testing.assert_array_equal(model_ranks(results.frame)["pair"], ranks)


def test_segments_add_up_and_masking_matters() -> None:
    masked, kept = run(), run(repeats=True)
    assert 0 < masked.segments["cold"] < 60 and masked.segments["all"] == 60
    for model in ("cooccurrence", "popular"):
        parts = masked.models[model]
        total = sum(parts[name]["mrr"][0] * masked.segments[name] for name in ("warm", "cold"))
        assert total / 60 == pytest.approx(parts["all"]["mrr"][0])
        low, mean, high = (parts["all"]["hr@10"][place] for place in (1, 0, 2))
        assert low < mean < high
        assert (model_ranks(masked.frame)[model] <= model_ranks(kept.frame)[model]).all()
        assert parts["all"] != kept.models[model]["all"]


def test_written_results_read_back(tmp_path: Path) -> None:
    results = run()
    write_results(results, tmp_path)
    tree = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert {"split", "protocol", "users", "items", "models"} <= set(tree)
    assert set(tree["models"]["popular"]["cold"]) == {"hr@5", "hr@10", "ndcg@5", "ndcg@10", "mrr"}
    back = read_results(tmp_path)
    assert back.tree() == results.tree() and back.frame.equals(results.frame)
    assert sorted(path.name for path in (tmp_path / "eval").iterdir()) == ["per_user.parquet", "results.json"]
    with pytest.raises(FileNotFoundError, match=r"python -m nqf\.evaluate"):
        read_results(tmp_path / "absent")
    # Of version 0.2, which did not bind its files to each other.
    path = tmp_path / "eval" / "results.json"
    tree.pop("digest")
    path.write_text(json.dumps(tree))
    assert read_results(tmp_path).tree() == results.tree()


def test_changed_results_are_refused(tmp_path: Path, record: Callable[..., None]) -> None:
    results = run()
    table, path = (tmp_path / "eval" / name for name in ("per_user.parquet", "results.json"))

    def refused() -> None:
        with pytest.raises(ValueError, match=r"per_user\.parquet are not what was evaluated; run python -m nqf"):
            read_results(tmp_path)

    write_results(results, tmp_path)
    results.frame.with_columns(pl.col("rank:popular") + 1).write_parquet(table)
    refused()
    table.unlink()
    refused()
    write_results(results, tmp_path)
    path.write_text(path.read_text().replace('"popular": {', '"best": {', 1))
    refused()
    record(
        "results or their table that were changed or are gone",
        tried=3,
        survived=3,
        seen="refused with both files and the command that evaluates again",
    )


@pytest.mark.parametrize("protocol", ["full", "legacy"])
def test_tables_show_every_model(protocol: str) -> None:
    results = run(protocol)
    console = Console(record=True, width=240)
    print_results(results, console)
    printed, table = console.export_text(), markdown_table(results)
    shown = format_interval(results.models["cooccurrence"]["cold"]["hr@10"])
    for text in (printed, table):
        assert "popular" in text and shown in text
    assert ("0.052" in printed and "uniformly drawn" in printed) == (protocol == "legacy")
    assert "python -m nqf.evaluate runs/x" in table and "seed 0" in table
    with pytest.raises(ValueError, match="no metrics at 7"):
        markdown_table(results, k=7)


def test_format_of_intervals() -> None:
    assert format_interval([0.1234, 0.05, 1.0]) == ".1234 [.0500, 1.0000]"
    assert format_interval([-0.01, 0.0, 0.02], signed=True) == "-.0100 [+.0000, +.0200]"


def test_legacy_negatives() -> None:
    past = [np.arange(20), np.array([], int), np.arange(0, 60, 2)]
    targets = np.array([25, 129, 1])
    candidates = draw_candidates(targets, past, items=130, seed=4)
    assert candidates.shape == (3, NEGATIVES + 1)
    np.testing.assert_array_equal(candidates[:, 0], targets)
    for row in range(3):
        assert len(np.unique(candidates[row])) == NEGATIVES + 1
        assert not np.isin(candidates[row], past[row]).any()
        assert candidates[row].max() < 130
    np.testing.assert_array_equal(candidates, draw_candidates(targets, past, items=130, seed=4))
    assert (candidates != draw_candidates(targets, past, items=130, seed=5)).any()
    # Every item that may be drawn is drawn: 99 of the 99 left.
    assert set(draw_candidates(targets[:1], [np.arange(20)], items=120, seed=0)[0]) == set(range(20, 120))
    with pytest.raises(ValueError, match="only 98 of 119 are left"):
        draw_candidates(targets[:1], [np.arange(20)], items=119, seed=0)


def test_legacy_ties_get_the_middle_rank() -> None:
    interactions, split = random_interactions(1)
    results = evaluate(
        {"zero": (np.zeros((60, 2), np.float32), np.zeros((130, 2), np.float32))},
        interactions,
        split,
        split.test,
        split_name="test",
        config=CONFIG,
        seed=0,
        protocol="legacy",
    )
    # The reference's unstable sort could call this 1.
    np.testing.assert_array_equal(model_ranks(results.frame)["zero"], np.full(60, 50.5))


def test_wrong_sizes_and_empty_splits_are_refused() -> None:
    interactions, split = random_interactions(1)
    common = {"split_name": "test", "config": CONFIG, "seed": 0}
    with pytest.raises(ValueError, match="60 cases"):
        evaluate({"x": (np.zeros((59, 2)), np.zeros((130, 2)))}, interactions, split, split.test, **common)
    empty = type(split.test)(users=split.test.users[:0], cuts=split.test.cuts[:0])
    with pytest.raises(ValueError, match="test split is empty"):
        evaluate({}, interactions, split, empty, **common)


def test_compare_pairs_users_across_runs(tmp_path: Path) -> None:
    write_results(run(), tmp_path / "a")
    write_results(run(), tmp_path / "b")
    options = CompareArguments(runs=(tmp_path / "a", tmp_path / "b"), metric="mrr", bootstrap=50)
    header, rows = compare(options)
    cells = {row[0]: row[1:] for row in rows}
    assert header[-1] == "mrr minus a:cooccurrence"
    assert cells["a:cooccurrence"][-1] == "reference"
    assert cells["b:cooccurrence"][-1] == "+.0000 [+.0000, +.0000]"
    assert cells["b:popular"][-1] == cells["a:popular"][-1] != cells["b:cooccurrence"][-1]
    # The same model compared the other way round has the opposite sign.
    _, swapped = compare(dataclasses.replace(options, against="a:popular"))
    assert float(swapped[0][-1].split()[0]) == -float(cells["a:popular"][-1].split()[0])
    _, cold = compare(dataclasses.replace(options, segment="cold"))
    assert cold[0][1:] != rows[0][1:]


def test_compare_refuses_what_cannot_be_paired(tmp_path: Path) -> None:
    write_results(run(), tmp_path / "a")
    write_results(run(repeats=True), tmp_path / "b")
    options = CompareArguments(runs=(tmp_path / "a", tmp_path / "b"))
    with pytest.raises(ValueError, match="repeats"):
        compare(options)
    for wrong, message in (({"metric": "auc"}, "metric"), ({"against": "sasrec"}, "model"), ({"segment": "x"}, "seg")):
        with pytest.raises(ValueError, match=message):
            compare(CompareArguments(runs=(tmp_path / "a",), **wrong))
