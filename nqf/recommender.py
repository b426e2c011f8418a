"""`nqf.Recommender`: a trained run restored for use from Python."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import polars as pl

from nqf.config import ConfigError
from nqf.data.catalogue import canonical_items
from nqf.evaluation.ranking import top_k
from nqf.fields.cache import encode_items
from nqf.models.item_qformer import ItemQFormer
from nqf.models.recommender import ItemTables
from nqf.pipelines.histories import gather_history, history_of_items, newest
from nqf.training.item_stage import load_items
from nqf.training.joint_stage import load_joint, title_tokens
from nqf.training.rankers import Ranker
from nqf.training.run import Run, open_run
from nqf.training.stages import require
from nqf.training.user_stage import load_users


class Recommender:
    """Ranks the catalogue for a history. Restore one with `Recommender.load`.

    Attributes:
      item_ids: Ids of all items, in the order of `item_vectors`.
      item_vectors: float32 [items, dim]; the inner product with a row of `encode_users` ranks.
    """

    def __init__(
        self, run: Run, ranker: Ranker, variables: Any, items: tuple[ItemQFormer, Any], tokenizer: Any
    ) -> None:
        self._run, self._ranker, self._variables = run, ranker, variables
        self._items, self._tokenizer = items, tokenizer
        self.item_ids: list[str] = list(run.dataset.catalogue.item_ids)
        self._titles: list[str] = [
            title if title is not None else ""
            for chunk in run.dataset.catalogue.chunks(["title"], 65_536)
            for title in chunk["title"]
        ]
        self._row_of = {item_id: row for row, item_id in enumerate(self.item_ids)}
        self.item_vectors: np.ndarray = ranker.item_vectors(variables)

    @classmethod
    def load(cls, run: str | Path, *, stage: str = "joint") -> Recommender:
        """Restores a run's checkpoints, whatever number of devices wrote them.

        Args:
          run: Run folder.
          stage: `joint`, or `user` for the User Q-Former without the language model.

        Raises:
          StageError: The run or the stage is missing or stale.
          CheckpointError: The checkpoint does not fit the run's configuration.
        """
        opened = open_run(run)
        require(opened, stage)
        if stage == "joint":
            joint, ranker, variables, items = load_joint(opened)
            return cls(opened, ranker, variables, items, joint.tokenizer)
        if stage == "user":
            ranker, variables = load_users(opened)
            return cls(opened, ranker, variables, load_items(opened), None)
        raise ConfigError(f"stage {stage!r} ranks nothing; use 'joint' or 'user'")

    def recommend(
        self, *, history: Sequence[str] | None = None, user: str | None = None, k: int = 10, mask_seen: bool = True
    ) -> pl.DataFrame:
        """The best `k` items for a history of item ids, oldest first, or for a known user.

        A known user's times, ratings and reviews are read too; a bare history has none.

        Returns:
          Frame with rank (1-based), item_id, title and score (cosine-scaled inner product, float32).

        Raises:
          ValueError: Neither or both of history and user, an empty history, or an unknown id.
        """
        if (history is None) == (user is None):
            raise ValueError("give either a history of item ids or a user id")
        if user is not None:
            vectors, seen = self._encode_known([self._user_row(user)])
        else:
            vectors, seen = self.encode_users([history]), [self._rows(history)]
        scores, rows = top_k(vectors, self.item_vectors, k, seen if mask_seen else None)
        return self._frame(rows[0], scores[0])

    def recommend_all(self, *, k: int = 10, mask_seen: bool = True) -> Iterable[pl.DataFrame]:
        """Recommendations for every user of the run, in frames of many users with a user_id column."""
        interactions, size = self._run.dataset.interactions, self._ranker.batch_size
        for start in range(0, len(interactions.user_ids), size):
            users = list(range(start, min(start + size, len(interactions.user_ids))))
            vectors, seen = self._encode_known(users)
            scores, rows = top_k(vectors, self.item_vectors, k, seen if mask_seen else None)
            yield pl.concat(
                self._frame(rows[index], scores[index]).select(
                    pl.lit(interactions.user_ids[user]).alias("user_id"), pl.all()
                )
                for index, user in enumerate(users)
            )

    def encode_users(self, histories: Sequence[Sequence[str]]) -> np.ndarray:
        """User vectors of histories of item ids, oldest first: float32 [users, dim], rows of unit norm.

        Raises:
          ValueError: An empty history or an unknown item id.
        """
        slots = self._ranker.max_history
        reviews = self._run.features.reviews
        width = 0 if reviews is None else reviews.values.shape[1]
        rows = np.stack([newest(self._rows(history), slots) for history in histories])
        parts = [
            self._ranker.encode(self._variables, history_of_items(rows[start : start + self._ranker.batch_size], width))
            for start in range(0, len(rows), self._ranker.batch_size)
        ]
        return _unit(np.concatenate(parts))

    def add_items(self, items: pl.DataFrame | Sequence[Mapping[str, Any]]) -> None:
        """Adds new items without retraining: encodes their fields, appends their tokens and vectors.

        The run folder is not changed.

        Args:
          items: item_id and the schema's columns; missing columns are missing values.

        Raises:
          DataError: A duplicate or known item id, or a column that does not parse.
        """
        catalogue = self._run.dataset.catalogue
        frame = items if isinstance(items, pl.DataFrame) else pl.DataFrame(list(items))
        frame = canonical_items(frame, catalogue.schema, taken=self._row_of.keys())
        encoded = encode_items(self._run.cache, frame)
        values = {name: encoded[name][0] for name in self._run.cache.names}
        present = {name: encoded[name][1] for name in self._run.cache.names}
        module, params = self._items
        output = module.apply({"params": params}, values, present)
        text, has_text = encoded["_candidate"]
        titles = [title or "" for title in frame["title"]]
        old = self._ranker.tables
        new = ItemTables(
            tokens=np.asarray(output.tokens, old.tokens.dtype),
            vectors=np.asarray(output.vector, old.vectors.dtype),
            text=np.where(has_text[:, None], text, 0).astype(old.text.dtype),
            has_text=has_text,
            titles=title_tokens(titles, old.titles.shape[1], self._tokenizer),
        )
        tables = jax.tree.map(lambda *parts: np.concatenate(parts), old, new)
        rows = np.arange(len(self.item_ids), len(self.item_ids) + len(frame), dtype=np.int32)
        self._ranker = dataclasses.replace(self._ranker, tables=tables)
        vectors = self._ranker.items(self._variables, new, rows)
        self.item_vectors = np.concatenate([self.item_vectors, np.asarray(vectors, np.float32)])
        self.item_ids += frame["item_id"].to_list()
        self._titles += titles
        self._row_of |= {item_id: int(row) for item_id, row in zip(frame["item_id"], rows, strict=True)}

    def _encode_known(self, users: Sequence[int]) -> tuple[np.ndarray, list[np.ndarray]]:
        interactions, slots = self._run.dataset.interactions, self._ranker.max_history
        spans = [(interactions.offsets[user], interactions.offsets[user + 1]) for user in users]
        events = np.stack([newest(np.arange(start, stop), slots) for start, stop in spans])
        vectors = self._ranker.encode(self._variables, gather_history(self._run.features, events))
        return _unit(vectors), [interactions.items[start:stop] for start, stop in spans]

    def _user_row(self, user: str) -> int:
        return self._run.dataset.interactions.user_row(user)

    def _rows(self, history: Sequence[str]) -> np.ndarray:
        if not len(history):
            raise ValueError("the history is empty; give at least one item id")
        unknown = [item for item in history if item not in self._row_of]
        if unknown:
            raise ValueError(f"unknown item ids in the history: {', '.join(map(repr, unknown[:5]))}")
        return np.array([self._row_of[item] for item in history], np.int64)

    def _frame(self, rows: np.ndarray, scores: np.ndarray) -> pl.DataFrame:
        kept = rows >= 0
        rows, scores = rows[kept], scores[kept]
        return pl.DataFrame(
            {
                "rank": np.arange(1, len(rows) + 1),
                "item_id": [self.item_ids[row] for row in rows],
                "title": [self._titles[row] for row in rows],
                "score": scores.astype(np.float32),
            }
        )


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
