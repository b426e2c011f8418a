"""User Q-Former: a history of item tokens with times, ratings and reviews to a few user tokens per position.

At position i the queries read the history up to and including slot i and nothing after it, so a single pass
supervises every position, and the tokens of position i equal those of the history cut after slot i. Where slots
stand to each other enters as a bias on the cross-attention logits (number of slots and time between them, as in
HSTU, arXiv 2402.17152, eq. 2), never as an absolute position, which a cut would change.

Letters: B users, N history slots, P positions (the newest P slots), Q item tokens per slot, U user tokens,
D width, H heads.
"""

from __future__ import annotations

from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from nqf.config import QFormerConfig
from nqf.models.dropout import Dropout
from nqf.models.qformer import QFormer
from nqf.pipelines.batches import RATING_BUCKETS, Array, History

GAP_BUCKETS = 34
"""log2 of a gap in seconds: 0 for below one second, 1..32 for powers of two, 33 for an unknown time."""
RECENCY_BUCKETS = 32


def gap_bucket(seconds: jax.Array) -> jax.Array:
    """Bucket of an int32 gap: number of bits of the seconds, so one bucket per power of two.

    Integer arithmetic throughout: float32 cannot tell seconds apart in gaps beyond half a year.
    """
    return jnp.where(seconds < 0, GAP_BUCKETS - 1, 32 - jax.lax.clz(jnp.maximum(seconds, 0)))


def recency_bucket(slots: jax.Array) -> jax.Array:
    """Bucket of a distance in slots: exact to 15, then four per doubling, capped (T5's scheme, arXiv 1910.10683)."""
    exact = 16
    far = exact + 4 * jnp.log2(jnp.maximum(slots, exact) / exact)
    return jnp.minimum(jnp.where(slots < exact, slots, far.astype(jnp.int32)), RECENCY_BUCKETS - 1)


class SmallEmbed(nn.Module):
    """`nn.Embed` for a table of few rows, as a product with one-hot rows.

    The gradient of a lookup adds thousands of rows into each of a few: as a scatter that is serial on CPUs and fights
    over the same addresses on GPUs.

    Attributes:
      rows: Rows of the table.
      width: Its columns.
      dtype: Dtype of the result.
    """

    rows: int
    width: int
    dtype: jnp.dtype = jnp.float32
    init: nn.initializers.Initializer = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, at: Array) -> jax.Array:
        """Rows of the table at int32 [...]: float [..., width]."""
        table = self.param("embedding", self.init, (self.rows, self.width))
        return jax.nn.one_hot(at, self.rows, dtype=self.dtype) @ table.astype(self.dtype)


def interaction_features(
    history: History, width: int, *, times: bool, ratings: bool, reviews: bool, dtype: jnp.dtype
) -> jax.Array | None:
    """Embeddings of each slot's time, rating and review, summed: float [B, N, width]; None if none is read.

    To be called in a compact method, whose module gets the parameters.
    """
    parts = []
    if times:
        for index, (name, size) in enumerate((("hour", 24), ("weekday", 7), ("month", 12))):
            # Row 0 stands for an unknown time.
            parts.append(SmallEmbed(size + 1, width, name=name, dtype=dtype)(history.calendar[..., index] + 1))
        previous = jnp.concatenate([jnp.full_like(history.age[:, :1], -1), history.age[:, :-1]], axis=1)
        known = (previous >= 0) & (history.age >= 0)
        gap = jnp.where(known, previous - history.age, -1)
        parts.append(SmallEmbed(GAP_BUCKETS, width, name="gap", dtype=dtype)(gap_bucket(gap)))
    if ratings:
        parts.append(SmallEmbed(RATING_BUCKETS + 1, width, name="rating", dtype=dtype)(history.ratings + 1))
    if reviews and history.reviews.shape[-1]:
        review = nn.Dense(width, name="review", dtype=dtype)(history.reviews.astype(dtype))
        parts.append(jnp.where(history.has_review[..., None], review, 0))
    return cast(jax.Array, sum(parts)) if parts else None


class InteractionFeatures(nn.Module):
    """`interaction_features` as a module of its own; zero where nothing is read."""

    width: int
    ratings: bool = True
    times: bool = True
    reviews: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, history: History) -> jax.Array:
        """Returns float [B, N, width]."""
        made = interaction_features(
            history, self.width, times=self.times, ratings=self.ratings, reviews=self.reviews, dtype=self.dtype
        )
        return jnp.zeros((*history.items.shape, self.width), self.dtype) if made is None else made


