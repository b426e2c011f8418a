"""`nqf.Recommender`: a trained run restored for use from Python."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import polars as pl
import scipy.sparse

from nqf.config import ConfigError
from nqf.data.catalogue import canonical_items
from nqf.evaluation.cooccurrence import WINDOW
from nqf.evaluation.ranking import dense_batches, raise_some, rank_vectors, ranks_from_scores, top_k
from nqf.fields.cache import encode_items
from nqf.pipelines.batches import ItemTables
from nqf.pipelines.histories import gather_history, history_of_items, newest
from nqf.serving.explain import Explanation, Items, explain
from nqf.serving.overlay import read_overlay
from nqf.stages.graph import require
from nqf.stages.item import ENCODE_CHUNK
from nqf.stages.joint import load_joint, title_tokens
from nqf.stages.rank import Trained
from nqf.stages.run import Run, open_run
from nqf.stages.user import load_users


class Recommender:
    """Ranks the catalogue for a history. Restore one with `Recommender.load`.

    Attributes:
      item_ids: Ids of all items, in the order of `item_vectors`.
      item_vectors: float32 [items, dim]; the inner product with a row of `encode_users` ranks, to which the joint stage
        adds what `evaluation.cooccurrence_weight` says.
      available: bool [items], False for items that were removed: known in histories, never recommended.
    """

    def __init__(self, run: Run, trained: Trained, cooccurrence_weight: float) -> None:
        self._trained = trained
        self._run, self._ranker, self._variables = run, trained.ranker, trained.variables
        self._tokenizer, self._cooccurrence_weight = trained.parts.tokenizer, cooccurrence_weight
        self._items = trained.load_item_qformer()
        # Test targets do not count, so that trying the recommender on test users tells the truth.
        self._cooccurrence = run.cooccurrence(run.dataset.split.test) if cooccurrence_weight else None
        self.item_ids: list[str] = list(run.dataset.catalogue.item_ids)
        self._titles: list[str] = [
            title if title is not None else ""
            for chunk in run.dataset.catalogue.chunks(["title"], 65_536)
            for title in chunk["title"]
        ]
        self._row_of = {item_id: row for row, item_id in enumerate(self.item_ids)}
        self.item_vectors: np.ndarray = self._ranker.item_vectors(self._variables)
        self.available = np.ones(len(self.item_ids), bool)
        # Row of an item that was added or updated to its place in a frame, and its encoded fields.
        self._changed: dict[int, tuple[int, pl.DataFrame, Mapping[str, tuple[np.ndarray, np.ndarray]]]] = {}

    @classmethod
    def load(cls, run: str | Path, *, stage: str = "joint") -> Recommender:
        """Restores a run's checkpoints, whatever number of devices wrote them, and its changed items (`nqf.items`).

        Args:
          run: Run folder.
          stage: `joint`, or `user` for the User Q-Former without the language model.

        Raises:
          StageError: The run or the stage is missing or stale.
          CheckpointError: The checkpoint does not fit the run's configuration.
          CacheError: The changed items cannot be used.
        """
        opened = open_run(run)
        if stage not in ("joint", "user"):
            raise ConfigError(f"stage {stage!r} ranks nothing; use 'joint' or 'user'")
        require(opened, stage)
        trained = load_joint(opened) if stage == "joint" else load_users(opened)
        weight = opened.config.evaluation.cooccurrence_weight if stage == "joint" else 0.0
        recommender = cls(opened, trained, weight)
        overlay = read_overlay(opened.folder / "items", opened.dataset.catalogue, opened.cache)
        recommender._put(overlay.frame, overlay.encoded)
        recommender.available = np.array([item_id not in overlay.removed for item_id in recommender.item_ids])
        return recommender

    @property
    def trained(self) -> Trained:
        """The restored stage, with the item tables as they are now."""
        return dataclasses.replace(self._trained, ranker=self._ranker)

    def recommend(
        self, *, history: Sequence[str] | None = None, user: str | None = None, k: int = 10, repeats: bool | None = None
    ) -> pl.DataFrame:
        """The best `k` items for a history of item ids, oldest first, or for a known user.

        A known user's times, ratings and reviews are read too; a bare history has none.

        Args:
          history: Item ids.
          user: User id, in place of a history.
          k: Number of items.
          repeats: Whether items of the history may be recommended; by default what `evaluation.repeats` says.

        Returns:
          Frame with rank (1-based), item_id, title and score (inner product with the user vector of length one, and
          what co-occurrence adds; float32).

        Raises:
          ValueError: Neither or both of history and user, an empty history, or an unknown id.
        """
        if (history is None) == (user is None):
            raise ValueError("give either a history of item ids or a user id")
        if user is not None:
            vectors, seen = self._encode_known([self._user_row(user)])
        else:
            vectors, seen = self._encode_histories([history]), [self._rows(history)]
        scores, rows = self._best(vectors, seen, k, repeats)
        return self._frame(rows[0], scores[0])

    def recommend_all(self, *, k: int = 10, repeats: bool | None = None) -> Iterable[pl.DataFrame]:
        """Recommendations for every user of the run, in frames of many users with a user_id column."""
        interactions, size = self._run.dataset.interactions, self._ranker.batch_size
        for start in range(0, len(interactions.user_ids), size):
            users = list(range(start, min(start + size, len(interactions.user_ids))))
            vectors, seen = self._encode_known(users)
            scores, rows = self._best(vectors, seen, k, repeats)
            yield pl.concat(
                self._frame(rows[index], scores[index]).select(
                    pl.lit(interactions.user_ids[user]).alias("user_id"), pl.all()
                )
                for index, user in enumerate(users)
            )

    def rank(
        self, histories: Sequence[Sequence[str]], item_ids: Sequence[str], *, left_out: Sequence[Sequence[str]]
    ) -> np.ndarray:
        """Expected rank under ties of one item after each history, float64 [histories], 1 for the best.

        Args:
          histories: Item ids, oldest first.
          item_ids: The item to rank after each.
          left_out: Item ids that are not ranked beside each; no part of it may be empty.

        Raises:
          ValueError: An empty history or an unknown item id.
        """
        rows = self._left_out([np.unique(self._rows(ids)) for ids in left_out], False)
        vectors, targets = self._encode_histories(histories), self._rows(item_ids)
        if self._cooccurrence is None:
            return rank_vectors(_unit(vectors), self.item_vectors, targets, rows)
        pairs, ranks = self._pairs([self._rows(history) for history in histories]), []
        for span in dense_batches(len(targets), len(self.item_ids), self._ranker.batch_size):
            scores = vectors[span] @ self.item_vectors.T + pairs[span].toarray()
            ranks.append(ranks_from_scores(scores, targets[span], rows[span]))
        return np.concatenate([np.zeros(0), *ranks])

    def explain(self, history: Sequence[str], item_id: str) -> Explanation:
        """What speaks for an item after a history of item ids, oldest first: see `nqf.serving.explain.Explanation`.

        Only the newest items of the history that the model reads are judged.

        Raises:
          ValueError: An empty history or an unknown item id.
        """
        seen = self._rows(history)
        rows = np.concatenate([seen[-self._ranker.max_history :], self._rows([item_id])])
        reviews = self._run.features.reviews
        explanation = explain(
            self._contents(rows),
            ranker=self._ranker,
            variables=self._variables,
            item_qformer=self._items,
            cache=self._run.cache,
            text_features=self._run.text_features,
            field_features=self._run.field_features,
            item_vectors=self.item_vectors,
            pairs=self._pairs,
            older=seen[: -self._ranker.max_history],
            left_out=self._left_out([seen], None)[0],
            review_width=0 if reviews is None else reviews.values.shape[1],
        )
        positions = np.arange(len(seen) - len(rows) + 2, len(seen) + 1)
        return dataclasses.replace(
            explanation, history=explanation.history.insert_column(0, pl.Series("position", positions))
        )

    def _contents(self, rows: np.ndarray) -> Items:
        """Canonical values and encoded fields of some items."""
        cache, catalogue = self._run.cache, self._run.dataset.catalogue
        ids = pl.DataFrame({"item_id": [self.item_ids[row] for row in rows]})
        stored = (
            pl.scan_parquet(catalogue.path, glob=False)
            .filter(pl.col("item_id").is_in(ids["item_id"].implode()))
            .collect()
        )
        changed = [self._changed[row][1][self._changed[row][0]] for row in dict.fromkeys(rows) if row in self._changed]
        changed = pl.concat([stored.head(0), *changed])
        stored = stored.filter(~pl.col("item_id").is_in(changed["item_id"].implode()))
        frame = ids.join(pl.concat([stored, changed.select(stored.columns)]), on="item_id", maintain_order="left")
        values, present = {}, {}
        for name in cache.names:
            # Items beyond the catalogue are among the changed ones.
            values[name], present[name] = cache.gather(name, np.minimum(rows, cache.items - 1))
            for place, row in enumerate(rows):
                if row in self._changed:
                    at, _, encoded = self._changed[row]
                    values[name][place], present[name][place] = encoded[name][0][at], encoded[name][1][at]
        return Items(rows=rows, frame=frame, values=values, present=present)

    def encode_users(self, histories: Sequence[Sequence[str]]) -> np.ndarray:
        """User vectors of histories of item ids, oldest first: float32 [users, dim], rows of unit norm.

        Raises:
          ValueError: An empty history or an unknown item id.
        """
        return _unit(self._encode_histories(histories))

    def encode_all_users(self) -> tuple[list[str], np.ndarray]:
        """The run's users and the vectors of their whole histories: ids and float32 [users, dim], rows of unit norm."""
        users, size = self._run.dataset.interactions.user_ids, self._ranker.batch_size
        parts = [
            self._encode_known(range(start, min(start + size, len(users))))[0] for start in range(0, len(users), size)
        ]
        return list(users), _unit(np.concatenate(parts))

    def add_items(self, items: pl.DataFrame | Sequence[Mapping[str, Any]]) -> None:
        """Adds new items without retraining: encodes their fields, appends their tokens and vectors.

        The run folder is not changed; `python -m nqf.items` does that.

        Args:
          items: item_id and the schema's columns; missing columns are missing values.

        Raises:
          DataError: A duplicate or known item id, or a value that does not parse.
        """
        frame = items if isinstance(items, pl.DataFrame) else pl.DataFrame(list(items))
        frame = canonical_items(frame, self._run.dataset.catalogue.schema, taken=self._row_of.keys())
        self._put(frame, encode_items(self._run.cache, frame))

    def _put(self, frame: pl.DataFrame, encoded: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
        """Appends new items and replaces the content of known ones; no other row changes."""
        if not len(frame):
            return
        rows = np.array([self._row_of.get(item_id, -1) for item_id in frame["item_id"]], np.int32)
        known = rows >= 0
        rows[~known] = len(self.item_ids) + np.arange((~known).sum(), dtype=np.int32)
        titles = [title or "" for title in frame["title"]]
        # A known item keeps its learned vector: its row is the same. A new one has none.
        trained = known & self._ranker.tables.trained[np.where(known, rows, 0)]
        new = self._encode(encoded, titles, trained)
        vectors = self._ranker.item_vectors(self._variables, new, rows)

        def merged(old: np.ndarray, new: np.ndarray) -> np.ndarray:
            table = np.concatenate([old, new[~known]])
            table[rows[known]] = new[known]
            return table

        self._ranker = dataclasses.replace(self._ranker, tables=jax.tree.map(merged, self._ranker.tables, new))
        self.item_vectors = merged(self.item_vectors, vectors)
        self.available = merged(self.available, np.ones(len(rows), bool))
        self._changed |= {row: (at, frame, encoded) for at, row in enumerate(rows.tolist())}
        for item_id, row, title in zip(frame["item_id"], rows.tolist(), titles, strict=True):
            if row == len(self.item_ids):
                self.item_ids.append(item_id)
                self._titles.append(title)
                self._row_of[item_id] = row
            self._titles[row] = title

    def _encode(
        self, encoded: Mapping[str, tuple[np.ndarray, np.ndarray]], titles: Sequence[str], trained: np.ndarray
    ) -> ItemTables:
        """Item tables of some encoded items."""
        names, (module, params), old = self._run.cache.names, self._items, self._ranker.tables
        encode = jax.jit(lambda params, values, present: module.apply({"params": params}, values, present))
        tokens, vectors = [], []
        for start in range(0, len(titles), ENCODE_CHUNK):
            chunk = slice(start, start + ENCODE_CHUNK)
            values, present = ({name: encoded[name][part][chunk] for name in names} for part in (0, 1))
            output = encode(params, values, present)
            tokens.append(np.asarray(output.tokens, old.tokens.dtype))
            vectors.append(np.asarray(output.vector, old.vectors.dtype))
        nothing = np.zeros((len(titles), self._run.text[0].shape[1]), np.float32), np.zeros(len(titles), bool)
        text, has_text = encoded.get("_candidate", nothing)
        return ItemTables(
            tokens=np.concatenate(tokens),
            vectors=np.concatenate(vectors),
            fields=self._run.field_features(encoded),
            text=self._run.text_features(text, has_text),
            has_text=has_text,
            trained=trained,
            titles=title_tokens(titles, old.titles.shape[1], self._tokenizer),
        )

    def _left_out(self, seen: Sequence[np.ndarray], repeats: bool | None) -> list[np.ndarray]:
        """Rows that are not recommended to each user: what was removed and, without `repeats`, what is seen."""
        repeats = self._run.config.evaluation.repeats if repeats is None else repeats
        removed = np.flatnonzero(~self.available)
        return [removed if repeats else np.concatenate([rows, removed]) for rows in seen]

    def _encode_known(self, users: Sequence[int]) -> tuple[np.ndarray, list[np.ndarray]]:
        interactions, slots = self._run.dataset.interactions, self._ranker.max_history
        spans = [(interactions.offsets[user], interactions.offsets[user + 1]) for user in users]
        events = np.stack([newest(np.arange(start, stop), slots) for start, stop in spans])
        vectors = self._ranker.encode(self._variables, gather_history(self._run.features, events))
        return vectors, [interactions.items[start:stop] for start, stop in spans]

    def _encode_histories(self, histories: Sequence[Sequence[str]]) -> np.ndarray:
        slots = self._ranker.max_history
        reviews = self._run.features.reviews
        width = 0 if reviews is None else reviews.values.shape[1]
        rows = np.stack([newest(self._rows(history), slots) for history in histories])
        parts = [
            self._ranker.encode(self._variables, history_of_items(rows[start : start + self._ranker.batch_size], width))
            for start in range(0, len(rows), self._ranker.batch_size)
        ]
        return np.concatenate(parts)

    def _best(
        self, vectors: np.ndarray, seen: Sequence[np.ndarray], k: int, repeats: bool | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores and rows of the best items, given user vectors as encoded and the users' whole histories."""
        left_out, unit = self._left_out(seen, repeats), _unit(vectors)
        best = top_k(unit, self.item_vectors, k, left_out)
        if self._cooccurrence is None:
            return best
        scale = scipy.sparse.diags(1 / np.maximum(np.linalg.norm(vectors, axis=1), 1e-12))
        raised = (scale @ self._pairs(seen)).tocsr().astype(np.float32)
        return raise_some(best, unit, self.item_vectors, raised, left_out)

    def _pairs(self, histories: Sequence[np.ndarray]) -> scipy.sparse.csr_matrix:
        """What co-occurrence adds to the scores of user vectors as encoded, float32 [users, items].

        Args:
          histories: Item rows, oldest first.
        """
        if self._cooccurrence is None:
            return scipy.sparse.csr_matrix((len(histories), len(self.item_ids)), dtype=np.float32)
        newest_BxH = np.stack([newest(history, WINDOW)[::-1] for history in histories])
        # Items beyond the catalogue were in no training event.
        newest_BxH = np.where(newest_BxH < len(self._run.dataset.catalogue.item_ids), newest_BxH, -1)
        pairs = self._cooccurrence_weight * self._cooccurrence.scores(newest_BxH)
        pairs.resize(len(histories), len(self.item_ids))
        return pairs

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
