"""Training-free baselines: popularity, recent popularity, last-item cosine, co-occurrence alone and
beside texts.

What a baseline may count are the training events and, when the test split is evaluated, the validation targets too
(`known_events`): they lie in the past of every test case, and the trained models read them in the histories.
"""

from __future__ import annotations

import numpy as np

from nqf.data.interactions import MISSING_TIME, Interactions
from nqf.data.splits import Cases, Split
from nqf.evaluation.cooccurrence import Counting, count_pairs, newest_of_cases, recent_text, stand_in
from nqf.evaluation.ranking import Scorer

_DAY = 86_400
_RECENT_SHARE = 0.1


def known_events(interactions: Interactions, split: Split, cases: Cases) -> np.ndarray:
    """What the baselines may count for these cases, bool [events].

    The training events; and when no validation case is among `cases`, the validation targets that are not cold: an
    item that training never saw stays unseen.
    """
    known = split.train.copy()
    if not np.isin(cases.cuts, split.valid.cuts).any():
        cuts = split.valid.cuts
        known[cuts[~split.cold[interactions.items[cuts]]]] = True
    known[cases.cuts] = False
    return known


def popular(interactions: Interactions, split: Split, cases: Cases) -> Scorer:
    """Every item by its number of known events."""
    known = known_events(interactions, split, cases)
    return _same_for_all(np.bincount(interactions.items[known], minlength=len(split.cold)), cases)


def recent_popular(interactions: Interactions, split: Split, cases: Cases, *, days: float) -> Scorer:
    """Every item by its number of known events in the `days` before the last of them.

    Where no event has a time, the last tenth of each user's known events counts, at least one.
    """
    known = known_events(interactions, split, cases)
    times = np.where(known, interactions.times, MISSING_TIME)
    if (times != MISSING_TIME).any():
        recent = (times != MISSING_TIME) & (times >= times.max() - round(days * _DAY))
    else:
        user_of = interactions.users
        ends = np.cumsum(np.bincount(user_of[known], minlength=len(interactions.user_ids)))
        sizes = np.diff(ends, prepend=0)
        place = np.arange(ends[-1] if len(ends) else 0)
        owner = user_of[known]
        recent = np.zeros(len(known), bool)
        recent[known] = place >= ends[owner] - np.maximum(1, np.floor(_RECENT_SHARE * sizes[owner]))
    return _same_for_all(np.bincount(interactions.items[recent], minlength=len(split.cold)), cases)


def last_item_cosine(
    interactions: Interactions, cases: Cases, item_vectors_IxD: np.ndarray, present_I: np.ndarray
) -> Scorer:
    """Cosine to the newest history item that has a vector; items without one come last.

    Args:
      interactions: All interactions.
      cases: The cases to score.
      item_vectors_IxD: float [I, D].
      present_I: bool, False where an item has no vector.
    """
    lengths_I = np.linalg.norm(item_vectors_IxD, axis=1)
    present_I = present_I & (lengths_I > 0)
    unit_IxD = np.where(present_I[:, None], item_vectors_IxD / np.maximum(lengths_I, 1e-12)[:, None], 0)
    events = np.arange(len(interactions.items))
    # For every event, the newest event up to it whose item has a vector, in any user's history.
    newest = np.maximum.accumulate(np.where(present_I[interactions.items], events, -1))
    last = np.where(cases.cuts > 0, newest[cases.cuts - 1], -1)
    found = last >= interactions.offsets[cases.users]
    users_NxD = np.where(found[:, None], unit_IxD[interactions.items[np.maximum(last, 0)]], 0)
    # One more axis puts items without a vector below the smallest cosine, which is -1.
    return (
        np.column_stack([users_NxD, np.ones(len(users_NxD))]).astype(np.float32),
        np.column_stack([unit_IxD, np.where(present_I, 0.0, -2.0)]).astype(np.float32),
    )


def cooccurrence(
    interactions: Interactions,
    split: Split,
    cases: Cases,
    how: Counting,
    *,
    text: tuple[np.ndarray, float] | None = None,
) -> Scorer:
    """Items that follow, and less so precede, the newest history items in other known sequences.

    Args:
      interactions: All interactions.
      split: What is training.
      cases: The cases to score.
      how: How pairs count.
      text: Frozen text vectors of all items, unit rows, and what their cosine to the newest items' weighs beside it.
    """
    memory = count_pairs(interactions, known_events(interactions, split, cases), len(split.cold), how)
    memory = stand_in(memory, text[0]) if text is not None else memory

    def score(rows: np.ndarray) -> np.ndarray:
        scores_BxI = memory.scores(newest_of_cases(interactions, cases, rows, how.newest)).toarray()
        if text is not None:
            scores_BxI += text[1] * recent_text(interactions, cases, rows, text[0]) @ text[0].T
        return scores_BxI

    return score


def _same_for_all(scores_I: np.ndarray, cases: Cases) -> Scorer:
    """One ranking for every user, as vectors of width 1; counts up to 2^24 are exact in float32."""
    return np.ones((len(cases.users), 1), np.float32), scores_I.astype(np.float32)[:, None]
