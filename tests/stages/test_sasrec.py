"""The SASRec baseline: what it sees, what it is trained on, and that it learns."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hand_made import last_two_out, make_interactions

from nqf.config import SASRecConfig
from nqf.data.splits import Cases
from nqf.evaluation.ranking import rank_vectors
from nqf.stages.sasrec import SASRec, make_sequences, train_sasrec

CONFIG = SASRecConfig(width=16, layers=2, heads=2, max_history=8, batch_positions=64, epochs=1)


def init(items: int) -> tuple[Callable, dict]:
    model = SASRec(config=CONFIG, items=items)
    return jax.jit(model.apply), jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))


def test_no_position_sees_what_comes_after_it() -> None:
    apply, variables = init(20)
    items = np.array([[3, 1, 4, 1, 5, 9, 2, 6]], np.int32)
    changed = items.copy()
    changed[0, 5] = 17
    states, others = apply(variables, items), apply(variables, changed)
    np.testing.assert_array_equal(states[:, :5], others[:, :5])
    assert (np.abs(states - others)[:, 5:].max(axis=-1) > 1e-3).all()


def test_padding_changes_nothing() -> None:
    apply, variables = init(20)
    history = np.array([[3, 1, 4]], np.int32)
    padded = np.concatenate([np.full((1, 5), -1, np.int32), history], axis=1)
    short, long = apply(variables, history), apply(variables, padded)
    np.testing.assert_allclose(short, long[:, 5:], atol=1e-5)
    assert np.isfinite(long).all()


def test_every_training_event_but_the_first_is_a_target_once() -> None:
    histories = [list(range(23)), [5, 6, 7, 8], [1, 2, 3]]
    interactions = make_interactions(histories)
    split = last_two_out(interactions, 23)
    sequences = make_sequences(interactions, split, 8)
    pairs = []
    for slots, rows in sequences.items():
        assert rows.shape[1] == slots + 1 <= 9
        inside = rows[:, :-1] >= 0
        pairs += list(zip(rows[:, :-1][inside].tolist(), rows[:, 1:][inside].tolist(), strict=True))
    # The last two events are held out; the third user has no pair left.
    assert sorted(pairs) == sorted([(item, item + 1) for item in range(20)] + [(5, 6)])


@pytest.fixture(scope="module")
def successors():
    """Users who walk along one random cycle through 40 items."""
    rng = np.random.default_rng(0)
    cycle = rng.permutation(40)
    histories = [
        np.take(cycle, np.arange(start, start + 9), mode="wrap").tolist() for start in rng.integers(0, 40, 150)
    ]
    interactions = make_interactions(histories)
    split = last_two_out(interactions, 40)
    config = SASRecConfig(
        width=32, layers=1, max_history=8, batch_positions=128, epochs=20, learning_rate=5e-3, patience=2
    )
    return interactions, split, config, train_sasrec(interactions, split, config, seed=1)


def test_it_learns_a_transition_and_keeps_its_best_epoch(successors) -> None:
    interactions, split, _, trained = successors
    ranks = [
        rank_vectors(
            *trained.scorer(interactions, cases),
            interactions.items[cases.cuts],
            [interactions.items[interactions.offsets[user] : cut] for user, cut in enumerate(cases.cuts)],
        )
        for cases in (split.test, split.valid)
    ]
    assert (ranks[0] == 1).mean() > 0.9
    # The kept parameters reproduce the best validation figure that the history reports.
    best = max(trained.history, key=lambda entry: entry["ndcg@10"])
    assert best is not trained.history[-1]
    assert (1 / ranks[1]).mean() == pytest.approx(best["mrr"], abs=1e-6)


def test_without_a_selection_all_epochs_are_trained_and_the_last_is_kept(successors) -> None:
    interactions, split, config, trained = successors
    epochs = len(trained.history)
    last = train_sasrec(interactions, split, config, seed=1, select=False)
    # Validation changes nothing but what is kept and when training stops.
    assert epochs < config.epochs == len(last.history)
    assert [entry["loss"] for entry in trained.history] == [entry["loss"] for entry in last.history[:epochs]]
    assert "ndcg@10" not in last.history[0]
    differences = jax.tree.map(lambda one, other: float(np.abs(one - other).max()), trained.params, last.params)
    assert max(jax.tree.leaves(differences)) > 0


def test_user_vectors_do_not_depend_on_the_target_or_the_batch(successors) -> None:
    interactions, split, _, trained = successors
    users, _ = trained.scorer(interactions, split.test)
    changed = interactions.items.copy()
    changed[split.test.cuts] = 0
    other = type(interactions)(**{**vars(interactions), "items": changed})
    np.testing.assert_array_equal(users, trained.scorer(other, split.test)[0])
    few = Cases(users=split.test.users[7:9], cuts=split.test.cuts[7:9])
    np.testing.assert_allclose(users[7:9], trained.scorer(interactions, few)[0], atol=1e-4)


def test_training_is_deterministic_and_needs_sequences(successors) -> None:
    interactions, split, config, _ = successors
    short = SASRecConfig(**{**vars(config), "epochs": 2})
    first, second = (train_sasrec(interactions, split, short, seed=3) for _ in range(2))
    assert first.history == second.history
    alone = make_interactions([[1, 2, 3], [2, 3, 4]])
    with pytest.raises(ValueError, match="two training events"):
        train_sasrec(alone, last_two_out(alone, 5), config, seed=0)
