"""Leave-one-out, global temporal and sample splits, with items removed from training on request."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from nqf import files
from nqf.data.errors import DataError
from nqf.data.interactions import MISSING_TIME, Interactions
from nqf.data.unirec import Found


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Cases:
    """What is predicted: for case c, the item of event `cuts[c]` from the user's events before it.

    Attributes:
      users: int32 [cases], user rows.
      cuts: int64 [cases], event numbers of the targets.
    """

    users: np.ndarray
    cuts: np.ndarray

    def __getitem__(self, rows: np.ndarray | slice) -> Cases:
        return Cases(users=self.users[rows], cuts=self.cuts[rows])


def repeated(interactions: Interactions, cases: Cases) -> np.ndarray:
    """bool [cases], whether the user of a case had its target before."""
    starts, targets = interactions.offsets[cases.users], interactions.items[cases.cuts]
    found = np.zeros(len(starts), bool)
    # From the newest event before each target backwards, one of every case at a time, until all pasts are through.
    left, back = np.arange(len(starts)), 1
    while len(left := left[cases.cuts[left] - back >= starts[left]]):
        found[left] = interactions.items[cases.cuts[left] - back] == targets[left]
        left, back = left[~found[left]], back + 1
    return found


def rankable(interactions: Interactions, cases: Cases, *, repeats: bool) -> np.ndarray:
    """The cases that can be ranked, int64 [at most cases], ascending: all, or those whose target is new to the user.

    Where the user's past is masked, a target out of it cannot be ranked: were it alone let in again, every scorer that
    prefers the past would find it.

    Raises:
      DataError: There are cases, and none is left.
    """
    kept = np.arange(len(cases.users)) if repeats else np.flatnonzero(~repeated(interactions, cases))
    if len(cases.users) and not len(kept):
        raise DataError(
            f"all {len(cases.users)} targets are items that their users had before; set evaluation.repeats: true where "
            "people buy the same again, or data.duplicates: merge where the same event stands in the table twice"
        )
    return kept


def pasts(interactions: Interactions, cases: Cases) -> list[np.ndarray]:
    """Item rows before the target of every case, oldest first."""
    starts = interactions.offsets[cases.users]
    return [interactions.items[start:cut] for start, cut in zip(starts, cases.cuts, strict=True)]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """A division of the interactions.

    Attributes:
      train: bool [events].
      valid: Cases to select on.
      test: Cases to report; their histories include what came after the validation target.
      cold: bool [items], items in no training event.
      removed: bool [items], items that were drawn to be removed from training.
      warnings: What a reader of the results must know.
      given_events: int64 [G], ascending, the events whose samples have candidates; empty but for `data.split: samples`.
      given: int32 [G, C], rows of these candidates without the target, in the order of the file, -1 in padding.
    """

    train: np.ndarray
    valid: Cases
    test: Cases
    cold: np.ndarray
    removed: np.ndarray
    warnings: tuple[str, ...]
    given_events: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    given: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 0), np.int32))

    def candidates(self, events: np.ndarray) -> np.ndarray:
        """The candidates of some events' samples, int32 [n, C]; -1 where there is none."""
        found = np.full((len(events), self.given.shape[1]), -1, np.int32)
        if len(self.given):
            at = np.minimum(np.searchsorted(self.given_events, events), len(self.given) - 1)
            found = np.where((self.given_events[at] == events)[:, None], self.given[at], -1)
        return found

    def save(self, path: str | Path) -> None:
        """Writes an .npz file without pickled objects."""
        np.savez(
            path,
            train=self.train,
            valid_users=self.valid.users,
            valid_cuts=self.valid.cuts,
            test_users=self.test.users,
            test_cuts=self.test.cuts,
            cold=self.cold,
            removed=self.removed,
            warnings=np.array(self.warnings, dtype=np.str_),
            given_events=self.given_events,
            given=self.given,
        )


