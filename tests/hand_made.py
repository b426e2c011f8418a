"""Small interactions, splits and cases made by hand, for the tests of the evaluation."""

import numpy as np

from nqf.data.interactions import MISSING_TIME, Interactions
from nqf.data.splits import Cases, Split


def make_interactions(histories: list[list[int]], times: list[list[int]] | None = None) -> Interactions:
    """Interactions of users u0, u1, ... with these items in this order."""
    items = np.concatenate([np.asarray(history, np.int32) for history in histories])
    stamps = np.full(len(items), MISSING_TIME) if times is None else np.concatenate(times).astype(np.int64)
    return Interactions(
        user_ids=[f"u{user}" for user in range(len(histories))],
        offsets=np.concatenate([[0], np.cumsum([len(history) for history in histories])]).astype(np.int64),
        items=items,
        times=stamps,
        ratings=np.full(len(items), np.nan, np.float32),
        reviews=None,
    )


def last_two_out(interactions: Interactions, items: int) -> Split:
    """The last event of every user is test, the one before validation, the rest training."""
    users, ends = np.arange(len(interactions.user_ids), dtype=np.int32), interactions.offsets[1:]
    train = np.ones(len(interactions.items), bool)
    train[ends - 1] = train[ends - 2] = False
    return Split(
        train=train,
        valid=Cases(users=users, cuts=ends - 2),
        test=Cases(users=users, cuts=ends - 1),
        cold=np.bincount(interactions.items[train], minlength=items) == 0,
        removed=np.zeros(items, bool),
        warnings=(),
    )


def random_interactions(seed: int, *, users: int = 60, items: int = 130) -> tuple[Interactions, Split]:
    """Random histories of 3 to 20 distinct items; the least popular items are cold."""
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, items + 1)
    histories = [
        rng.choice(items, rng.integers(3, 21), replace=False, p=share / share.sum()).tolist() for _ in range(users)
    ]
    interactions = make_interactions(histories)
    return interactions, last_two_out(interactions, items)
