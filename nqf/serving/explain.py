"""Why an item stands where it stands: occlusion of history items and fields, and what both Q-Formers attend to.

An effect is the item's log-probability under a softmax over the catalogue minus that without the evidence, in nats:
positive evidence speaks for the item. Letters: N history items, F fields, V variants, R rows of the variants' tables.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import polars as pl
import scipy.sparse

from nqf.config import from_tree
from nqf.data.schema import Field
from nqf.fields.cache import CANDIDATE, FieldCache, candidate_fields, candidate_text, encode_column
from nqf.models.item_qformer import ItemOutput, ItemQFormer
from nqf.models.qformer import cross_attention
from nqf.pipelines.batches import ItemTables
from nqf.pipelines.histories import bucket_of, history_of_items, newest, slot_buckets
from nqf.serving.stock import fill
from nqf.stages.ranker import Ranker

# Item vectors scored at a time.
_CHUNK = 65_536


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Explanation:
    """What speaks for an item after a history.

    Attributes:
      item_id: The explained item.
      title: Its title.
      rank: Its expected rank under ties, 1 for the best, the history left out of the ranking.
      log_probability: Its log-probability under a softmax over the same items, in nats.
      history: One row per history item that the model reads, oldest first: position (1-based in the given history),
        item_id, title, effect (nats, of removing the item), rank_without, attention (share of the User Q-Former's
        cross-attention, mean over layers, heads and user tokens; null if the model reads no user tokens).
      fields: One row per field and side: side (`history`: hidden in all its items; `item`: hidden in the explained
        item), field, effect (nats), rank_without, attention (share of the Item Q-Former's cross-attention, mean over
        layers, heads, query tokens and the side's items that have the field).
      user_attention: float32 [layers, heads, user tokens, N, item tokens], or None.
      item_attention: float32 [N + 1, layers, heads, query tokens, F]; the explained item is the last.
    """

    item_id: str
    title: str
    rank: float
    log_probability: float
    history: pl.DataFrame
    fields: pl.DataFrame
    user_attention: np.ndarray | None
    item_attention: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Items:
    """The history's items and, last, the explained one, as the Item Q-Former reads them.

    Attributes:
      rows: int64 [N + 1], their rows among the learned vectors.
      tables: Their item tables.
      frame: Canonical values, N + 1 rows.
      values: Field name to float32 [N + 1, width].
      present: Field name to bool [N + 1].
    """

    rows: np.ndarray
    tables: ItemTables
    frame: pl.DataFrame
    values: Mapping[str, np.ndarray]
    present: Mapping[str, np.ndarray]


# Long: all variants go through each model in one call, so nothing of it can be done apart.
# Many parameters: parts of a run that have no value in common, by name.
def explain(
    items: Items,
    *,
    ranker: Ranker,
    variables: Any,
    item_qformer: tuple[ItemQFormer, Any],
    cache: FieldCache,
    text_features: Callable[[np.ndarray, np.ndarray], np.ndarray],
    field_features: Callable[[Mapping[str, tuple[np.ndarray, np.ndarray]]], np.ndarray],
    item_vectors: np.ndarray,
    pairs: Callable[[Sequence[np.ndarray]], scipy.sparse.csr_matrix],
    older: np.ndarray,
    left_out: np.ndarray,
    review_width: int,
) -> Explanation:
    """Explains the last of the items after the others; `Recommender.explain` calls it.

    All variants go through the Item Q-Former in one call, through the user or joint model in one, and through the
    candidate tower in one.

    Args:
      items: The newest history items that the model reads, and the explained item.
      ranker: The model.
      variables: Its variables.
      item_qformer: Module and parameters of the Item Q-Former.
      cache: Encoders of the candidate text.
      text_features: `Run.text_features`, what the models read of its embeddings.
      field_features: `Run.field_features`, what the candidate tower reads of its fields.
      item_vectors: float32 [I, D].
      pairs: What co-occurrence adds to the catalogue's scores after histories of item rows, sparse [histories, I].
      older: Rows of the history before the items that the model reads, oldest first; they are in every variant.
      left_out: Rows that are not ranked; the explained item is, all the same.
      review_width: Width of the review embeddings that the model was trained with; 0 without.
    """
    names, size = list(cache.names), len(items.rows)
    buckets = slot_buckets(ranker.max_history)
    slots = buckets[bucket_of(np.array(size - 1), buckets)]
    # Rows of the tables: all items as they are, then with one field hidden after another.
    tables, item_attention = _hide_fields(items, item_qformer, cache, text_features, field_features, slots)
    rows = np.tile(items.rows, 1 + len(names)).astype(np.int32)
    whole = np.arange(size - 1)
    variants = [whole, *(np.delete(whole, slot) for slot in whole)]
    variants += [whole + size * (1 + field) for field in range(len(names))]
    users, attention = _encode(ranker, variables, tables, rows, variants, slots, review_width)
    own = np.arange(size - 1, len(rows), size)
    own_vectors = np.asarray(ranker.items(variables, tables.take(own), rows[own]), np.float32)
    targets = users @ own_vectors[0]
    # The last variants are of the explained item: the whole history, one of its fields hidden.
    users = np.concatenate([users, np.repeat(users[:1], len(names), axis=0)])
    targets = np.concatenate([targets, own_vectors[1:] @ users[0]])
    added = pairs([np.concatenate([older, rows[slots]]) for slots in [*variants, *[whole] * len(names)]])
    targets += added[:, [items.rows[-1]]].toarray()[:, 0]
    log_probabilities, ranks = _standing(users, targets, item_vectors, added, items.rows[-1], left_out)
    effects = log_probabilities[0] - log_probabilities

    of_items, of_fields = slice(1, size), slice(size, None)
    slot_shares = [None] * (size - 1)
    if attention is not None:
        attention = attention[..., -(size - 1) * tables.tokens.shape[1] :]
        attention = attention.reshape(*attention.shape[:3], size - 1, -1)
        slot_shares = attention.sum(axis=-1).mean(axis=(0, 1, 2))
    field_shares = item_attention.mean(axis=(1, 2, 3))
    there = np.stack([items.present[name] for name in names], axis=1)
    return Explanation(
        item_id=items.frame["item_id"][-1],
        title=items.frame["title"][-1] or "",
        rank=float(ranks[0]),
        log_probability=float(log_probabilities[0]),
        history=pl.DataFrame(
            {
                "item_id": items.frame["item_id"][:-1],
                "title": items.frame["title"][:-1],
                "effect": effects[of_items],
                "rank_without": ranks[of_items],
                "attention": pl.Series(slot_shares, dtype=pl.Float32),
            }
        ),
        fields=pl.DataFrame(
            {
                "side": ["history"] * len(names) + ["item"] * len(names),
                "field": names * 2,
                "effect": effects[of_fields],
                "rank_without": ranks[of_fields],
                "attention": np.concatenate(
                    [
                        field_shares[side].sum(axis=0) / np.maximum(there[side].sum(axis=0), 1)
                        for side in (slice(-1), slice(-1, None))
                    ]
                ).astype(np.float32),
            }
        ),
        user_attention=attention,
        item_attention=item_attention,
    )


def _hide_fields(
    items: Items,
    item_qformer: tuple[ItemQFormer, Any],
    cache: FieldCache,
    text_features: Callable[[np.ndarray, np.ndarray], np.ndarray],
    field_features: Callable[[Mapping[str, tuple[np.ndarray, np.ndarray]]], np.ndarray],
    slots: int,
) -> tuple[ItemTables, np.ndarray]:
    """Tables of all items with no field hidden, then with one after another, and the attention with none hidden."""
    names, size = list(cache.names), len(items.rows)
    fields = [from_tree(Field, field) for field in cache.manifest["fields"]]
    title, spoken = cache.manifest["title"], {field.name for field in candidate_fields(fields)}
    values = {name: np.tile(items.values[name], (1 + len(names), 1)) for name in names}
    present = {name: np.tile(items.present[name], 1 + len(names)) for name in names}
    old = items.tables.take(np.tile(np.arange(size), 1 + len(names)))
    text, has_text, titles = old.text.copy(), old.has_text.copy(), old.titles.copy()
    for index, name in enumerate(names):
        at = slice(size * (1 + index), size * (2 + index))
        present[name][at] = False
        if name == title:
            titles[at] = -1
        if name in spoken and cache.candidates is not None and cache.candidates.modality == "text":
            frame = items.frame.with_columns(pl.lit(None, dtype=items.frame.schema[name]).alias(name))
            words = candidate_text(frame, fields, title)
            said = words.is_not_null().to_numpy()
            vectors, readable = encode_column(cache.encoder(CANDIDATE), words.fill_null(""))
            has_text[at] = said & readable
            text[at] = text_features(vectors, np.asarray(has_text[at]))
    output, attention = _read_fields(*item_qformer, *fill((values, present), (slots + 1) * (1 + len(names))))
    hidden = ItemTables(
        tokens=np.asarray(output.tokens, old.tokens.dtype)[: len(text)],
        vectors=np.asarray(output.vector, old.vectors.dtype)[: len(text)],
        fields=field_features({name: (values[name], present[name]) for name in names}),
        neighbors=old.neighbors,
        text=text,
        has_text=has_text,
        trained=old.trained,
        titles=titles,
    )
    return hidden, np.moveaxis(np.asarray(attention), 1, 0)[:size]


@functools.partial(jax.jit, static_argnums=0)
def _read_fields(module: ItemQFormer, params: Any, values: Any, present: Any) -> tuple[ItemOutput, jax.Array]:
    output, state = module.apply({"params": params}, values, present, mutable=["intermediates"])
    attention = cross_attention(dict(state["intermediates"]), ("qformer",))
    assert attention is not None
    return output, attention


def _encode(
    ranker: Ranker,
    variables: Any,
    tables: ItemTables,
    rows: np.ndarray,
    variants: Sequence[np.ndarray],
    slots: int,
    review_width: int,
) -> tuple[np.ndarray, np.ndarray | None]:
    """User vectors of histories of table rows, float32 [V, D], and the first one's attention, [layers, heads, ...]."""
    items_VxS = np.stack([newest(variant, slots) for variant in variants])
    most = len(variants) - len(variants[0]) + slots
    history = history_of_items(fill(items_VxS, most), review_width)
    tables, rows = fill((tables, rows), len(rows) // (len(variants[0]) + 1) * (slots + 1))
    users, attention = ranker.explained(variables, tables, rows, history)
    users = np.asarray(users, np.float32)[: len(variants)]
    return users, None if attention is None else np.asarray(attention[:, 0], np.float32)


def _standing(
    users_VxD: np.ndarray,
    targets_V: np.ndarray,
    item_vectors_IxD: np.ndarray,
    added_VxI: scipy.sparse.csr_matrix,
    own: int,
    left_out: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability and expected rank, float64 [V], of a target among all items that are not left out.

    Args:
      users_VxD: User vectors.
      targets_V: The target's scores, which may be those of a variant of the item.
      item_vectors_IxD: The catalogue.
      added_VxI: What is added to the inner products.
      own: The target's row, in whose place `targets_V` stand.
      left_out: Rows that are not ranked.
    """
    ranked = np.ones(len(item_vectors_IxD), bool)
    ranked[left_out] = ranked[own] = False
    greater, equal = np.zeros(len(users_VxD)), np.zeros(len(users_VxD))
    # Log of the sum of exp(score - target) over all ranked items; the target itself adds exp(0).
    log_sum = np.zeros(len(users_VxD))
    for start in range(0, len(ranked), _CHUNK):
        chunk = start + np.flatnonzero(ranked[start : start + _CHUNK])
        scores_VxC = users_VxD @ item_vectors_IxD[chunk].T + added_VxI[:, chunk].toarray()
        ahead_VxC = (scores_VxC - targets_V[:, None]).astype(np.float64)
        greater += (ahead_VxC > 0).sum(axis=1)
        equal += (ahead_VxC == 0).sum(axis=1)
        log_sum = np.logaddexp(log_sum, np.logaddexp.reduce(ahead_VxC, axis=1))
    return -log_sum, 1.0 + greater + 0.5 * equal
