"""`nqf.Recommender`: a trained run restored for use from Python."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import polars as pl
import scipy.sparse

from nqf import __version__, files
from nqf.config import ConfigError
from nqf.data.catalogue import canonical_items
from nqf.data.errors import DataError
from nqf.data.load import open_short_users
from nqf.data.schema import Schema
from nqf.evaluation.baselines import known_events
from nqf.evaluation.choice import Score
from nqf.evaluation.cooccurrence import Cooccurrence, stand_in
from nqf.evaluation.factors import factorize
from nqf.evaluation.ranking import dense_batches, raise_one, raise_some, rank_vectors, ranks_from_scores
from nqf.fields.cache import encode_items
from nqf.fields.encoder import unit_rows
from nqf.models.item_qformer import read_fields
from nqf.pipelines.batches import ItemTables
from nqf.pipelines.histories import (
    bucket_of,
    distinct_of,
    gather_history,
    history_of_items,
    newest,
    places_among,
    slot_buckets,
)
from nqf.serving import overlay
from nqf.serving.explain import Explanation, Items, explain
from nqf.serving.filters import Filters
from nqf.serving.histories import Past, checked_ids, events_of, features_of, given_pasts, known_of, pasts_of, some_ids
from nqf.serving.index import SAMPLE, TARGET, Kind, load_faiss
from nqf.serving.stock import SIZES, Changed, Stock, fill, powers, sizes_of, together
from nqf.stages import folder as folders
from nqf.stages.graph import require, served
from nqf.stages.joint import title_tokens
from nqf.stages.rank import Trained
from nqf.stages.records import StageError, read_artifact
from nqf.stages.remote import local_run
from nqf.stages.run import Run, open_run
from nqf.stages.score import dense_score_of, load_scored, memory_of, weigh_text
from nqf.stages.user import load_users

_HUB_METADATA = """---
library_name: nqf
tags: [recommendation, sequential-recommendation, jax, flax]
---

