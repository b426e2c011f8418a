"""What a score counts besides vectors, chosen on validation cases: how pairs count, and what counts and texts weigh."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from nqf.data.interactions import MISSING_TIME, Interactions
from nqf.data.splits import Cases, pasts, rankable
from nqf.evaluation.cooccurrence import (
    Cooccurrence,
    Counting,
    NearPairs,
    damp,
    near_pairs,
    newest_of_cases,
    recent_text,
    stand_in,
)
from nqf.evaluation.metrics import ndcg
from nqf.evaluation.ranking import ranks_from_scores
from nqf.fields.encoder import unit_rows

CASES = 4_000
# Scores of all tried cases, at most: 2^25 take a second.
_SCORES = 1 << 25
_BATCH = 256
USUAL = Counting()
Ways = Mapping[str, Sequence[Mapping[str, Any]]]
"""Alternatives by axis, as changes of a `Counting`."""
_LARGEST = 1_024.0
_STAND_INS = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """What is added to a score by vectors.

    Attributes:
      counting: How pairs of items count.
      cooccurrence: What the counts weigh.
      text: What the cosine of frozen texts weighs.
      gate: What the vectors themselves give it, on average; 0 where this is not known.
      ndcg: NDCG@10 on the validation cases that this was chosen by; None where nothing was chosen.
    """

    counting: Counting = USUAL
    cooccurrence: float = 0.0
    text: float = 0.0
    gate: float = 0.0
    ndcg: float | None = None

    def new_item_weight(self, weight: float) -> float:
        """Factor of the whole text part of an item that training never saw, whose `gate` alone counts `weight` times.

        What was added counts alike for all items: were it multiplied too, no weight of texts that ranks known items
        well would leave them before the new ones.
        """
        return (self.gate * weight + self.text) / (self.gate + self.text) if self.gate else weight

    @classmethod
    def of(cls, tree: Mapping[str, Any]) -> Score:
        """Of the mapping that `dataclasses.asdict` makes."""
        return cls(**{**tree, "counting": Counting(**tree["counting"])})


class Trial:
    """Validation cases on which scores are compared, what they may count, and what is remembered between trials.

    Args:
      interactions: All interactions.
      known: bool [events], what may be counted.
      cases: Validation cases; a fixed sample of them is ranked.
      items: I.
      repeats: Whether the past stays in the ranking.
      text_IxT: Frozen text vectors of all items, unit rows, zero where there is none: whose counts stand in for those
        of items without; None leaves texts out.
    """

    def __init__(
        self,
        interactions: Interactions,
        known: np.ndarray,
        cases: Cases,
        items: int,
        *,
        repeats: bool,
        text_IxT: np.ndarray | None = None,
    ) -> None:
        kept = rankable(interactions, cases, repeats=repeats)
        count = min(CASES, max(100, _SCORES // items))
        self.which = kept[np.sort(np.random.default_rng(0).permutation(len(kept))[:count])]
        self._interactions, self._known, self._cases, self._items = interactions, known, cases, items
        self._seen = None if repeats else pasts(interactions, cases[self.which])
        self._targets = interactions.items[cases.cuts[self.which]]
        self._near: dict[tuple, NearPairs] = {}
        self._counted: dict[Counting, Cooccurrence] = {}
        self._text_IxT, self._counts_as = text_IxT, None

    def recent_text(self) -> np.ndarray:
        """Cosines of the newest items' texts to all items', float32 [N, I], N the tried cases."""
        assert self._text_IxT is not None, "there are texts"
        return recent_text(self._interactions, self._cases, self.which, self._text_IxT) @ self._text_IxT.T

    def newest(self, count: int) -> np.ndarray:
        """The newest items before the targets of the tried cases, int [N, count], the newest first, -1 for none."""
        return newest_of_cases(self._interactions, self._cases, self.which, count)

    def counted(self, how: Counting) -> Cooccurrence:
        """Counted pairs; the last ones are remembered."""
        if how not in self._counted:
            pairs = how.window, how.decay, how.ties
            if pairs not in self._near:
                # Two of them, so that trying another one does not cost the best one.
                kept = list(self._near.items())[-1:]
                self._near = dict(kept) | {pairs: near_pairs(self._interactions, self._known, self._items, how)}
            memory = damp(self._near[pairs], how)
            if self._text_IxT is not None:
                # Which items have counts, and so whose stand in, does not depend on how pairs count.
                if self._counts_as is None:
                    self._counts_as = stand_in(memory, self._text_IxT).counts_as
                memory = dataclasses.replace(memory, counts_as=self._counts_as)
            self._counted = {how: memory}
        return self._counted[how]

    def value(self, score: Score, base_NxI: np.ndarray | None, text_NxI: np.ndarray | None) -> float:
        """NDCG@10 of a score.

        Args:
          score: What counts and texts weigh.
          base_NxI: Scores of the tried cases that they are added to, float32; None for none.
          text_NxI: What the text's weight multiplies, float32; None for no texts.
        """
        memory = self.counted(score.counting) if score.cooccurrence else None
        total = 0.0
        for start in range(0, len(self.which), _BATCH):
            span = slice(start, min(start + _BATCH, len(self.which)))
            scores = np.zeros((span.stop - start, self._items), np.float32) if base_NxI is None else base_NxI[span]
            if memory is not None:
                newest = newest_of_cases(self._interactions, self._cases, self.which[span], memory.how.newest)
                scores = scores + score.cooccurrence * memory.scores(newest).toarray()
            if score.text and text_NxI is not None:
                scores = scores + score.text * text_NxI[span]
            seen = None if self._seen is None else self._seen[span]
            total += float(ndcg(ranks_from_scores(scores, self._targets[span], seen), 10).sum())
        return total / max(1, len(self.which))


def has_ties(interactions: Interactions) -> bool:
    """Whether some events follow each other at the same time."""
    times = interactions.times
    return bool(((times[1:] == times[:-1]) & (times[1:] != MISSING_TIME)).any())


def counting_ways(*, ties: bool) -> Ways:
    """Ways in which pairs may count: each was best on some data."""
    return {
        "backward": [{"backward": share} for share in (0.0, 0.25, 0.5, 1.0)],
        "scale": [{"scale": scale} for scale in (0.0, 0.005, 0.02)],
        "pairs": [{"window": w, "decay": d} for w, d in ((5, 0.0), (10, 0.0), (10, 0.9), (30, 0.8), (30, 0.9))],
        "history": [{"newest": n, "recency": r} for n, r in ((10, 0.0), (10, 0.8), (30, 0.8), (30, 0.9))],
        "damp_history": [{"damp_history": power} for power in (0.25, 0.5, 0.75, 1.0)],
        "damp_candidate": [{"damp_candidate": power} for power in (0.0, 0.25, 0.5)],
    } | ({"ties": [{"ties": name} for name in ("sequence", "set")]} if ties else {})


def choose_counting(trial: Trial, *, ties: bool, text: bool) -> Score:
    """The score of counts, and of texts beside them, that ranks the cases best.

    Of two hills the higher: one ascent begins at what is good on most data, the other at what is good for baskets.
    """
    basket = Counting(window=30, decay=0.9, backward=1.0, newest=30, recency=0.9, ties="set" if ties else "sequence")
    stand_ins, beside = (_STAND_INS, trial.recent_text()) if text else (0, None)
    # Both ascents may come by the same scores.
    value = functools.cache(lambda score: trial.value(score, None, beside))
    tops = [
        ascend(
            value,
            Score(counting=dataclasses.replace(how, stand_ins=stand_ins), cooccurrence=1.0, text=0.5 if text else 0.0),
            counting_ways(ties=ties),
            ("text",) if text else (),
        )
        for how in (USUAL, basket)
    ]
    return max(tops, key=lambda top: top.ndcg or 0.0)


def ascend(
    value: Callable[[Score], float],
    start: Score,
    grid: Ways,
    weights: Sequence[str],
) -> Score:
    """Coordinate ascent: each axis in turn takes its best value, until a whole round changes nothing.

    Args:
      value: What is to be large; asked for the same score more than once, so callers cache it.
      start: Where to begin.
      grid: Ways in which pairs may count.
      weights: Attributes that are doubled and halved as long as that helps, each by itself and all at once, or become
        zero. Vectors are the third beside counts and texts, so what these weigh beside each other is a ridge.
    """
    best = start

    def climb(steps: Iterable[Score]) -> None:
        nonlocal best
        for step in steps:
            if value(step) <= value(best):
                return
            best = step

    while True:
        before = best
        for changes in grid.values():
            for change in changes:
                climb([dataclasses.replace(best, counting=dataclasses.replace(best.counting, **change))])
        for name in weights:
            for factor in (2.0, 0.5):
                climb(_along(best, [name], factor))
            climb([dataclasses.replace(best, **{name: 0.0})])
        if len(weights) > 1 and all(getattr(best, name) for name in weights):
            for factor in (2.0, 0.5):
                climb(_along(best, weights, factor))
        if best == before:
            return dataclasses.replace(best, ndcg=value(best))


def choose_weights(
    value: Callable[[Score], float], start: Score, free: Sequence[str], ways: Ways | None = None
) -> Score:
    """What counts and texts weigh beside other scores, and how pairs count there.

    Counts and texts may be a hint beside strong vectors or the other way round, and there is a hill at each: the ascent
    begins at the best of a coarse grid. Pairs that count best by themselves may not do so beside vectors, which know of
    some: on 6,000 validation cases of amazon-beauty that had not chosen it, .0845 became .0867.

    Args:
      value: NDCG@10 of the whole.
      start: How pairs count, and the weights that are given.
      free: Names of the weights that are not.
      ways: Ways in which pairs may count; by default as in `start`.
    """
    value, ways, starts = functools.cache(value), ways or {}, [start]
    if "cooccurrence" in free:
        starts += [
            dataclasses.replace(start, cooccurrence=weight, counting=dataclasses.replace(start.counting, **scale))
            for scale in ways.get("scale", [{}])
            for weight in (0.25, 2.0, 16.0)
        ]
    if "text" in free:
        starts += [dataclasses.replace(some, text=weight) for some in starts for weight in (1.0, 8.0)]
    return ascend(value, max(starts, key=value), ways if "cooccurrence" in free else {}, free)


def _along(start: Score, names: Sequence[str], factor: float) -> Iterator[Score]:
    """Weights multiplied again and again, which keeps what they weigh beside each other; one that is zero begins."""
    weights = {name: (getattr(start, name) or 0.125) * factor for name in names}
    while all(1 / _LARGEST <= weight <= _LARGEST for weight in weights.values()):
        yield dataclasses.replace(start, **weights)
        weights = {name: weight * factor for name, weight in weights.items()}


def text_rows(text_IxT: np.ndarray, has_text_I: np.ndarray) -> np.ndarray:
    """Frozen text vectors without what all have in common, unit rows, zero without text: float32 [I, T]."""
    if not has_text_I.any():
        return np.zeros_like(text_IxT, np.float32)
    rows = unit_rows(text_IxT)
    return np.where(has_text_I[:, None], unit_rows(rows - rows[has_text_I].mean(axis=0)), 0).astype(np.float32)
