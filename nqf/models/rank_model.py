"""The rank model: candidate tower, user vectors, and the Qwen3 that reads a prompt with injected tokens.

User and item vectors are concatenations of a learned part and, if configured, the frozen text embedding, so that
one inner product adds the learned cosine over the temperature and the frozen similarity under a learned scale.

Letters: B users, N history slots, P supervised positions (the newest P slots), Q item tokens, U user tokens,
I items, D width, V width of the learned part, T width of the text embedding, L prompt length.
"""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from nqf.config import CandidatesConfig, PromptConfig, UserConfig
from nqf.models.qwen3 import Qwen3, Qwen3Config
from nqf.models.user_qformer import InteractionFeatures, UserQFormer
from nqf.ops.losses import unit
from nqf.ops.pins import over_all, over_batch, take_rows
from nqf.pipelines.batches import Array, History, ItemTables

NEIGHBORS_HIDDEN = 0.5
"""Share of the items whose neighbors the tower is not shown in a training step."""


class CandidateTower(nn.Module):
    """Item vectors from frozen content and, for items seen in training, a learned vector of their own.

    Attributes:
      config: Sources, width and dropout.
      items: Number of learned vectors.
      dtype: Compute dtype.
    """

    config: CandidatesConfig
    items: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tables: ItemTables, rows: Array, *, deterministic: bool = True) -> jax.Array:
        """Learned part of the item vectors, not normalized.

        Args:
          tables: Tables of R items.
          rows: int32 [R], the items' rows among the learned vectors; outside of them (-1, or beyond the last) for
            items without one, as are those that were never trained on.
          deterministic: Whether dropout is off.

        Returns:
          float [R, V].
        """
        neighbors = tables.neighbors
        if not deterministic and "neighbors" in self.config.sources:
            # What is to be predicted is often a neighbor of the last item: shown always, they are all that is learned.
            shown = jax.random.bernoulli(self.make_rng("dropout"), 1 - NEIGHBORS_HIDDEN, rows.shape)
            neighbors = jnp.where(shown[:, None], neighbors, jnp.zeros_like(neighbors))
        sources = {"item": tables.vectors, "fields": tables.fields, "neighbors": neighbors, "text": tables.text}
        inputs = [
            nn.LayerNorm(name=f"norm_{name}", dtype=self.dtype)(over_all(sources[name].astype(self.dtype)))
            for name in self.config.sources
        ]
        width = self.config.width
        content = nn.Dense(2 * width, name="hidden", dtype=self.dtype)(jnp.concatenate(inputs, axis=-1))
        # Of length one, which a learned vector reaches within some hundred steps of Adam; beside a content of length
        # sqrt(V) it would take ten times as many to tell.
        content = over_all(unit(nn.Dense(width, name="output", dtype=self.dtype)(nn.gelu(content))).astype(self.dtype))
        if not self.config.free_vectors:
            return content
        free = self.param("free", nn.initializers.normal(0.02), (self.items, width))
        keep = (rows >= 0) & (rows < self.items) & tables.trained
        if not deterministic and self.config.free_dropout > 0:
            # Whole vectors are hidden, not elements: a hidden item looks exactly like one that training never saw.
            shown = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.config.free_dropout, rows.shape)
            keep = keep & shown
        own = take_rows(free, jnp.clip(rows, 0, self.items - 1))
        return content + jnp.where(keep[:, None], own, 0).astype(self.dtype)


