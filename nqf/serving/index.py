"""Approximate search of item vectors: an inverted file of faiss that knows what it finds.

Items are divided among lists by k-means, and a search reads the lists whose centers have the largest inner products
with the user's vector (IVF), in one byte per component. What is nearest by these bytes is scored again in float32
(`ranked`): scores and order are exact, and only what was not found can be missing. How many lists are read is chosen on
users of the run, by the recall of their exact lists (`tuned`), whatever the norms and the clusters of the vectors are.

Graphs (HNSW) take longer to be built, and lose their way where most of what they pass is filtered out; lists are read
to the end whatever is in them. Letters: N users, D width, R rows, I items.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

Kind = Literal["exact", "approximate"]
"""How the best items are found: by comparing all, or by an index."""
TARGET = 0.95
"""Recall@10 of the exact lists below which an index is not used."""
DEPTHS = (10, 100)
"""Lengths of lists at which the recall is held; longer ones are searched exactly."""
SAMPLE = 256
"""Users whose exact lists an index is compared with: one half chooses, the other tells."""
# What the choosing half has to reach, so that the telling one is not below the target by chance.
_CHOSEN_BY = 0.97
# Lists for each square root of the number of items: k-means takes four times as long for twice as many.
_LISTS = 2
# As faiss has it: fewer items per list say little about its center, and more than some only take time.
_FEWEST_PER_LIST, _MOST_PER_LIST = 39, 64
# Below this share, it is looked up how many of the allowed items are in which list.
_NEARLY_ALL = 0.95


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Index:
    """Item vectors in lists.

    Attributes:
      lists: faiss's index.
      centers: float32 [lists, D].
      sizes: int64 [lists], items of each list.
      list_of: int32 [I], the list of every item, -1 for those that were removed before.
      probes: Length of a result to how many lists are read for it; ascending, empty where nothing reached the target.
      recall: Recall@10 of the exact lists of users that the probes were not chosen by.
      seconds: What building and choosing took.
    """

    lists: Any
    centers: np.ndarray
    sizes: np.ndarray
    list_of: np.ndarray
    probes: Mapping[int, int]
    recall: float = math.nan
    seconds: float = 0.0

    @property
    def count(self) -> int:
        """Items that it knows of; the rows of others are above theirs."""
        return len(self.list_of)

    @property
    def held(self) -> int:
        """Items that it holds."""
        return self.lists.ntotal

    @property
    def nbytes(self) -> int:
        """Bytes that it takes beside the vectors: codes, ids and centers."""
        return self.held * (self.lists.code_size + 8) + self.list_of.nbytes + 2 * self.centers.nbytes

    def __str__(self) -> str:
        read = "/".join(str(probes) for probes in self.probes.values())
        return (
            f"approximate, recall@10 {self.recall:.3f}, {read} of {len(self.centers):,} lists read, "
            f"built in {self.seconds:.1f} s"
        )

    def facts(self) -> dict[str, Any]:
        """What is known of it, for JSON."""
        return {
            "recall@10": round(self.recall, 4),
            "lists": len(self.centers),
            "lists_read": {str(depth): probes for depth, probes in self.probes.items()},
            "items": self.held,
            "bytes": self.nbytes,
            "seconds": round(self.seconds, 1),
        }

    def search(self, users_NxD: np.ndarray, k: int, wanted: int, allowed_I: np.ndarray) -> np.ndarray | None:
        """Candidates for the best `k` items of each user.

        Where some items are not allowed, each user's search reads on until it has seen as many allowed ones as it would
        without a filter, and as many again: the fewer stand near the user, the further.

        Args:
          users_NxD: float32.
          k: Items that are looked for.
          wanted: Candidates per user.
          allowed_I: bool, which items may be among them; at least one.

        Returns:
          Rows, int64 [N, wanted], -1 where fewer are found; None for a `k` at which the recall is unknown.
        """
        probes = next((probes for depth, probes in self.probes.items() if k <= depth), None)
        if probes is None:
            return None
        share, needed_N = np.count_nonzero(allowed_I) / self.held, np.full(len(users_NxD), probes)
        if share < _NEARLY_ALL:
            needed_N = self._needed(users_NxD, probes, allowed_I)
        faiss, users_NxD = load_faiss(), np.ascontiguousarray(users_NxD, np.float32)
        among = {"sel": faiss.IDSelectorBitmap(np.packbits(allowed_I, bitorder="little"))} if share < 1 else {}
        rows_NxR = np.full((len(users_NxD), wanted), -1, np.int64)
        for probes in np.unique(needed_N):
            at = np.flatnonzero(needed_N == probes)
            parameters = faiss.SearchParametersIVF(nprobe=int(probes), **among)
            rows_NxR[at] = self.lists.search(users_NxD[at], wanted, params=parameters)[1]
        return rows_NxR

    def _needed(self, users_NxD: np.ndarray, probes: int, allowed_I: np.ndarray) -> np.ndarray:
        """Lists after which each user has seen twice the items that it sees without a filter, int [N]."""
        order_NxL = np.argsort(-(users_NxD @ self.centers.T), axis=1)
        allowed = np.bincount(self.list_of[allowed_I], minlength=len(self.centers))
        seen_NxL = np.cumsum(allowed[order_NxL], axis=1)
        # Twice as many: what is left, where the nearest are filtered out, is spread over more lists.
        enough_N = np.minimum(2 * self.sizes[order_NxL[:, :probes]].sum(axis=1), seen_NxL[:, -1])
        first_N = np.argmax(seen_NxL >= enough_N[:, None], axis=1) + 1
        # Of few values, as every value is a search of its own.
        needed_N = 2 ** np.ceil(np.log2(np.maximum(first_N, probes))).astype(np.int64)
        return np.minimum(needed_N, len(self.centers))


def load_faiss() -> Any:
    """The library; its interface is made at run time, so that no type checker knows it.

    Raises:
      RuntimeError: It is not installed.
    """
    try:
        return importlib.import_module("faiss")
    except ModuleNotFoundError as error:
        raise RuntimeError(f"{error.name} is not installed; pip install 'nqf[index]'") from None


def build(vectors_IxD: np.ndarray, available_I: np.ndarray) -> Index:
    """Divides items among lists; `tuned` says how many are to be read.

    Args:
      vectors_IxD: float32, finite, of any norm.
      available_I: bool, the items to hold.

    Raises:
      RuntimeError: faiss is not installed.
    """
    faiss, began = load_faiss(), time.perf_counter()
    rows = np.flatnonzero(available_I)
    held_HxD = np.ascontiguousarray(vectors_IxD if available_I.all() else vectors_IxD[rows], np.float32)
    count, width = held_HxD.shape
    number = max(1, min(round(_LISTS * math.sqrt(count)), count // _FEWEST_PER_LIST))
    lists = faiss.index_factory(width, f"IVF{number},SQ8", faiss.METRIC_INNER_PRODUCT)
    lists.cp.min_points_per_centroid, lists.cp.max_points_per_centroid = 1, _MOST_PER_LIST
    lists.train(held_HxD)
    lists.add_with_ids(held_HxD, rows)
    list_of = np.full(len(vectors_IxD), -1, np.int32)
    sizes = np.array([lists.invlists.list_size(place) for place in range(number)])
    for place, size in enumerate(sizes.tolist()):
        if size:
            list_of[faiss.rev_swig_ptr(lists.invlists.get_ids(place), size)] = place
    return Index(
        lists=lists,
        centers=lists.quantizer.reconstruct_n(0, number),
        sizes=sizes,
        list_of=list_of,
        probes={},
        seconds=time.perf_counter() - began,
    )


def tuned(index: Index, best_NxK: np.ndarray, search: Callable[[Index, int, slice], np.ndarray]) -> Index:
    """Chooses the fewest lists that find enough on one half of some users, and measures the recall on the other.

    Args:
      index: From `build`.
      best_NxK: float32, scores of the exact lists of the users, minus infinity where there are fewer items; K is the
        largest of `DEPTHS`, or all items.
      search: From an index, a length and a slice of the users to the scores that are found, float32.
    """
    began, probes = time.perf_counter(), {}
    for depth in DEPTHS:
        lists = 1
        while depth <= best_NxK.shape[1]:
            found = search(dataclasses.replace(index, probes={depth: lists}), depth, slice(0, None, 2))
            if recall(found, best_NxK[::2, :depth]) >= _CHOSEN_BY:
                probes[depth] = lists
                break
            if lists == len(index.centers):
                break
            lists = min(2 * lists, len(index.centers))
    made, told = dataclasses.replace(index, probes=probes), math.nan
    if probes:
        told = recall(search(made, DEPTHS[0], slice(1, None, 2)), best_NxK[1::2, : DEPTHS[0]])
    seconds = index.seconds + time.perf_counter() - began
    return dataclasses.replace(made, recall=told, seconds=seconds)


def recall(found_NxK: np.ndarray, best_NxK: np.ndarray) -> float:
    """Share of exact lists that was found, by scores: an item in place of another of the same score is none that lacks.

    Args:
      found_NxK: float32, scores of what was found, falling, minus infinity where nothing was.
      best_NxK: float32, those of the exact lists.
    """
    there_NxK = best_NxK > -np.inf
    last_N = np.min(np.where(there_NxK, best_NxK, np.inf), axis=1, keepdims=True)
    # Products of the same vectors in another order of summation.
    last_N = last_N - 1e-6 * np.abs(np.where(there_NxK.any(axis=1, keepdims=True), last_N, 0))
    hits = np.minimum((found_NxK >= last_N).sum(axis=1), there_NxK.sum(axis=1)).sum()
    return float(hits / there_NxK.sum()) if there_NxK.any() else 1.0


def ranked(
    users_NxD: np.ndarray,
    vectors_IxD: np.ndarray,
    own_NxR: np.ndarray,
    shared_S: np.ndarray,
    left_out: Sequence[np.ndarray],
    k: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The best `k` of some candidates by their inner products; ties go to the lower row.

    Args:
      users_NxD: float32.
      vectors_IxD: float32, of all items.
      own_NxR: Rows that are candidates of each user, -1 for none.
      shared_S: Rows that are candidates of all users, none of them in `own_NxR`.
      left_out: Rows that are not recommended to each user.
      k: Items per user.

    Returns:
      Scores float32 [N, k] in falling order, and rows int32 [N, k]; minus infinity and -1 where no candidate is left.
    """
    scores_NxK = np.full((len(users_NxD), k), -np.inf, np.float32)
    rows_NxK = np.full((len(users_NxD), k), -1, np.int32)
    of_shared_NxS, marked = users_NxD @ vectors_IxD[shared_S].T, np.zeros(len(vectors_IxD), bool)
    for user, (own, out) in enumerate(zip(own_NxR, left_out, strict=True)):
        own = own[own >= 0]
        rows = np.append(own, shared_S)
        scores = np.append(vectors_IxD[own] @ users_NxD[user], of_shared_NxS[user])
        marked[out] = True
        kept = ~marked[rows]
        marked[out] = False
        if np.count_nonzero(kept) > k:
            kept &= scores >= np.partition(scores[kept], -k)[-k]
        rows, scores = rows[kept], scores[kept]
        order = np.lexsort((rows, -scores))[:k]
        scores_NxK[user, : len(order)], rows_NxK[user, : len(order)] = scores[order], rows[order]
    return scores_NxK, rows_NxK
