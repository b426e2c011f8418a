"""The joint model: each branch of a training prompt is the prompt that ends there."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nqf.config import CandidatesConfig, Config, JointConfig, PromptConfig, QFormerConfig, UserConfig
from nqf.models.qwen3 import Qwen3Config
from nqf.models.rank_model import CandidateTower, PromptIds, RankModel
from nqf.pipelines.batches import History, ItemTables
from nqf.pipelines.histories import history_of_items
from nqf.stages.joint import reader_of
from nqf.stages.rank import rank_module

ITEMS, QUERIES, WIDTH, SLOTS, WORDS = 9, 2, 16, 6, 3
QWEN3 = Qwen3Config(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)
PROMPT = PromptIds(instruction=jnp.array([4, 5, 6]), placeholder=jnp.array(49), end=jnp.array(48))
QFORMER = QFormerConfig(width=WIDTH, layers=1, heads=2, mlp_width=32, queries=2)


def model_of(prompt: PromptConfig) -> RankModel:
    config = Config(user=UserConfig(qformer=QFORMER), joint=JointConfig(prompt=prompt))
    return rank_module(config, tables(), jnp.float32, reader_of(config.joint, QWEN3))


def tables() -> ItemTables:
    rng = np.random.default_rng(0)
    titles = rng.integers(10, 40, (ITEMS, WORDS)).astype(np.int32)
    titles[np.arange(WORDS)[None] >= rng.integers(1, WORDS + 1, ITEMS)[:, None]] = -1
    return ItemTables(
        tokens=rng.normal(size=(ITEMS, QUERIES, WIDTH)).astype(np.float32),
        vectors=rng.normal(size=(ITEMS, WIDTH)).astype(np.float32),
        fields=rng.normal(size=(ITEMS, 5)).astype(np.float32),
        neighbors=rng.normal(size=(ITEMS, 5)).astype(np.float32),
        text=rng.normal(size=(ITEMS, 8)).astype(np.float32),
        has_text=np.arange(ITEMS) != 3,
        trained=np.arange(ITEMS) != 4,
        titles=titles,
    )


def history() -> History:
    items = np.array([[-1, -1, 0, 3, 5, 2], [1, 2, 3, 4, 5, 6], [-1, -1, -1, -1, -1, 7]], np.int32)
    age = np.where(items >= 0, np.arange(SLOTS)[::-1][None] * 90_000, -1).astype(np.int32)
    return history_of_items(items, 0).replace(age=age)


def init(model: RankModel, items: ItemTables, rows: np.ndarray, batch: History) -> Any:
    """Fresh parameters; compiled, as operation by operation takes ten times as long."""
    made = jax.jit(model.init, static_argnames="positions")
    return made(jax.random.key(0), items, rows, batch, PROMPT, positions=1)["params"]


@pytest.mark.parametrize(
    ("pooling", "user_tokens", "words"), [("last", True, WORDS), ("mean", True, 0), ("last", False, WORDS)]
)
def test_a_branch_is_the_prompt_that_ends_there(pooling, user_tokens, words):
    # Without user tokens, times, ratings and reviews are read on the prompt's item tokens alone.
    prompt = PromptConfig(
        history_items=SLOTS,
        title_tokens=words,
        user_tokens=user_tokens,
        interactions=not user_tokens,
        pooling=pooling,
    )
    model, rows, batch = model_of(prompt), np.arange(ITEMS, dtype=np.int32), history()
    items = dataclasses.replace(tables(), titles=tables().titles[:, :words])
    params = init(model, items, rows, batch)
    apply = jax.jit(model.apply, static_argnames="positions")
    together, *_ = apply({"params": params}, items, rows, batch, PROMPT, positions=SLOTS)
    for slot in (3, SLOTS - 1):
        # The history up to the slot, its padding before it, and ages that count from its newest slot.
        part = jax.tree.map(lambda x, n=slot + 1: x[:, :n], batch)
        part = part.replace(age=np.where(part.age >= 0, part.age - part.age[:, -1:], -1))
        alone, *_ = apply({"params": params}, items, rows, part, PROMPT, positions=1)
        there = batch.items[:, slot] >= 0
        np.testing.assert_allclose(alone[there, 0], together[there, slot], atol=2e-5)
    # The rating of one slot tells in its branch and in those after it.
    rated = batch.replace(ratings=np.where(np.arange(SLOTS) == 4, 7, batch.ratings))
    moved = np.abs(np.asarray(apply({"params": params}, items, rows, rated, PROMPT, positions=SLOTS)[0]) - together)
    assert moved[1, :4].max() == 0 and moved[1, 4:].max(axis=-1).min() > 1e-5


def test_padding_before_a_history_changes_nothing():
    model, rows, batch = model_of(PromptConfig(history_items=SLOTS)), np.arange(ITEMS, dtype=np.int32), history()
    items = dataclasses.replace(tables(), titles=tables().titles[:, :0])
    params = init(model, items, rows, batch)
    apply = jax.jit(model.apply, static_argnames="positions")
    padded, *_ = apply({"params": params}, items, rows, batch, PROMPT, positions=1)
    short = jax.tree.map(lambda x: x[:1, 2:], batch)
    np.testing.assert_allclose(
        apply({"params": params}, items, rows, short, PROMPT, positions=1)[0], padded[:1], atol=1e-5
    )


def test_an_item_that_training_never_saw_is_scored_by_its_content():
    model, rows = model_of(PromptConfig(history_items=SLOTS)), np.arange(ITEMS, dtype=np.int32)
    items = tables()
    params = init(model, items, rows, history())
    width, weight = model.tower_config.width, model.new_item_weight
    assert weight != 1

    def vectors(items: ItemTables, rows: np.ndarray) -> np.ndarray:
        return np.asarray(model.apply({"params": params}, items, rows, PROMPT, method="item_vectors"))

    found = vectors(items, rows)
    # Item 4 of the catalogue is in no training event: it is what an item of the same content from outside would be.
    outside = items.replace(trained=np.zeros(ITEMS, bool))
    np.testing.assert_allclose(found[4], vectors(outside, np.full(ITEMS, -1, np.int32))[4], atol=1e-6)
    known = vectors(items.replace(trained=np.ones(ITEMS, bool)), rows)
    np.testing.assert_allclose(found[4, width:], weight * known[4, width:], atol=1e-6)
    assert np.abs(found[4, :width] - known[4, :width]).max() > 1e-3
    others = rows != 4
    np.testing.assert_array_equal(found[others], known[others])


def test_neighbors_are_hidden_from_half_of_the_items_in_training_alone() -> None:
    rng = np.random.default_rng(1)
    count, config = 400, CandidatesConfig(width=8, free_dropout=0.0, sources=("fields", "neighbors"))
    shown = jax.tree.map(lambda x: np.repeat(x[:1], count, axis=0), tables()).replace(
        fields=rng.normal(size=(count, 5)).astype(np.float32), neighbors=rng.normal(size=(count, 5)).astype(np.float32)
    )
    hidden = shown.replace(neighbors=np.zeros_like(shown.neighbors))
    tower, rows = CandidateTower(config, count), np.arange(count)
    variables = tower.init(jax.random.key(0), shown, rows)
    seen, unseen = (np.asarray(tower.apply(variables, some, rows)) for some in (shown, hidden))
    made = np.asarray(tower.apply(variables, shown, rows, deterministic=False, rngs={"dropout": jax.random.key(1)}))
    is_seen, is_unseen = (np.isclose(made, some, atol=1e-6).all(axis=1) for some in (seen, unseen))
    assert (is_seen ^ is_unseen).all()
    assert 150 < is_unseen.sum() < 250