class ScoreHead(nn.Module):
    """User vectors of every position from a pooled state and what the history's items look like.

    Attributes:
      config: Width, temperature and which parts the score has.
      text_weight: What the frozen similarity counts beyond what was learned.
    """

    config: CandidatesConfig
    text_weight: float = 0.0

    @nn.compact
    def __call__(
        self,
        pooled_BxPxD: jax.Array,
        learned_BxNxV: jax.Array,
        valid_BxN: jax.Array,
        text_BxNxT: jax.Array,
        has_text_BxN: jax.Array,
        tokens_BxPxE: jax.Array | None = None,
    ) -> jax.Array:
        """Returns user vectors, float32 [B, P, V (+ T)]; their inner products with `item_side` are the logits.

        Args:
          pooled_BxPxD: Pooled states of the newest P positions.
          learned_BxNxV: The tower's vectors of the items in the history's slots.
          valid_BxN: False in padding.
          text_BxNxT: Frozen text embeddings of the slots.
          has_text_BxN: False in padding and where the item has no text.
          tokens_BxPxE: User tokens, side by side, of which the pooled state has been told.
        """
        slots, positions = valid_BxN.shape[1], pooled_BxPxD.shape[1]
        distance_PxN = jnp.arange(slots - positions, slots)[:, None] - jnp.arange(slots)[None, :]

        def recent(name: str, vectors_BxNxD: jax.Array, there_BxN: jax.Array) -> jax.Array:
            """Direction of the vectors' sum up to each position, older ones weighing exponentially less."""
            decay = self.param(name, nn.initializers.constant(0.5), ())
            weight_PxN = jnp.exp(-jax.nn.softplus(decay) * jnp.maximum(distance_PxN, 0)) * (distance_PxN >= 0)
            return unit(jnp.einsum("pn,bnd->bpd", weight_PxN, vectors_BxNxD.astype(jnp.float32) * there_BxN[..., None]))

        pooled_BxPxD = pooled_BxPxD.astype(jnp.float32)
        width = self.config.width
        user = nn.Dense(width, name="project")(pooled_BxPxD)
        if tokens_BxPxE is not None:
            # What they say of a long history hardly finds its way through a language model that begins at random.
            user += nn.Dense(width, use_bias=False, name="tokens")(tokens_BxPxE.astype(jnp.float32))
        if self.config.transitions:
            last = recent("transition_decay", learned_BxNxV, valid_BxN)
            # Which item follows which, as in a factorized Markov chain (FPMC, Rendle et al. 2010). Elements are of
            # about one, as those of the pooled state.
            user += nn.Dense(width, use_bias=False, name="transition")(last * width**0.5)
        user = scaled(self, self.config, unit(user))
        if not self.config.frozen_similarity:
            return user
        # softplus(4) is about 4: the frozen cosine starts as a hint beside the learned one's 1 / 0.07.
        gate_BxPx1 = nn.softplus(
            nn.Dense(1, name="gate", kernel_init=nn.initializers.zeros, bias_init=nn.initializers.constant(4.0))(
                pooled_BxPxD
            )
        )
        weight_BxPx1 = gate_BxPx1 + self.text_weight
        return jnp.concatenate([user, weight_BxPx1 * recent("decay", text_BxNxT, has_text_BxN)], axis=-1)


class FrozenHead(nn.Module):
    """User vectors that are the pooled state itself, on the side of frozen text embeddings.

    Attributes:
      config: Temperature.
    """

    config: CandidatesConfig

    @nn.compact
    def __call__(
        self,
        pooled_BxPxD: jax.Array,
        learned_BxNx0: jax.Array,
        valid_BxN: jax.Array,
        text_BxNxT: jax.Array,
        has_text_BxN: jax.Array,
        tokens_BxPxE: jax.Array | None = None,
    ) -> jax.Array:
        """Returns float32 [B, P, T]; the arguments are those of `ScoreHead`, without the tokens."""
        user, width = pooled_BxPxD.astype(jnp.float32), text_BxNxT.shape[-1]
        if user.shape[-1] != width:
            user = nn.Dense(width, use_bias=False, name="project")(user)
        return scaled(self, self.config, unit(user))


def scaled(module: nn.Module, config: CandidatesConfig, user: jax.Array) -> jax.Array:
    """User vectors over the temperature, which is a parameter of the module where it is learned."""
    if not config.learn_temperature:
        return user / config.temperature
    log_scale = module.param("log_scale", nn.initializers.constant(-math.log(config.temperature)), ())
    # CLIP's cap on the scale (arXiv 2103.00020, section 2.5): larger ones make training unstable.
    return user * jnp.exp(jnp.minimum(log_scale, math.log(100.0)))


def _item_inputs(tables: ItemTables, learned_RxV: jax.Array, items_BxN: Array) -> jax.Array:
    """Tokens of the history's items, each beside the item's learned vector: float [B, N, Q, E + V]."""
    rows = jnp.maximum(items_BxN, 0)
    tokens = take_rows(tables.tokens, rows)
    # Elements of about one, as those of the tokens.
    learned = learned_RxV[rows][:, :, None, :] * learned_RxV.shape[-1] ** 0.5
    learned = jnp.broadcast_to(learned, (*tokens.shape[:3], learned_RxV.shape[-1]))
    return jnp.concatenate([tokens.astype(learned.dtype), learned], axis=-1)


