"""The SASRec baseline: what it sees, what it is trained on, and that it learns."""

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
from rich.console import Console

from nqf.config import BaselinesConfig, Config, DataConfig, EvaluationConfig, FieldsConfig, SASRecConfig
from nqf.data.splits import Cases
from nqf.evaluation.ranking import rank_vectors
from nqf.models.sasrec import SASRec
from nqf.pipelines.histories import history_of_items
from nqf.stages.graph import open_for_training, run_stage
from nqf.stages.run import Run
from nqf.stages.sasrec import sasrec_parts, sasrec_program, sasrec_vectors

CONFIG = SASRecConfig(width=16, layers=2, heads=2, max_history=8, batch_positions=64, epochs=1)
ITEMS = 20


def states_of() -> Callable[[np.ndarray], np.ndarray]:
    """States after every slot, of a network with random parameters."""
    model, rows = SASRec(config=CONFIG, items=ITEMS), np.arange(ITEMS, dtype=np.int32)

    def call(params: dict, items: np.ndarray) -> jax.Array:
        return model.apply(params, None, rows, history_of_items(items, 0), positions=items.shape[1])[0]

    params = jax.jit(
        lambda: model.init(jax.random.key(0), None, rows, history_of_items(np.zeros((1, 1), np.int32), 0), positions=1)
    )()
    return lambda items: np.asarray(call(params, items))


def test_no_position_sees_what_comes_after_it() -> None:
    states_at = states_of()
    items = np.array([[3, 1, 4, 1, 5, 9, 2, 6]], np.int32)
    changed = items.copy()
    changed[0, 5] = 17
    states, others = states_at(items), states_at(changed)
    np.testing.assert_allclose(states[:, :5], others[:, :5], atol=1e-6)
    assert (np.abs(states - others)[:, 5:].max(axis=-1) > 1e-3).all()


def test_padding_changes_nothing() -> None:
    states_at = states_of()
    history = np.array([[3, 1, 4]], np.int32)
    padded = np.concatenate([np.full((1, 5), -1, np.int32), history], axis=1)
    short, long = states_at(history), states_at(padded)
    np.testing.assert_allclose(short, long[:, 5:], atol=1e-5)
    assert np.isfinite(long).all()


@pytest.fixture(scope="module")
def successors(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on users who walk along one random cycle through 40 items."""
    folder = tmp_path_factory.mktemp("successors")
    rng = np.random.default_rng(0)
    cycle = rng.permutation(40)
    walks = [np.take(cycle, np.arange(start, start + 9), mode="wrap") for start in rng.integers(0, 40, 150)]
    events = [(f"u{user}", f"i{item}", time) for user, walk in enumerate(walks) for time, item in enumerate(walk)]
    events = pl.DataFrame(events, schema=["user_id", "item_id", "timestamp"], orient="row")
    events.write_parquet(folder / "events.parquet")
    items = pl.DataFrame({"item_id": [f"i{item}" for item in range(40)]})
    items = items.with_columns(title="thing " + pl.col("item_id"))
    items.write_parquet(folder / "items.parquet")
    (folder / "schema.yaml").write_text("title: title\nfields:\n  title: {modality: text}\n")
    config = Config(
        data=DataConfig(
            format="table",
            items=str(folder / "items.parquet"),
            interactions=str(folder / "events.parquet"),
            schema=str(folder / "schema.yaml"),
        ),
        fields=FieldsConfig(text_width=8),
        evaluation=EvaluationConfig(batch_size=64),
        baselines=BaselinesConfig(
            sasrec=True,
            sasrec_options=SASRecConfig(
                width=32, layers=1, max_history=8, batch_positions=128, epochs=20, learning_rate=5e-3, patience=2
            ),
        ),
    )
    run = open_for_training(config, folder / "run", Console(file=io.StringIO()))
    run_stage(run, "fields")
    run_stage(run, "sasrec")
    return run


def test_it_learns_a_transition_and_keeps_its_best_epoch(successors: Run) -> None:
    interactions, split = successors.dataset.interactions, successors.dataset.split
    ranks = [
        rank_vectors(
            *sasrec_vectors(successors, cases),
            interactions.items[cases.cuts],
            [
                interactions.items[interactions.offsets[user] : cut]
                for user, cut in zip(cases.users, cases.cuts, strict=True)
            ],
        )
        for cases in (split.test, split.valid)
    ]
    assert (ranks[0] == 1).mean() > 0.9
    output = successors.console.file.getvalue()
    # What was kept is what the best validation reported.
    lines = [line for line in output.splitlines() if "sasrec" in line and "ndcg@10" in line]
    best = max(float(line.split("ndcg@10")[1].split()[0]) for line in lines)
    found = (1 / np.log2(ranks[1] + 1) * (ranks[1] <= 10)).mean()
    assert found == pytest.approx(best, abs=1e-4)


def test_every_training_event_but_the_first_is_a_target_once(successors: Run) -> None:
    program = sasrec_program(successors)
    data = program.data(dataclasses.replace(program.optim, batch_size=1, epochs=1))
    targets = np.concatenate([data.batches[step].targets.ravel() for step in range(data.steps)])
    split, interactions = successors.dataset.split, successors.dataset.interactions
    first = np.zeros(len(interactions.items), bool)
    first[interactions.offsets[:-1]] = True
    expected = interactions.items[split.train & ~first]
    np.testing.assert_array_equal(np.sort(targets[targets >= 0]), np.sort(expected))


def test_user_vectors_do_not_depend_on_the_target_or_the_batch(successors: Run) -> None:
    interactions, split = successors.dataset.interactions, successors.dataset.split
    users, _ = sasrec_vectors(successors, split.test)
    few = Cases(users=split.test.users[7:9], cuts=split.test.cuts[7:9])
    np.testing.assert_allclose(users[7:9], sasrec_vectors(successors, few)[0], atol=1e-4)
    before = interactions.items.copy()
    try:
        interactions.items[split.test.cuts] = 0
        np.testing.assert_array_equal(users, sasrec_vectors(successors, split.test)[0])
    finally:
        interactions.items[:] = before


def test_it_knows_of_items_their_number_alone(successors: Run) -> None:
    assert all(leaf.size == 0 or leaf.dtype == bool for leaf in jax.tree.leaves(sasrec_parts(successors).tables))
    params = jax.eval_shape(sasrec_program(successors).init)
    assert params["item_embedding"].shape == (40, 32) and params["item_embedding"].dtype == jnp.float32


def test_a_finished_one_is_not_trained_again(successors: Run, tmp_path: Path) -> None:
    assert not run_stage(successors, "sasrec")
