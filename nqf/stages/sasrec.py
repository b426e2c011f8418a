"""SASRec with full softmax: the trained baseline (Kang and McAuley 2018, arXiv 1808.09781).

Pre-norm causal blocks over left-padded histories, item vectors tied to the input, cross-entropy over the whole
catalogue at every position, which is what makes a SASRec strong (Klenitskiy and Vasilev 2023, arXiv 2309.07602).
Scores are cosines over a learned temperature: they learn about twice as fast as plain inner products.
Letters: B sequences, L slots, D width, I items.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from nqf.config import SASRecConfig
from nqf.data.interactions import Interactions
from nqf.data.splits import Cases, Split
from nqf.evaluation.metrics import summarize
from nqf.evaluation.ranking import rank_vectors
from nqf.ops.losses import full_softmax, unit

_VALIDATION_CASES = 5_000
_BATCH = 512


class SASRec(nn.Module):
    """The network.

    Attributes:
      config: Sizes.
      items: Size of the catalogue.
    """

    config: SASRecConfig
    items: int

    def setup(self) -> None:
        width = self.config.width
        self.item_embedding = self.param("item_embedding", nn.initializers.normal(width**-0.5), (self.items, width))
        self.log_scale = self.param("log_scale", nn.initializers.constant(-np.log(self.config.temperature)), ())
        self.position_embedding = self.param(
            "position_embedding", nn.initializers.normal(0.02), (self.config.max_history, width)
        )
        self.dropout = nn.Dropout(self.config.dropout)
        self.blocks = [_Block(self.config) for _ in range(self.config.layers)]
        self.norm = nn.LayerNorm()

    def __call__(self, items_BxL: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """States after each slot, unit rows times the scale, float32 [B, L, D].

        Args:
          items_BxL: int32 item rows, oldest first, -1 to the left of a short history.
          deterministic: Whether dropout is off.
        """
        slots = items_BxL.shape[1]
        present_BxL = items_BxL >= 0
        # Places are counted from the newest slot, so that the padding of a batch does not move them.
        x_BxLxD = self.item_embedding[items_BxL] * self.config.width**0.5 + self.position_embedding[-slots:]
        x_BxLxD = self.dropout(x_BxLxD, deterministic=deterministic)
        # A slot of padding sees itself, which keeps its softmax defined; nobody sees it.
        mask = nn.make_causal_mask(items_BxL) * (present_BxL[:, None, None, :] | jnp.eye(slots, dtype=bool)[None, None])
        for block in self.blocks:
            x_BxLxD = block(x_BxLxD, mask, deterministic)
        return unit(self.norm(x_BxLxD)) * jnp.exp(self.log_scale)

    def item_vectors(self) -> jax.Array:
        """Unit item vectors, float32 [I, D]."""
        return unit(self.item_embedding)


class _Block(nn.Module):
    config: SASRecConfig

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array, mask: jax.Array, deterministic: bool) -> jax.Array:
        config = self.config
        attention = nn.MultiHeadDotProductAttention(
            num_heads=config.heads, dropout_rate=config.dropout, broadcast_dropout=False
        )
        dropout = nn.Dropout(config.dropout, deterministic=deterministic)
        x_BxLxD += dropout(attention(nn.LayerNorm()(x_BxLxD), mask=mask, deterministic=deterministic))
        hidden = nn.gelu(nn.Dense(4 * config.width)(nn.LayerNorm()(x_BxLxD)))
        return x_BxLxD + dropout(nn.Dense(config.width)(hidden))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedSASRec:
    """A trained SASRec.

    Attributes:
      model: The network.
      params: Its best parameters by validation.
      history: Mean loss and, where it was validated, metrics of each epoch.
    """

    model: SASRec
    params: Any
    history: list[dict[str, float]]

    def scorer(self, interactions: Interactions, cases: Cases) -> tuple[np.ndarray, np.ndarray]:
        """User vectors [cases, D] from everything before the targets, and item vectors [I, D], float32."""
        items = self.model.apply({"params": self.params}, method=SASRec.item_vectors)
        return _encode(self.model, self.params, interactions, cases), np.asarray(items)


def train_sasrec(
    interactions: Interactions,
    split: Split,
    config: SASRecConfig,
    *,
    seed: int,
    select: bool = True,
    report: Callable[[dict[str, float]], None] | None = None,
) -> TrainedSASRec:
    """Trains on the training events and keeps the epoch with the best validation NDCG@10, seen items masked.

    Without a selection it trains all epochs and keeps the last.

    Args:
      interactions: All interactions.
      split: What is training, and the validation cases.
      config: Sizes and schedule.
      seed: Seed of initialization, dropout and data order.
      select: Whether the validation cases were kept out of the training events and can select.
      report: Called with each epoch's entry of the history.

    Raises:
      ValueError: No user has two training events.
    """
    buckets = make_sequences(interactions, split, config.max_history)
    if not buckets:
        raise ValueError("no user has two training events; a SASRec has nothing to learn from")
    model = SASRec(config=config, items=len(split.cold))
    generator = np.random.default_rng(seed)
    root = jax.random.key(seed)
    params = jax.jit(model.init)(root, jnp.zeros((1, 1), jnp.int32))["params"]
    steps = sum(1 for _ in _batches(buckets, config.batch_positions, np.random.default_rng(0)))
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, steps, steps * max(2, config.epochs))
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            schedule, weight_decay=config.weight_decay, mask=lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)
        ),
    )

    def loss_fn(params: Any, sequences_BxS: jax.Array, key: jax.Array) -> jax.Array:
        inputs_BxL, targets_BxL = sequences_BxS[:, :-1], sequences_BxS[:, 1:]
        states = model.apply({"params": params}, inputs_BxL, deterministic=False, rngs={"dropout": key})
        items = model.apply({"params": params}, method=SASRec.item_vectors)
        weights = (inputs_BxL >= 0).astype(jnp.float32).reshape(-1)
        return full_softmax(
            states.reshape(-1, config.width),
            items,
            jnp.zeros((len(items), 0)),
            jnp.maximum(targets_BxL, 0).reshape(-1),
            weights_M=weights,
            allowed=jnp.ones(len(items), bool),
        )

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, sequences_BxS: jax.Array, count: int) -> tuple[Any, Any, jax.Array]:
        loss, gradient = jax.value_and_grad(loss_fn)(params, sequences_BxS, jax.random.fold_in(root, count))
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    validate = _validation(interactions, split) if select else None
    state, count = optimizer.init(params), 0
    best, best_score, history = params, -1.0, []
    for epoch in range(1, config.epochs + 1):
        losses = []
        for sequences_BxS in _batches(buckets, config.batch_positions, generator):
            params, state, loss = step(params, state, sequences_BxS, count)
            losses.append(loss)
            count += 1
        metrics = validate(TrainedSASRec(model=model, params=params, history=[])) if validate else {}
        history.append({"epoch": epoch, "loss": float(np.mean(jax.device_get(losses))), **metrics})
        if report is not None:
            report(history[-1])
        if validate is None:
            best = params
        elif metrics["ndcg@10"] > best_score:
            # To the host: the next step takes the device's buffers.
            best, best_score = jax.device_get(params), metrics["ndcg@10"]
        elif epoch - max(history, key=lambda entry: entry["ndcg@10"])["epoch"] >= config.patience:
            break
    return TrainedSASRec(model=model, params=best, history=history)


def make_sequences(interactions: Interactions, split: Split, max_history: int) -> dict[int, np.ndarray]:
    """Training sequences by their number of slots.

    Args:
      interactions: All interactions.
      split: What is training.
      max_history: Longest window of inputs; a longer sequence gives several windows, each event a target once.

    Returns:
      Slots L (powers of two up to `max_history`) to int32 [n, L + 1] item rows, -1 to the left: all but the last
      are inputs, all but the first targets.
    """
    windows: dict[int, list[np.ndarray]] = {}
    for user in range(len(interactions.user_ids)):
        span = slice(interactions.offsets[user], interactions.offsets[user + 1])
        items = interactions.items[span][split.train[span]]
        for stop in range(len(items), 1, -max_history):
            window = items[max(0, stop - max_history - 1) : stop]
            slots = min(max_history, 1 << (len(window) - 2).bit_length())
            row = np.full(slots + 1, -1, np.int32)
            row[-len(window) :] = window
            windows.setdefault(slots, []).append(row)
    return {slots: np.stack(rows) for slots, rows in sorted(windows.items())}


def _batches(buckets: dict[int, np.ndarray], positions: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """An epoch in random order: batches of one bucket each, filled up with rows of padding."""
    batches = []
    for slots, rows in buckets.items():
        size = max(1, positions // slots)
        order = generator.permutation(len(rows))
        batches += [(slots, order[start : start + size], size) for start in range(0, len(order), size)]
    for index in generator.permutation(len(batches)):
        slots, chosen, size = batches[index]
        batch = np.full((size, slots + 1), -1, np.int32)
        batch[: len(chosen)] = buckets[slots][chosen]
        yield batch


@functools.partial(jax.jit, static_argnums=0)
def _last_state(model: SASRec, params: Any, items_BxL: jax.Array) -> jax.Array:
    return model.apply({"params": params}, items_BxL)[:, -1]


def _encode(model: SASRec, params: Any, interactions: Interactions, cases: Cases) -> np.ndarray:
    """User vectors of the cases; each batch has the slots that its longest history needs."""
    slots = model.config.max_history
    lengths_N = np.minimum(cases.cuts - interactions.offsets[cases.users], slots)
    vectors_NxD = np.zeros((len(cases.users), model.config.width), np.float32)
    order = np.argsort(lengths_N, kind="stable")
    for start in range(0, len(order), _BATCH):
        rows = order[start : start + _BATCH]
        width = min(slots, 1 << max(0, int(lengths_N[rows[-1]]) - 1).bit_length())
        at_BxL = cases.cuts[rows, None] - width + np.arange(width)
        inside_BxL = at_BxL >= interactions.offsets[cases.users[rows], None]
        items_BxL = np.full((_BATCH, width), -1, np.int32)
        items_BxL[: len(rows)] = np.where(inside_BxL, interactions.items[np.maximum(at_BxL, 0)], -1)
        vectors_NxD[rows] = np.asarray(_last_state(model, params, items_BxL))[: len(rows)]
    return vectors_NxD


def _validation(interactions: Interactions, split: Split) -> Callable[[TrainedSASRec], dict[str, float]]:
    """Metrics at 10 on a fixed sample of the validation cases."""
    chosen = np.sort(np.random.default_rng(0).permutation(len(split.valid.users))[:_VALIDATION_CASES])
    cases = Cases(users=split.valid.users[chosen], cuts=split.valid.cuts[chosen])
    targets_N = interactions.items[cases.cuts]
    seen = [
        interactions.items[interactions.offsets[user] : cut] for user, cut in zip(cases.users, cases.cuts, strict=True)
    ]

    def validate(trained: TrainedSASRec) -> dict[str, float]:
        ranks_N = rank_vectors(*trained.scorer(interactions, cases), targets_N, seen)
        return {name: entry[0] for name, entry in summarize(ranks_N, (10,), bootstrap=0).items()}

    return validate
