"""No leak, proven by planting: other held-out events make the same models, baselines and negatives, bit for bit."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import polars as pl
import pytest
import yaml

from nqf import train
from nqf.evaluation import baselines
from nqf.stages.artifacts import restore_best
from nqf.stages.assess import baseline_scorers
from nqf.stages.graph import STAGES
from nqf.stages.run import Run, open_run
from nqf.stages.score import make_counts, make_score

ROOT = Path(__file__).parents[2]
HELD_OUT = {"test": 1, "valid": 2}
"""Place from the end of a user's events, of which leave-one-out takes the last two."""


def planted(source: Path, folder: Path, place: int | None) -> Path:
    """Tables in which, at one place from the end, every user has another item, rating, review and time."""
    shutil.copytree(source, folder)
    events = pl.read_parquet(source / "interactions.parquet").sort("user_id", "timestamp", maintain_order=True)
    if place is not None:
        rng = np.random.default_rng(place)
        items = pl.read_parquet(source / "items.parquet")["item_id"].to_numpy()
        last = (pl.len().over("user_id") - pl.int_range(pl.len()).over("user_id")) == place
        other = events.with_columns(
            item_id=pl.Series(rng.choice(items, len(events))),
            rating=pl.lit(1.0, pl.Float32),
            review=pl.format("quixotic zephyr {}", pl.Series(rng.integers(0, 9, len(events)))),
            # A second later, which keeps the order: the built-in catalogue's events are days apart.
            timestamp=pl.col("timestamp") + 1,
        )
        columns = [name for name in events.columns if name != "user_id"]
        events = events.with_columns(
            pl.when(last).then(other[name]).otherwise(pl.col(name)).alias(name) for name in columns
        )
    events.write_parquet(folder / "interactions.parquet")
    return folder


def trained(folder: Path) -> Run:
    """A run on planted tables, of one epoch each, so that nothing is left for a validation to choose."""
    tree = yaml.safe_load((ROOT / "tests" / "tiny.yaml").read_text())
    paths = {"items": "items.parquet", "interactions": "interactions.parquet", "schema": "schema.yaml"}
    tree["data"] = {"format": "table"} | {key: str(folder / name) for key, name in paths.items()}
    for stage in ("item", "user", "joint"):
        tree[stage]["optim"]["epochs"] = 1
    tree["item"]["contrastive"] = "triplet"
    tree["joint"] |= {"mining": {"count": 2}, "loss": {"negatives": "sampled", "samples": 64}}
    tree["baselines"]["sasrec_options"]["epochs"] = 1
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    for stage in ("fields", "item", "tokens", "user", "joint", "sasrec"):
        train.main(["--config", str(folder / "config.yaml"), "--run", str(folder / "run"), "--stage", stage])
    return open_run(folder / "run")


def learned(run: Run) -> dict[str, Any]:
    """Parameters of every stage, what the tokens stage wrote, and the negatives that were mined, by name."""
    found: dict[str, Any] = {}
    for stage in STAGES:
        if stage.program is not None:
            found[stage.name] = restore_best(run.folder, stage.name, stage.program(run, False).init)
    found |= {path.name: np.load(path) for path in (run.folder / "tokens").glob("*.npy")}
    mined = np.load(run.folder / "joint" / "negatives.npy")
    found["mined"] = mined[run.dataset.split.train]
    return found


@pytest.fixture(scope="module")
def worlds(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder, source = tmp_path_factory.mktemp("worlds"), tiny_run / "data" / "source"
    places = {"as it is": None, **HELD_OUT}
    return {name: trained(planted(source, folder / name, place)) for name, place in places.items()}


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.parametrize("split", HELD_OUT)
def test_other_held_out_events_make_the_same_models(
    worlds: dict[str, Run], split: str, record: Callable[..., None]
) -> None:
    one, other = learned(worlds["as it is"]), learned(worlds[split])
    events = [worlds[name].dataset.interactions for name in ("as it is", split)]
    cuts = getattr(worlds[split].dataset.split, split).cuts
    assert (events[0].items[cuts] != events[1].items[cuts]).mean() > 0.9
    assert (events[0].times[cuts] != events[1].times[cuts]).all()
    assert one.keys() == other.keys() and len(one) > 6
    for name, tree in one.items():
        jax.tree.map(np.testing.assert_array_equal, tree, other[name])
    record(
        f"other {split} events: their items, times, ratings and reviews",
        tried=1,
        survived=1,
        seen="nothing: the parameters of every stage and of the SASRec and the mined negatives are equal bit for bit",
    )


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.parametrize("split", HELD_OUT)
def test_baselines_do_not_see_what_they_are_tested_on(worlds: dict[str, Run], split: str) -> None:
    scores = []
    for name in ("as it is", split):
        run = worlds[name]
        cases = getattr(run.dataset.split, split)
        scorers = baseline_scorers(run, cases)
        rows = np.arange(len(cases.users))
        scores.append(
            {key: [np.asarray(part) for part in (scorer if isinstance(scorer, tuple) else (scorer(rows),))]
             for key, scorer in scorers.items()}
        )  # fmt: skip
    assert scores[0].keys() == scores[1].keys() and "cooccurrence" in scores[0]
    for key, parts in scores[0].items():
        for one, other in zip(parts, scores[1][key], strict=True):
            np.testing.assert_array_equal(one, other, err_msg=key)


@pytest.mark.ci
@pytest.mark.slow
def test_the_planting_would_be_seen(worlds: dict[str, Run]) -> None:
    run, other = worlds["as it is"], worlds["test"]
    cases = run.dataset.split.test
    # A baseline that counts what it is tested on is told apart.
    everything = [np.bincount(world.dataset.interactions.items, minlength=240) for world in (run, other)]
    assert (everything[0] != everything[1]).any()
    assert baselines.popular(run.dataset.interactions, run.dataset.split, cases) is not None


@pytest.mark.ci
@pytest.mark.slow
def test_what_is_chosen_does_not_see_the_test_split(worlds: dict[str, Run]) -> None:
    for make in (make_counts, make_score):
        one, other = (make(worlds[name]) for name in ("as it is", "test"))
        assert one == other
