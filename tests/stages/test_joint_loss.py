"""The joint stage's loss: micro-batches give its gradient, and a tied Qwen3 may stand in for the candidate tower."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nqf.config import (
    CandidatesConfig,
    Config,
    JointConfig,
    LossConfig,
    MiningConfig,
    PromptConfig,
    QFormerConfig,
    UserConfig,
)
from nqf.models.qwen3 import Qwen3Config
from nqf.models.rank_model import PromptIds, RankModel, ScoreHead
from nqf.pipelines.batches import HistoryBatch, ItemTables
from nqf.pipelines.histories import history_of_items
from nqf.stages.joint import make_joint_loss, reader_of
from nqf.stages.rank import RankParts, rank_module

ITEMS, QUERIES, WIDTH, SLOTS, WORDS, BATCH = 10, 2, 8, 3, 2, 5
QWEN3 = Qwen3Config(
    vocab_size=30,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
)
PROMPT = PromptIds(instruction=jnp.array([4, 5]), placeholder=jnp.array(29), end=jnp.array(28))
RNG = np.random.default_rng(0)
TITLES = RNG.integers(6, 20, (ITEMS, WORDS)).astype(np.int32)
TITLES[::3, 1:] = -1
TABLES = jax.tree.map(
    jnp.asarray,
    ItemTables(
        tokens=RNG.normal(size=(ITEMS, QUERIES, WIDTH)).astype(np.float32),
        vectors=RNG.normal(size=(ITEMS, WIDTH)).astype(np.float32),
        fields=RNG.normal(size=(ITEMS, 5)).astype(np.float32),
        neighbors=RNG.normal(size=(ITEMS, 5)).astype(np.float32),
        text=RNG.normal(size=(ITEMS, 6)).astype(np.float32),
        has_text=np.arange(ITEMS) != 3,
        trained=np.ones(ITEMS, bool),
        titles=TITLES,
    ),
)
ROWS = np.arange(ITEMS, dtype=np.int32)
SEQUENCES = RNG.integers(0, ITEMS, (BATCH, SLOTS + 1)).astype(np.int32)
SEQUENCES[1, :2] = SEQUENCES[4, :1] = -1
TARGETS = np.where(SEQUENCES[:, :-1] >= 0, SEQUENCES[:, 1:], -1)
PLACES = np.flatnonzero(TARGETS >= 0).astype(np.int32)


def config_of(candidates: str, micro_batch: int, width: int = 12) -> Config:
    prompt = PromptConfig(history_items=SLOTS, title_tokens=WORDS)
    return Config(
        candidates=CandidatesConfig(width=width, free_dropout=0.0),
        user=UserConfig(qformer=QFormerConfig(width=WIDTH, layers=1, heads=2, mlp_width=16, dropout=0.0)),
        joint=JointConfig(
            backbone=dataclasses.replace(JointConfig().backbone, dropout=0.0),
            prompt=prompt,
            candidates=candidates,
            micro_batch=micro_batch,
            loss=LossConfig(negatives="in-batch", duplicate_cosine=0.9),
            mining=MiningConfig(count=1),
        ),
    )


def model_of(config: Config) -> RankModel:
    return rank_module(config, TABLES, jnp.float32, reader_of(config.joint, QWEN3))


def loss_of(config: Config) -> Callable:
    return make_joint_loss(config, RankParts(module=model_of(config), tables=TABLES, max_history=SLOTS), None)


def inputs() -> tuple:
    return TABLES, ROWS, jax.tree.map(jnp.asarray, history_of_items(SEQUENCES[:, :-1], 0)), PROMPT


def params_of(model: RankModel) -> dict:
    return jax.jit(lambda: model.init(jax.random.key(0), *inputs(), positions=1))()["params"]


def test_micro_batches_give_the_gradient_of_the_batch() -> None:
    batch = HistoryBatch(
        history=inputs()[2], targets=TARGETS, supervised=PLACES, rows=ROWS, given=(TARGETS[..., None] + 3) % ITEMS
    )
    frozen = {
        "tables": None,
        "params": {},
        "prompt": PROMPT,
        "log_popularity": np.log(np.full(ITEMS, 0.1, np.float32)),
    }
    batch = batch.replace(tables=TABLES)
    params = {"params": params_of(model_of(config_of("qwen3", 0)))}

    def gradient(micro_batch: int) -> tuple:
        config = config_of("qwen3", micro_batch)
        loss = loss_of(config)
        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params, frozen, batch, jax.random.key(2))

    expected = gradient(0)
    for name in ("qwen3", "tower", "user_qformer", "head"):
        assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected[1]["params"][name])) > 1e-3, name
    # 2 does not divide the batch, nor do the six items that it allows the ten of the batch.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient(2), expected)


def test_a_tied_item_vector_is_of_the_item_alone() -> None:
    model = model_of(config_of("qwen3", 0, width=7))
    params = params_of(model)
    vectors = jax.jit(lambda tables, rows: model.apply({"params": params}, tables, rows, PROMPT, method="item_vectors"))
    together = np.asarray(vectors(TABLES, ROWS))
    # The projection brings the Qwen3's width to that of the scores; the frozen text stands beside it.
    assert together.shape == (ITEMS, 7 + TABLES.text.shape[1])
    some = np.array([8, 3, 3])
    np.testing.assert_allclose(vectors(TABLES.take(some), ROWS[some]), together[some], atol=1e-5)
    np.testing.assert_allclose(
        jax.jit(model.apply, static_argnames="positions")({"params": params}, *inputs(), positions=SLOTS)[1],
        together,
        atol=1e-5,
    )
    # Padding behind a title changes nothing, a word does, and so do the injected tokens.
    wider = TABLES.replace(titles=np.pad(TITLES, ((0, 0), (0, 2)), constant_values=-1))
    np.testing.assert_allclose(vectors(wider, ROWS), together, atol=1e-5)
    other = TABLES.replace(titles=np.where(TITLES >= 0, 21, -1))
    assert np.all(np.abs(vectors(other, ROWS) - together)[:, :7].max(axis=1) > 1e-3)
    other = TABLES.replace(tokens=TABLES.tokens + np.eye(ITEMS, dtype=np.float32)[0][:, None, None])
    changed = np.abs(vectors(other, ROWS) - together).max(axis=1)
    assert changed[0] > 1e-3 and np.all(changed[1:] < 1e-6)


def test_dropout_of_the_small_model_leaves_a_pretrained_base_alone() -> None:
    stage = JointConfig(backbone=dataclasses.replace(JointConfig().backbone, dropout=0.3))
    assert reader_of(stage, QWEN3).dropout == 0.3
    stage = dataclasses.replace(stage, backbone=dataclasses.replace(stage.backbone, path="Qwen/Qwen3-Embedding-0.6B"))
    assert reader_of(stage, QWEN3).dropout == 0.0


def test_frozen_candidates_are_scored_by_the_pooled_vector_itself() -> None:
    """No tower, no head where the widths are the same, and a projection alone where they are not."""
    config = config_of("tower", 0)
    frozen = dataclasses.replace(config.candidates, frozen=True, learn_temperature=False, temperature=0.07)
    model = model_of(dataclasses.replace(config, candidates=frozen))
    params = params_of(model)
    assert "tower" not in params and set(params["head"]) == {"project"} and "bias" not in params["head"]["project"]
    same = TABLES.replace(text=jnp.asarray(RNG.normal(size=(ITEMS, QWEN3.hidden_size)).astype(np.float32)))
    history = jax.tree.map(jnp.asarray, history_of_items(SEQUENCES[:, :-1], 0))
    variables = jax.jit(lambda: model.init(jax.random.key(0), same, ROWS, history, PROMPT, positions=1))()
    assert "head" not in variables["params"]

    @jax.jit
    def read(variables: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        users, items, _ = model.apply(variables, same, ROWS, history, PROMPT, positions=1)
        pooled, _ = model.apply(variables, same, jnp.zeros((ITEMS, 0)), history, PROMPT, 1, True, method="_pooled")
        return users, items, pooled

    users, items, pooled = read(variables)
    np.testing.assert_allclose(users, pooled / jnp.linalg.norm(pooled, axis=-1, keepdims=True) / 0.07, rtol=1e-4)
    np.testing.assert_allclose(items, same.text / jnp.linalg.norm(same.text, axis=-1, keepdims=True), rtol=1e-5)


def test_a_fixed_temperature_has_no_parameter() -> None:
    there = jnp.ones((2, 3), bool)
    inputs = jnp.ones((2, 3, 4)), jnp.ones((2, 3, 6)), there, jnp.ones((2, 3, 5)), there
    learned, fixed = (
        ScoreHead(config=CandidatesConfig(width=6, temperature=0.2, learn_temperature=learn)) for learn in (True, False)
    )
    params = dict(jax.jit(learned.init)(jax.random.key(0), *inputs)["params"])
    expected = jax.jit(learned.apply)({"params": params}, *inputs)
    assert float(params.pop("log_scale")) == pytest.approx(np.log(5))
    assert jax.tree.structure(jax.eval_shape(fixed.init, jax.random.key(0), *inputs)["params"]) == jax.tree.structure(
        params
    )
    np.testing.assert_allclose(jax.jit(fixed.apply)({"params": params}, *inputs), expected, rtol=1e-5)
