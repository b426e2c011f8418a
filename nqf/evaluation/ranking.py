"""Exact ranks and top-k lists over the whole catalogue, in bounded memory, the catalogue spread over the devices.

Ranks are counted, not sorted: rank = 1 + #greater + 1/2 #equal over the other items that are not masked, which is
the expected rank under random tie-breaking. Letters: N users, I items, D width, C items of a chunk, S seen items.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse

from nqf.ops.pins import on_local_devices

BATCH = 512
# Scores that stand at a time. On a CPU they are counted while they are still in its cache: 2^21 ran at the full rate of
# the matrix product, 2^23 at a quarter of it.
_TILE_CPU = 1 << 21
_TILE_ACCELERATOR = 1 << 26
# The product keeps its rate down to about as many users at a time.
_FEWEST_USERS = 128
# Twice as many are still exact in float32.
_WIDEST = 1 << 22
# Columns of a group of `_top`.
_GROUP = 16
_ROWS_CHECKED = 65_536
# Scores that a function may hold at a time: 256 MiB of float32.
_DENSE_SCORES = 1 << 26

# User vectors [cases, D] and item vectors [items, D], scored by inner product, or a function from case rows int [B] to
# scores [B, items].
Scorer = tuple[np.ndarray, np.ndarray] | Callable[[np.ndarray], np.ndarray]
Seen = Sequence[Sequence[int] | np.ndarray]


def ranks_from_scores(scores_NxI: np.ndarray, targets_N: np.ndarray, seen: Seen | None = None) -> np.ndarray:
    """Ranks of the targets in given scores.

    Args:
      scores_NxI: Scores of every item, any float dtype; infinities are allowed.
      targets_N: Row of each target item.
      seen: Items of each user to leave out; a target among them stays in. Default: none.

    Returns:
      Expected ranks under ties, float64 [N], 1 for the best.

    Raises:
      ValueError: A score is not a number, a shape does not fit, or a target is outside the catalogue.
    """
    scores_NxI = np.asarray(scores_NxI)
    targets_N = _checked_targets(targets_N, len(scores_NxI), scores_NxI.shape[1])
    if np.isnan(scores_NxI).any():
        raise ValueError(f"{int(np.isnan(scores_NxI).sum())} scores are not numbers (NaN); such items have no rank")
    target_N = scores_NxI[np.arange(len(targets_N)), targets_N][:, None]
    greater_NxI = scores_NxI > target_N
    equal_NxI = scores_NxI == target_N
    greater_N = greater_NxI.sum(axis=1)
    # The target equals itself.
    equal_N = equal_NxI.sum(axis=1) - 1
    if seen is not None and len(targets_N):
        seen_NxS = _padded(seen, targets_N)
        valid_NxS = seen_NxS >= 0
        rows_NxS = np.maximum(seen_NxS, 0)
        greater_N = greater_N - (np.take_along_axis(greater_NxI, rows_NxS, axis=1) & valid_NxS).sum(axis=1)
        equal_N = equal_N - (np.take_along_axis(equal_NxI, rows_NxS, axis=1) & valid_NxS).sum(axis=1)
    return 1.0 + greater_N + 0.5 * equal_N


def rank_vectors(
    user_vectors_NxD: np.ndarray,
    item_vectors_IxD: np.ndarray,
    targets_N: np.ndarray,
    seen: Seen | None = None,
    *,
    batch: int = BATCH,
    chunk: int | None = None,
) -> np.ndarray:
    """Ranks of the targets under inner products; the scores are never all in memory.

    Args:
      user_vectors_NxD: float32; a memory map is read piece by piece.
      item_vectors_IxD: float32; likewise.
      targets_N: Row of each target item.
      seen: Items of each user to leave out; a target among them stays in. Default: none.
      batch: Users scored at a time.
      chunk: Items scored at a time; by default what suits the device.

    Returns:
      Expected ranks under ties, float64 [N], 1 for the best.

    Raises:
      ValueError: A vector is not finite, a shape does not fit, or a target is outside the catalogue.
    """
    items = len(item_vectors_IxD)
    targets_N = _checked_targets(targets_N, len(user_vectors_NxD), items)
    _check_vectors(user_vectors_NxD, item_vectors_IxD)
    batch, width = _tile(len(targets_N), items, batch, chunk)
    spans = list(_spans(len(targets_N), batch))
    padded = [
        _rows(_padded(seen[span] if seen is not None else [[]] * len(targets_N[span]), targets_N[span]), batch, -1)
        for span in spans
    ]
    if items <= width:
        items_CxD = on_local_devices(_rows(item_vectors_IxD, width), split=True)
        ahead = [
            _ahead_of_item(
                _rows(user_vectors_NxD[span], batch), items_CxD, _rows(targets_N[span], batch), seen_BxS, items
            )
            for span, seen_BxS in zip(spans, padded, strict=True)
        ]
    else:
        # The target's score has to come from a product of the same shapes as the others: another order of summation
        # may differ in the last bit, and an item with the target's own vector would no longer tie with it.
        target = [
            _target_scores(_rows(user_vectors_NxD[span], batch), item_vectors_IxD, targets_N[span], width)
            for span in spans
        ]
        ahead = [on_local_devices(np.zeros(batch, np.int32)) for _ in spans]
        for start in range(0, items, width):
            chunk_CxD = on_local_devices(_rows(item_vectors_IxD[start : start + width], width), split=True)
            count = min(width, items - start)
            for number, span in enumerate(spans):
                users_BxD = _rows(user_vectors_NxD[span], batch)
                # Summed on the device, so that no piece waits for the one before.
                ahead[number] = _ahead(
                    ahead[number], users_BxD, chunk_CxD, target[number], padded[number], start, count
                )
    twice_N = np.concatenate([np.zeros(0), *map(np.asarray, ahead)])[: len(targets_N)]
    # The target is level with itself.
    return 1.0 + 0.5 * (twice_N - 1)


def top_k(
    user_vectors_NxD: np.ndarray,
    item_vectors_IxD: np.ndarray,
    k: int,
    seen: Seen | None = None,
    *,
    batch: int = BATCH,
    chunk: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The best `k` items of each user under inner products, exact; ties go to the lower item row.

    Args:
      user_vectors_NxD: float32.
      item_vectors_IxD: float32.
      k: Items per user, at most the catalogue's size is used.
      seen: Items of each user to leave out. Default: none.
      batch: Users scored at a time.
      chunk: Items scored at a time; by default what suits the device.

    Returns:
      Scores float32 [N, k] in falling order and item rows int32 [N, k]. Where fewer than `k` items are left, the
      score is minus infinity and the row is -1.

    Raises:
      ValueError: A vector is not finite, a shape does not fit, or `k` is not positive.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    _check_vectors(user_vectors_NxD, item_vectors_IxD)
    users, items = len(user_vectors_NxD), len(item_vectors_IxD)
    k, (batch, width) = min(k, items), _tile(users, items, batch, chunk)
    scores_NxK = np.full((users, k), -np.inf, np.float32)
    rows_NxK = np.full((users, k), -1, np.int32)
    spans = list(_spans(users, batch))
    seen = [[]] * users if seen is None else seen
    padded = [_padded(seen[span]) for span in spans]
    for start in range(0, items, width):
        chunk_CxD = on_local_devices(_rows(item_vectors_IxD[start : start + width], width), split=True)
        count = min(width, items - start)
        for span, seen_BxS in zip(spans, padded, strict=True):
            size = span.stop - span.start
            scores_BxK, rows_BxK = _merged(
                _rows(scores_NxK[span], batch),
                _rows(rows_NxK[span], batch),
                _rows(user_vectors_NxD[span], batch),
                chunk_CxD,
                _rows(seen_BxS, batch, -1),
                start,
                count,
            )
            scores_NxK[span], rows_NxK[span] = np.asarray(scores_BxK)[:size], np.asarray(rows_BxK)[:size]
    return scores_NxK, rows_NxK


def place_items(item_vectors_IxD: np.ndarray) -> jax.Array:
    """Item vectors on the devices, for `best_columns`, filled up with zeros to rows that all devices share evenly."""
    whole = 128 * jax.local_device_count()
    return on_local_devices(_rows(item_vectors_IxD, -(-len(item_vectors_IxD) // whole) * whole), split=True)


@functools.partial(jax.jit, static_argnames="k")
def best_columns(
    users_BxD: jax.Array, items_CxD: jax.Array, allowed_C: jax.Array, left_out_BxS: jax.Array, *, k: int
) -> tuple[jax.Array, jax.Array]:
    """The best `k` items of a few users whose scores fit in memory together; ties go to the lower row.

    Args:
      users_BxD: float32.
      items_CxD: From `place_items`.
      allowed_C: bool, which items may be among the best of anybody.
      left_out_BxS: int32, items that may not be among a user's best, -1 for none.
      k: Items per user, at most C.

    Returns:
      Scores float32 [B, k] in falling order, minus infinity where no item is left, and rows int32 [B, k].
    """
    scores_BxC = jnp.where(allowed_C, _standing(users_BxD, items_CxD), -jnp.inf)
    left_out_BxS = jnp.where(left_out_BxS >= 0, left_out_BxS, items_CxD.shape[0])
    scores_BxC = scores_BxC.at[jnp.arange(len(users_BxD))[:, None], left_out_BxS].set(-jnp.inf, mode="drop")
    return _top(_one_zero(scores_BxC), k)


def top_k_from_scores(scores_NxI: np.ndarray, k: int, seen: Seen | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The best `k` items of each user in given scores; as `top_k`."""
    scores_NxI = np.array(scores_NxI, np.float32)
    for row, items in enumerate(seen if seen is not None else []):
        scores_NxI[row, np.asarray(items, np.int64)] = -np.inf
    best_NxK, rows_NxK = jax.lax.top_k(_one_zero(scores_NxI), min(k, scores_NxI.shape[1]))
    best_NxK = np.asarray(best_NxK)
    return best_NxK, np.where(best_NxK > -np.inf, np.asarray(rows_NxK), -1)