def history_vectors(
    tables: ItemTables, learned_RxV: jax.Array, history: History
) -> tuple[jax.Array, Array, Array, Array]:
    """What the score reads of the slots: the tower's vectors, float [B, N, V], where there is an item, bool [B, N],
    frozen text embeddings, float [B, N, T], and where there is one, bool [B, N]."""
    rows, there = jnp.maximum(history.items, 0), history.items >= 0
    return learned_RxV[rows], there, take_rows(tables.text, rows), tables.has_text[rows] & there


class PromptIds(struct.PyTreeNode):
    """Token ids that frame the injected tokens.

    Attributes:
      instruction: int32 [S], before the history.
      placeholder: int32 scalar, a spare row of the vocabulary that stands where tokens are injected.
      end: int32 scalar, the end token whose state is pooled.
    """

    instruction: Array
    placeholder: Array
    end: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reader:
    """The language model that reads a history as a prompt.

    Attributes:
      qwen3: Its configuration.
      prompt: What it reads.
      pretrained: Whether its weights are not drawn at random.
      reads_items: Whether it also makes the item vectors, of prompts of one item, in place of the candidate tower.
      dropout: Dropout rate of the prompt's embeddings.
    """

    qwen3: Qwen3Config
    prompt: PromptConfig
    pretrained: bool
    reads_items: bool
    dropout: float


