"""Qwen3 (dense; arXiv 2505.09388): grouped-query attention with QK-norm, RoPE, SwiGLU, and optional LoRA.

Modules and parameters are named as in Hugging Face's model; the layers are scanned, so their parameters are stacked
along a leading layer axis: `layers/self_attn/q_proj/kernel` is [L, D, H K].

Letters: B batch, T length, D width, H query heads, G key-value heads, K head width, L layers, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from nqf.models.dropout import Dropout
from nqf.models.lora import LoRADense
from nqf.ops.attention import Implementation, dot_product_attention
from nqf.ops.pins import over_batch, take_rows
from nqf.ops.products import DotGeneral
from nqf.ops.rope import apply_rope, rope_tables

# Projections that may carry an adapter, as peft names them.
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3Config:
    """Sizes and options of a Qwen3; the first ten are named as in `config.json`.

    Attributes:
      vocab_size: Rows of the embedding.
      hidden_size: Width D.
      intermediate_size: Width of the gated feed-forward layer.
      num_hidden_layers: Layers L.
      num_attention_heads: Query heads H.
      num_key_value_heads: Key-value heads G; divides H.
      head_dim: Head width K, independent of D / H.
      rms_norm_eps: Epsilon of every RMS norm.
      rope_theta: Base of the rotary wavelengths.
      tie_word_embeddings: Whether logits use the embedding's rows.
      lora_rank: Rank of the adapters; 0 for none.
      lora_alpha: The adapters' update is scaled by alpha / rank.
      lora_dropout: Dropout rate on the adapters' input.
      lora_targets: Projections that carry adapters.
      residual_dropout: Dropout rate on both residual branches.
      dtype: Compute dtype; norms, softmax and rotation are float32 inside.
      param_dtype: Type of the base's parameters at initialization.
      remat: Recompute each layer's activations in the backward pass.
      attention: Attention kernel.
      dot_general: The projections' product, where it is not `jax.lax.dot_general`.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    tie_word_embeddings: bool = True
    lora_rank: int = 0
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    lora_targets: tuple[str, ...] = LORA_TARGETS
    residual_dropout: float = 0.0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = False
    attention: Implementation = "auto"
    dot_general: DotGeneral = None

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads {self.num_key_value_heads} does not divide "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotation needs pairs")
        unknown = [name for name in self.lora_targets if name not in LORA_TARGETS]
        if unknown:
            raise ValueError(f"lora_targets {', '.join(unknown)}: not among {', '.join(LORA_TARGETS)}")

    @property
    def lora_scale(self) -> float:
        """alpha / rank."""
        return self.lora_alpha / self.lora_rank

    @classmethod
    def from_hf(cls, tree: dict[str, Any], **options: Any) -> Qwen3Config:
        """Reads the content of a `config.json`, in the older form (`rope_theta`) or the newer (`rope_parameters`).

        Args:
          tree: The file's content.
          **options: Fields that the file does not have, e.g. `dtype` or `lora_rank`.

        Raises:
          ValueError: Another kind of model, missing keys, or an option that is not implemented; all are named.
        """
        names = [
            field.name
            for field in dataclasses.fields(cls)
            if field.default is dataclasses.MISSING and field.name != "num_key_value_heads"
        ]
        errors = [f"no '{name}'" for name in names if name not in tree]
        if tree.get("model_type") != "qwen3":
            errors.insert(0, f"model_type is {tree.get('model_type')!r}, not 'qwen3'")
        if tree.get("hidden_act", "silu") != "silu":
            errors.append(f"hidden_act {tree['hidden_act']!r} is not supported")
        errors += [f"{key} is not supported" for key in ("attention_bias", "use_sliding_window") if tree.get(key)]
        rope = tree.get("rope_parameters") or {}
        scaling = tree.get("rope_scaling") or rope
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind != "default":
            errors.append(f"rope_type {kind!r} is not supported")
        if errors:
            raise ValueError("; ".join(errors))
        # The defaults of absent keys are those of transformers' Qwen3Config.
        return cls(
            **{name: tree[name] for name in names},
            num_key_value_heads=tree.get("num_key_value_heads") or tree["num_attention_heads"],
            head_dim=tree.get("head_dim") or 128,
            rms_norm_eps=tree.get("rms_norm_eps", 1e-6),
            rope_theta=float(rope.get("rope_theta", tree.get("rope_theta", 10_000.0))),
            tie_word_embeddings=tree.get("tie_word_embeddings", False),
            **options,
        )

    @classmethod
    def qwen3_0_6b(cls, **options: Any) -> Qwen3Config:
        """Qwen3-0.6B."""
        return cls(**_sizes(1024, 3072, 28, 16) | options)

    @classmethod
    def qwen3_1_7b(cls, **options: Any) -> Qwen3Config:
        """Qwen3-1.7B."""
        return cls(**_sizes(2048, 6144, 28, 16) | options)

    @classmethod
    def qwen3_4b(cls, **options: Any) -> Qwen3Config:
        """Qwen3-4B."""
        return cls(**_sizes(2560, 9728, 36, 32) | options)

    @classmethod
    def qwen3_8b(cls, **options: Any) -> Qwen3Config:
        """Qwen3-8B."""
        return cls(**_sizes(4096, 12_288, 36, 32, tie_word_embeddings=False) | options)

    @classmethod
    def qwen3_14b(cls, **options: Any) -> Qwen3Config:
        """Qwen3-14B."""
        return cls(**_sizes(5120, 17_408, 40, 40, tie_word_embeddings=False) | options)

    @classmethod
    def qwen3_32b(cls, **options: Any) -> Qwen3Config:
        """Qwen3-32B."""
        return cls(**_sizes(5120, 25_600, 64, 64, tie_word_embeddings=False) | options)

    @classmethod
    def qwen3_embedding_0_6b(cls, **options: Any) -> Qwen3Config:
        """Qwen3-Embedding-0.6B."""
        return cls.qwen3_0_6b(**{"vocab_size": 151_669} | options)

    @classmethod
    def qwen3_embedding_4b(cls, **options: Any) -> Qwen3Config:
        """Qwen3-Embedding-4B."""
        return cls.qwen3_4b(**{"vocab_size": 151_665} | options)

    @classmethod
    def qwen3_embedding_8b(cls, **options: Any) -> Qwen3Config:
        """Qwen3-Embedding-8B; its files have no output projection."""
        return cls.qwen3_8b(**{"vocab_size": 151_665} | options)


