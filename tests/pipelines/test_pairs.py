"""Pairs of the item stage: what a user owns, looked up in two ways."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nqf.pipelines.pairs import PairSource, pair_batch


def source_of(owned: set[tuple[int, int]], items: int, users: int) -> PairSource:
    keys = np.array(sorted(user * items + item for user, item in owned), np.int64)
    return PairSource(
        users=keys // items,
        anchors=(keys % items).astype(np.int32),
        positives=(keys % items).astype(np.int32),
        trainable=np.arange(items, dtype=np.int32),
        owned=keys,
        items=items,
    )


@settings(deadline=None)
@given(
    st.sets(st.tuples(st.integers(0, 7), st.integers(0, 11)), min_size=1),
    st.lists(st.integers(0, 7), min_size=1, max_size=9),
    st.lists(st.integers(0, 11), min_size=1, max_size=9),
)
def test_owns_each_is_owns_of_every_pair(owned, users, items):
    source, users, items = source_of(owned, 12, 8), np.array(users), np.array(items)
    expected = np.array([[(user, item) in owned for item in items] for user in users])
    np.testing.assert_array_equal(source.owns_each(users, items), expected)
    np.testing.assert_array_equal(source.owns(users[:, None], items[None, :]), expected)


def test_a_batch_has_no_negative_that_its_user_owns_and_knows_its_own_positives():
    rng = np.random.default_rng(0)
    owned = {
        (int(user), int(item)) for user, item in zip(rng.integers(0, 20, 200), rng.integers(0, 50, 200), strict=True)
    }
    source = source_of(owned, 50, 20)
    batch = pair_batch(source, np.arange(len(source.users)), rng)
    assert not source.owns(source.users, batch.negatives).any()
    assert batch.known.diagonal().all() and not batch.known.all()
