"""User tower and item tower as StableHLO, for `jax.export` or any other reader of it, without nqf.

    user-<B>.bin    item rows int32 [B, N], newest last, -1 in padding; calendar int32 [B, N, 3], age int32 [B, N] and
                    ratings int32 [B, N], -1 where unknown: see `nqf.pipelines.batches.History`. Returns float32 [B, D],
                    rows of unit norm
    item-<B>.bin    item rows int32 [B]. Returns float32 [B, D]
    ids.json        item id of every row
    towers.json     shapes, and what the score is

Parameters and item tables are constants of the programs. The inner product of both ranks; what co-occurrence adds to
the joint stage's score is not in them, and neither are reviews.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nqf import files
from nqf.pipelines.batches import History
from nqf.serving.recommender import Recommender

BATCHES = (1, 64)
"""Sizes of the batches; a program is of one size."""
PLATFORMS = ("cpu", "cuda", "tpu")


def write_towers(recommender: Recommender, folder: Path) -> None:
    """Writes the towers of a recommender, with its items as they are now, into an existing folder."""
    ranker, variables = recommender.trained.ranker, recommender.trained.variables
    tables = jax.tree.map(np.asarray, ranker.tables)
    slots, width = ranker.max_history, recommender.review_width

    def rows_of(items: jax.Array) -> Any:
        return jax.tree.map(lambda table: jnp.asarray(table)[jnp.maximum(items, 0)], tables)

    def user(items: jax.Array, calendar: jax.Array, age: jax.Array, ratings: jax.Array) -> jax.Array:
        flat = items.reshape(-1)
        # The tables of a batch have a row for every slot, so that an item's number is its slot's.
        numbers = jnp.arange(flat.size, dtype=jnp.int32).reshape(items.shape)
        history = History(
            items=jnp.where(items >= 0, numbers, -1),
            calendar=calendar,
            age=age,
            ratings=ratings,
            reviews=jnp.zeros((*items.shape, width), jnp.float32),
            has_review=jnp.zeros(items.shape, bool),
        )
        vectors = ranker.users(variables, rows_of(flat), flat, history).astype(jnp.float32)
        return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)

    def item(items: jax.Array) -> jax.Array:
        return ranker.items(variables, rows_of(items), items).astype(jnp.float32)

    def shape(*sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, jnp.int32)

    for batch in BATCHES:
        history = (shape(batch, slots), shape(batch, slots, 3), shape(batch, slots), shape(batch, slots))
        for name, tower, arguments in (("user", user, history), ("item", item, (shape(batch),))):
            made = jax.export.export(jax.jit(tower), platforms=PLATFORMS)(*arguments)
            with files.whole(folder / f"{name}-{batch}.bin") as file:
                file.write(made.serialize())
    files.write_json(folder / "ids.json", recommender.item_ids)
    about = {
        "batches": BATCHES,
        "slots": slots,
        "width": int(recommender.item_vectors.shape[1]),
        "platforms": PLATFORMS,
    }
    files.write_text(folder / "towers.json", json.dumps(about | {"score": "inner product"}, indent=1))