def _sizes(width: int, mlp_width: int, layers: int, heads: int, **options: Any) -> dict[str, Any]:
    # Every published size has 8 key-value heads and the same vocabulary.
    return {
        "vocab_size": 151_936,
        "hidden_size": width,
        "intermediate_size": mlp_width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        **options,
    }


class RMSNorm(nn.Module):
    """x / rms(x) * scale, with the mean square in float32.

    `flax.linen.RMSNorm` multiplies by the scale before it rounds to the compute dtype; Qwen3 rounds first.

    Attributes:
      config: The model's configuration.
    """

    config: Qwen3Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes the last axis of float [..., N]."""
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],), self.config.param_dtype)
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.config.rms_norm_eps)
        scale = scale.astype(self.config.dtype).reshape((1,) * (x.ndim - 1) + scale.shape)
        return wide.astype(self.config.dtype) * scale


def _projection(config: Qwen3Config, name: str, features: int) -> LoRADense:
    rank = config.lora_rank if name in config.lora_targets else 0
    return LoRADense(
        features=features,
        rank=rank,
        scale=config.lora_scale if rank else 1.0,
        dropout=config.lora_dropout,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        dot_general=config.dot_general,
        name=name,
    )


_FEW_LAYERS = 8
"""Layers up to which the last one is computed for the wanted tokens alone. Of more it is a small share, and the weights
that each layer picks from the stack would be kept for the gradient, all of them a second time."""

KeysAndValues = tuple[jax.Array, jax.Array]
"""Keys, rotated, and values of tokens that others read."""


def take_tokens(x_BxTxD: jax.Array, read_at: jax.Array) -> jax.Array:
    """The tokens [B, P, D] at the places int [B or 1, P]."""
    return jnp.take_along_axis(x_BxTxD, read_at[..., None], axis=1)


class Attention(nn.Module):
    """Causal self-attention with grouped queries; queries and keys are normalized per head, then rotated.

    Attributes:
      config: The model's configuration.
    """

    config: Qwen3Config

    @nn.compact
    def __call__(
        self,
        x_BxTxD: jax.Array,
        mask: jax.Array | None,
        cos: jax.Array,
        sin: jax.Array,
        prefix: KeysAndValues | None,
        deterministic: bool,
        read_at: jax.Array | None = None,
    ) -> tuple[jax.Array, KeysAndValues]:
        """Returns what the tokens (at `read_at`) read, and the keys, rotated, and values of all, [B, T, G, K]."""
        config, batch = self.config, x_BxTxD.shape[0]

        def heads(name: str, count: int, x: jax.Array) -> jax.Array:
            flat = _projection(config, name, count * config.head_dim)(x, deterministic)
            return flat.reshape(*x.shape[:2], count, config.head_dim)

        k_BxTxGxK = RMSNorm(config, name="k_norm")(heads("k_proj", config.num_key_value_heads, x_BxTxD))
        own = apply_rope(k_BxTxGxK, cos, sin), heads("v_proj", config.num_key_value_heads, x_BxTxD)
        # Tokens in causal order stand before those that have rows of the mask.
        ordered = x_BxTxD.shape[1] - (0 if mask is None else mask.shape[2])
        if read_at is not None:
            if mask is None:
                mask = (jnp.arange(x_BxTxD.shape[1]) <= read_at[..., None])[:, None]
            else:
                mask = jnp.take_along_axis(mask, read_at[:, None, :, None] - ordered, axis=2)
            x_BxTxD, cos, sin = (take_tokens(x, read_at) for x in (x_BxTxD, cos, sin))
            ordered = 0
        q_BxTxHxK = RMSNorm(config, name="q_norm")(heads("q_proj", config.num_attention_heads, x_BxTxD))
        q_BxTxHxK = apply_rope(q_BxTxHxK, cos, sin)
        keys, values = own
        if prefix is not None:
            keys, values = (
                jnp.concatenate([jnp.broadcast_to(shared, (batch, *shared.shape[1:])), mine], axis=1)
                for shared, mine in zip(prefix, own, strict=True)
            )
        attend = functools.partial(dot_product_attention, implementation=config.attention)
        read = []
        if ordered:
            # What stands before the sequences, and these tokens.
            first = keys.shape[1] - q_BxTxHxK.shape[1] + ordered
            read.append(attend(q_BxTxHxK[:, :ordered], keys[:, :first], values[:, :first], is_causal=True))
        if mask is not None:
            read.append(attend(q_BxTxHxK[:, ordered:], keys, values, mask=mask))
        read_BxTxHxK = jnp.concatenate(read, axis=1)
        o_proj = _projection(config, "o_proj", config.hidden_size)
        return o_proj(read_BxTxHxK.reshape(*read_BxTxHxK.shape[:2], -1), deterministic), own


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)).

    Attributes:
      config: The model's configuration.
    """

    config: Qwen3Config

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array, deterministic: bool) -> jax.Array:
        config = self.config
        gate = _projection(config, "gate_proj", config.intermediate_size)(x_BxTxD, deterministic)
        up = _projection(config, "up_proj", config.intermediate_size)(x_BxTxD, deterministic)
        return _projection(config, "down_proj", config.hidden_size)(nn.silu(gate) * up, deterministic)


