"""Losses as plain functions of arrays: InfoNCE over given scores, triplet margin, masked field errors.

Letters: M examples, C candidates, B items, D width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from nqf.ops.pins import AXES, pin

# Large enough to vanish in a float32 softmax, small enough that sums of two stay finite.
NEGATIVE = -1e9


def info_nce(
    scores_MxC: jax.Array,
    labels_M: jax.Array,
    *,
    weights_M: jax.Array | None = None,
    log_q_C: jax.Array | None = None,
    allowed_MxC: jax.Array | None = None,
) -> jax.Array:
    """Softmax cross-entropy of the labeled candidate (van den Oord et al. 2018, arXiv 1807.03748, eq. 4).

    Args:
      scores_MxC: Scores, already divided by the temperature; any float dtype, summed in float32.
      labels_M: int32 column of each example's positive.
      weights_M: Weight of each example; zero leaves one out. Default: all one.
      log_q_C: Log of the probability with which each candidate was sampled, subtracted from its score
        (Bengio and Senecal 2008; Yi et al. 2019, eq. 3). Default: no correction.
      allowed_MxC: False keeps a candidate out of an example's denominator (accidental hits, near-duplicates). The
        positive always stays in.

    Returns:
      Weighted mean of the losses, a float32 scalar; 0 where all weights are zero.
    """
    scores_MxC = scores_MxC.astype(jnp.float32)
    if log_q_C is not None:
        scores_MxC = scores_MxC - log_q_C[None, :]
    positive_M = jnp.take_along_axis(scores_MxC, labels_M[:, None], axis=1)[:, 0]
    if allowed_MxC is not None:
        is_label_MxC = labels_M[:, None] == jnp.arange(scores_MxC.shape[1])[None, :]
        scores_MxC = jnp.where(allowed_MxC | is_label_MxC, scores_MxC, NEGATIVE)
    loss_M = jax.nn.logsumexp(scores_MxC, axis=1) - positive_M
    return weighted_mean(loss_M, weights_M)


def full_softmax(
    users_MxD: jax.Array,
    learned_CxV: jax.Array,
    frozen_CxT: jax.Array,
    targets_M: jax.Array,
    *,
    weights_M: jax.Array,
    allowed: jax.Array,
) -> jax.Array:
    """`info_nce` of inner products with every candidate, with one [M, C] array instead of several.

    The gradient is written out: of the softmax cross-entropy it is `(softmax - one_hot(target)) * weight`, whose part
    at the target is a gather and a scatter of M rows, not of an [M, C] array; and frozen columns get none.

    Args:
      users_MxD: float32, D = V + T.
      learned_CxV: float32, the leading columns of the candidates.
      frozen_CxT: float32, the other columns, without a gradient.
      targets_M: int32 rows of the positives.
      weights_M: Weight of each example; zero leaves one out.
      allowed: bool [C] or [M, C], False keeps a candidate out of all denominators, or of an example's. No target of
        positive weight may be among them.

    Returns:
      Weighted mean of the losses, a float32 scalar; 0 where all weights are zero.
    """
    bias = jnp.where(allowed, 0.0, NEGATIVE)
    shares_M = weights_M / jnp.maximum(jnp.sum(weights_M), 1e-9)
    return _full_softmax(users_MxD, learned_CxV, jax.lax.stop_gradient(frozen_CxT), targets_M, shares_M, bias)


@jax.custom_vjp
def _full_softmax(users, learned, frozen, targets, shares, bias):
    return _full_softmax_forward(users, learned, frozen, targets, shares, bias)[0]


def _full_softmax_forward(users, learned, frozen, targets, shares, bias):
    items = jnp.concatenate([learned, frozen], axis=1)
    # Split over the catalogue: items are many, and the users of a batch few.
    scores = pin(users @ items.T + bias, None, AXES)
    normalizer = jax.nn.logsumexp(scores, axis=1)
    loss = jnp.sum(shares * (normalizer - jnp.sum(users * items[targets], axis=1)))
    return loss, (users, items, learned, targets, shares, scores, normalizer)


def _full_softmax_backward(residuals, g):
    users, items, learned, targets, shares, scores, normalizer = residuals
    weights = (g * shares)[:, None]
    slopes = jnp.exp(scores - normalizer[:, None]) * weights
    to_users = slopes @ items - weights * items[targets]
    width = learned.shape[1]
    to_learned = (slopes.T @ users[:, :width]).at[targets].add(-weights * users[:, :width])
    frozen = jnp.zeros((items.shape[0], items.shape[1] - width), items.dtype)
    return to_users, to_learned, frozen, None, None, None


_full_softmax.defvjp(_full_softmax_forward, _full_softmax_backward)


def triplet_margin(
    anchor_MxD: jax.Array, positive_MxD: jax.Array, negative_MxD: jax.Array, *, margin: float
) -> jax.Array:
    """Mean of max(0, |a - p| - |a - n| + margin) over Euclidean distances (torch's `TripletMarginLoss`, p=2).

    Returns:
      A float32 scalar.
    """

    def distance(a: jax.Array, b: jax.Array) -> jax.Array:
        # torch adds its epsilon to the difference, which also keeps the gradient of the root finite at zero.
        return jnp.sqrt(jnp.sum(jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32) + 1e-6), axis=-1))

    gap_M = distance(anchor_MxD, positive_MxD) - distance(anchor_MxD, negative_MxD) + margin
    return jnp.mean(jnp.maximum(gap_M, 0.0))


def weighted_mean(values_M: jax.Array, weights_M: jax.Array | None) -> jax.Array:
    """Mean of `values_M` under `weights_M` (all one by default); 0 where the weights sum to zero."""
    if weights_M is None:
        return jnp.mean(values_M)
    weights_M = weights_M.astype(jnp.float32)
    return jnp.sum(values_M * weights_M) / jnp.maximum(jnp.sum(weights_M), 1e-9)


def unit(x: jax.Array) -> jax.Array:
    """Scales the last axis to unit length in float32; a zero vector stays zero and has a zero gradient."""
    x = x.astype(jnp.float32)
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return jnp.where(square > 0, x * jax.lax.rsqrt(jnp.maximum(square, 1e-12)), 0.0)
