"""Trained user and joint models as rankers: histories to user vectors, the catalogue to item vectors."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nqf.config import LossConfig
from nqf.data.interactions import Interactions
from nqf.data.splits import Cases
from nqf.models.qformer import cross_attention
from nqf.models.recommender import ItemTables
from nqf.models.user_qformer import History
from nqf.ops.losses import full_softmax, info_nce, unit
from nqf.pipelines.histories import (
    EventFeatures,
    HistoryBatch,
    bucket_of,
    case_events,
    gather_history,
    number_by_rows,
    slot_buckets,
)

ITEM_CHUNK = 16_384


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranker:
    """A model's inference functions over the catalogue's tables.

    Attributes:
      users: `(variables, tables, rows, history) -> [B, D]`, compiled; the newest position's user vector.
      items: `(variables, tables, rows) -> [R, D]`, compiled.
      explained: `users` with the User Q-Former's cross-attention beside it, float32 [layers, B, heads, user tokens,
        slots * item tokens], None if the model does not read user tokens.
      tables: Host tables of the whole catalogue.
      max_history: Newest slots that the model reads.
      batch_size: Users encoded at a time.
      item_chunk: Items encoded at a time.
    """

    users: Callable[[Any, ItemTables, jax.Array, History], jax.Array]
    items: Callable[[Any, ItemTables, jax.Array], jax.Array]
    explained: Callable[[Any, ItemTables, jax.Array, History], tuple[jax.Array, jax.Array | None]]
    tables: ItemTables
    max_history: int
    batch_size: int
    item_chunk: int

    def encode_cases(
        self, variables: Any, interactions: Interactions, features: EventFeatures, cases: Cases, which: np.ndarray
    ) -> np.ndarray:
        """User vectors of some cases from everything before their targets, float32 [cases, D]."""
        lengths = (cases.cuts - interactions.offsets[cases.users])[which]
        longest = max(1, int(min(self.max_history, lengths.max(initial=1))))
        buckets = slot_buckets(longest)
        bucket = bucket_of(lengths, buckets)
        vectors: np.ndarray | None = None
        for index, slots in enumerate(buckets):
            members = np.flatnonzero(bucket == index)
            for start in range(0, len(members), self.batch_size):
                chunk = members[start : start + self.batch_size]
                events = case_events(interactions, cases, which[chunk], slots)
                encoded = self.encode(variables, gather_history(features, events))
                if vectors is None:
                    vectors = np.zeros((len(which), encoded.shape[1]), np.float32)
                vectors[chunk] = encoded
        if vectors is None:
            return np.zeros((0, 1), np.float32)
        return vectors

    def encode(self, variables: Any, history: History) -> np.ndarray:
        """User vectors of a batch of histories, float32 [B, D].

        The batch is padded to `batch_size` rows, so that every number of users runs the same compiled program.
        """
        count = history.items.shape[0]
        pad = self.batch_size - count

        def widen(x: np.ndarray) -> np.ndarray:
            # Padding repeats the last history; its vectors are cut off again.
            return np.concatenate([x, np.repeat(x[-1:], pad, axis=0)])

        history = jax.tree.map(widen, history)
        none = np.full((self.batch_size, 0), -1, np.int32)
        batch = number_by_rows(HistoryBatch(history=history, targets=none, supervised=none.ravel()), self.tables)
        vectors = self.users(variables, batch.tables, batch.rows, batch.history)
        return np.asarray(jax.device_get(vectors), np.float32)[:count]

    def item_vectors(
        self, variables: Any, tables: ItemTables | None = None, rows: np.ndarray | None = None
    ) -> np.ndarray:
        """Item vectors of the whole catalogue, or of other tables and their rows among the learned vectors.

        Returns:
          float32 [I, D].
        """
        tables = self.tables if tables is None else tables
        rows = np.arange(len(tables.has_text), dtype=np.int32) if rows is None else rows
        parts = []
        for start in range(0, len(rows), self.item_chunk):
            at = np.arange(start, min(start + self.item_chunk, len(rows)))
            parts.append(np.asarray(self.items(variables, tables.take(at), rows[at]), np.float32))
        return np.concatenate(parts)


def make_ranker(
    model: Any, tables: ItemTables, *, extra: tuple, max_history: int, batch_size: int, item_chunk: int = ITEM_CHUNK
) -> Ranker:
    """Compiles a ranker from a `UserModel` or `JointModel`.

    The variables are arguments of the compiled functions, never constants in them: a base of a billion parameters
    would otherwise stand in every program.

    Args:
      model: The module.
      tables: Host tables.
      extra: Further positional arguments of the module (the joint model's prompt).
      max_history: Newest slots that the model reads.
      batch_size: Users encoded at a time.
      item_chunk: Items encoded at a time.
    """

    @jax.jit
    def users(variables: Any, tables: ItemTables, rows: jax.Array, history: History) -> jax.Array:
        return model.apply(variables, tables, rows, history, *extra, positions=1)[0][:, -1]

    @jax.jit
    def items(variables: Any, tables: ItemTables, rows: jax.Array) -> jax.Array:
        return model.apply(variables, tables, rows, *extra, method=type(model).item_vectors)

    @jax.jit
    def explained(
        variables: Any, tables: ItemTables, rows: jax.Array, history: History
    ) -> tuple[jax.Array, jax.Array | None]:
        outputs, state = model.apply(variables, tables, rows, history, *extra, positions=1, mutable=["intermediates"])
        return outputs[0][:, -1], cross_attention(state.get("intermediates", {}), ("user_qformer", "qformer"))

    return Ranker(
        users=users,
        items=items,
        explained=explained,
        tables=tables,
        max_history=max_history,
        batch_size=batch_size,
        item_chunk=item_chunk,
    )


def batch_tables(tables: ItemTables | None, batch: HistoryBatch) -> tuple[ItemTables, jax.Array]:
    """The tables a training step works on and their rows in the catalogue."""
    if batch.tables is not None:
        return batch.tables, batch.rows
    if batch.rows is not None:
        return tables.take(jnp.maximum(batch.rows, 0)), batch.rows
    return tables, jnp.arange(tables.has_text.shape[0], dtype=jnp.int32)


def ranking_loss(
    config: LossConfig,
    users_BxPxD: jax.Array,
    items_RxD: jax.Array,
    batch: HistoryBatch,
    *,
    learned_width: int,
    text_RxT: jax.Array,
    trained: jax.Array,
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
    text_RxT = unit(text_RxT) if config.duplicate_cosine else text_RxT

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
            other &= products(text_RxT[targets_M], text_RxT[rows]) <= config.duplicate_cosine
        return other

    if config.negatives == "full":
        allowed = trained
        if config.duplicate_cosine:
            everything = jnp.arange(trained.shape[0])
            allowed = (trained & unlike(everything)) | (targets_M[:, None] == everything)
        learned, frozen = items_RxD[:, :learned_width], items_RxD[:, learned_width:]
        return full_softmax(users_MxD, learned, frozen, targets_M, weights_M=weights_M, allowed=allowed)
    if config.negatives == "sampled":
        negatives = batch.negatives
        labels_M = jnp.zeros_like(targets_M)
        positive_M = jnp.sum(users_MxD * items_RxD[targets_M], axis=-1)
        all_scores = jnp.concatenate([positive_M[:, None], scores(negatives)], axis=1)
        allowed = unlike(negatives) & trained[negatives]
        allowed = jnp.concatenate([jnp.ones_like(allowed[:, :1]), allowed], axis=1)
        # Each negative stands for I / S items; the positive stands for itself.
        ratio = jnp.full(negatives.shape, jnp.log(negatives.shape[0] / log_popularity.shape[0]))
        log_q, log_one = jnp.concatenate([jnp.zeros(1), ratio]), 0.0
    else:
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


@functools.cache
def compute_dtype(name: str) -> jnp.dtype:
    """The dtype of `training.dtype`: `auto` is bfloat16 on accelerators and float32 on CPU."""
    if name == "auto":
        return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    return jnp.dtype(name)
