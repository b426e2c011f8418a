"""Rank models at inference: histories to user vectors, the catalogue to item vectors."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import numpy as np
from jax.tree_util import Partial

from nqf.data.interactions import Interactions
from nqf.data.splits import Cases
from nqf.models.qformer import cross_attention
from nqf.models.rank_model import PromptIds
from nqf.ops.pins import pin
from nqf.pipelines.batches import Array, History, HistoryBatch, ItemTables
from nqf.pipelines.histories import EventFeatures, bucket_of, case_events, gather_history, number_by_rows, slot_buckets

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

    users: Callable[[Any, ItemTables, Array, History], jax.Array]
    items: Callable[[Any, ItemTables, Array], jax.Array]
    explained: Callable[[Any, ItemTables, Array, History], tuple[jax.Array, jax.Array | None]]
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
        assert batch.tables is not None, "they were given"
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
    model: nn.Module,
    tables: ItemTables,
    *,
    prompt: PromptIds | None,
    max_history: int,
    batch_size: int,
    item_chunk: int = ITEM_CHUNK,
) -> Ranker:
    """The inference functions of a rank model, compiled when they are first called.

    The variables are arguments of the compiled functions, never constants in them: a base of a billion parameters
    would otherwise stand in every program.

    Args:
      model: The module.
      tables: Host tables.
      prompt: Token ids of the prompt; None without a language model.
      max_history: Newest slots that the model reads.
      batch_size: Users encoded at a time.
      item_chunk: Items encoded at a time.
    """
    users, items, explained = _programs(model)
    return Ranker(
        users=Partial(users, prompt),
        items=Partial(items, prompt),
        explained=Partial(explained, prompt),
        tables=tables,
        max_history=max_history,
        batch_size=batch_size,
        item_chunk=item_chunk,
    )


@functools.lru_cache(maxsize=8)
def _programs(model: nn.Module) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """The compiled functions of `Ranker` with the prompt's ids before their arguments.

    Equal models share them, so that what training validated with is not compiled again for the evaluation, nor a run
    that a service loads again; those of the last few models are kept.
    """

    @jax.jit
    def users(prompt: PromptIds | None, variables: Any, tables: ItemTables, rows: Array, history: History) -> jax.Array:
        return pin(model.apply(variables, tables, rows, history, prompt, positions=1)[0][:, -1])

    @jax.jit
    def items(prompt: PromptIds | None, variables: Any, tables: ItemTables, rows: Array) -> jax.Array:
        return cast(jax.Array, pin(model.apply(variables, tables, rows, prompt, method="item_vectors")))

    @jax.jit
    def explained(
        prompt: PromptIds | None, variables: Any, tables: ItemTables, rows: Array, history: History
    ) -> tuple[jax.Array, jax.Array | None]:
        outputs, state = cast(
            tuple[Any, dict[str, Any]],
            model.apply(variables, tables, rows, history, prompt, positions=1, mutable=["intermediates"]),
        )
        return outputs[0][:, -1], cross_attention(state.get("intermediates", {}), ("user_qformer", "qformer"))

    return users, items, explained