def raise_some(
    best: tuple[np.ndarray, np.ndarray],
    user_vectors_NxD: np.ndarray,
    item_vectors_IxD: np.ndarray,
    raised_NxI: scipy.sparse.csr_matrix,
    seen: Seen,
    *,
    k: int | None = None,
    certain: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """The top-k lists after some items' scores have been raised.

    Exact: whatever is among the best k and was not raised was among the best k before.

    Args:
      best: Scores, float32 [N, K], and rows, int32 [N, K], of `top_k` for these vectors. The longer they are, the lower
        is what they do not hold, and the fewer of the raised items need a product.
      user_vectors_NxD: float32.
      item_vectors_IxD: float32.
      raised_NxI: What is added to the inner products, sparse, nothing below zero.
      seen: Items of each user that were left out.
      k: Items per user, at most K, which is the default.
      certain: Whether the lists are the best for certain. In those of an approximate search better items may be
        missing: every item that is raised is then scored, so that none but items that are not raised can be missing.

    Returns:
      Scores and rows as `top_k` returns them.

    Raises:
      ValueError: Something would be lowered.
    """
    if raised_NxI.data.size and raised_NxI.data.min() < 0:
        raise ValueError("scores can only be raised: a weight below zero would need all items' scores")
    scores_NxK, rows_NxK = (array[:, :k].copy() for array in best)
    marked = np.zeros(len(item_vectors_IxD), bool)
    for user, (left_out, start, stop) in enumerate(zip(seen, raised_NxI.indptr, raised_NxI.indptr[1:], strict=False)):
        scores_NxK[user], rows_NxK[user] = raise_one(
            (best[0][user], best[1][user]),
            user_vectors_NxD[user],
            item_vectors_IxD,
            (raised_NxI.indices[start:stop], raised_NxI.data[start:stop]),
            left_out,
            marked,
            k=scores_NxK.shape[1],
            certain=certain,
        )
    return scores_NxK, rows_NxK


def raise_one(
    best: tuple[np.ndarray, np.ndarray],
    user_vector_D: np.ndarray,
    item_vectors_IxD: np.ndarray,
    raised: tuple[np.ndarray, np.ndarray],
    left_out: Sequence[int] | np.ndarray,
    marked: np.ndarray,
    *,
    k: int,
    certain: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """`raise_some` for one user: `raised` are items and what is added to their scores.

    `marked` is room to work in, bool [I], all False before and after.
    """
    (scores, rows), (own, more) = best, raised
    # Of what is missing in a list that is not certain, nothing bounds the score.
    lowest = scores[-1] if certain else -np.inf
    marked[np.asarray(left_out, np.int64)] = True
    kept = ~marked[own]
    marked[np.asarray(left_out, np.int64)] = False
    own, more = own[kept], more[kept]
    listed = rows[rows >= 0]
    marked[listed] = True
    # Those in the list come first whatever their raise.
    urgent = np.where(marked[own], np.inf, more)
    marked[listed] = False
    for most in _most_raised(urgent, len(rows) + 4 * k):
        # What was not among the best was at most the last of them: a raise that cannot make up for how far that is from
        # the list as it has become is not worth a product. The slack is above what sums in another order differ by.
        risen = scores[k - 1]
        slack = 1e-5 * (abs(lowest) + abs(risen)) if np.isfinite(lowest) else np.inf
        most = most[(more[most] >= risen - lowest - slack) | np.isinf(urgent[most])] if np.isfinite(slack) else most
        new = own[most]
        marked[new] = True
        others = (rows < 0) | ~marked[rows]
        marked[new] = False
        scores = np.concatenate([scores[others], item_vectors_IxD[new] @ user_vector_D + more[most]])
        rows = np.concatenate([rows[others], new])
        order = np.lexsort((rows, -scores))[:k]
        scores, rows = scores[order], rows[order]
    return scores[:k], rows[:k]


def _most_raised(more: np.ndarray, first: int) -> Iterator[np.ndarray]:
    """Places of the `first` largest raises, and then of the others."""
    if first < len(more):
        order = np.argpartition(-more, first)
        yield order[:first]
        yield order[first:]
    else:
        yield np.arange(len(more))


def dense_batches(users: int, items: int, batch: int = BATCH) -> Iterator[slice]:
    """Slices of the users whose scores of all items fit in memory together."""
    return _spans(users, max(1, min(batch, _DENSE_SCORES // items)))


def _scores(users_BxD: jax.Array, chunk_CxD: jax.Array) -> jax.Array:
    # Accelerators would round the inputs of a default-precision product, which makes ties of near neighbors.
    return jnp.matmul(users_BxD, chunk_CxD.T, precision=jax.lax.Precision.HIGHEST)


def _standing(users_BxD: jax.Array, chunk_CxD: jax.Array) -> jax.Array:
    """Scores as an array of their own: what reads them would else become a part of the product, at a lower rate."""
    return jax.lax.optimization_barrier(_scores(users_BxD, chunk_CxD))


def _one_zero(scores: jax.Array | np.ndarray) -> jax.Array:
    # `lax.top_k` orders -0.0 below 0.0, which a comparison holds to be equal.
    return jnp.where(scores == 0, 0.0, scores)


@jax.jit
def _picked(users_BxD: jax.Array, chunk_CxD: jax.Array, columns_B: jax.Array) -> jax.Array:
    return jnp.take_along_axis(_standing(users_BxD, chunk_CxD), columns_B[:, None], axis=1)[:, 0]


def _target_scores(
    users_BxD: np.ndarray, item_vectors_IxD: np.ndarray, targets_N: np.ndarray, width: int
) -> np.ndarray:
    """Scores of the users' targets, float32 [B], by products of `width` items; N are the real ones of the B users."""
    scores_B = np.zeros(len(users_BxD), np.float32)
    for part in _spans(len(targets_N), width):
        of_targets_CxD = on_local_devices(_rows(item_vectors_IxD[targets_N[part]], width), split=True)
        rows = np.arange(part.start, part.stop)
        columns_B = np.zeros(len(users_BxD), np.int32)
        columns_B[rows] = rows - part.start
        scores_B[rows] = np.asarray(_picked(users_BxD, of_targets_CxD, columns_B))[rows]
    return scores_B


@jax.jit
def _ahead(
    ahead_B: jax.Array,
    users_BxD: jax.Array,
    chunk_CxD: jax.Array,
    target_B: jax.Array,
    seen_BxS: jax.Array,
    start: int,
    count: int,
) -> jax.Array:
    """Adds, for a chunk, twice the items that are above the target and once those level with it, int32 [B]."""
    return ahead_B + _count(_standing(users_BxD, chunk_CxD), target_B, seen_BxS - start, count)


@jax.jit
def _ahead_of_item(
    users_BxD: jax.Array, items_CxD: jax.Array, targets_B: jax.Array, seen_BxS: jax.Array, count: int
) -> jax.Array:
    """As `_ahead`, for the whole catalogue and targets given by their rows: one product for both."""
    scores_BxC = _standing(users_BxD, items_CxD)
    target_B = jnp.take_along_axis(scores_BxC, targets_B[:, None], axis=1)[:, 0]
    return _count(scores_BxC, target_B, seen_BxS, count)


def _count(scores_BxC: jax.Array, target_B: jax.Array, columns_BxS: jax.Array, count: int) -> jax.Array:
    """Twice the scores above the target's and once those level with it, int32 [B].

    Args:
      scores_BxC: Scores of a chunk; those of its padding are zero.
      target_B: The targets' scores.
      columns_BxS: Distinct columns to leave out; what lies outside of the chunk is passed over.
      count: Columns that are items.
    """

    def ahead(scores_BxN: jax.Array) -> jax.Array:
        return (scores_BxN > target_B[:, None]).astype(jnp.float32) + (scores_BxN >= target_B[:, None])

    # A product with ones is the fastest sum of a row on a CPU, and exact: a chunk has less than 2^23 items.
    total_B = ahead(scores_BxC) @ jnp.ones(scores_BxC.shape[1], jnp.float32)
    # Padding and seen items are counted with the others and taken off again: a gather is cheaper than a mask.
    padding_B = ahead(jnp.zeros((len(target_B), 1)))[:, 0] * (scores_BxC.shape[1] - count)
    inside_BxS = (columns_BxS >= 0) & (columns_BxS < count)
    seen_BxS = jnp.take_along_axis(scores_BxC, jnp.where(inside_BxS, columns_BxS, 0), axis=1)
    seen_B = jnp.sum(jnp.where(inside_BxS, ahead(seen_BxS), 0.0), axis=1)
    return (total_B - padding_B - seen_B).astype(jnp.int32)


@jax.jit
def _merged(
    best_BxK: jax.Array,
    rows_BxK: jax.Array,
    users_BxD: jax.Array,
    chunk_CxD: jax.Array,
    seen_BxS: jax.Array,
    start: int,
    count: int,
) -> tuple[jax.Array, jax.Array]:
    """Merges a chunk into the best so far. Earlier rows stand first, and `lax.top_k` keeps the first of equals."""
    scores_BxC = _one_zero(_scores(users_BxD, chunk_CxD))
    scores_BxC = jnp.where(jnp.arange(chunk_CxD.shape[0]) < count, scores_BxC, -jnp.inf)
    local_BxS = jnp.where(seen_BxS >= start, seen_BxS - start, chunk_CxD.shape[0])
    scores_BxC = scores_BxC.at[jnp.arange(len(users_BxD))[:, None], local_BxS].set(-jnp.inf, mode="drop")
    new_BxK, columns_BxK = _top(scores_BxC, min(best_BxK.shape[1], chunk_CxD.shape[0]))
    new_rows_BxK = jnp.where(new_BxK > -jnp.inf, columns_BxK + start, -1)
    merged_BxK, which_BxK = jax.lax.top_k(jnp.concatenate([best_BxK, new_BxK], axis=1), best_BxK.shape[1])
    return merged_BxK, jnp.take_along_axis(jnp.concatenate([rows_BxK, new_rows_BxK], axis=1), which_BxK, axis=1)


def _top(scores_BxC: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """`lax.top_k`, which sorts its input, over the groups of columns that can hold one of the best alone.

    The `k` groups with the largest members, the first of equals, hold the `k` best columns, the first of equals: a
    column outside of them comes after the largest member of each.
    """
    users, columns = scores_BxC.shape
    groups = columns // _GROUP
    if columns % _GROUP or 2 * k >= groups:
        return jax.lax.top_k(scores_BxC, k)
    grouped_BxGxW = scores_BxC.reshape(users, groups, _GROUP)
    # In falling order of columns, `lax.top_k` would not keep the first of equals.
    which_BxK = jnp.sort(jax.lax.top_k(jnp.max(grouped_BxGxW, axis=-1), k)[1], axis=1)
    chosen_BxKxW = jnp.take_along_axis(grouped_BxGxW, which_BxK[:, :, None], axis=1)
    best_BxK, at_BxK = jax.lax.top_k(chosen_BxKxW.reshape(users, k * _GROUP), k)
    return best_BxK, jnp.take_along_axis(which_BxK, at_BxK // _GROUP, axis=1) * _GROUP + at_BxK % _GROUP


def _spans(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _tile(users: int, items: int, batch: int, chunk: int | None) -> tuple[int, int]:
    """Users and items that are scored at a time."""
    devices = jax.local_device_count()
    scores = _TILE_CPU if jax.default_backend() == "cpu" else _TILE_ACCELERATOR
    # Whole vector registers, so that no item is scored by a remainder loop with another order of summation.
    whole = -(-items // (128 * devices)) * 128 * devices
    if chunk is None and whole * _FEWEST_USERS <= scores:
        # A small catalogue in one piece, for fewer users at a time: the targets' scores need no product of their own.
        batch, chunk = min(batch, scores // whole // 64 * 64), whole
    # A single user does not pay for a whole batch; powers of two keep the number of compiled programs small.
    batch = min(batch, 1 << max(0, users - 1).bit_length())
    if chunk is None:
        chunk = min(max(1_024, scores // batch), _WIDEST)
    width = min(chunk, whole)
    return batch, -(-width // devices) * devices


def _rows(values: np.ndarray, count: int, fill: float = 0) -> np.ndarray:
    """Fills up to `count` rows, so that the last piece runs the program of the others."""
    values = np.asarray(values)
    if len(values) == count:
        return values
    out = np.full((count, *values.shape[1:]), fill, values.dtype)
    out[: len(values)] = values
    return out


def _padded(seen: Seen, targets_N: np.ndarray | None = None) -> np.ndarray:
    """Distinct seen items without the target, int32 [N, S] filled up with -1; S is a power of two."""
    lengths_N = np.array([len(items) for items in seen], np.int64)
    out = np.full((len(seen), 1 << max(0, int(lengths_N.max(initial=0)) - 1).bit_length()), -1, np.int32)
    if lengths_N.any():
        out[np.arange(out.shape[1]) < lengths_N[:, None]] = np.concatenate([np.asarray(items) for items in seen])
    out.sort(axis=1)
    out[:, 1:][out[:, 1:] == out[:, :-1]] = -1
    if targets_N is not None:
        out[out == np.asarray(targets_N)[:, None]] = -1
    return out


def _checked_targets(targets_N: np.ndarray, users: int, items: int) -> np.ndarray:
    targets_N = np.asarray(targets_N, np.int64)
    if targets_N.shape != (users,):
        raise ValueError(f"{users} users but targets of shape {targets_N.shape}; one target per user is needed")
    outside = (targets_N < 0) | (targets_N >= items)
    if outside.any():
        row = int(np.flatnonzero(outside)[0])
        raise ValueError(f"target {int(targets_N[row])} of user {row} is outside the catalogue of {items} items")
    return targets_N


def _check_vectors(user_vectors_NxD: np.ndarray, item_vectors_IxD: np.ndarray) -> None:
    if user_vectors_NxD.ndim != 2 or user_vectors_NxD.shape[1:] != item_vectors_IxD.shape[1:]:
        raise ValueError(
            f"user vectors of shape {user_vectors_NxD.shape} and item vectors of shape {item_vectors_IxD.shape} "
            "do not fit: both need the same width"
        )
    nothing = np.zeros(user_vectors_NxD.shape[1], np.float32)
    for name, vectors in (("user", user_vectors_NxD), ("item", item_vectors_IxD)):
        for span in _spans(len(vectors), _ROWS_CHECKED):
            # Zero times what is not finite is NaN: one product, at the rate of memory.
            with np.errstate(invalid="ignore"):
                bad = np.isnan(vectors[span] @ nothing)
            if bad.any():
                row = span.start + int(np.flatnonzero(bad)[0])
                raise ValueError(f"the vector of {name} {row} is not finite; training may have diverged")