class UserQFormer(nn.Module):
    """Compresses the history before each position to `config.queries` user tokens.

    Attributes:
      config: Size of the Q-Former.
      ratings: Whether ratings are read.
      times: Whether calendar parts and time gaps are read.
      reviews: Whether review embeddings are read.
      dtype: Compute dtype; parameters are float32.
    """

    config: QFormerConfig
    ratings: bool = True
    times: bool = True
    reviews: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, inputs_BxNxQxE: jax.Array, history: History, *, positions: int, deterministic: bool = True
    ) -> jax.Array:
        """Encodes histories.

        Args:
          inputs_BxNxQxE: Item tokens of every slot, any float dtype.
          history: The slots' other features.
          positions: P, how many of the newest slots get user tokens; 1 for inference.
          deterministic: Whether dropout is off.

        Returns:
          User tokens, float [B, P, U, D]. Those of padded positions see nothing and mean nothing.
        """
        batch, slots, per_item, _ = inputs_BxNxQxE.shape
        width, count, heads = self.config.width, self.config.queries, self.config.heads
        valid_BxN = history.items >= 0

        tokens_BxNxQxD = nn.Dense(width, name="project", dtype=self.dtype)(inputs_BxNxQxE.astype(self.dtype))
        which = self.param("token_index", nn.initializers.normal(0.02), (per_item, width))
        tokens_BxNxQxD = tokens_BxNxQxD + which.astype(self.dtype)
        slot_BxNxD = interaction_features(
            history, width, times=self.times, ratings=self.ratings, reviews=self.reviews, dtype=self.dtype
        )
        if slot_BxNxD is not None:
            tokens_BxNxQxD = tokens_BxNxQxD + slot_BxNxD[:, :, None, :]
        tokens_BxNxQxD = nn.LayerNorm(name="input_norm", dtype=self.dtype)(tokens_BxNxQxD)
        tokens_BxNxQxD = Dropout(self.config.dropout)(tokens_BxNxQxD, deterministic)

        at_P = jnp.arange(slots - positions, slots)
        distance_PxN = at_P[:, None] - jnp.arange(slots)[None, :]
        sees_BxPxN = (distance_PxN >= 0)[None] & valid_BxN[:, None, :]
        bias_BxHxPxN = self._bias(history, distance_PxN, at_P)

        def per_token(x: jax.Array) -> jax.Array:
            return jnp.repeat(jnp.repeat(x, count, axis=-2), per_item, axis=-1)

        # The tokens of one position read each other; positions do not.
        block = jnp.repeat(jnp.arange(positions), count)
        queries = self.param("queries", nn.initializers.normal(0.02), (1, count, width))
        tokens_BxPUxD = QFormer(config=self.config, name="qformer", dtype=self.dtype)(
            jnp.tile(queries.astype(self.dtype), (batch, positions, 1)),
            tokens_BxNxQxD.reshape(batch, slots * per_item, width),
            None,
            query_mask=(block[:, None] == block[None, :])[None, None],
            cross_mask=per_token(sees_BxPxN)[:, None],
            cross_bias=per_token(bias_BxHxPxN),
            deterministic=deterministic,
        )
        assert bias_BxHxPxN.shape[1] == heads
        return tokens_BxPUxD.reshape(batch, positions, count, width)

    def _bias(self, history: History, distance_PxN: jax.Array, at_P: jax.Array) -> jax.Array:
        heads = self.config.heads
        recency = self.param("recency_bias", nn.initializers.zeros, (RECENCY_BUCKETS, heads))
        bias = recency[recency_bucket(jnp.maximum(distance_PxN, 0))].transpose(2, 0, 1)[None]
        if self.times:
            table = SmallEmbed(GAP_BUCKETS, heads, init=nn.initializers.zeros, name="gap_bias")
            age_BxPx1, age_Bx1xN = history.age[:, at_P, None], history.age[:, None, :]
            gap = jnp.where((age_BxPx1 >= 0) & (age_Bx1xN >= 0), jnp.maximum(age_Bx1xN - age_BxPx1, 0), -1)
            bias = bias + table(gap_bucket(gap)).transpose(0, 3, 1, 2)
        return jnp.broadcast_to(bias, (history.items.shape[0], *bias.shape[1:])).astype(jnp.float32)