def load_split(path: str | Path) -> Split:
    """Reads what `Split.save` wrote."""
    arrays = files.read_arrays(path)
    return Split(
        train=arrays["train"],
        valid=Cases(users=arrays["valid_users"], cuts=arrays["valid_cuts"]),
        test=Cases(users=arrays["test_users"], cuts=arrays["test_cuts"]),
        cold=arrays["cold"],
        removed=arrays["removed"],
        warnings=tuple(arrays["warnings"].tolist()),
        # Which splits of before version 0.2 lack.
        **{name: arrays[name] for name in ("given_events", "given") if name in arrays},
    )


def leave_one_out(
    interactions: Interactions, *, items: int, cold_share: float = 0.0, refit: bool = False, seed: int = 0
) -> Split:
    """Holds out the last event of every user for testing and the one before it for validation.

    Users with fewer than three events have no cases; all their events are training.

    Args:
      interactions: All interactions.
      items: Number of catalogue items.
      cold_share: Share of the items, 0 to 1, whose events are removed from training; they stay in histories and
        among the targets.
      refit: Whether the validation targets are training events too.
      seed: Seed of the draw of cold items.

    Raises:
      DataError: No training event or no case is left.
    """
    ends = interactions.offsets[1:]
    users = np.flatnonzero(np.diff(interactions.offsets) >= 3)
    valid = Cases(users=users.astype(np.int32), cuts=ends[users] - 2)
    test = Cases(users=users.astype(np.int32), cuts=ends[users] - 1)
    train = np.ones(len(interactions.items), bool)
    train[valid.cuts] = refit
    train[test.cuts] = False
    warnings = _refitted(refit)
    short = len(interactions.user_ids) - len(users)
    if short:
        warnings.append(f"{short} users have fewer than three interactions: they are trained on and not evaluated")
    known = train & (interactions.times != MISSING_TIME)
    timed = interactions.times[test.cuts][interactions.times[test.cuts] != MISSING_TIME]
    newest = np.max(interactions.times, where=known, initial=MISSING_TIME)
    if timed.size and newest > timed.min():
        late = np.sum(known & (interactions.times > np.median(timed))) / np.sum(known)
        warnings.append(
            f"leave-one-out leaks the future: {late:.0%} of the training interactions are "
            "newer than half of the test targets; it serves comparison with published numbers, data.split: temporal "
            "does not leak"
        )
    return _finish(interactions, train, valid, test, items=items, cold_share=cold_share, seed=seed, warnings=warnings)


def temporal(
    interactions: Interactions,
    *,
    items: int,
    valid_share: float,
    test_share: float,
    cold_share: float = 0.0,
    refit: bool = False,
    seed: int = 0,
) -> Split:
    """Cuts all interactions at two moments, the same for all users.

    Events before the first cut are training. In each of the two later windows, a user's last event is the target,
    and all events before it, earlier ones of the window included, are the history: at that moment they are known.
    Events of the windows are never trained on. A user without an event before the target has no case. An event
    without a time has that of the user's event before it; without one, it is older than all others.

    Args:
      interactions: All interactions.
      items: Number of catalogue items.
      valid_share: Share of the interactions, 0 to 1, between the cuts, as nearly as ties allow.
      test_share: Share of the interactions, 0 to 1, after the second cut.
      cold_share: As in `leave_one_out`.
      refit: Whether the events between the cuts are training events too.
      seed: As in `leave_one_out`.

    Raises:
      DataError: No interaction has a time, or no training event or no case is left.
    """
    times = _filled_times(interactions)
    if not (times != MISSING_TIME).any():
        raise DataError("data.split: temporal needs timestamps, and no interaction has one; use leave-one-out")
    last = len(times) - 1
    cuts = [min(round(len(times) * share), last) for share in (1 - valid_share - test_share, 1 - test_share)]
    first_cut, second_cut = np.partition(times, cuts)[cuts]
    valid, short_valid = _last_inside(interactions, (times >= first_cut) & (times < second_cut))
    test, short_test = _last_inside(interactions, times >= second_cut)
    warnings = _refitted(refit)
    if short_valid or short_test:
        warnings.append(
            f"{short_valid} validation and {short_test} test users have no interaction before their target and are "
            "not evaluated"
        )
    return _finish(
        interactions,
        times < (second_cut if refit else first_cut),
        valid,
        test,
        items=items,
        cold_share=cold_share,
        seed=seed,
        warnings=warnings,
    )