class RankModel(nn.Module):
    """Histories to user vectors and items to item vectors, whose inner product ranks.

    Without a reader the user tokens themselves are the pooled state, and predict the next item's query tokens as well
    (the user stage). With one (the joint stage), a Qwen3 reads instruction, item tokens and user tokens. The prompt is
    a trunk, `instruction, (title, item tokens) x P`, and for each supervised position i a branch `user tokens, end`
    that reads the trunk up to slot i and itself only. Each branch is thus computed exactly as if the prompt ended
    there: one pass supervises every position, no position sees its target, and inference with one branch gives the
    vectors that training gave.

    Attributes:
      tower_config: What an item is scored by.
      user: The User Q-Former and what it reads.
      items: Number of catalogue items.
      item_tokens: (Q, E), shape of an item's tokens.
      new_item_weight: Factor of the frozen similarity of items that training never saw.
      text_weight: What the frozen similarity counts beyond what was learned.
      reader: The language model; None for the user tokens alone.
      dtype: Compute dtype.
    """

    tower_config: CandidatesConfig
    user: UserConfig
    items: int
    item_tokens: tuple[int, int]
    new_item_weight: float
    text_weight: float = 0.0
    reader: Reader | None = None
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        user, reader = self.user, self.reader
        frozen = self.tower_config.frozen
        if not frozen:
            self.tower = CandidateTower(config=self.tower_config, items=self.items, dtype=self.dtype)
        self.user_qformer = UserQFormer(
            config=user.qformer, ratings=user.ratings, times=user.times, reviews=user.reviews, dtype=self.dtype
        )
        if frozen:
            self.head = FrozenHead(config=self.tower_config)
        else:
            self.head = ScoreHead(config=self.tower_config, text_weight=self.text_weight)
        if reader is None:
            self.regression = nn.Dense(math.prod(self.item_tokens), dtype=self.dtype)
            return
        self.qwen3 = Qwen3(reader.qwen3)
        width = reader.qwen3.hidden_size
        # Injected tokens start at the size of word embeddings (Qwen3-Embedding's rows have an RMS near 0.03); a
        # projection of unit RMS would drown the words of a pretrained model.
        scale = nn.initializers.constant(0.03 if reader.pretrained else 1.0)
        self.item_projection = nn.Dense(width, dtype=self.dtype)
        self.user_projection = nn.Dense(width, dtype=self.dtype)
        self.item_norm = nn.RMSNorm(dtype=self.dtype, scale_init=scale)
        self.user_norm = nn.RMSNorm(dtype=self.dtype, scale_init=scale)
        self.dropout = nn.Dropout(reader.dropout)
        if reader.reads_items:
            self.candidate = nn.Dense(self.tower_config.width)
        if reader.prompt.interactions:
            self.interactions = InteractionFeatures(
                width=width, ratings=user.ratings, times=user.times, reviews=user.reviews, dtype=self.dtype
            )

    def item_vectors(self, tables: ItemTables, rows: Array, prompt: PromptIds | None) -> jax.Array:
        """Item side of the score, float32 [R, V (+ T)]."""
        return self.candidates(tables, self.learned(tables, rows), prompt)

    def __call__(
        self,
        tables: ItemTables,
        rows: Array,
        history: History,
        prompt: PromptIds | None,
        *,
        positions: int,
        deterministic: bool = True,
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Encodes histories and items.

        Args:
          tables: Tables of R items; `history.items` index them.
          rows: int32 [R], the items' rows in the catalogue, -1 for new items.
          history: The batch.
          prompt: Token ids of the prompt; None without a reader.
          positions: Newest slots to encode: all slots of the prompt in training, 1 for inference.
          deterministic: Whether dropout is off.

        Returns:
          User vectors float32 [B, P, V (+ T)], item vectors float32 [R, V (+ T)] and, without a reader, the predicted
          query tokens of the next item, float [B, P, Q, E].
        """
        learned = self.learned(tables, rows, deterministic=deterministic)
        pooled, tokens = self._pooled(tables, learned, history, prompt, positions, deterministic)
        users, predicted = self.head(pooled, *history_vectors(tables, learned, history), tokens), None
        if self.reader is None:
            predicted = over_batch(self.regression(pooled)).reshape(*pooled.shape[:2], *self.item_tokens)
        return users, self.candidates(tables, learned, prompt, deterministic=deterministic), predicted

    def learned(self, tables: ItemTables, rows: Array, *, deterministic: bool = True) -> jax.Array:
        """The candidate tower's vectors, float [R, V], which also stand beside the items' tokens; else V is 0."""
        if self.tower_config.frozen:
            return jnp.zeros((len(rows), 0), self.dtype)
        return self.tower(tables, rows, deterministic=deterministic)

    def candidates(
        self, tables: ItemTables, learned_RxV: jax.Array, prompt: PromptIds | None, *, deterministic: bool = True
    ) -> jax.Array:
        """Item vectors, float32 [R, V (+ T)]: of the tower, or of what the Qwen3 makes of `title, item tokens, end`."""
        if self.tower_config.frozen:
            return unit(tables.text)
        if prompt is not None and self.reader is not None and self.reader.reads_items:
            inputs = _item_inputs(tables, learned_RxV, jnp.arange(len(learned_RxV))[:, None])
            tokens = self.item_norm(self.item_projection(inputs))
            bare = prompt.replace(instruction=prompt.instruction[:0])
            valid = jnp.ones(tokens.shape[:2], bool)
            pooled = self._read(bare, tables.titles[:, None], tokens, valid, None, 1, deterministic)[:, 0]
            learned_RxV = self.candidate(pooled.astype(jnp.float32))
        parts = [unit(learned_RxV)]
        if self.tower_config.frozen_similarity:
            weight_R = jnp.where(tables.trained, 1.0, self.new_item_weight)
            parts.append(weight_R[:, None] * unit(tables.text))
        return jnp.concatenate(parts, axis=-1)

    def users(
        self,
        tables: ItemTables,
        learned_RxV: jax.Array,
        history: History,
        prompt: PromptIds | None,
        *,
        positions: int,
        deterministic: bool = True,
    ) -> jax.Array:
        """User vectors, float32 [B, P, V (+ T)]; the arguments are those of a call, and `learned`'s result."""
        pooled, tokens = self._pooled(tables, learned_RxV, history, prompt, positions, deterministic)
        return self.head(pooled, *history_vectors(tables, learned_RxV, history), tokens)

    def _pooled(
        self,
        tables: ItemTables,
        learned_RxV: jax.Array,
        history: History,
        prompt: PromptIds | None,
        positions: int,
        deterministic: bool,
    ) -> tuple[jax.Array, jax.Array | None]:
        """The state of every position that the score reads, float [B, P, D], and the user tokens, side by side, [B, P,
        E], where these have been read by a language model."""
        inputs = over_batch(_item_inputs(tables, learned_RxV, history.items))
        reader = self.reader
        if reader is None or prompt is None:
            tokens = self.user_qformer(inputs, history, positions=positions, deterministic=deterministic)
            # Of the width of frozen embeddings, as the reference's mean is.
            frozen = self.tower_config.frozen
            return over_batch(tokens.mean(axis=2) if frozen else tokens.reshape(*tokens.shape[:2], -1)), None
        slots = min(reader.prompt.history_items, history.items.shape[1])
        positions = min(positions, slots)
        user_tokens = side_by_side = None
        if reader.prompt.user_tokens:
            tokens = self.user_qformer(inputs, history, positions=positions, deterministic=deterministic)
            user_tokens = self.user_norm(self.user_projection(tokens))
            side_by_side = over_batch(tokens.reshape(*tokens.shape[:2], -1))
        item_tokens = self.item_projection(inputs[:, -slots:])
        if reader.prompt.interactions:
            item_tokens = item_tokens + self.interactions(history)[:, -slots:, None]
        item_tokens = self.item_norm(item_tokens)
        items_BxS = history.items[:, -slots:]
        titles = jnp.where((items_BxS >= 0)[..., None], tables.titles[jnp.maximum(items_BxS, 0)], -1)
        pooled = self._read(prompt, titles, item_tokens, items_BxS >= 0, user_tokens, positions, deterministic)
        return pooled, side_by_side

    def _read(
        self,
        prompt: PromptIds,
        titles_BxSxW: Array,
        items_BxSxQxD: jax.Array,
        valid_BxS: Array,
        users_BxPxUxD: jax.Array | None,
        positions: int,
        deterministic: bool,
    ) -> jax.Array:
        """Runs the Qwen3 over the branched prompt; returns the pooled state of every branch, [B, P, D]."""
        assert self.reader is not None, "without a language model there is no prompt"
        (batch, slots, per_item, _), words = items_BxSxQxD.shape, titles_BxSxW.shape[-1]
        count = users_BxPxUxD.shape[2] if users_BxPxUxD is not None else 0
        layout = prompt_layout(slots, words, per_item, positions, count)

        # Ids of the prompt after its instruction, with placeholders where tokens are injected.
        slot_ids = jnp.concatenate(
            [
                jnp.where(titles_BxSxW >= 0, titles_BxSxW, prompt.end),
                jnp.full((batch, slots, per_item), prompt.placeholder, jnp.int32),
            ],
            axis=-1,
        )
        branch_ids = jnp.concatenate([jnp.full((count,), prompt.placeholder, jnp.int32), prompt.end[None]])
        ids_BxL = jnp.concatenate(
            [
                slot_ids.reshape(batch, -1),
                jnp.broadcast_to(jnp.tile(branch_ids, positions), (batch, positions * (count + 1))),
            ],
            axis=1,
        )
        embeds = self.qwen3.embed(ids_BxL)
        embeds = embeds.at[:, layout.item_at].set(items_BxSxQxD.reshape(batch, -1, embeds.shape[-1]))
        if users_BxPxUxD is not None:
            embeds = embeds.at[:, layout.user_at].set(users_BxPxUxD.reshape(batch, -1, embeds.shape[-1]))
        embeds = self.dropout(embeds, deterministic=deterministic)

        valid_slot = jnp.concatenate(
            [titles_BxSxW >= 0, jnp.broadcast_to(valid_BxS[..., None], (batch, slots, per_item))], axis=-1
        )
        valid_BxT = valid_slot.reshape(batch, -1)
        instruction_1xIxD = self.dropout(self.qwen3.embed(prompt.instruction[None]), deterministic=deterministic)
        pools_last = self.reader.prompt.pooling == "last"
        if positions == 1:
            valid_BxL = jnp.pad(valid_BxT, ((0, 0), (0, count + 1)), constant_values=True)
            return self._read_one(instruction_1xIxD, embeds, valid_BxL, pools_last, deterministic)
        start, prefix = instruction_1xIxD.shape[1], None
        if start:
            # Often more than half of a short history's prompt, and the same in all of them.
            instructed_1xIxD, prefix = self.qwen3.read_prefix(instruction_1xIxD, deterministic=deterministic)
        trunk = valid_BxT.shape[1]
        position_ids, mask_BxRxL = _branches(valid_slot, layout.own, positions)
        hidden = self.qwen3(
            inputs_embeds=_padding_last(embeds, valid_BxT),
            position_ids=start + position_ids,
            mask=jnp.pad(mask_BxRxL, ((0, 0), (0, 0), (start, 0)), constant_values=True)[:, None],
            prefix=prefix,
            read_at=jnp.asarray(layout.end_at)[None] if pools_last else None,
            deterministic=deterministic,
        )
        if pools_last:
            return hidden
        weights = mask_BxRxL[:, layout.end_at - trunk].astype(jnp.float32)
        total = jnp.einsum("bpl,bld->bpd", weights, hidden.astype(jnp.float32))
        if start:
            total += jnp.sum(instructed_1xIxD.astype(jnp.float32), axis=1, keepdims=True)
        return total / (start + jnp.sum(weights, axis=-1, keepdims=True))

    def _read_one(
        self,
        instruction_1xIxD: jax.Array,
        embeds_BxLxD: jax.Array,
        valid_BxL: jax.Array,
        pools_last: bool,
        deterministic: bool,
    ) -> jax.Array:
        """Prompts of one branch, which are plain sequences: with their padding moved to the end, causal order is all
        that attention needs, and no mask stands in memory."""
        batch, start = len(embeds_BxLxD), instruction_1xIxD.shape[1]
        instruction_BxIxD = jnp.broadcast_to(instruction_1xIxD, (batch, *instruction_1xIxD.shape[1:]))
        embeds_BxLxD = jnp.concatenate([instruction_BxIxD, embeds_BxLxD], axis=1)
        valid_BxL = jnp.pad(valid_BxL, ((0, 0), (start, 0)), constant_values=True)
        embeds = _padding_last(embeds_BxLxD, valid_BxL)
        count_Bx1 = jnp.sum(valid_BxL, axis=1, keepdims=True)
        if pools_last:
            return self.qwen3(inputs_embeds=embeds, read_at=count_Bx1 - 1, deterministic=deterministic)
        hidden = self.qwen3(inputs_embeds=embeds, deterministic=deterministic)
        weights_BxL = (jnp.arange(hidden.shape[1])[None] < count_Bx1).astype(jnp.float32)
        return jnp.einsum("bl,bld->bd", weights_BxL / count_Bx1, hidden.astype(jnp.float32))[:, None]


def _branches(valid_BxSxW: jax.Array, own_RxR: np.ndarray, positions: int) -> tuple[jax.Array, jax.Array]:
    """Positions of all tokens after the instruction, int [B, L], and what those of the branches read, bool [B, R, L],
    where the trunk's padding stands at its end."""
    (batch, slots, per_slot), rows = valid_BxSxW.shape, len(own_RxR)
    trunk, per_branch = slots * per_slot, rows // positions
    # Tokens of the trunk that a branch reads: a token's position is the number of those before it.
    read_BxP = jnp.cumsum(valid_BxSxW.sum(-1), axis=1)[:, slots - positions :]
    read_BxR = jnp.repeat(read_BxP, per_branch, axis=1)
    trunk_BxT = jnp.broadcast_to(jnp.arange(trunk), (batch, trunk))
    mask_BxRxT = jnp.arange(trunk) < read_BxR[..., None]
    return (
        jnp.concatenate([trunk_BxT, read_BxR + jnp.tile(jnp.arange(per_branch), positions)], axis=1),
        jnp.concatenate([mask_BxRxT, jnp.broadcast_to(own_RxR, (batch, rows, rows))], axis=-1),
    )


def _padding_last(x_BxLxD: jax.Array, valid_BxT: jax.Array) -> jax.Array:
    """The first T tokens with their padding after them, so that causal order is all that reading them needs; the others
    as they are."""
    order_BxT = jnp.argsort(~valid_BxT, axis=1, stable=True)
    ordered = jnp.take_along_axis(x_BxLxD[:, : order_BxT.shape[1]], order_BxT[..., None], axis=1)
    return jnp.concatenate([ordered, x_BxLxD[:, order_BxT.shape[1] :]], axis=1)


class PromptLayout(struct.PyTreeNode):
    """Static places in a branched prompt, counted from the end of its instruction.

    Attributes:
      item_at: int [S * Q], where item tokens stand.
      user_at: int [P * U], where user tokens stand.
      end_at: int [P], where the end tokens stand.
      own: bool [R, R], R = P * (U + 1), which token of the branches may read which of them.
    """

    item_at: np.ndarray
    user_at: np.ndarray
    end_at: np.ndarray
    own: np.ndarray


def prompt_layout(slots: int, words: int, per_item: int, positions: int, user_tokens: int) -> PromptLayout:
    """Lays out a trunk of `slots` items and one branch for each of the newest `positions` slots.

    Args:
      slots: Items in the prompt.
      words: Title tokens of an item.
      per_item: Injected tokens of an item.
      positions: Branches.
      user_tokens: User tokens of a branch; the end token follows them.
    """
    per_slot, per_branch = words + per_item, user_tokens + 1
    trunk = slots * per_slot
    item_at = (np.arange(slots)[:, None] * per_slot + words + np.arange(per_item)).reshape(-1)
    branch_at = trunk + np.arange(positions)[:, None] * per_branch + np.arange(per_branch)
    at = np.arange(positions * per_branch)
    branch = at // per_branch
    return PromptLayout(
        item_at=item_at,
        user_at=branch_at[:, :user_tokens].reshape(-1),
        end_at=branch_at[:, -1],
        own=(branch[:, None] == branch[None, :]) & (at[None, :] <= at[:, None]),
    )
