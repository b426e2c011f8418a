"""The Q-Former block of BLIP-2 (arXiv 2301.12597): a BERT encoder whose queries cross-attend to encoder states.

Post-norm, exact GELU, the query branch only. Parameter names are those of `transformers`' `Blip2QFormerModel`.
Letters: B batch, Q queries, S encoder states, D width, E encoder width, H heads, K head width.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from nqf.config import QFormerConfig
from nqf.ops.dropout import dropout
from nqf.ops.pins import over_batch
from nqf.ops.products import DotGeneral

LAYER_NORM_EPS = 1e-12
"""`layer_norm_eps` of Blip2QFormerConfig and BertConfig."""


class Attention(nn.Module):
    """Multi-head attention with residual and post-norm (`Blip2QFormerAttention`)."""

    config: QFormerConfig
    dtype: jnp.dtype
    dot_general: DotGeneral = None

    @nn.compact
    def __call__(
        self,
        x_BxQxD: jax.Array,
        states_BxSxE: jax.Array,
        mask: jax.Array | None,
        bias: jax.Array | None,
        seed: jax.Array | None,
        salt: int,
    ) -> jax.Array:
        heads = self.config.heads

        def project(name: str, x: jax.Array) -> jax.Array:
            y = nn.Dense(self.config.width, name=name, dtype=self.dtype, dot_general=self.dot_general)(x)
            return y.reshape(*y.shape[:-1], heads, -1)

        q_BxQxHxK = project("query", x_BxQxD)
        absorbed = self._absorbs(x_BxQxD.shape[1], states_BxSxE.shape[1])
        if absorbed:
            w_ExHxK, _ = self._heads("key")
            # The bias adds the same to all states of a query, which the softmax takes out again.
            asked_BxHxQxE = jnp.einsum("bqhk,ehk->bhqe", q_BxQxHxK, w_ExHxK)
            logits_BxHxQxS = jnp.einsum("bhqe,bse->bhqs", asked_BxHxQxE, states_BxSxE)
        else:
            k_BxSxHxK, v_BxSxHxK = project("key", states_BxSxE), project("value", states_BxSxE)
            logits_BxHxQxS = jnp.einsum("bqhk,bshk->bhqs", q_BxQxHxK, k_BxSxHxK)
        # Softmax in float32: bfloat16 has too few digits for sums over many states.
        logits_BxHxQxS = logits_BxHxQxS.astype(jnp.float32) * q_BxQxHxK.shape[-1] ** -0.5
        if bias is not None:
            logits_BxHxQxS = logits_BxHxQxS + bias
        if mask is not None:
            logits_BxHxQxS = jnp.where(mask, logits_BxHxQxS, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits_BxHxQxS, axis=-1)
        if mask is not None:
            # A query that may read nothing reads zero, not the mean of everything it must not see.
            weights = jnp.where(jnp.any(mask, axis=-1, keepdims=True), weights, 0.0)
        # Kept only where a caller asks for the collection `intermediates`; otherwise the program is the same.
        self.sow("intermediates", "attention", weights)
        weights = dropout(weights, self.config.dropout, seed, salt).astype(self.dtype)
        if absorbed:
            w_ExHxK, b_HxK = self._heads("value")
            read_BxHxQxE = jnp.einsum("bhqs,bse->bhqe", weights, states_BxSxE)
            attended = jnp.einsum("bhqe,ehk->bqhk", read_BxHxQxE, w_ExHxK)
            attended += jnp.sum(weights, axis=-1).swapaxes(1, 2)[..., None] * b_HxK
        else:
            attended = jnp.einsum("bhqs,bshk->bqhk", weights, v_BxSxHxK)
        return _residual(self, attended.reshape(*attended.shape[:2], -1), x_BxQxD, seed, salt + 1)

    def _absorbs(self, queries: int, states: int) -> bool:
        """Whether few queries read many states, so that it is cheaper to put the maps of keys and values on the side
        of the queries (as DeepSeek-V2 does in decoding, arXiv 2405.04434, section 2.1.2): q . (W s) = (W^T q) . s."""
        cheaper = queries * (self.config.width + self.config.heads * states) < states * self.config.width
        # The parameters are made by the plain way.
        return cheaper and not self.is_initializing()

    def _heads(self, name: str) -> tuple[jax.Array, jax.Array]:
        """Kernel [E, H, K] and bias [H, K] of the map `name`."""
        heads, made = self.config.heads, self.variables["params"][name]
        kernel, bias = made["kernel"].astype(self.dtype), made["bias"].astype(self.dtype)
        return kernel.reshape(kernel.shape[0], heads, -1), bias.reshape(heads, -1)


class FeedForward(nn.Module):
    """Feed-forward layer of the query branch (`intermediate_query`, `output_query`)."""

    config: QFormerConfig
    dtype: jnp.dtype
    dot_general: DotGeneral = None

    @nn.compact
    def __call__(self, x_BxQxD: jax.Array, seed: jax.Array | None, salt: int) -> jax.Array:
        hidden = nn.Dense(self.config.mlp_width, name="intermediate", dtype=self.dtype, dot_general=self.dot_general)(
            x_BxQxD
        )
        # With erf; `nn.gelu` takes erfc, for which XLA's CPU code is twice as long.
        hidden = hidden * (0.5 + 0.5 * jax.lax.erf(hidden * 0.5**0.5))
        return _residual(self, hidden, x_BxQxD, seed, salt)


def _residual(module: nn.Module, update: jax.Array, x: jax.Array, seed: jax.Array | None, salt: int) -> jax.Array:
    update = nn.Dense(module.config.width, name="dense", dtype=module.dtype, dot_general=module.dot_general)(update)
    update = dropout(update, module.config.dropout, seed, salt)
    return nn.LayerNorm(epsilon=LAYER_NORM_EPS, name="LayerNorm", dtype=module.dtype)(update + x)


class QFormer(nn.Module):
    """Queries that read encoder states.

    Attributes:
      config: Width, layers, heads, feed-forward width, dropout and how often to cross-attend.
      dtype: Compute dtype; parameters are float32.
    """

    config: QFormerConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        queries_BxQxD: jax.Array,
        states_BxSxE: jax.Array,
        states_mask_BxS: jax.Array | None = None,
        *,
        query_mask: jax.Array | None = None,
        cross_mask: jax.Array | None = None,
        cross_bias: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Runs the blocks.

        Args:
          queries_BxQxD: Query embeddings; a batch of 1 is broadcast.
          states_BxSxE: What the queries read, of any width.
          states_mask_BxS: bool, False where a state is padding.
          query_mask: bool [B or 1, 1, Q, Q], which query may read which; default all.
          cross_mask: bool [B or 1, 1, Q, S], which query may read which state; replaces `states_mask_BxS`.
          cross_bias: float32 [B or 1, H, Q, S], added to the cross-attention logits.
          deterministic: Whether dropout is off.

        Returns:
          float [B, Q, D]. A query that may read no state gets nothing from cross-attention.
        """
        if cross_mask is None and states_mask_BxS is not None:
            cross_mask = states_mask_BxS[:, None, None, :]
        shape = (states_BxSxE.shape[0], *queries_BxQxD.shape[1:])
        x = jnp.broadcast_to(queries_BxQxD, shape).astype(self.dtype)
        x = nn.LayerNorm(epsilon=LAYER_NORM_EPS, name="layernorm", dtype=self.dtype)(x)
        # One draw for all masks of the step.
        seed = None if deterministic else jax.random.bits(self.make_rng("dropout"), (2,), jnp.uint32)
        x = dropout(x, self.config.dropout, seed, 0)
        for layer in range(self.config.layers):
            with jax.named_scope(f"qformer_layer_{layer}"):
                attention = Attention(config=self.config, dtype=self.dtype, name=f"layer_{layer}_attention")
                x = over_batch(x)
                x = attention(x, x, query_mask, None, seed, 5 * layer + 1)
                if layer % self.config.cross_every == 0:
                    cross = Attention(config=self.config, dtype=self.dtype, name=f"layer_{layer}_crossattention")
                    x = cross(x, states_BxSxE.astype(self.dtype), cross_mask, cross_bias, seed, 5 * layer + 3)
                feed_forward = FeedForward(config=self.config, dtype=self.dtype, name=f"layer_{layer}_output")
                x = feed_forward(x, seed, 5 * layer + 5)
        return x


def cross_attention(intermediates: dict, path: tuple[str, ...]) -> jax.Array | None:
    """Cross-attention weights of a Q-Former from the collection `intermediates`.

    Args:
      intermediates: The collection.
      path: Names of the modules down to the `QFormer`.

    Returns:
      float32 [layers with cross-attention, B, H, Q, S]; None if the Q-Former was not called.
    """
    for name in path:
        intermediates = intermediates.get(name, {})
    layers = [name for name in intermediates if name.endswith("_crossattention")]
    if not layers:
        return None
    layers.sort(key=lambda name: int(name.split("_")[1]))
    return jnp.stack([intermediates[name]["attention"][0] for name in layers])