def of_samples(
    interactions: Interactions,
    trained: Found,
    tested: Found,
    *,
    items: int,
    valid_share: float,
    cold_share: float = 0.0,
    refit: bool = False,
    seed: int = 0,
) -> Split:
    """Takes the training and the test samples of UniRec's files as they are.

    Training events are those of the training samples. The targets of a share of them, drawn by `seed`, are held out as
    validation cases: the reference selects on its test file.

    Args:
      interactions: All interactions.
      trained: The training samples.
      tested: The test samples.
      items: Number of catalogue items.
      valid_share: Share of the training samples, 0 to 1; one at least.
      cold_share: As in `leave_one_out`.
      refit: Whether the validation targets are training events too.
      seed: Seed of both draws.

    Raises:
      DataError: No training event or no case is left.
    """
    test = np.unique(tested.targets)
    free = np.setdiff1d(trained.targets, test)
    valid = np.sort(np.random.default_rng(seed).permutation(free)[: max(1, round(len(free) * valid_share))])
    train = np.zeros(len(interactions.items), bool)
    for start, target in zip(trained.starts, trained.targets, strict=True):
        train[start : target + 1] = True
    train[valid] = refit
    train[test] = False
    users = interactions.users.astype(np.int32)
    split = _finish(
        interactions,
        train,
        Cases(users=users[valid], cuts=valid),
        Cases(users=users[test], cuts=test),
        items=items,
        cold_share=cold_share,
        seed=seed,
        warnings=_refitted(refit),
    )
    most = max(trained.given.shape[1], tested.given.shape[1])
    padded = [
        np.pad(found.given, ((0, 0), (0, most - found.given.shape[1])), constant_values=-1)
        for found in (trained, tested)
    ]
    events, first = np.unique(np.concatenate([trained.targets, tested.targets]), return_index=True)
    return dataclasses.replace(split, given_events=events, given=np.concatenate(padded)[first])


def _refitted(refit: bool) -> list[str]:
    return ["data.refit: the validation cases are trained on; nothing can be selected on them"] if refit else []


def _filled_times(interactions: Interactions) -> np.ndarray:
    known = interactions.times != MISSING_TIME
    if known.all():
        return interactions.times
    events = np.arange(len(interactions.times))
    latest = np.maximum.accumulate(np.where(known, events, -1))
    own = latest >= interactions.offsets[interactions.users]
    return np.where(own, interactions.times[np.maximum(latest, 0)], MISSING_TIME)


def _last_inside(interactions: Interactions, window: np.ndarray) -> tuple[Cases, int]:
    """Each user's last event in the window, and how many users had nothing before it."""
    events = np.flatnonzero(window)
    users = np.searchsorted(interactions.offsets, events, side="right") - 1
    newest = np.append(users[1:] != users[:-1], True)[: len(users)]
    users, cuts = users[newest], events[newest]
    known = cuts > interactions.offsets[users]
    return Cases(users=users[known].astype(np.int32), cuts=cuts[known]), int((~known).sum())


def _finish(
    interactions: Interactions,
    train: np.ndarray,
    valid: Cases,
    test: Cases,
    *,
    items: int,
    cold_share: float,
    seed: int,
    warnings: list[str],
) -> Split:
    removed = np.zeros(items, bool)
    removed[np.random.default_rng(seed).permutation(items)[: round(items * cold_share)]] = True
    train = train & ~removed[interactions.items]
    for name, count in (
        ("training", train.sum()),
        ("validation", len(valid.users)),
        ("test", len(test.users)),
    ):
        if not count:
            raise DataError(
                f"the {name} split is empty: {len(interactions.items)} interactions of {len(interactions.user_ids)} "
                "users do not suffice; lower data.min_interactions or data.cold_share, change data.valid_share and "
                "data.test_share, or add data"
            )
    cold = np.ones(items, bool)
    cold[interactions.items[train]] = False
    return Split(train=train, valid=valid, test=test, cold=cold, removed=removed, warnings=tuple(warnings))