"""
# New items that are encoded at a time.
_ITEMS = 64
# Items of the lists by vectors alone, to which counts are added.
_WIDE = 64
_log = logging.getLogger(__name__)
Fallback = Literal["popular", "refuse"]
Frame = pl.DataFrame | Sequence[Mapping[str, Any]]


class Recommender:
    """Ranks the catalogue for a history. Restore one with `Recommender.load`.

    Its methods may be called from several threads at once. Users are computed in batches of few sizes (1, 8, 64, 512):
    the same request always gives the same bits, and in another batch its scores differ by rounding, 1e-6 at most, so
    that the lists are the same but for items whose scores are that near to each other.

    Attributes:
      item_ids: Ids of all items, in the order of `item_vectors`.
      item_vectors: float32 [items, dim]; the inner product with a row of `encode_users` ranks, to which the joint stage
        adds counted pairs where there are any.
      score: What counts and texts weigh beside what the vectors learned.
      memory: The counted pairs of the catalogue, without those that stand in for new items; None for none.
      available: bool [items], False for items that were removed: known in histories, never recommended.
    """

    def __init__(
        self, run: Run, trained: Trained, stage: str, score: Score | None = None, memory: Cooccurrence | None = None
    ) -> None:
        self._run, self._ranker, self._variables, self._stage = run, trained.ranker, trained.variables, stage
        self._trained, self._tokenizer = trained, trained.parts.tokenizer
        self._items = trained.load_item_qformer()
        self.score, self.memory = score or Score(), memory
        self._where: str | Path = run.folder
        self._counted_of: tuple[Stock, np.ndarray, Cooccurrence] | None = None
        self._known = known_of(run)
        self._short = open_short_users(run.folder / "data")
        self._filters = Filters(run.dataset.catalogue)
        self._changing = threading.Lock()
        item_ids = list(run.dataset.catalogue.item_ids)
        titles = [title or "" for chunk in run.dataset.catalogue.chunks(["title"], 65_536) for title in chunk["title"]]
        self._stock = Stock.of(item_ids, titles, self._ranker.tables, self._ranker.item_vectors(self._variables))

    @classmethod
    def load(cls, run: str | Path, *, stage: str = "joint", index: Kind = "exact") -> Recommender:
        """Restores a run's checkpoints, whatever number of devices wrote them, and its changed items (`nqf.items`).

        Args:
          run: Run folder or its address as text (`gs://`, `s3://`, ...), what `save` wrote, or `owner/name` of a
            repository that `push_to_hub` wrote.
          stage: `joint`, or `user` for the User Q-Former without the language model.
          index: `exact` compares every item. `approximate` builds an index of the items (`nqf[index]`) that finds most
            of the best ones for a fraction of the work, which pays from some hundred thousand items on; filters and
            changes of items are exact with it, and so are `rank`, `explain`, `similar_items` and evaluation. Where it
            does not find 95 % of the exact lists of a sample of the run's users, a warning is logged and all items are
            compared.

        Raises:
          RuntimeError: An index is wanted and faiss is not installed.
          StageError: The run or the stage is missing or stale.
          CheckpointError: The checkpoint does not fit the run's configuration.
          CacheError: The changed items cannot be used.
          DataError: An address that cannot be read.
        """
        if not Path(run).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(run)):
            run = _from_hub(str(run))
        with local_run(run) as (folder, _):
            recommender = cls._open(open_run(folder), stage, index)
        recommender._where = run
        return recommender

    @classmethod
    def _open(cls, opened: Run, stage: str, index: Kind) -> Recommender:
        if stage not in ("joint", "user"):
            raise ConfigError(f"stage {stage!r} ranks nothing; use 'joint' or 'user'")
        if index not in ("exact", "approximate"):
            raise ConfigError(f"index {index!r}: use 'exact' or 'approximate'")
        if index == "approximate":
            # Before minutes are spent on what could not be used.
            load_faiss()
        require(opened, stage)
        if stage == "joint":
            trained, score, memory = load_scored(opened)
            recommender = cls(opened, trained, stage, score, memory)
        else:
            recommender = cls(opened, load_users(opened, before=opened.dataset.split.test), stage)
        changed = overlay.read_overlay(opened.folder / "items", opened.dataset.catalogue, opened.cache)
        recommender._put(changed.frame, changed.encoded)
        recommender._remove(changed.removed)
        if index == "approximate":
            recommender._build_index()
        return recommender

    def _build_index(self) -> None:
        """Searches approximately from now on, if that finds enough of the exact lists of some users."""
        stock, interactions = self._stock, self._run.dataset.interactions
        users = np.unique(np.linspace(0, len(interactions.user_ids) - 1, SAMPLE).astype(np.int64))
        pasts = pasts_of(self._run.features, interactions, users.tolist())
        left_out = [np.zeros(0, np.int64) if self.repeats else past.items for past in pasts]
        indexed = stock.indexed(unit_rows(self._encode(stock, pasts)), left_out)
        assert indexed.index is not None, "it was just built"
        if not indexed.index.recall >= TARGET:
            _log.warning(
                "the index finds too little of the exact lists of %d users (%s); all items are compared",
                len(users),
                indexed.index,
            )
            return
        _log.info("index of %s items: %s", f"{indexed.index.held:,}", indexed.index)
        self._stock = indexed

    def __repr__(self) -> str:
        stock = self._stock
        known = len(self._run.dataset.catalogue.item_ids)
        changes = [f"{stock.count - known:,} added"] if stock.count > known else []
        changes += [f"{gone:,} removed"] if (gone := int((~stock.available).sum())) else []
        changes = [f"({', '.join(changes)})"] if changes else []
        users = len(self._run.dataset.interactions.user_ids) + (len(self._short.user_ids) if self._short else 0)
        return (
            f"<nqf.Recommender of {self._run.folder}: stage {self._stage}, {stock.count:,} items"
            f"{''.join(f' {change}' for change in changes)}, {users:,} users, vectors of {stock.vectors.shape[1]}"
            f"{f'; search {stock.index}' if stock.index else ''}>"
        )

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self._run.folder

    @property
    def stage(self) -> str:
        """The stage that ranks."""
        return self._stage

    @property
    def trained(self) -> Trained:
        """The restored stage, with the item tables as they are now."""
        stock = self._stock
        tables = stock.take(np.arange(stock.count)) if stock.changed else self._ranker.tables
        return dataclasses.replace(self._trained, ranker=dataclasses.replace(self._ranker, tables=tables))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Lengths up to which histories share a program."""
        return slot_buckets(self._ranker.max_history)

    @property
    def review_width(self) -> int:
        """Width of the review embeddings that the models read; 0 without."""
        reviews = self._known.reviews
        return 0 if reviews is None else reviews.values.shape[1]

    @property
    def item_ids(self) -> list[str]:
        """Ids of all items, in the order of `item_vectors`."""
        return self._stock.item_ids[: self._stock.count]

    @property
    def item_vectors(self) -> np.ndarray:
        """float32 [items, dim]."""
        return self._stock.vectors

    @property
    def available(self) -> np.ndarray:
        """bool [items], False for items that were removed."""
        return self._stock.available

    @property
    def search(self) -> dict[str, Any]:
        """How the best items are found: `kind`, `exact` or `approximate`.

        With `approximate` there is what is known of the index: the `recall@10` of exact lists that was measured when it
        was made, `lists` and how many of them are read for the best 10 and 100, `items` in it and `behind` it (changed
        since, which are compared one by one), `seconds` that making it took, and its `bytes`.
        """
        stock = self._stock
        if stock.index is None:
            return {"kind": "exact"}
        return {"kind": "approximate", **stock.index.facts(), "behind": len(stock.behind)}

    @property
    def schema(self) -> Schema:
        """Fields of the items."""
        return self._run.dataset.catalogue.schema

    @property
    def titles(self) -> list[str]:
        """Titles of all items, empty where there is none."""
        return self._stock.titles[: self._stock.count]

    @property
    def user_ids(self) -> list[str]:
        """The run's users, those with too few events to be trained on last."""
        return [*self._run.dataset.interactions.user_ids, *(self._short.user_ids if self._short else [])]

    def events(self) -> pl.DataFrame:
        """The events of the users that were trained on, users one after the other, each user's oldest first.

        Returns:
          Frame with user_id, item_id, timestamp (unix seconds), rating, review, where there are any, and part: `train`,
          or `valid` and `test` for what is to be predicted there from the user's events before it; null for the rest.
          With `data.refit`, those of `valid` were trained on at last.
        """
        return events_of(self._run)

    # Many parameters: what may be asked, by name; none is needed but for one of the first four.
    def recommend(
        self,
        *,
        history: Sequence[str] | None = None,
        histories: Sequence[Sequence[str]] | None = None,
        user: str | None = None,
        users: Sequence[str] | None = None,
        k: int = 10,
        exclude: Collection[str] = (),
        only: Collection[str] | None = None,
        where: Mapping[str, Any] | None = None,
        fallback: Fallback | None = None,
        repeats: bool | None = None,
        times: Sequence[Any] | None = None,
        ratings: Sequence[Any] | None = None,
        reviews: Sequence[Any] | None = None,
    ) -> pl.DataFrame:
        """The best `k` items for histories of item ids, oldest first, or for known users.

        Filters are exact: what they leave out is masked before the best are looked for.

        Args:
          history: Item ids.
          histories: Several of them.
          user: User id, in place of a history; the user's times, ratings and reviews are read too.
          users: Several of them.
          k: Number of items.
          exclude: Item ids that are not recommended; unknown ones change nothing.
          only: Item ids of which some are recommended.
          where: Field name to what an item has to have: a value or a list of values, one of which suffices; for numbers
            and times (unix seconds) also a pair (least, most), None for no bound.
          fallback: Who gets the popular items: by default those with an empty history, while unknown users are refused;
            `popular` for both, `refuse` for neither.
          repeats: Whether items of the history may be recommended; by default what `evaluation.repeats` says.
          times: With histories: the time of each item, as dates, ISO 8601 or unix seconds, None where unknown.
          ratings: With histories: the rating of each item, None where unknown.
          reviews: With histories: what the user wrote of each item, None where nothing.

        Returns:
          Frame with rank (1-based), item_id, title, score (inner product with the user vector of length one, and what
          co-occurrence adds, float32; of popular items their share of the events) and basis: `history`, or `popular`
          where the fallback was taken. With users there is user_id before them, with histories history (0-based).

        Raises:
          ValueError: Not exactly one of the first four, an unknown id, or a value that cannot be used.
        """
        stock = self._stock
        given = {"history": history, "histories": histories, "user": user, "users": users}
        named = [name for name, value in given.items() if value is not None]
        if len(named) != 1:
            raise ValueError(f"give either a history or a user, or several as histories or users; got {named}")
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if fallback not in (None, "popular", "refuse"):
            raise ValueError(f"fallback {fallback!r}: use 'popular', 'refuse' or None")
        extras = _given(times=times, ratings=ratings, reviews=reviews)
        if user is not None or users is not None:
            if extras:
                raise ValueError(f"{next(iter(extras))}: belongs to a bare history; those of a user are known")
            ids = checked_ids([user] if users is None else users, named[0])
            pasts = [self._past_of(user, fallback) for user in ids]
            head = None if users is None else ("user_id", ids)
        else:
            many = _lists(histories) if histories is not None else [[] if history is None else history]
            extras = {name: [values] for name, values in extras.items()} if histories is None else extras
            rows = [self._rows(stock, some, empty=fallback != "refuse") for some in many]
            pasts = given_pasts(self._run, self._known, rows, extras)
            head = None if histories is None else ("history", range(len(many)))
        allowed = self._allowed(stock, only, where)
        return self._ranked(stock, pasts, head, k, allowed, self._known_rows(stock, exclude, "exclude"), repeats)

    def recommend_all(
        self, *, k: int = 10, repeats: bool | None = None, users: Sequence[str] | None = None
    ) -> Iterable[pl.DataFrame]:
        """Recommendations for every user of the run, or for some, in frames of many users with a user_id column.

        Users with too few events to be trained on come last.
        """
        users = self.user_ids if users is None else users
        for start in range(0, len(users), SIZES[-1]):
            yield self.recommend(users=users[start : start + SIZES[-1]], k=k, repeats=repeats)

    def similar_items(
        self,
        item_id: str,
        *,
        k: int = 10,
        exclude: Collection[str] = (),
        only: Collection[str] | None = None,
        where: Mapping[str, Any] | None = None,
    ) -> pl.DataFrame:
        """The `k` items whose vectors are nearest to an item's; filters as in `recommend`.

        Returns:
          Frame with rank (1-based), item_id, title and score (cosine, float32).

        Raises:
          ValueError: An unknown id, or a value that cannot be used.
        """
        stock = self._stock
        row = self._rows(stock, checked_ids([item_id], "item_id"))[0]
        allowed = self._allowed(stock, only, where)
        allowed[np.append(self._known_rows(stock, exclude, "exclude"), row)] = False
        scores, rows = _first(unit_rows(stock.vectors) @ unit_rows(stock.vectors[[row]])[0], allowed, k)
        return self._frame(stock, scores[None], rows[None], None).drop("basis")

    def profile(
        self,
        *,
        text: str | None = None,
        ratings: Mapping[str, float] | None = None,
        k: int = 10,
        exclude: Collection[str] = (),
        only: Collection[str] | None = None,
        where: Mapping[str, Any] | None = None,
    ) -> pl.DataFrame:
        """The best `k` items for somebody who is described: by words, by ratings of some items, or both.

        The words are read as an item of that title which was chosen last; filters as in `recommend`.

        Returns:
          As `recommend`.

        Raises:
          ValueError: Neither words nor ratings, an unknown id, words that say nothing to the run's encoders, or ratings
            for a run that was trained without.
        """
        stock, rated = self._stock, dict(ratings or {})
        if not rated and not (text or "").strip():
            raise ValueError("give a text, ratings of items, or both")
        rows = self._rows(stock, list(rated), empty=True)
        extras = {"ratings": [[*rated.values(), *([None] if text else [])]]} if rated else {}
        spoken = self._spoken(text) if text else None
        if spoken is not None:
            rows = np.append(rows, stock.count)
        pasts = given_pasts(self._run, self._known, [rows], extras)
        allowed = self._allowed(stock, only, where)
        out = self._known_rows(stock, exclude, "exclude")
        return self._ranked(stock, pasts, None, k, allowed, out, False, spoken)

    def rank(
        self,
        histories: Sequence[Sequence[str]],
        item_ids: Sequence[str],
        *,
        left_out: Sequence[Sequence[str]],
        times: Sequence[Sequence[Any]] | None = None,
        ratings: Sequence[Sequence[Any]] | None = None,
        reviews: Sequence[Sequence[Any]] | None = None,
    ) -> np.ndarray:
        """Expected rank under ties of one item after each history, float64 [histories], 1 for the best.

        Args:
          histories: Item ids, oldest first.
          item_ids: The item to rank after each.
          left_out: Item ids that are not ranked beside each.
          times: As in `recommend`, for each history.
          ratings: Likewise.
          reviews: Likewise.

        Raises:
          ValueError: An empty history, an unknown item id, or a value that cannot be used.
        """
        stock = self._stock
        removed = np.flatnonzero(~stock.available)
        rows = [np.append(np.unique(self._rows(stock, ids, empty=True)), removed) for ids in left_out]
        targets, given = self._rows(stock, item_ids), [self._rows(stock, history) for history in histories]
        extras = _given(times=times, ratings=ratings, reviews=reviews)
        pasts = given_pasts(self._run, self._known, given, extras)
        vectors = self._encode(stock, pasts)
        if self.memory is None:
            return rank_vectors(unit_rows(vectors), stock.vectors, targets, rows)
        pairs, ranks = self._pairs(stock, [past.items for past in pasts]), []
        for span in dense_batches(len(targets), stock.count, self._ranker.batch_size):
            scores = vectors[span] @ stock.vectors.T + pairs[span].toarray()
            ranks.append(ranks_from_scores(scores, targets[span], rows[span]))
        return np.concatenate([np.zeros(0), *ranks])

    def explain(self, history: Sequence[str], item_id: str) -> Explanation:
        """What speaks for an item after a history of item ids, oldest first: see `nqf.serving.explain.Explanation`.

        Only the newest items of the history that the model reads are judged.

        Raises:
          ValueError: An empty history or an unknown item id.
        """
        stock = self._stock
        seen = self._rows(stock, history)
        rows = np.append(seen[-self._ranker.max_history :], self._rows(stock, [item_id]))
        removed = np.flatnonzero(~stock.available)
        explanation = explain(
            self._contents(stock, rows),
            ranker=self._ranker,
            variables=self._variables,
            item_qformer=self._items,
            cache=self._run.cache,
            text_features=self._run.text_features,
            field_features=self._run.field_features,
            item_vectors=stock.vectors,
            pairs=functools.partial(self._pairs, stock),
            older=seen[: -self._ranker.max_history],
            left_out=np.append([] if self._run.config.evaluation.repeats else seen, removed).astype(np.int64),
            review_width=self.review_width,
        )
        positions = np.arange(len(seen) - len(rows) + 2, len(seen) + 1)
        return dataclasses.replace(
            explanation, history=explanation.history.insert_column(0, pl.Series("position", positions))
        )

    def _contents(self, stock: Stock, rows: np.ndarray) -> Items:
        """Canonical values and encoded fields of some items."""
        cache = self._run.cache
        values, present = {}, {}
        for name in cache.names:
            # Items beyond the catalogue are among the changed ones.
            values[name], present[name] = cache.gather(name, np.minimum(rows, cache.items - 1))
            for place, row in enumerate(rows.tolist()):
                if row in stock.changed:
                    values[name][place], present[name][place] = stock.changed[row].encoded[name]
        return Items(
            rows=rows, tables=stock.take(rows), frame=self._values(stock, rows), values=values, present=present
        )

    def _values(self, stock: Stock, rows: np.ndarray) -> pl.DataFrame:
        """Canonical values of some items."""
        ids = [stock.item_ids[row] for row in rows]
        changed = [stock.changed[row].row for row in dict.fromkeys(rows.tolist()) if row in stock.changed]
        stored = (
            pl.scan_parquet(self._run.dataset.catalogue.path, glob=False).filter(pl.col("item_id").is_in(ids)).collect()
        )
        new = pl.DataFrame(changed, schema=stored.schema)
        stored = pl.concat([stored.filter(~pl.col("item_id").is_in(new["item_id"].to_list())), new])
        return pl.DataFrame({"item_id": ids}).join(stored, on="item_id", how="left", maintain_order="left")

    def fields(self, modality: str) -> list[str]:
        """Names of the schema's fields of a modality."""
        return [field.name for field in self.schema.fields if field.modality == modality]

    def columns(self, modality: str) -> list[str]:
        """Names of the columns that these fields are read from."""
        fields = self.schema.fields
        return [column for field in fields if field.modality == modality for column in field.columns]

    def marks(self, item_ids: Sequence[str]) -> list[dict[str, bool]]:
        """Of some items, whether each was in no training event (`cold`) and was added after training (`new`)."""
        stock, known = self._stock, len(self._run.dataset.catalogue.item_ids)
        rows = self._rows(stock, item_ids, empty=True)
        trained = stock.take(rows).trained
        return [
            {"cold": not there, "new": row >= known} for row, there in zip(rows.tolist(), trained.tolist(), strict=True)
        ]

    def items(self, item_ids: Sequence[str]) -> pl.DataFrame:
        """Canonical values of some items, in that order: item_id, title, the schema's fields.

        Raises:
          ValueError: An unknown id.
        """
        stock = self._stock
        return self._values(stock, self._rows(stock, item_ids))

    def encode_users(
        self,
        histories: Sequence[Sequence[str]],
        *,
        times: Sequence[Sequence[Any]] | None = None,
        ratings: Sequence[Sequence[Any]] | None = None,
        reviews: Sequence[Sequence[Any]] | None = None,
    ) -> np.ndarray:
        """User vectors of histories of item ids, oldest first: float32 [users, dim], rows of unit norm.

        Times, ratings and reviews are those of each history, as in `recommend`.

        Raises:
          ValueError: An empty history, an unknown item id, or a value that cannot be used.
        """
        stock = self._stock
        rows = [self._rows(stock, history) for history in _lists(histories)]
        extras = _given(times=times, ratings=ratings, reviews=reviews)
        return unit_rows(self._encode(stock, given_pasts(self._run, self._known, rows, extras)))

    def encode_all_users(self) -> tuple[list[str], np.ndarray]:
        """The users that were trained on and the vectors of their whole histories.

        Returns:
          Ids and float32 [users, dim], rows of unit norm.
        """
        users, vectors, _ = self.user_side()
        return users, unit_rows(vectors)

    def user_side(self) -> tuple[list[str], np.ndarray, list[np.ndarray]]:
        """What the score reads of the users that were trained on.

        Returns:
          Ids, vectors of their whole histories as the model gives them, float32 [users, dim], not of unit length, to
          whose inner products what `memory` counts is added, and the histories' item rows, oldest first.
        """
        interactions = self._run.dataset.interactions
        pasts = pasts_of(self._run.features, interactions, range(len(interactions.user_ids)))
        return list(interactions.user_ids), self._encode(self._stock, pasts), [past.items for past in pasts]

    def dense_side(
        self, users: np.ndarray, histories: Sequence[np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Vectors that rank by their inner products alone, nearly as the whole score: see `evaluation.factor_weight`.

        Args:
          users: Vectors of `user_side`, float32 [users, dim].
          histories: Likewise.

        Returns:
          Users, float32 [users, dim + F]; items, float32 [items, dim + F]; and what each item of a history adds to the
          last F of a user's, float32 [items, F], by the weights of `score.counting`, newest first. None where factors
          weigh nothing.
        """
        stock, dense = self._stock, dense_score_of(self._run)
        if not dense.cooccurrence:
            return None
        if self.memory is not None and self.memory.how == dense.counting:
            memory = self._counted(stock, self.memory)
        else:
            memory = stand_in(memory_of(self._run, self._run.dataset.split.test, dense.counting), unit_rows(stock.text))
        factors = factorize(memory)
        if not factors.candidate.size:
            return None
        tables = self.trained.ranker.tables
        new = ~np.asarray(tables.trained)
        users, items = weigh_text(
            self._run,
            (users, stock.vectors),
            dense,
            new=new,
            text_JxT=unit_rows(np.asarray(tables.text, np.float32)[new]),
            before=self.score.text,
        )
        newest_BxH = np.stack([newest(history, dense.counting.newest)[::-1] for history in histories])
        users = np.concatenate([users, dense.cooccurrence * factors.users(newest_BxH)], axis=1)
        return users, np.concatenate([items, factors.candidate], axis=1), dense.cooccurrence * factors.history

    @property
    def pairs(self) -> scipy.sparse.csr_matrix:
        """What each item of a history adds to the score of each item, float32 [items, items], sparse."""
        stock = self._stock
        if self.memory is None:
            return scipy.sparse.csr_matrix((stock.count, stock.count), dtype=np.float32)
        return self._counted(stock, self.memory).all_pairs() * np.float32(self.score.cooccurrence)

    @property
    def repeats(self) -> bool:
        """Whether items of the past may be recommended (`evaluation.repeats`)."""
        return self._run.config.evaluation.repeats

    def evaluate(self, *, split: Literal["valid", "test"] = "test") -> pl.DataFrame:
        """Evaluates the run's models beside all baselines, as `nqf evaluate` does, which also writes its results.

        Returns:
          Frame with model, segment, users and a column per metric.
        """
        from nqf.stages.assess import assess

        results = assess(self._run, split=split)
        return pl.DataFrame(
            [
                {"model": model, "segment": segment, "users": results.segments[segment]}
                | {metric: value[0] for metric, value in metrics.items()}
                for model, segments in results.models.items()
                for segment, metrics in segments.items()
            ]
        )

    def save(self, folder: str | Path) -> Path:
        """Writes a run folder with what serving needs and nothing else, items changed in memory included.

        Args:
          folder: A new folder, or its address as text.

        Returns:
          The folder; of an address, the copy that is kept here.

        Raises:
          ValueError: There is something under that name.
          DataError: An address that cannot be written.
        """
        with local_run(folder, writes=True) as (target, _):
            return self._save(target)

    def _save(self, target: Path) -> Path:
        source = self._run.folder
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ValueError(f"{target}: there already; name a new folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        parts = files.partial(target)
        try:
            folders.mark_run_folder(parts)
            stages = served(self._stage, source)
            folders.claim(parts, *(name for stage in stages for name in (stage.name, *stage.also)))
            for stage in stages:
                artifact = read_artifact(source, stage.name)
                best = str(artifact.result.get("best_step")) if artifact else ""

                def unneeded(path: str, names: list[str], best: str = best) -> list[str]:
                    if Path(path).name == "checkpoints":
                        return [name for name in names if name.isdecimal() and name != best]
                    return [name for name in names if name in ("profile", "source") or name.startswith("non-finite-")]

                for name in (stage.name, *stage.also):
                    shutil.copytree(source / name, parts / name, ignore=unneeded)
            for name in ("config.yaml", "README.md"):
                if (source / name).is_file():
                    shutil.copy(source / name, parts / name)
            stock = self._stock
            changed = self._overlay_of(stock, stock.item_ids[: stock.count])
            if len(changed.frame) or changed.removed:
                overlay.write_overlay(parts / "items", changed, self._run.cache)
            files.publish(parts, target)
        finally:
            shutil.rmtree(parts, ignore_errors=True)
        return target

    def push_to_hub(self, name: str, *, private: bool = True, token: str | None = None) -> str:
        """Uploads what `save` writes to a repository of the Hugging Face Hub, for `Recommender.load(name)`.

        The users' events go along, as recommendations for users need them, and the names of the folders that the
        tables were read from; the repository is private unless told otherwise.

        Args:
          name: `owner/name` of the repository, which is made if missing.
          private: Whether a new repository is.
          token: Of the account; by default the one of `hf auth login`.

        Returns:
          Address of the commit.
        """
        import huggingface_hub

        with tempfile.TemporaryDirectory() as scratch:
            folder = self.save(Path(scratch) / "run")
            card = folder / "README.md"
            text = card.read_text(encoding="utf-8") if card.is_file() else f"# {name}\n"
            files.write_text(card, f"{_HUB_METADATA}{text}")
            hub = huggingface_hub.HfApi(token=token)
            hub.create_repo(name, private=private, exist_ok=True)
            return hub.upload_folder(folder_path=folder, repo_id=name, commit_message=f"nqf {__version__}").commit_url

    def add_items(self, items: Frame, *, save: bool = False) -> None:
        """Adds new items without retraining: encodes their fields, appends their tokens and vectors.

        Args:
          items: item_id and columns of the schema; missing columns are missing values.
          save: Add them to the run folder too, as `python -m nqf.items` does, and not to this recommender alone.

        Raises:
          DataError: A duplicate or known item id, a column that the schema does not name or none that it does, or a
            value that does not parse.
        """
        self._change(overlay.add, items, save)

    def update_items(self, items: Frame, *, save: bool = False) -> None:
        """Replaces fields of known items; a field of which no column is given stays as it is. See `add_items`.

        Raises:
          DataError: A duplicate or unknown item id, and as `add_items`.
        """
        self._change(overlay.update, items, save)

    def remove_items(self, item_ids: Collection[str], *, save: bool = False) -> None:
        """Takes items out of all recommendations; they stay known, as histories hold them. See `add_items`.

        Raises:
          DataError: An unknown item id, or one that was removed.
        """
        ids = checked_ids(item_ids, "item_ids")
        with self._changing:
            with self._overlay(ids, save) as (base, write):
                write(overlay.remove(base, self._run.dataset.catalogue, ids))
            self._remove(ids)

    def _change(self, change: Callable, items: Frame, save: bool) -> None:
        run, frames = (
            self._run,
            [items] if isinstance(items, pl.DataFrame) else _frames(items, change is overlay.update),
        )
        ids = [str(id_).strip() for frame in frames if "item_id" in frame.columns for id_ in frame["item_id"]]
        with self._changing:
            with self._overlay(ids, save) as (new, write):
                for frame in frames:
                    new = change(new, run.dataset.catalogue, run.cache, frame, Path.cwd())
                write(new)
            among = new.frame["item_id"].is_in(ids)
            encoded = {name: (one[among.to_numpy()], two[among.to_numpy()]) for name, (one, two) in new.encoded.items()}
            self._put(new.frame.filter(among), encoded)

    @contextlib.contextmanager
    def _overlay(self, ids: Sequence[str], save: bool) -> Iterator[tuple[overlay.Overlay, Callable]]:
        """What has changed of some items so far, and a function that keeps what is to hold from now on."""
        catalogue, cache = self._run.dataset.catalogue, self._run.cache
        if not save:
            yield self._overlay_of(self._stock, ids), lambda new: None
            return
        with local_run(self._where, writes=True) as (run, _), overlay.locked(folder := run / "items"):
            yield (
                overlay.read_overlay(folder, catalogue, cache),
                lambda new: overlay.write_overlay(folder, new, cache),
            )

    def _overlay_of(self, stock: Stock, ids: Sequence[str]) -> overlay.Overlay:
        """What has changed of some items."""
        catalogue, cache = self._run.dataset.catalogue, self._run.cache
        rows = [row for row in map(stock.row_of, ids) if row >= 0]
        changes = [stock.changed[row] for row in rows if row in stock.changed]
        empty = pl.scan_parquet(catalogue.path, glob=False).head(0).collect()
        encoded = {}
        for name, (values, _) in encode_items(cache, empty).items():
            pairs = [change.encoded[name] for change in changes]
            vectors = np.array([vector for vector, _ in pairs], np.float32).reshape(len(pairs), values.shape[1])
            encoded[name] = vectors, np.array([there for _, there in pairs], bool)
        return overlay.Overlay(
            frame=pl.DataFrame([change.row for change in changes], schema=empty.schema),
            encoded=encoded,
            removed=frozenset(stock.item_ids[row] for row in rows if not stock.available[row]),
        )

    def _remove(self, ids: Collection[str]) -> None:
        if ids:
            self._stock = self._stock.without(np.array([self._stock.row_of(item_id) for item_id in ids]))

    def _put(self, frame: pl.DataFrame, encoded: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
        """Appends new items and replaces the content of known ones; no other row changes."""
        stock = self._stock
        if not len(frame):
            return
        rows = np.array([stock.row_of(item_id) for item_id in frame["item_id"]], np.int32)
        known = rows >= 0
        rows[~known] = stock.count + np.arange((~known).sum(), dtype=np.int32)
        # A known item keeps its learned vector: its row is the same. A new one has none.
        trained = known & stock.take(np.where(known, rows, 0)).trained
        titles = [title or "" for title in frame["title"]]
        tables, vectors = self._encode_items(encoded, titles, trained, rows)
        changed = [
            Changed(
                row=row,
                encoded={
                    name: (values[at].astype(np.float16), bool(there[at])) for name, (values, there) in encoded.items()
                },
            )
            for at, row in enumerate(frame.iter_rows(named=True))
        ]
        self._stock = stock.put(frame, changed, tables, vectors)

    def _encode_items(
        self,
        encoded: Mapping[str, tuple[np.ndarray, np.ndarray]],
        titles: Sequence[str],
        trained: np.ndarray,
        rows: np.ndarray,
    ) -> tuple[ItemTables, np.ndarray]:
        """Item tables and item vectors of some encoded items.

        All in batches of one size: an item is the same to the bit whether it comes alone or with others.
        """
        run, (module, params), old = self._run, self._items, self._stock.known
        nothing = np.zeros((len(titles), run.text[0].shape[1]), np.float32), np.zeros(len(titles), bool)
        text, has_text = encoded.get("_candidate", nothing)
        fields, text = run.field_features(encoded), run.text_features(text, has_text)
        words = title_tokens(titles, old.titles.shape[1], self._tokenizer)
        parts, size = [], min(_ITEMS, self._ranker.item_chunk)
        for start in range(0, len(titles), size):
            chunk = slice(start, start + size)
            values, present = (
                fill({name: encoded[name][part][chunk] for name in run.cache.names}, size) for part in (0, 1)
            )
            output = read_fields(module, params, values, present)
            tables = ItemTables(
                tokens=np.asarray(output.tokens, old.tokens.dtype),
                vectors=np.asarray(output.vector, old.vectors.dtype),
                **{
                    name: fill(table[chunk], size)
                    for name, table in (("fields", fields), ("text", text), ("has_text", has_text),
                                        ("trained", trained), ("titles", words))
                },
                neighbors=self._neighbors(fill(rows[chunk], size)),
            )  # fmt: skip
            vectors = self._ranker.item_vectors(self._variables, tables, fill(rows[chunk], size))
            count = len(titles) - start
            parts.append(jax.tree.map(lambda x, count=count: x[:count], (tables, vectors)))
        return jax.tree.map(lambda *some: np.concatenate(some), *parts)

    def _neighbors(self, rows: np.ndarray) -> np.ndarray:
        """Neighbor features of items by their rows; zero for new ones, which no history knows."""
        known = self._stock.known.neighbors
        there = rows < len(known)
        return np.where(there[:, None], known[np.where(there, rows, 0)], 0)

    def _spoken(self, text: str) -> ItemTables:
        """Item tables, one row, of an item that has these words for a title and nothing else."""
        schema = self.schema
        field = next(
            (field for field in schema.fields if field.modality == "text" and field.name == schema.title), None
        )
        field = field or next((field for field in schema.fields if field.modality == "text"), None)
        if field is None:
            raise ValueError("the items of this run have no text, so it cannot read one; give ratings or a history")
        frame = canonical_items(pl.DataFrame({"item_id": ["-"], field.columns[0]: [text]}), schema)
        encoded = encode_items(self._run.cache, frame)
        if not any(there.any() for _, there in encoded.values()):
            raise ValueError(f"no word of {text!r} says anything to this run's encoders; use words of the catalogue")
        rows, untrained = np.array([self._stock.count], np.int32), np.zeros(1, bool)
        return self._encode_items(encoded, [text], untrained, rows)[0]

    def _past_of(self, user: str, fallback: Fallback | None) -> Past | None:
        """What a user has met; None for an unknown one who gets the popular items."""
        interactions = self._run.dataset.interactions
        if (row := interactions.find(user)) is not None:
            return pasts_of(self._run.features, interactions, [row])[0]
        if self._short is not None and (row := self._short.find(user)) is not None:
            return pasts_of(self._short_features, self._short, [row])[0]
        if fallback == "popular":
            return None
        named = some_ids([user], lambda: self.user_ids)
        raise DataError(f"unknown user: {named} (with fallback='popular' anybody gets the popular items)")

    @functools.cached_property
    def _short_features(self) -> Any:
        assert self._short is not None
        return features_of(self._run, self._known, self._short)

    @functools.cached_property
    def _popularity(self) -> np.ndarray:
        """Share of the known events, float32 [items of the catalogue]; test targets do not count."""
        dataset = self._run.dataset
        known = known_events(dataset.interactions, dataset.split, dataset.split.test)
        counts = np.bincount(dataset.interactions.items[known], minlength=len(dataset.split.cold))
        return (counts / max(counts.sum(), 1)).astype(np.float32)

    def _ranked(
        self,
        stock: Stock,
        pasts: Sequence[Past | None],
        head: tuple[str, Sequence] | None,
        k: int,
        allowed: np.ndarray,
        exclude: np.ndarray,
        repeats: bool | None,
        spoken: ItemTables | None = None,
    ) -> pl.DataFrame:
        """Lists of the best items, one after the other; see `recommend`."""
        seen = [np.zeros(0, np.int64) if past is None else past.items for past in pasts]
        repeats = self._run.config.evaluation.repeats if repeats is None else repeats
        left_out = [exclude if repeats else np.append(rows, exclude) for rows in seen]
        ranked = np.array([len(rows) > 0 for rows in seen], bool)
        k = min(k, stock.count)
        scores, rows = np.full((len(pasts), k), -np.inf, np.float32), np.full((len(pasts), k), -1, np.int32)
        only = pasts[0] if len(pasts) == 1 and spoken is None else None
        alone = only is not None and only.features is None
        # What a longer list does not hold needs the more of a raise, so that fewer items need a product. An index would
        # have to be asked for as many.
        wide = max(k, min(_WIDE, stock.count)) if self.memory is not None and stock.index is None else k
        for start in range(0, len(at := np.flatnonzero(ranked)), SIZES[-1]):
            chunk = at[start : start + SIZES[-1]]
            past, out = ([rows_of[index] for index in chunk] for rows_of in (seen, left_out))
            found = self._best_of_one(stock, past[0], wide, allowed, out[0]) if alone else None
            if found is None:
                vectors = self._encode(stock, [pasts[index] for index in chunk], spoken)
                found = vectors, stock.best(unit_rows(vectors), wide, allowed, out)
            scores[chunk], rows[chunk] = self._raised(stock, *found, k, past, allowed, out, spoken)
        for index in np.flatnonzero(~ranked):
            popularity = np.zeros(stock.count, np.float32)
            popularity[: len(self._popularity)] = self._popularity
            kept = allowed.copy()
            kept[left_out[index]] = False
            found = _first(popularity, kept, k)
            scores[index, : len(found[0])], rows[index, : len(found[0])] = found
        return self._frame(stock, scores, rows, head, ranked)

    def _encode(self, stock: Stock, pasts: Sequence[Past], spoken: ItemTables | None = None) -> np.ndarray:
        """User vectors as the model gives them, float32 [users, D], in batches of few sizes and lengths.

        Args:
          stock: The items.
          pasts: What the users have met.
          spoken: Tables of one more item, whose row is `stock.count`.
        """
        ranker, buckets = self._ranker, self.lengths
        groups: dict[int, dict[int, list[int]]] = {}
        for index, past in enumerate(pasts):
            bucket = int(bucket_of(np.array(len(past.events)), buckets))
            groups.setdefault(id(past.features), {}).setdefault(bucket, []).append(index)
        vectors = np.zeros((len(pasts), stock.vectors.shape[1]), np.float32)
        for bucket, members in (pair for of in groups.values() for pair in together(of)):
            slots, start = buckets[bucket], 0
            for size in sizes_of(len(members), max(1, ranker.batch_size)):
                chunk = members[start : start + size]
                events = fill(np.stack([newest(pasts[index].events, slots) for index in chunk]), size)
                if (features := pasts[chunk[0]].features) is None:
                    history = history_of_items(events, self.review_width)
                else:
                    history = gather_history(features, events)
                found = distinct_of(history.items)
                history = history.replace(items=places_among(found, history.items))
                # As many rows as such a batch can have: one program, whatever its histories have in common.
                rows = np.full(powers(min(size * slots, stock.count + 1), 64), -1, np.int32)
                rows[: len(found)] = found
                tables = stock.take(np.clip(rows, 0, stock.count - 1))
                if spoken is not None:
                    at = np.flatnonzero(rows == stock.count)
                    tables = jax.tree.map(functools.partial(_replaced, at), tables, spoken)
                vectors[chunk] = np.asarray(ranker.users(self._variables, tables, rows, history))[: len(chunk)]
                start += size
        return vectors

    def _best_of_one(
        self, stock: Stock, seen: np.ndarray, k: int, allowed: np.ndarray, left_out: np.ndarray
    ) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]] | None:
        """User vector as encoded, scores and rows of the best items of one bare history; see `Stock.best_of_one`."""
        buckets = self.lengths
        items = newest(seen, buckets[int(bucket_of(np.array(len(seen)), buckets))])
        kept = allowed.copy()
        kept[left_out] = False
        found = stock.best_of_one(self._ranker.users, self._variables, items, k, kept, self.review_width)
        return None if found is None else (found[0][None], (found[1][None], found[2][None]))

    def _raised(
        self,
        stock: Stock,
        vectors: np.ndarray,
        best: tuple[np.ndarray, np.ndarray],
        k: int,
        seen: Sequence[np.ndarray],
        allowed: np.ndarray,
        left_out: Sequence[np.ndarray],
        spoken: ItemTables | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores and rows of the best items with the counts of the users' whole histories.

        Args:
          stock: The items.
          vectors: User vectors as encoded.
          best: Scores and rows of the best items by these vectors alone, `k` or more.
          k: Items per user.
          seen: The histories.
          allowed: bool [count], which items may be recommended.
          left_out: Rows that are not recommended to each user.
          spoken: Tables of one more item.
        """
        if self.memory is None:
            return best
        unit = unit_rows(vectors)
        scale = 1 / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        left_out = [rows[rows < stock.count] for rows in left_out]
        if len(seen) == 1:
            rows, more = self._counted(stock, self.memory, spoken).raises(seen[0])
            rows, more = rows[rows < stock.count], more[rows < stock.count] * self.score.cooccurrence * scale[0]
            kept = allowed[rows] & (more != 0)
            first, room = (best[0][0], best[1][0]), np.zeros(stock.count, bool)
            raised = rows[kept], more[kept]
            found = raise_one(
                first, unit[0], stock.vectors, raised, left_out[0], room, k=k, certain=stock.index is None
            )
            return found[0][None], found[1][None]
        raised = scipy.sparse.csr_matrix(self._pairs(stock, seen, spoken), dtype=np.float32)
        raised.data *= np.repeat(scale[:, 0], np.diff(raised.indptr))
        raised.data[~allowed[raised.indices]] = 0
        raised.eliminate_zeros()
        return raise_some(best, unit, stock.vectors, raised, left_out, k=k, certain=stock.index is None)

    def _pairs(
        self, stock: Stock, histories: Sequence[np.ndarray], spoken: ItemTables | None = None
    ) -> scipy.sparse.csr_matrix:
        """What co-occurrence adds to the scores of user vectors as encoded, float32 [users, items].

        Args:
          stock: The items.
          histories: Item rows, oldest first.
          spoken: Tables of one more item, whose row is `stock.count`.
        """
        if self.memory is None:
            return scipy.sparse.csr_matrix((len(histories), stock.count), dtype=np.float32)
        newest_BxH = np.stack([newest(history, self.memory.how.newest)[::-1] for history in histories])
        memory = self._counted(stock, self.memory, spoken)
        return (self.score.cooccurrence * memory.scores(newest_BxH))[:, : stock.count]

    def _counted(self, stock: Stock, memory: Cooccurrence, spoken: ItemTables | None = None) -> Cooccurrence:
        """Counts of all items: those beyond the catalogue, which were in no training event, have those of others."""
        known = self._counted_of
        if known is not None and known[0] is stock and spoken is None:
            return known[2]
        texts = unit_rows(stock.text if spoken is None else np.concatenate([stock.text, spoken.text]))
        before = None if known is None else (known[1], known[2].counts_as)
        made = stand_in(memory, texts, before)
        if spoken is None:
            self._counted_of = stock, texts, made
        return made

    def _rows(self, stock: Stock, history: Sequence[str], *, empty: bool = False) -> np.ndarray:
        """Rows of a history's items, int64, oldest first."""
        ids = checked_ids(history, "history")
        if not ids and not empty:
            raise ValueError("the history is empty; give at least one item id")
        rows = np.array([stock.row_of(item_id) for item_id in ids], np.int64)
        if (rows < 0).any():
            unknown = [item_id for item_id, row in zip(ids, rows, strict=True) if row < 0]
            raise ValueError(f"unknown item ids in the history: {some_ids(unknown, lambda: self.item_ids)}")
        return rows

    def _known_rows(self, stock: Stock, ids: Collection[str], what: str) -> np.ndarray:
        """Rows of those of some ids that are known, int64."""
        rows = np.array([stock.row_of(item_id) for item_id in checked_ids(ids, what)], np.int64)
        return rows[rows >= 0]

    def _allowed(self, stock: Stock, only: Collection[str] | None, where: Mapping[str, Any] | None) -> np.ndarray:
        """bool [items], which may be recommended: those that are available and pass the filters."""
        allowed = stock.available.copy()
        if only is not None:
            ids = checked_ids(only, "only")
            if unknown := [item_id for item_id in ids if stock.row_of(item_id) < 0]:
                raise ValueError(f"unknown item ids in only: {some_ids(unknown, lambda: self.item_ids)}")
            among = np.zeros(stock.count, bool)
            among[self._known_rows(stock, ids, "only")] = True
            allowed &= among
        for name, wanted in (where or {}).items():
            allowed &= self._filters.having(stock, name, wanted)
        return allowed

    def _frame(
        self,
        stock: Stock,
        scores: np.ndarray,
        rows: np.ndarray,
        head: tuple[str, Sequence] | None,
        ranked: np.ndarray | None = None,
    ) -> pl.DataFrame:
        """Lists of items, -1 for none, as a frame; `head` says whose each is."""
        who, place = np.nonzero(rows >= 0)
        flat, users = rows[who, place].tolist(), who.tolist()
        columns = [
            pl.Series("rank", place + 1),
            pl.Series("item_id", [stock.item_ids[row] for row in flat], dtype=pl.String),
            pl.Series("title", [stock.titles[row] for row in flat], dtype=pl.String),
            pl.Series("score", scores[who, place].astype(np.float32)),
            pl.Series(
                "basis",
                ["history" if ranked is None or ranked[user] else "popular" for user in users],
                dtype=pl.String,
            ),
        ]
        if head is not None:
            # Not by an expression, which polars would hand to its threads: a request would wait for them to wake.
            name, of = head
            columns.insert(
                0, pl.Series(name, [of[user] for user in users], dtype=pl.String if name == "user_id" else pl.Int64)
            )
        return pl.DataFrame(columns)


def _frames(items: Sequence[Mapping[str, Any]], apart: bool) -> list[pl.DataFrame]:
    """Items as a frame, or those with the same keys each as one: a key that is not there is not an empty value."""
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for item in items:
        groups.setdefault(tuple(sorted(item)) if apart else (), []).append(item)
    # Whole columns decide about their types, and numbers among texts are told by what reads them.
    return [pl.DataFrame(group, infer_schema_length=None, strict=False) for group in groups.values()]


def _given(**values: Any) -> dict[str, Any]:
    """Those that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def _lists(histories: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    if isinstance(histories, (str, bytes)) or any(isinstance(history, (str, bytes)) for history in histories):
        raise ValueError("histories: give a list of lists of item ids; for a single one there is history=[...]")
    return list(histories)


def _from_hub(name: str) -> Path:
    """The folder of a repository of the Hub, which is downloaded if it is not in the cache.

    Raises:
      StageError: Neither a folder nor such a repository.
    """
    import huggingface_hub
    import huggingface_hub.errors

    try:
        return Path(huggingface_hub.snapshot_download(name))
    except (huggingface_hub.errors.HFValidationError, huggingface_hub.errors.RepositoryNotFoundError, OSError) as error:
        reason = str(error).strip().partition("\n")[0][:300]
        raise StageError(f"{name}: neither a run folder nor a repository that can be downloaded ({reason})") from error


def _replaced(at: np.ndarray, table: np.ndarray, row: np.ndarray) -> np.ndarray:
    """A copy of a table with another row in some places."""
    table = np.array(table)
    table[at] = row
    return table


def _first(scores: np.ndarray, allowed: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and rows of the best allowed items, ties in the order of the rows."""
    scores = np.where(allowed, scores, -np.inf)
    rows = np.argsort(-scores, kind="stable")[:k]
    rows = rows[scores[rows] > -np.inf]
    return scores[rows].astype(np.float32), rows