class DecoderLayer(nn.Module):
    """One layer: pre-norm attention and feed-forward, each with a residual.

    Attributes:
      config: The model's configuration.
    """

    config: Qwen3Config

    @nn.compact
    def __call__(
        self,
        x_BxTxD: jax.Array,
        mask: jax.Array | None,
        cos: jax.Array,
        sin: jax.Array,
        prefix: KeysAndValues | None,
        deterministic: bool,
        keep: bool,
        read_at: jax.Array | None = None,
    ) -> tuple[jax.Array, KeysAndValues | None]:
        """Returns the layer's output (at `read_at`), which `nn.scan` carries, and to `keep` its keys and values,
        which it stacks."""
        config, x_BxTxD = self.config, over_batch(x_BxTxD)
        drop = Dropout(config.residual_dropout, name="residual_dropout")
        with jax.named_scope("attention"):
            normed = RMSNorm(config, name="input_layernorm")(x_BxTxD)
            read, own = Attention(config, name="self_attn")(normed, mask, cos, sin, prefix, deterministic, read_at)
            x_BxTxD = x_BxTxD if read_at is None else take_tokens(x_BxTxD, read_at)
            x_BxTxD = over_batch(x_BxTxD + drop(read, deterministic))
        with jax.named_scope("mlp"):
            normed = RMSNorm(config, name="post_attention_layernorm")(x_BxTxD)
            x_BxTxD = x_BxTxD + drop(MLP(config, name="mlp")(normed, deterministic), deterministic)
        return over_batch(x_BxTxD), own if keep else None


