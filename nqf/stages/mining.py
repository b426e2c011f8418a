"""Hard negatives of the joint stage, mined once with the user stage's model."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nqf import files
from nqf.evaluation.ranking import dense_batches
from nqf.pipelines.batches import History, HistoryBatch, ItemTables
from nqf.pipelines.histories import gather_history, number_by_rows, training_windows, window_events
from nqf.stages.run import Run
from nqf.stages.user import load_users
from nqf.training.mesh import barrier, is_primary


def mined_negatives(run: Run) -> np.ndarray | None:
    """The hard negatives of every training target; None if none are to be mined.

    They stay in the stage's folder, so that training that resumes after a crash reads what it began with.

    Returns:
      int32 [events, count], item rows, the hardest first, -1 for none; a row for every event, all -1 where it is no
      training target.
    """
    if not run.config.joint.mining.count:
        return None
    path = run.folder / "joint" / "negatives.npy"
    if is_primary() and not path.is_file():
        with files.whole(path) as file:
            np.save(file, mine(run))
    barrier("mining")
    return np.load(path, mmap_mode="r")


def mine(run: Run) -> np.ndarray:
    """The best-ranked items of every training target that are neither it, nor the user's, nor above the margin."""
    config, interactions, split = run.config, run.dataset.interactions, run.dataset.split
    trained = load_users(run)
    module, tables, ranker, variables = trained.parts.module, trained.parts.tables, trained.ranker, trained.variables
    items, trained = jax.device_put(ranker.item_vectors(variables)), jax.device_put(~split.cold)
    windows = training_windows(interactions, split, config.joint.prompt.history_items)
    slots = int(min(config.user.max_history, windows.slots().max()))
    positions = min(config.joint.prompt.history_items, slots)
    # What a user was trained on, not what is held out: to spare a test item would tell that it is one.
    starts = np.searchsorted(interactions.users[windows.order], np.arange(len(interactions.user_ids) + 1))
    longest = np.diff(starts).max()

    @jax.jit
    def encode(variables: Any, tables: ItemTables, rows: jax.Array, history: History) -> jax.Array:
        return module.apply(variables, tables, rows, history, None, positions=positions)[0]

    mined = np.full((len(interactions.items), config.joint.mining.count), -1, np.int32)
    spans = list(dense_batches(len(windows.ends), len(items) * positions, config.evaluation.batch_size))
    for span in spans:
        # The last part is filled up with the last window, so that there is one compilation.
        examples = np.minimum(np.arange(span.start, span.start + spans[0].stop), len(windows.ends) - 1)
        history, targets_BxP = window_events(windows, examples, slots)
        targets_BxP = targets_BxP[:, -positions:]
        none = np.full((len(examples), 0), -1, np.int32)
        batch = HistoryBatch(history=gather_history(run.features, history), targets=none, supervised=none.ravel())
        batch = number_by_rows(batch, tables)
        seen_BxS = np.full((len(examples), longest), len(items), np.int32)
        for row, user in enumerate(windows.users[examples]):
            seen = interactions.items[windows.order[starts[user] : starts[user + 1]]]
            seen_BxS[row, : len(seen)] = seen
        users_BxPxD = encode(variables, batch.tables, batch.rows, batch.history)
        rows_BxP = interactions.items[np.maximum(targets_BxP, 0)]
        found = hardest(
            users_BxPxD, items, rows_BxP, seen_BxS, trained, config.joint.mining.margin, config.joint.mining.count
        )
        valid = targets_BxP >= 0
        mined[targets_BxP[valid]] = np.asarray(found)[valid]
    return mined


@functools.partial(jax.jit, static_argnames="count")
def hardest(
    users_BxPxD: jax.Array,
    items_IxD: jax.Array,
    targets_BxP: jax.Array,
    seen_BxS: jax.Array,
    trained_I: jax.Array,
    margin: float,
    count: int,
) -> jax.Array:
    """The best items below the margin.

    Args:
      users_BxPxD: User vectors.
      items_IxD: Item vectors.
      targets_BxP: Item row of each position's target.
      seen_BxS: Item rows that are no negatives of a user; beyond the last row in padding.
      trained_I: False for items that are no negatives at all.
      margin: Items that score above this share of the target's score are passed over. A negative score is lowered
        as far as a positive one of its size.
      count: K.

    Returns:
      int32 [B, P, K] item rows, the best first, -1 where there are no more.
    """
    scores = jnp.einsum("bpd,id->bpi", users_BxPxD, items_IxD)
    target = jnp.take_along_axis(scores, targets_BxP[..., None], axis=-1)
    own = jnp.zeros(seen_BxS.shape[:1] + trained_I.shape, bool)
    own = own.at[jnp.arange(len(own))[:, None], seen_BxS].set(True, mode="drop")
    allowed = trained_I & ~own[:, None] & (scores <= target - (1 - margin) * jnp.abs(target))
    allowed &= jnp.arange(len(items_IxD)) != targets_BxP[..., None]
    best, rows = jax.lax.top_k(jnp.where(allowed, scores, -jnp.inf), min(count, len(items_IxD)))
    rows = jnp.where(best > -jnp.inf, rows, -1)
    return jnp.pad(rows, ((0, 0), (0, 0), (0, count - rows.shape[-1])), constant_values=-1)
