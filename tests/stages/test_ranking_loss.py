"""The ranking loss against its definition: which items are negatives of which target, and with what weight."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nqf.config import LossConfig
from nqf.pipelines.batches import HistoryBatch
from nqf.pipelines.histories import history_of_items, number_by_rows
from nqf.stages.ranking_loss import ranking_loss

ITEMS, LEARNED, WIDTH, BATCH, POSITIONS = 12, 5, 8, 3, 4
RNG = np.random.default_rng(0)
VECTORS = RNG.normal(size=(ITEMS, WIDTH)).astype(np.float32)
TEXT = RNG.normal(size=(ITEMS, 6)).astype(np.float32)
# Two pairs of near-duplicates; item 3 has no text and item 11 was never trained on.
TEXT[5], TEXT[8], TEXT[3] = 2 * TEXT[4] + 0.01, TEXT[7] - 0.01, 0
TRAINED = np.arange(ITEMS) != 11
LOG_POPULARITY = np.log(RNG.uniform(0.01, 0.3, ITEMS)).astype(np.float32)
USERS = RNG.normal(size=(BATCH, POSITIONS, WIDTH)).astype(np.float32)
TARGETS = np.array([[-1, 4, 7, 2], [-1, -1, -1, 5], [3, 4, 8, 9]], np.int32)
NEGATIVES = np.array([4, 5, 8, 0, 11, 10, 4], np.int32)
GIVEN = np.full((BATCH, POSITIONS, 3), -1, np.int32)
GIVEN[0, 1], GIVEN[2, 3], GIVEN[1, 3] = (5, 6, -1), (9, 11, 1), (-1, -1, 0)


def batch_of(negatives: str, given: bool) -> HistoryBatch:
    places = np.flatnonzero(TARGETS >= 0)
    batch = HistoryBatch(
        history=history_of_items(np.maximum(TARGETS, 0), 0),
        targets=TARGETS,
        supervised=np.concatenate([places, [-1, -1]]).astype(np.int32),
        negatives=NEGATIVES if negatives == "sampled" else None,
        given=GIVEN if given else None,
    )
    everyone = np.concatenate([TARGETS.ravel(), GIVEN.ravel(), np.zeros(1, np.int32)])
    return batch if negatives == "full" else number_by_rows(batch, None, everyone)


def found(config: LossConfig, batch: HistoryBatch, vectors: jax.Array = VECTORS) -> jax.Array:
    rows = np.arange(ITEMS) if batch.rows is None else np.maximum(batch.rows, 0)

    def loss(batch: HistoryBatch, items: jax.Array, text: jax.Array, trained: jax.Array) -> jax.Array:
        return ranking_loss(
            config,
            jnp.asarray(USERS),
            items,
            batch,
            learned_width=LEARNED,
            text_RxT=text,
            trained=trained,
            log_popularity=jnp.asarray(LOG_POPULARITY),
        )

    return jax.jit(loss)(batch, vectors[rows], TEXT[rows], TRAINED[rows])


def alike(one: int, other: int, limit: float) -> bool:
    if one == other:
        return True
    norms = np.linalg.norm(TEXT[one]) * np.linalg.norm(TEXT[other])
    return bool(limit and norms and TEXT[one] @ TEXT[other] / norms > limit)


def expected(config: LossConfig, given: bool) -> float:
    cases = [
        (row, place) for row, place in itertools.product(range(BATCH), range(POSITIONS)) if TARGETS[row, place] >= 0
    ]
    losses = []
    for row, place in cases:
        target = TARGETS[row, place]
        if config.negatives == "full":
            drawn, weights = np.arange(ITEMS), np.ones(ITEMS)
            own = 1.0
        elif config.negatives == "sampled":
            drawn, weights, own = NEGATIVES, np.full(len(NEGATIVES), ITEMS / len(NEGATIVES)), 1.0
        else:
            drawn = np.array([TARGETS[case] for case in cases])
            weights, own = np.exp(-LOG_POPULARITY[drawn]), np.exp(-LOG_POPULARITY[target])
        weights = weights if config.log_q else np.ones(len(drawn))
        own = own if config.log_q else 1.0
        single = len(cases) if config.negatives == "in-batch" and config.log_q else 1.0
        terms = [(item, weight) for item, weight in zip(drawn, weights, strict=True)]
        terms += [(item, single) for item in GIVEN[row, place] if given and item >= 0]
        score = USERS[row, place] @ VECTORS.T
        total = own * np.exp(score[target])
        for item, weight in terms:
            if TRAINED[item] and not alike(target, item, config.duplicate_cosine):
                total += weight * np.exp(score[item])
        losses.append(np.log(total) - score[target] - np.log(own))
    return float(np.mean(losses))


@pytest.mark.parametrize("duplicate_cosine", [0.0, 0.95])
@pytest.mark.parametrize(
    ("negatives", "log_q", "given"),
    [
        ("full", True, False),
        ("sampled", True, False),
        ("sampled", False, True),
        ("sampled", True, True),
        ("in-batch", True, True),
        ("in-batch", False, False),
    ],
)
def test_the_loss_is_its_definition(negatives: str, log_q: bool, given: bool, duplicate_cosine: float) -> None:
    config = LossConfig(negatives=negatives, log_q=log_q, duplicate_cosine=duplicate_cosine)
    assert float(found(config, batch_of(negatives, given))) == pytest.approx(expected(config, given), rel=1e-5)


@pytest.mark.parametrize("negatives", ["full", "sampled"])
def test_near_duplicates_are_not_pushed_away(negatives: str) -> None:
    # The target is 4; item 5 is the same thing under another id.
    batch = dataclasses.replace(batch_of(negatives, False), supervised=np.array([1, -1], np.int32))

    def pushed(limit: float) -> float:
        config = LossConfig(negatives=negatives, duplicate_cosine=limit)
        gradient = jax.grad(lambda vectors: found(config, batch, vectors))(jnp.asarray(VECTORS))
        return float(gradient[5, :LEARNED] @ USERS[0, 1, :LEARNED])

    assert pushed(0.0) > 1e-3 and pushed(0.95) == 0