class Qwen3(nn.Module):
    """The decoder, up to and including its final norm.

    Attributes:
      config: Sizes and options.
    """

    config: Qwen3Config

    def setup(self) -> None:
        config = self.config
        self.embed_tokens = nn.Embed(
            config.vocab_size,
            config.hidden_size,
            embedding_init=nn.initializers.normal(0.02),
            dtype=config.dtype,
            param_dtype=config.param_dtype,
        )
        # 6 and 7 are `deterministic` and `keep`, counted with self. Inside a scan the barrier against common
        # subexpressions, which would undo the recomputation, is not needed.
        layer = nn.remat(DecoderLayer, prevent_cse=False, static_argnums=(6, 7)) if config.remat else DecoderLayer
        self.layers = nn.scan(
            layer,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True, "dropout": True},
            # flax declares one entry for all arguments, and takes one for each.
            in_axes=cast(Any, (nn.broadcast, nn.broadcast, nn.broadcast, 0, nn.broadcast, nn.broadcast)),
            length=config.num_hidden_layers,
        )(config)
        self.norm = RMSNorm(config)
        if not config.tie_word_embeddings:
            self.lm_head = LoRADense(features=config.vocab_size, dtype=config.dtype, param_dtype=config.param_dtype)

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        *,
        inputs_embeds: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        mask: jax.Array | None = None,
        prefix: KeysAndValues | None = None,
        read_at: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Encodes sequences.

        Args:
          input_ids: int [B, T]; this or `inputs_embeds`.
          attention_mask: bool or int [B, T], non-zero at valid tokens; padding may be on any side. None: all valid.
          inputs_embeds: float [B, T, D], in place of the ids' embeddings.
          position_ids: int [B, T]; by default the number of valid tokens before each.
          mask: bool [B, 1, R, T], True where one of the last R tokens (row) may read another; in place of their causal
            order, which those before them keep, and of `attention_mask`. Every token must read something. After a
            prefix of P tokens [B, 1, R, P + T].
          prefix: What `read_prefix` returned for P tokens before all of these sequences; then `position_ids` and `mask`
            have to be given.
          read_at: int [B or 1, P], the tokens whose states are wanted, by default all; with `mask`, some of those that
            have rows. The last of a few layers is then computed for them alone: nobody would read what the others get
            there.
          deterministic: Whether dropout is off; otherwise it draws from the stream `dropout`.

        Returns:
          float [B, T, D], or [B, P, D] with `read_at`, after the final norm, of the compute dtype; meaningless at
          padding.

        Raises:
          ValueError: Neither or both of `input_ids` and `inputs_embeds`, or a prefix without `position_ids` and `mask`.
        """
        if prefix is not None and (position_ids is None or mask is None):
            raise ValueError("after a prefix, position_ids and mask have to be given")
        if input_ids is not None and inputs_embeds is None:
            x_BxTxD = self.embed(input_ids)
        elif inputs_embeds is not None and input_ids is None:
            x_BxTxD = inputs_embeds.astype(self.config.dtype)
        else:
            raise ValueError("give either input_ids or inputs_embeds")
        length = x_BxTxD.shape[1]
        if position_ids is None:
            if attention_mask is None:
                position_ids = jnp.arange(length)[None]
            else:
                position_ids = jnp.maximum(jnp.cumsum(attention_mask.astype(jnp.int32), axis=1) - 1, 0)
        if mask is None and attention_mask is not None:
            at = jnp.arange(length)
            causal_TxT = at[None, :] <= at[:, None]
            # Padding reads itself, so that no row is empty.
            readable_BxTxT = (attention_mask != 0)[:, None, :] | (at[None, :] == at[:, None])[None]
            mask = (causal_TxT[None] & readable_BxTxT)[:, None]
        cos, sin = rope_tables(position_ids, self.config.head_dim, self.config.rope_theta)
        if read_at is None or self.is_initializing() or self.config.num_hidden_layers > _FEW_LAYERS:
            x_BxTxD, _ = self.layers(x_BxTxD, mask, cos, sin, prefix, deterministic, False)
            return self.norm(x_BxTxD if read_at is None else take_tokens(x_BxTxD, read_at))
        stacked = {name: tree for name, tree in self.layers.variables.items() if name in ("params", "lora")}
        key = self.make_rng("dropout") if self.has_rng("dropout") else None
        # Unrolled, because the last layer differs.
        for index in range(self.config.num_hidden_layers):
            own, shared = jax.tree.map(lambda leaf, index=index: leaf[index], (stacked, prefix))
            rngs = {} if key is None else {"dropout": jax.random.fold_in(key, index)}
            last = index == self.config.num_hidden_layers - 1
            layer = functools.partial(DecoderLayer(self.config, parent=None).apply, rngs=rngs)
            if self.config.remat:
                layer = jax.checkpoint(layer, static_argnums=(6, 7))
            with jax.named_scope(f"layer_{index}"):
                x_BxTxD, _ = layer(
                    own, x_BxTxD, mask, cos, sin, shared, deterministic, False, read_at if last else None
                )
        return self.norm(x_BxTxD)

    def read_prefix(self, inputs_embeds: jax.Array, *, deterministic: bool = True) -> tuple[jax.Array, KeysAndValues]:
        """Encodes tokens that stand before all sequences of a batch, once for all of them.

        Args:
          inputs_embeds: float [1, P, D].
          deterministic: Whether dropout is off; otherwise all sequences share what it draws.

        Returns:
          float [1, P, D] after the final norm, and every layer's keys, rotated, and values, [layers, 1, P, G, K].
        """
        cos, sin = rope_tables(jnp.arange(inputs_embeds.shape[1])[None], self.config.head_dim, self.config.rope_theta)
        x_1xPxD = inputs_embeds.astype(self.config.dtype)
        x_1xPxD, prefix = self.layers(x_1xPxD, None, cos, sin, None, deterministic, True)
        assert prefix is not None, "the layers were told to keep it"
        return self.norm(x_1xPxD), prefix

    def embed(self, input_ids: jax.Array) -> jax.Array:
        """Rows of the embedding, float [..., D], of int ids [...]."""
        # Not by `nn.Embed`'s call, which converts the whole table to the compute dtype before it picks rows.
        return take_rows(self.embed_tokens.embedding, input_ids, fill=True).astype(self.config.dtype)

    def logits(self, hidden_BxTxD: jax.Array) -> jax.Array:
        """Next-token logits, float32 [B, T, V], of hidden states after the final norm."""
        if self.config.tie_word_embeddings:
            return self.embed_tokens.attend(hidden_BxTxD).astype(jnp.float32)
        return self.lm_head(hidden_BxTxD).astype(jnp.float32)

    def init_all(self, input_ids: jax.Array) -> jax.Array:
        """Logits of int ids [B, T]; `init` with this method makes every parameter, the output projection's too."""
        return self.logits(self(input_ids))
