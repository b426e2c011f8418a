"""The items that a recommender knows, at one moment, and how they are scored.

A change makes a new value; who holds the old one continues reading it undisturbed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import polars as pl

from nqf.evaluation.ranking import best_columns, place_items
from nqf.pipelines.batches import ItemTables

SIZES = (1, 8, 64, 512)
"""Sizes of the batches that are computed, so that few programs are compiled, each once."""
# Scores that stand at a time: 256 MiB of float32.
_SCORES = 1 << 26
_FEWEST = 16


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Changed:
    """An item that was added or updated after training.

    Attributes:
      row: Canonical values.
      encoded: Field name (and "_candidate") to its vector, float16 [width], and whether it has one.
    """

    row: Mapping[str, Any]
    encoded: Mapping[str, tuple[np.ndarray, bool]]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Stock:
    """Items and what the models know of them; rows are items.

    Attributes:
      item_ids: Ids; of later states too, so that only the first `count` are of this one. So are the next three.
      titles: Titles, empty where there is none.
      rows: Id to row.
      changed: Row to what was added or updated.
      count: Number of items.
      buffers: Item tables and, beside them, item vectors float32 [., D] and bool [.], whether an item is recommended;
        with spare room behind `count`.
    """

    item_ids: list[str]
    titles: list[str]
    rows: dict[str, int]
    changed: dict[int, Changed]
    count: int
    buffers: tuple[ItemTables, np.ndarray, np.ndarray]

    @functools.cached_property
    def tables(self) -> ItemTables:
        """Tables of this state."""
        # As plain arrays: what is taken of a memory map is of its class, which jax takes a slower road with.
        return jax.tree.map(lambda buffer: np.asarray(buffer)[: self.count], self.buffers[0])

    @property
    def vectors(self) -> np.ndarray:
        """float32 [count, D]."""
        return self.buffers[1][: self.count]

    @property
    def available(self) -> np.ndarray:
        """bool [count]."""
        return self.buffers[2][: self.count]

    @functools.cached_property
    def _placed(self) -> jax.Array:
        # With its spare room: a catalogue that grows by single items runs one program, not a new one for each size.
        vectors = self.buffers[1]
        return place_items(np.concatenate([self.vectors, np.zeros_like(vectors[self.count :])]))

    def row_of(self, item_id: str) -> int:
        """The row of an item, -1 for an unknown one."""
        row = self.rows.get(item_id, -1)
        return row if row < self.count else -1

    def best(
        self, users_NxD: np.ndarray, k: int, allowed: np.ndarray, left_out: Sequence[np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best `k` items of each user, as `nqf.evaluation.ranking.top_k`; they are masked before they are ranked.

        Args:
          users_NxD: float32.
          k: Items per user.
          allowed: bool [count].
          left_out: Rows that are not recommended to each user.
        """
        items_CxD = self._placed
        wide = np.zeros(len(items_CxD), bool)
        wide[: self.count] = allowed
        most, width = min(powers(k, _FEWEST), len(items_CxD)), powers(max(map(len, left_out), default=0), 64)
        scores, rows = np.full((len(users_NxD), k), -np.inf, np.float32), np.full((len(users_NxD), k), -1, np.int32)
        start = 0
        for size in sizes_of(len(users_NxD), max(1, _SCORES // len(items_CxD))):
            span = slice(start, min(start + size, len(users_NxD)))
            out = np.full((size, width), -1, np.int32)
            for row, own in enumerate(left_out[span]):
                out[row, : len(own)] = own
            found, columns = best_columns(fill(users_NxD[span], size), items_CxD, wide, out, k=most)
            real, at = span.stop - span.start, slice(0, min(k, most))
            scores[span, at] = np.asarray(found)[:real, at]
            rows[span, at] = np.where(scores[span, at] > -np.inf, np.asarray(columns)[:real, at], -1)
            start = span.stop
        return scores, rows

    def put(self, frame: pl.DataFrame, changed: Sequence[Changed], tables: ItemTables, vectors: np.ndarray) -> Stock:
        """The next state, with new items behind the others and known ones replaced; both are recommended from now on.

        To be called by one thread at a time, on the newest state.

        Args:
          frame: Their item_id and title.
          changed: What was made of them.
          tables: Their item tables.
          vectors: Their item vectors.
        """
        rows = np.array([self.row_of(item_id) for item_id in frame["item_id"]], np.int64)
        new = rows < 0
        rows[new] = self.count + np.arange(int(new.sum()))
        count = self.count + int(new.sum())
        parts = (tables, vectors, np.ones(len(rows), bool))

        def merged(buffer: np.ndarray, part: np.ndarray) -> np.ndarray:
            # Who reads an older state sees neither the spare room nor, as rows of it are copied, what replaces them.
            if count > len(buffer) or not new.all() or not buffer.flags.writeable:
                grown = np.zeros((max(count, len(buffer)) if count <= len(buffer) else count + count // 4 + 256,
                                  *buffer.shape[1:]), buffer.dtype)  # fmt: skip
                grown[: self.count] = buffer[: self.count]
                buffer = grown
            buffer[rows] = part
            return buffer

        buffers = jax.tree.map(merged, self.buffers, parts)
        for item_id, title, row, change in zip(frame["item_id"], frame["title"], rows.tolist(), changed, strict=True):
            if row == len(self.item_ids):
                self.item_ids.append(item_id)
                self.titles.append(title or "")
            self.titles[row], self.changed[row] = title or "", change
        state = dataclasses.replace(self, count=count, buffers=buffers)
        # Last: an id that is found belongs to items that are there.
        self.rows.update(zip(frame["item_id"], rows.tolist(), strict=True))
        return state

    def without(self, rows: np.ndarray) -> Stock:
        """The next state, in which some items are no longer recommended."""
        available = self.buffers[2].copy()
        available[rows] = False
        return dataclasses.replace(self, buffers=(self.buffers[0], self.buffers[1], available))


def powers(count: int, least: int) -> int:
    """The smallest power of two that is neither below `count` nor below `least`."""
    return max(least, 1 << max(0, count - 1).bit_length())


def sizes_of(count: int, most: int) -> list[int]:
    """Sizes of batches for some rows: the last may be filled up, but by less than a step of the sizes would save."""
    allowed = [size for size in SIZES if size <= most] or [1]
    plan = []
    while count > 0:
        fitting = [size for size in allowed if size >= count]
        size = fitting[0] if fitting and fitting[0] <= 2 * count else None
        size = size or max(size for size in allowed if size <= count)
        plan.append(size)
        count -= size
    return plan


def fill(tree: Any, size: int) -> Any:
    """Repeats the last row of every array up to `size` rows, so that batches share their programs."""
    return jax.tree.map(lambda x: np.concatenate([x, np.repeat(x[-1:], size - len(x), axis=0)]), tree)
