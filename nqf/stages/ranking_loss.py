"""The ranking loss of the user and joint stages: InfoNCE against full, sampled, in-batch or given negatives."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from nqf.config import LossConfig
from nqf.ops.losses import full_softmax, info_nce, unit
from nqf.ops.pins import take_rows
from nqf.pipelines.batches import Array, HistoryBatch, ItemTables


def batch_tables(tables: ItemTables | None, batch: HistoryBatch) -> tuple[ItemTables, Array]:
    """The tables a training step works on and their rows in the catalogue."""
    if batch.tables is not None:
        return batch.tables, batch.rows
    assert tables is not None, "where batches carry no tables, they are on the device"
    if batch.rows is not None:
        rows = jnp.maximum(batch.rows, 0)
        return jax.tree.map(lambda table: take_rows(table, rows), tables), batch.rows
    return tables, jnp.arange(tables.has_text.shape[0], dtype=jnp.int32)


def ranking_loss(
    config: LossConfig,
    users_BxPxD: jax.Array,
    items_RxD: jax.Array,
    batch: HistoryBatch,
    *,
    learned_width: int,
    text_RxT: Array,
    trained: Array,
    log_popularity: jax.Array,
) -> jax.Array:
    """InfoNCE of every supervised position against the configured negatives.

    Args:
      config: Which negatives, and whether they are corrected for how often they are drawn.
      users_BxPxD: User vectors.
      items_RxD: Item vectors of the batch's numbering.
      batch: Targets and negatives.
      learned_width: Leading part of the vectors that gets a gradient on the item side; the rest is frozen.
      text_RxT: Frozen text embeddings, which tell near-duplicates.
      trained: bool [R], items with a training event. The others are never negatives: pushing them away is what
        makes trained towers fail on new items.
      log_popularity: float [I], log share of the training events per item.

    Returns:
      A float32 scalar.
    """
    places_M = jnp.maximum(batch.supervised, 0)
    users_MxD = users_BxPxD.reshape(-1, users_BxPxD.shape[-1])[places_M]
    targets_M = jnp.maximum(batch.targets.reshape(-1)[places_M], 0)
    weights_M = (batch.supervised >= 0).astype(jnp.float32)

    def products(of_MxD: jax.Array, others: jax.Array) -> jax.Array:
        # With the same others for all, [C, D], or with others for each, [M, C, D].
        return of_MxD @ others.T if others.ndim == 2 else jnp.einsum("md,mcd->mc", of_MxD, others)

    def scores(rows: jax.Array) -> jax.Array:
        items = items_RxD[rows]
        learned = products(users_MxD[:, :learned_width], items[..., :learned_width])
        return learned + products(users_MxD[:, learned_width:], jax.lax.stop_gradient(items[..., learned_width:]))

    def unlike(rows: jax.Array) -> jax.Array:
        # Neither the target itself nor, as far as the text tells, the same thing under another id.
        other = targets_M[:, None] != rows
        if config.duplicate_cosine:
            other &= products(unit(text_RxT[targets_M]), unit(text_RxT[rows])) <= config.duplicate_cosine
        return other

    if config.negatives == "given":
        return _given_loss(users_MxD, items_RxD, targets_M, weights_M, batch)
    if config.negatives == "full":
        allowed = trained
        if config.duplicate_cosine:
            everything = jnp.arange(trained.shape[0])
            allowed = (trained & unlike(everything)) | (targets_M[:, None] == everything)
        learned, frozen = items_RxD[:, :learned_width], items_RxD[:, learned_width:]
        return full_softmax(users_MxD, learned, frozen, targets_M, weights_M=weights_M, allowed=allowed)
    if config.negatives == "sampled":
        negatives = batch.negatives
        assert negatives is not None, "the batches of this loss carry them"
        labels_M = jnp.zeros_like(targets_M)
        positive_M = jnp.sum(users_MxD * items_RxD[targets_M], axis=-1)
        all_scores = jnp.concatenate([positive_M[:, None], scores(negatives)], axis=1)
        allowed = unlike(negatives) & trained[negatives]
        allowed = jnp.concatenate([jnp.ones_like(allowed[:, :1]), allowed], axis=1)
        # Each negative stands for I / S items; the positive stands for itself.
        ratio = jnp.full(negatives.shape, jnp.log(negatives.shape[0] / log_popularity.shape[0]))
        log_q, log_one = jnp.concatenate([jnp.zeros(1), ratio]), 0.0
    else:
        assert batch.rows is not None, "the batches of this loss are numbered by them"
        # in-batch: every other example's target is a negative, drawn by its popularity.
        labels_M = jnp.arange(targets_M.shape[0])
        all_scores = scores(targets_M)
        allowed = unlike(targets_M) & (weights_M > 0)
        log_q = log_popularity[jnp.maximum(batch.rows, 0)[targets_M]]
        log_one = -jnp.log(jnp.maximum(jnp.sum(weights_M), 1.0))
    if batch.given is not None:
        # Negatives of one target alone: each stands for itself.
        given_MxK = batch.given.reshape(-1, batch.given.shape[-1])[places_M]
        rows_MxK = jnp.maximum(given_MxK, 0)
        all_scores = jnp.concatenate([all_scores, scores(rows_MxK)], axis=1)
        known = (given_MxK >= 0) & trained[rows_MxK]
        allowed = jnp.concatenate([allowed, unlike(rows_MxK) & known], axis=1)
        log_q = jnp.concatenate([log_q, jnp.full(given_MxK.shape[1], log_one)])
    return info_nce(
        all_scores, labels_M, weights_M=weights_M, log_q_C=log_q if config.log_q else None, allowed_MxC=allowed
    )


def _given_loss(
    users_MxD: jax.Array, items_RxD: jax.Array, targets_M: jax.Array, weights_M: jax.Array, batch: HistoryBatch
) -> jax.Array:
    """InfoNCE of each target against its own negatives, all of which count: they were drawn evenly and are frozen."""
    assert batch.given is not None, "the batches of this loss carry them"
    given_MxK = batch.given.reshape(-1, batch.given.shape[-1])[jnp.maximum(batch.supervised, 0)]
    rows_MxC = jnp.concatenate([targets_M[:, None], jnp.maximum(given_MxK, 0)], axis=1)
    scores_MxC = jnp.einsum("md,mcd->mc", users_MxD, items_RxD[rows_MxC])
    allowed_MxC = jnp.pad(given_MxK >= 0, ((0, 0), (1, 0)), constant_values=True)
    return info_nce(scores_MxC, jnp.zeros_like(targets_M), weights_M=weights_M, allowed_MxC=allowed_MxC)
