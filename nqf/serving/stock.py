"""The items that a recommender knows, at one moment, and how they are scored.

A change makes a new value; who holds the old one continues reading it undisturbed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl

from nqf.evaluation.ranking import best_columns, place_items, top_k
from nqf.ops.losses import unit
from nqf.pipelines.batches import Array, History, ItemTables
from nqf.pipelines.histories import history_of_items
from nqf.serving.index import DEPTHS, Index, build, ranked, tuned

SIZES = (1, 8, 64, 512)
"""Sizes of the batches that are computed, so that few programs are compiled, each once."""
# Scores that stand at a time: 256 MiB of float32.
_SCORES = 1 << 26
_FEWEST = 16
# Items behind the catalogue whose vectors move to the devices together.
_PIECE = 4_096
_MOST_ALONE = 64
# Tables of a larger catalogue stay on the host.
_TABLES_ON_DEVICE = 1 << 30
# So many items are compared with every user sooner than an index is asked.
_COMPARED = 4_096
# Items that are left out of one user's list are looked for with the others up to so many, and filtered out beyond.
_FETCHED = 256


Users = Callable[[Any, ItemTables, Array, History], jax.Array]


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
      known: Item tables of the catalogue that the recommender was loaded with; never written to.
      more: Item tables of what was added or updated since, with spare room behind the first `used`.
      used: Rows of `more` that are taken.
      places: int32 [count], where the tables of each item are: in `known`, or counted on behind it, in `more`.
      shown: Item vectors float32 [., D] and bool [.], whether an item is recommended; with spare room behind `count`.
      pieces: The vectors on the devices: of the catalogue, and of every `_PIECE` items behind it; None for a piece
        that has changed since it was last asked for.
      on_device: `known` on the device, once it was asked for.
      index: What `best` asks in place of comparing all items; None for none.
      behind: int64, ascending: rows that were added or updated since the index was made.
    """

    item_ids: list[str]
    titles: list[str]
    rows: dict[str, int]
    changed: dict[int, Changed]
    count: int
    known: ItemTables
    more: ItemTables
    used: int
    places: np.ndarray
    shown: tuple[np.ndarray, np.ndarray]
    pieces: list[jax.Array | None]
    on_device: list[ItemTables]
    index: Index | None = None
    behind: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))

    @classmethod
    def of(cls, item_ids: list[str], titles: list[str], tables: ItemTables, vectors: np.ndarray) -> Stock:
        """A catalogue of which nothing has changed."""
        count = len(item_ids)
        # As plain arrays: what is taken of a memory map is of its class, which jax takes a slower road with.
        tables = jax.tree.map(np.asarray, tables)
        return cls(
            item_ids=item_ids,
            titles=titles,
            rows={item_id: row for row, item_id in enumerate(item_ids)},
            changed={},
            count=count,
            known=tables,
            more=tables.take(slice(0)),
            used=0,
            places=np.arange(count, dtype=np.int32),
            shown=(vectors, np.ones(count, bool)),
            pieces=[None],
            on_device=[],
        )

    @property
    def vectors(self) -> np.ndarray:
        """float32 [count, D]."""
        return self.shown[0][: self.count]

    @property
    def available(self) -> np.ndarray:
        """bool [count]."""
        return self.shown[1][: self.count]

    def row_of(self, item_id: str) -> int:
        """The row of an item, -1 for an unknown one."""
        row = self.rows.get(item_id, -1)
        return row if row < self.count else -1

    def take(self, rows: np.ndarray) -> ItemTables:
        """Item tables of some items, in that order."""
        return jax.tree.map(lambda known, more: self._gather(known, more, rows), self.known, self.more)

    @property
    def text(self) -> np.ndarray:
        """Frozen texts as the models read them, float32 [count, T]."""
        return self._gather(self.known.text, self.more.text, np.arange(self.count))

    def _gather(self, known: np.ndarray, more: np.ndarray, rows: np.ndarray) -> np.ndarray:
        if not self.used:
            # Nothing was added or updated: most services, at most requests.
            return known[rows]
        first, places = len(self.known.has_text), self.places[rows]
        old = places < first
        found = known[np.where(old, places, 0)]
        found[~old] = more[places[~old] - first]
        return found

    def _placed(self) -> Iterator[tuple[int, int, jax.Array]]:
        """Of each piece, the first row, the one behind the last, and the vectors with zeros up to its full width.

        A catalogue that grows by single items thus runs two programs, whatever its size, and moves one piece at a time.
        """
        first = len(self.known.has_text)
        for number, piece in enumerate(self.pieces):
            start, width = (first + (number - 1) * _PIECE, _PIECE) if number else (0, first)
            stop = min(start + width, self.count)
            if piece is None:
                vectors = np.zeros((width, self.vectors.shape[1]), np.float32)
                vectors[: stop - start] = self.vectors[start:stop]
                self.pieces[number] = piece = place_items(vectors)
            yield start, stop, piece

    def _pieces(self, allowed: np.ndarray) -> list[tuple[int, jax.Array, np.ndarray]]:
        """Of each piece, the first row, the vectors, and which of them are allowed, bool [width]."""
        pieces = []
        for first, stop, items in self._placed():
            wide = np.zeros(len(items), bool)
            wide[: stop - first] = allowed[first:stop]
            pieces.append((first, items, wide))
        return pieces

    def best(
        self, users_NxD: np.ndarray, k: int, allowed: np.ndarray, left_out: Sequence[np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best `k` items of each user, as `nqf.evaluation.ranking.top_k`; they are masked before they are ranked.

        With an index most of them: items that are better than the last one may be missing, and nothing else differs.

        Args:
          users_NxD: float32.
          k: Items per user.
          allowed: bool [count].
          left_out: Rows that are not recommended to each user.
        """
        if self.index is None:
            return self._exact(users_NxD, k, allowed, left_out)
        left_out = [out[out < self.count] for out in left_out]
        many = np.array([len(out) > _FETCHED for out in left_out], bool)
        if many.any() and len(users_NxD) > 1:
            scores, rows = np.zeros((len(users_NxD), k), np.float32), np.zeros((len(users_NxD), k), np.int32)
            for at in filter(len, (np.flatnonzero(~many), *np.flatnonzero(many)[:, None])):
                scores[at], rows[at] = self.best(users_NxD[at], k, allowed, [left_out[user] for user in at])
            return scores, rows
        if many.any():
            allowed = allowed.copy()
            allowed[left_out[0]] = False
            left_out = [left_out[0][:0]]
        found = self._found(self.index, users_NxD, k, allowed, left_out)
        if found is None:
            return self._exact(users_NxD, k, allowed, left_out)
        scores, rows, whole = found
        # Of those who have too few, there may be more than were found.
        if not whole and len(at := np.flatnonzero(rows[:, -1] < 0)):
            scores[at], rows[at] = self._exact(users_NxD[at], k, allowed, [left_out[user] for user in at])
        return scores, rows

    def _found(
        self, index: Index, users_NxD: np.ndarray, k: int, allowed: np.ndarray, left_out: Sequence[np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray, bool] | None:
        """Scores and rows as `best`, of what the index finds and of all that has changed since it was made.

        Returns:
          They, and whether every allowed item was compared; None where that has to be done without the index.
        """
        inside = allowed[: index.count]
        if len(self.behind):
            inside = inside.copy()
            inside[self.behind[self.behind < index.count]] = False
        shared = self.behind[allowed[self.behind]]
        whole = int(np.count_nonzero(inside)) + len(shared) <= _COMPARED
        if whole:
            shared, own = np.flatnonzero(allowed), np.zeros((len(users_NxD), 0), np.int64)
        elif len(shared) > max(_COMPARED, self.count // 16):
            return None
        else:
            # Some more than are wanted: bytes tell neighbors apart less well than their vectors do.
            wanted = 2 * k + 16 + max(map(len, left_out), default=0)
            own = index.search(users_NxD, k, min(wanted, index.count), inside)
            if own is None:
                return None
        return *ranked(users_NxD, self.vectors, own, shared, left_out, k), whole

    def indexed(self, users_NxD: np.ndarray, left_out: Sequence[np.ndarray]) -> Stock:
        """The same state with an index of its items: see `nqf.serving.index`.

        Args:
          users_NxD: float32, unit rows, users like those who will ask: the index is to find their exact lists.
          left_out: Rows that are not recommended to each.

        Raises:
          RuntimeError: faiss is not installed.
          ValueError: A vector is not finite.
        """
        place, held = np.cumsum(self.available) - 1, self.vectors
        held = held if self.available.all() else held[self.available]
        # Its scores say what is found, whatever the rows are called.
        best_NxK, _ = top_k(users_NxD, held, DEPTHS[-1], [place[out[self.available[out]]] for out in left_out])
        state = dataclasses.replace(self, behind=np.zeros(0, np.int64))

        def search(index: Index, k: int, some: slice) -> np.ndarray:
            found = state._found(index, users_NxD[some], k, state.available, left_out[some])
            assert found is not None, "nothing is behind it"
            return found[0]

        return dataclasses.replace(state, index=tuned(build(self.vectors, self.available), best_NxK, search))

    def _exact(
        self, users_NxD: np.ndarray, k: int, allowed: np.ndarray, left_out: Sequence[np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `best`, by all items' inner products."""
        pieces = self._pieces(allowed)
        most, width = powers(k, _FEWEST), powers(max(map(len, left_out), default=0), 64)
        largest = max(len(items) for _, items, _ in pieces)
        scores, rows = np.full((len(users_NxD), k), -np.inf, np.float32), np.full((len(users_NxD), k), -1, np.int32)
        start = 0
        for size in sizes_of(len(users_NxD), max(1, _SCORES // largest)):
            span = slice(start, min(start + size, len(users_NxD)))
            out, users = np.full((size, width), -1, np.int32), fill(users_NxD[span], size)
            for row, own in enumerate(left_out[span]):
                out[row, : len(own)] = own
            # What is outside of a piece is passed over.
            found = [
                (*best_columns(users, items, wide, out - first, k=min(most, len(items))), first)
                for first, items, wide in pieces
            ]
            best, columns = _merged(found, span.stop - start, k)
            scores[span, : best.shape[1]], rows[span, : best.shape[1]] = best, columns
            start = span.stop
        return scores, rows

    def best_of_one(
        self, users: Users, variables: Any, items_N: np.ndarray, k: int, allowed: np.ndarray, review_width: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """The best items after one history of which nothing but the items is known, by one program.

        A request by itself takes about as long to be handed over as to be computed: what is gathered, encoded and
        ranked here never leaves the device in between.

        Args:
          users: Encodes histories; a `Partial`, as the ranker's, so that equal models share the program.
          variables: Its variables.
          items_N: int, rows of the history, oldest first, -1 before the oldest.
          k: Items.
          allowed: bool [count], which may be among the best.
          review_width: Of the model's reviews.

        Returns:
          User vector as encoded, float32 [D], scores [k] and rows [k] as `best`; None where there is an index or
          are several devices, many items are wanted, or one of the history was added or updated: there `best` is to be
          used.
        """
        unchanged = (self.places[items_N[items_N >= 0]] < len(self.known.has_text)).all()
        alone = unchanged and self.index is None and k <= _MOST_ALONE and jax.local_device_count() == 1
        if not alone:
            return None
        if not self.on_device:
            if sum(table.nbytes for table in jax.tree.leaves(self.known)) > _TABLES_ON_DEVICE:
                return None
            self.on_device.append(jax.device_put(self.known))
        (_, vectors, wide), *more = self._pieces(allowed)
        vector, unit, *best = _best_of_one(
            users, variables, self.on_device[0], vectors, items_N.astype(np.int32), wide,
            k=min(_MOST_ALONE, len(vectors)), review_width=review_width,
        )  # fmt: skip
        none = np.zeros((1, 0), np.int32)
        found = [(*best_columns(unit, items, wide, none, k=_MOST_ALONE), first) for first, items, wide in more]
        scores, rows = _merged([(*best, 0), *found], 1, k)
        return np.asarray(vector), scores[0], rows[0]

    def put(self, frame: pl.DataFrame, changed: Sequence[Changed], tables: ItemTables, vectors: np.ndarray) -> Stock:
        """The next state, with new items behind the others and known ones replaced; both are recommended from now on.

        To be called by one thread at a time, on the newest state: it writes into the spare room, which no state sees.

        Args:
          frame: Their item_id and title.
          changed: What was made of them.
          tables: Their item tables.
          vectors: Their item vectors.
        """
        rows = np.array([self.row_of(item_id) for item_id in frame["item_id"]], np.int64)
        new = rows < 0
        count = self.count + int(new.sum())
        rows[new] = np.arange(self.count, count)
        first, more, used = len(self.known.has_text), self.more, self.used
        places = np.concatenate([self.places, np.zeros(count - self.count, np.int32)])
        if used + len(rows) > len(more.has_text):
            # What was replaced since stays behind, so that updates without end take no more room than the items.
            alive = np.setdiff1d(np.flatnonzero(self.places >= first), rows)
            at, used = places[alive] - first, len(alive)
            more = jax.tree.map(lambda table: _roomy(table[at], used + len(rows)), more)
            places[alive] = first + np.arange(used)
        added = np.arange(used, used + len(rows))
        places[rows] = first + added
        jax.tree.map(lambda table, part: table.__setitem__(added, part), more, tables)
        shown = self.shown
        if count > len(shown[0]) or not new.all():
            shown = tuple(_roomy(buffer[: self.count], count) for buffer in shown)
        shown[0][rows], shown[1][rows] = vectors, True
        pieces = [*self.pieces, *[None] * (1 - (first - count) // _PIECE - len(self.pieces))]
        for number in np.unique(np.where(rows < first, 0, 1 + (rows - first) // _PIECE)):
            pieces[number] = None
        for item_id, title, row, change in zip(frame["item_id"], frame["title"], rows.tolist(), changed, strict=True):
            if row == len(self.item_ids):
                self.item_ids.append(item_id)
                self.titles.append(title or "")
            self.titles[row], self.changed[row] = title or "", change
        state = dataclasses.replace(
            self, count=count, more=more, used=used + len(rows), places=places, shown=shown, pieces=pieces,
            behind=self.behind if self.index is None else np.union1d(self.behind, rows),
        )  # fmt: skip
        # Last: an id that is found belongs to items that are there.
        self.rows.update(zip(frame["item_id"], rows.tolist(), strict=True))
        return state

    def without(self, rows: np.ndarray) -> Stock:
        """The next state, in which some items are no longer recommended."""
        available = self.shown[1].copy()
        available[rows] = False
        return dataclasses.replace(self, shown=(self.shown[0], available))


@functools.partial(jax.jit, static_argnames=("k", "review_width"))
def _best_of_one(
    users: Users,
    variables: Any,
    tables: ItemTables,
    vectors_CxD: jax.Array,
    items_N: jax.Array,
    allowed_C: jax.Array,
    *,
    k: int,
    review_width: int,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    # One history needs no numbering of its distinct items.
    places_N = jnp.where(items_N >= 0, jnp.arange(len(items_N)), -1)
    own = jax.tree.map(lambda table: table[jnp.maximum(items_N, 0)], tables)
    vector_1xD = users(variables, own, items_N, history_of_items(places_N[None], review_width))
    unit_1xD, none_1x0 = unit(vector_1xD), jnp.zeros((1, 0), jnp.int32)
    return vector_1xD[0], unit_1xD, *best_columns(unit_1xD, vectors_CxD, allowed_C, none_1x0, k=k)


def _merged(found: Sequence[tuple[jax.Array, jax.Array, int]], users: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The best of all pieces, for the first `users`: scores and rows [users, k at most], -1 for none.

    Args:
      found: Of each piece the scores in falling order, the columns, and the row of its first column.
      users: Users; the rest of a batch is padding.
      k: Items.
    """
    parts = [(np.asarray(best)[:users], np.asarray(columns)[:users] + first) for best, columns, first in found]
    if len(parts) == 1:
        best, rows = (part[:, :k] for part in parts[0])
    else:
        best, rows = (np.concatenate(some, axis=1) for some in zip(*parts, strict=True))
        # Of equals the lower row stands first, within a piece as among them.
        order = np.argsort(-best, axis=1, kind="stable")[:, :k]
        best, rows = np.take_along_axis(best, order, axis=1), np.take_along_axis(rows, order, axis=1)
    return best, np.where(best > -np.inf, rows, -1)


def _roomy(part: np.ndarray, count: int) -> np.ndarray:
    """A copy of some rows with room for `count` and some more."""
    out = np.zeros((count + count // 4 + 256, *part.shape[1:]), part.dtype)
    out[: len(part)] = part
    return out


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


def together(groups: Mapping[int, Sequence[int]]) -> Iterator[tuple[int, list[int]]]:
    """Histories by their length's bucket, the few that would not fill a batch of theirs with the next longer ones.

    Args:
      groups: Bucket to which histories have its length.

    Yields:
      Bucket and histories; each of these once, in its own bucket or a longer one of those given.
    """
    some = sorted(groups)
    left: list[int] = []
    for place, bucket in enumerate(some):
        longer = some[place + 1] if place + 1 < len(some) else None
        members, left = [*left, *groups[bucket]], []
        few = len(members) % SIZES[1]
        # Below half of a batch, histories are computed one by one, and longer slots would only cost.
        if longer is not None and few and few + len(groups[longer]) >= SIZES[1] // 2:
            members, left = members[:-few], members[-few:]
        if members:
            yield bucket, members


def fill(tree: Any, size: int) -> Any:
    """Repeats the last row of every array up to `size` rows, so that batches share their programs."""

    def filled(x: np.ndarray) -> np.ndarray:
        return x if len(x) == size else np.concatenate([x, np.repeat(x[-1:], size - len(x), axis=0)])

    return jax.tree.map(filled, tree)
