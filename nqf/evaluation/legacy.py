"""The reference's protocol: the target against 99 random items or those of its sample, to compare with it alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nqf.evaluation.ranking import Scorer, dense_batches, ranks_from_scores

NEGATIVES = 99
# Mean of 1/r over the 100 places, all equally likely.
_CHANCE = sum(1 / rank for rank in range(1, NEGATIVES + 2)) / (NEGATIVES + 1)

LEGACY_WARNING = (
    "Legacy protocol: each target is ranked against 99 uniformly drawn items instead of the whole catalogue. "
    "Do not compare these figures with full-catalogue ones, nor models by them: "
    f"(1) chance alone has an MRR of {_CHANCE:.3f}; "
    "(2) uniform negatives are mostly unpopular items, so that popularity alone looks strong, and sampled metrics can "
    "put models in another order than exact ones do (Krichene and Rendle 2020); "
    "(3) the reference selected its checkpoint on the very test file that it reports, drew its negatives without a "
    "seed and left the order of ties to chance. Here the draw is seeded, ties get their expected rank and selection "
    "is on validation; (1) and (2) remain."
)


def legacy_ranks(
    scorer: Scorer,
    targets_N: np.ndarray,
    past: Sequence[np.ndarray],
    *,
    items: int,
    seed: int,
    given: np.ndarray | None = None,
) -> np.ndarray:
    """Ranks of the targets among themselves and 99 uniform negatives, or the candidates of their samples.

    The drawn negatives of a user are the same for every model. They are distinct and leave out the target and the
    user's whole past; the reference left out only the window of the past that it showed its model.

    Args:
      scorer: The model.
      targets_N: Row of each target item.
      past: Items before the target, per user.
      items: Size of the catalogue.
      seed: Seed of the negatives.
      given: int32 [N, C], the samples' candidates without the target, -1 in padding. The targets that have some are
        ranked among these; None if no target has.

    Returns:
      Expected ranks under ties, float64 [N], 1 to 100.

    Raises:
      ValueError: Fewer than 99 items are left for a user.
    """
    given = np.zeros((len(targets_N), 0), np.int32) if given is None else given
    bare = np.flatnonzero(~(given >= 0).any(axis=1))
    candidates_NxC = np.full((len(targets_N), 1 + max(NEGATIVES, given.shape[1])), -1, np.int64)
    candidates_NxC[:, 0], candidates_NxC[:, 1 : 1 + given.shape[1]] = targets_N, given
    drawn = draw_candidates(targets_N[bare], [past[row] for row in bare.tolist()], items=items, seed=seed)
    candidates_NxC[bare, : NEGATIVES + 1] = drawn
    ranks = []
    for span in dense_batches(len(targets_N), items):
        rows = np.arange(span.start, span.stop)
        candidates_BxC = candidates_NxC[rows]
        if callable(scorer):
            scores_BxC = np.take_along_axis(scorer(rows), candidates_BxC, axis=1)
        else:
            user_vectors_NxD, item_vectors_IxD = scorer
            scores_BxC = np.einsum("bd,bcd->bc", user_vectors_NxD[rows], item_vectors_IxD[candidates_BxC])
        scores_BxC = np.where(candidates_BxC >= 0, scores_BxC, -np.inf)
        ranks.append(ranks_from_scores(scores_BxC, np.zeros(len(rows), np.int64)))
    return np.concatenate(ranks)


def draw_candidates(targets_N: np.ndarray, past: Sequence[np.ndarray], *, items: int, seed: int) -> np.ndarray:
    """The target in column 0 and 99 distinct negatives beside it, int64 [N, 100].

    Raises:
      ValueError: Fewer than 99 items are left for a user.
    """
    generator = np.random.default_rng(seed)
    candidates_NxC = np.empty((len(targets_N), NEGATIVES + 1), np.int64)
    for row, (target, items_before) in enumerate(zip(targets_N, past, strict=True)):
        excluded = np.unique(np.append(items_before, target))
        if items - len(excluded) < NEGATIVES:
            raise ValueError(
                f"the legacy protocol needs {NEGATIVES} items that the user does not know, but for case {row} only "
                f"{items - len(excluded)} of {items} are left; use the full protocol"
            )
        # Places among the items that are not excluded, turned into item rows by stepping over those that are.
        drawn = np.sort(generator.choice(items - len(excluded), NEGATIVES, replace=False))
        drawn += np.searchsorted(excluded - np.arange(len(excluded)), drawn, side="right")
        candidates_NxC[row, 0], candidates_NxC[row, 1:] = target, drawn
    return candidates_NxC
