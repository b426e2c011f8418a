"""Qwen3's behavior: sizes, order, padding, explicit masks, injected vectors, dropout and recomputation.

Its numbers are compared with transformers' in tests/interop/test_huggingface.py.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nqf.models.qwen3 import Qwen3, Qwen3Config
from nqf.ops.pooling import last_token_pool

SMALL = Qwen3Config(
    vocab_size=61,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
)
IDS = np.random.default_rng(0).integers(0, 61, (2, 6))


@pytest.fixture(scope="module")
def params() -> Any:
    params = jax.jit(lambda key: Qwen3(SMALL).init(key, IDS))(jax.random.key(0))["params"]
    # At the start's 0.02 a tiny model barely mixes tokens; larger weights make every test below see more.
    return jax.tree.map(lambda leaf: leaf * 10 if leaf.ndim > 2 else leaf, params)


def apply(params: Any, *args: Any, config: Qwen3Config = SMALL, **options: Any) -> jax.Array:
    return Qwen3(config).apply({"params": params}, *args, **options)


class TestSizes:
    """By abstract evaluation: nothing of these sizes is ever computed."""

    # Parameters, of the weights published on the hub; tied models count the embedding once.
    @pytest.mark.parametrize(
        ("name", "count"),
        [
            ("qwen3_0_6b", 596_049_920),
            ("qwen3_1_7b", 1_720_574_976),
            ("qwen3_4b", 4_022_468_096),
            ("qwen3_8b", 8_190_735_360),
            ("qwen3_14b", 14_768_307_200),
            ("qwen3_32b", 32_762_123_264),
            ("qwen3_embedding_0_6b", 596_049_920 - (151_936 - 151_669) * 1024),
            ("qwen3_embedding_4b", 4_022_468_096 - (151_936 - 151_665) * 2560),
            # With the output projection, which its files leave out.
            ("qwen3_embedding_8b", 8_190_735_360 - 2 * (151_936 - 151_665) * 4096),
        ],
    )
    def test_published(self, name: str, count: int) -> None:
        config = getattr(Qwen3Config, name)(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, lora_rank=16, remat=True)
        model, ids = Qwen3(config), jax.ShapeDtypeStruct((2, 8), jnp.int32)
        shapes = jax.eval_shape(lambda ids: model.init(jax.random.key(0), ids, method="init_all"), ids)
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == count
        assert {leaf.dtype for leaf in jax.tree.leaves(shapes["params"])} == {jnp.dtype("bfloat16")}
        assert {leaf.dtype for leaf in jax.tree.leaves(shapes["lora"])} == {jnp.dtype("float32")}
        lora_a = shapes["lora"]["layers"]["mlp"]["down_proj"]["lora_a"]
        assert lora_a.shape == (config.num_hidden_layers, config.intermediate_size, 16)
        hidden = jax.eval_shape(model.apply, shapes, ids, ids)
        assert hidden.shape == (2, 8, config.hidden_size) and hidden.dtype == jnp.bfloat16
        logits = jax.eval_shape(lambda v, h: model.apply(v, h, method="logits"), shapes, hidden)
        assert logits.shape == (2, 8, config.vocab_size) and logits.dtype == jnp.float32

    def test_options_replace_published_values(self) -> None:
        config = Qwen3Config.qwen3_embedding_0_6b(vocab_size=12, num_hidden_layers=2)
        assert (config.vocab_size, config.num_hidden_layers, config.hidden_size) == (12, 2, 1024)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"num_key_value_heads": 3}, "3 does not divide num_attention_heads 4"),
            ({"head_dim": 7}, "7 is odd"),
            ({"lora_targets": ("q_proj", "query")}, "query: not among q_proj"),
        ],
    )
    def test_impossible_configurations(self, change: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(SMALL, **change)


def test_start() -> None:
    model = Qwen3(dataclasses.replace(SMALL, hidden_size=128, tie_word_embeddings=False))
    params = jax.jit(lambda key: model.init(key, IDS, method="init_all"))(jax.random.key(1))["params"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if path[-1].key == "scale":
            np.testing.assert_array_equal(leaf, 1.0)
        else:
            assert np.std(leaf) == pytest.approx(0.02, rel=0.1) and abs(np.mean(leaf)) < 2e-3, path
    kernel = params["layers"]["self_attn"]["q_proj"]["kernel"]
    assert np.max(np.abs(kernel[0] - kernel[1])) > 0.01  # Each layer draws its own numbers.


def test_causality_by_gradient(params: Any) -> None:
    embeds = np.random.default_rng(1).normal(size=(1, 6, 16)).astype(np.float32)

    @jax.jit
    @jax.jacrev
    def jacobian(embeds: jax.Array) -> jax.Array:
        return jnp.sum(apply(params, inputs_embeds=embeds)[0] * jnp.arange(1.0, 17.0)[None], axis=-1)

    # [output position, input position]
    influence = np.abs(np.asarray(jacobian(embeds)))[:, 0].max(-1)
    assert np.all(influence[np.triu_indices(6, 1)] == 0.0)
    assert np.all(influence[np.tril_indices(6)] > 1e-6)


@pytest.mark.parametrize("side", ["left", "right", "both", "holes"])
def test_padding_changes_no_vector(params: Any, side: str) -> None:
    ids = IDS[:1, :4]
    exact = apply(params, ids)[0]
    at = {
        "left": [3, 4, 5, 6],
        "right": [0, 1, 2, 3],
        "both": [2, 3, 4, 5],
        "holes": [1, 2, 5, 6],
    }[side]
    padded, mask = np.full((1, 7), 9), np.zeros((1, 7), np.int32)
    padded[0, at], mask[0, at] = ids[0], 1
    found = apply(params, padded, mask)
    assert np.all(np.isfinite(found))
    np.testing.assert_allclose(found[0, at], exact, atol=1e-5)
    np.testing.assert_allclose(last_token_pool(found, jnp.asarray(mask))[0], exact[-1], atol=1e-5)
    # A bool mask means the same.
    np.testing.assert_array_equal(apply(params, padded, mask.astype(bool)), found)
    # And without a mask padding on the left is read: the test above can fail.
    if side == "left":
        assert np.max(np.abs(apply(params, padded)[0, at] - exact)) > 1e-2


def test_vectors_in_place_of_ids(params: Any) -> None:
    embeds = apply(params, IDS, method="embed")
    np.testing.assert_array_equal(embeds, params["embed_tokens"]["embedding"][IDS])
    np.testing.assert_array_equal(apply(params, inputs_embeds=embeds), apply(params, IDS))
    for options in ({}, {"input_ids": IDS, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            apply(params, **options)


def test_explicit_mask_replaces_order_and_padding(params: Any) -> None:
    causal = np.tril(np.ones((6, 6), bool))[None, None]
    np.testing.assert_allclose(apply(params, IDS, mask=causal), apply(params, IDS), atol=1e-5)
    # Two branches over one trunk are two sequences: trunk 0-2, branch 3-4, branch 5.
    tree = np.tril(np.ones((6, 6), bool))
    tree[5, 3:5] = False
    positions = np.array([[0, 1, 2, 3, 4, 3]])
    # The padding mask is not looked at.
    options = {"mask": tree[None, None], "position_ids": positions}
    found = apply(params, IDS[:1], np.zeros((1, 6)), **options)
    np.testing.assert_allclose(found[0, :5], apply(params, IDS[:1, :5])[0], atol=1e-5)
    np.testing.assert_allclose(found[0, 5], apply(params, IDS[:1, [0, 1, 2, 5]])[0, 3], atol=1e-5)


@pytest.mark.parametrize("remat", [False, True])
def test_a_shared_prefix_stands_before_every_sequence(params: Any, remat: bool) -> None:
    ids = np.concatenate([np.repeat(IDS[:1, :2], 2, axis=0), IDS[:, 2:]], axis=1)
    config = dataclasses.replace(SMALL, remat=remat)

    def whole(params: Any) -> jax.Array:
        return apply(params, ids)

    def shared(params: Any) -> jax.Array:
        model = Qwen3(config)
        embeds = model.apply({"params": params}, ids, method=Qwen3.embed)
        first, prefix = model.apply({"params": params}, embeds[:1, :2], method=Qwen3.read_prefix)
        mask = np.tril(np.ones((6, 6), bool))[None, None, 2:]
        rest = model.apply(
            {"params": params},
            inputs_embeds=embeds[:, 2:],
            prefix=prefix,
            mask=mask,
            position_ids=2 + np.arange(4)[None],
        )
        return jnp.concatenate([jnp.repeat(first, 2, axis=0), rest], axis=1)

    np.testing.assert_allclose(jax.jit(shared)(params), jax.jit(whole)(params), atol=1e-5)
    # Every sequence's gradient reaches what the prefix was made with.
    weights = np.random.default_rng(1).normal(size=(2, 6, 16))
    wanted = jax.jit(jax.grad(lambda params: jnp.sum(whole(params) * weights)))(params)
    found = jax.jit(jax.grad(lambda params: jnp.sum(shared(params) * weights)))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), found, wanted)
    with pytest.raises(ValueError, match="after a prefix"):
        apply(params, ids, prefix=(np.zeros((3, 1, 2, 2, 6)),) * 2)


@pytest.mark.parametrize(
    ("remat", "with_mask", "read_at"),
    [(False, False, [[1], [4]]), (False, True, [[0, 3, 5]]), (True, True, [[1], [4]]), (True, False, [[5]])],
)
def test_states_of_some_tokens_are_those_of_all(remat: bool, with_mask: bool, read_at: list) -> None:
    config = dataclasses.replace(SMALL, remat=remat, lora_rank=2)
    model, read_at = Qwen3(config), np.array(read_at)
    variables = jax.jit(lambda key: model.init(key, IDS))(jax.random.key(0))
    leaves, tree = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    # Adapters start at zero and hardly any layer mixes tokens then.
    variables = tree.unflatten([x + 0.3 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)])
    weights = np.random.default_rng(1).normal(size=(2, read_at.shape[1], 16))
    options = {"mask": np.tril(np.ones((6, 6), bool))[None, None]} if with_mask else {}

    def value(variables: Any, some: bool) -> tuple[jax.Array, jax.Array]:
        if some:
            hidden = model.apply(variables, IDS, read_at=read_at, **options)
        else:
            hidden = jnp.take_along_axis(model.apply(variables, IDS, **options), read_at[..., None], axis=1)
        return jnp.sum(hidden * weights), hidden

    wanted, found = (
        jax.jit(jax.value_and_grad(value, has_aux=True), static_argnums=1)(variables, some) for some in (False, True)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1.0, np.abs(a).max())), wanted, found
    )


def test_the_last_layer_is_computed_for_the_wanted_tokens_alone() -> None:
    model = Qwen3(dataclasses.replace(SMALL, num_hidden_layers=1))
    variables = jax.eval_shape(model.init, jax.random.key(0), IDS)

    def flops(**options: Any) -> float:
        compiled = jax.jit(lambda variables: model.apply(variables, IDS, **options)).lower(variables).compile()
        return compiled.cost_analysis()["flops"]

    # Keys and values of all six tokens, and the rest of the only layer for one.
    assert flops(read_at=np.array([[5]])) < 0.5 * flops()


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_dropout_also_acts_where_some_tokens_are_read(params: Any, rate: float) -> None:
    config = dataclasses.replace(SMALL, residual_dropout=rate)

    def drawn(seed: int, **options: Any) -> jax.Array:
        rngs = {"dropout": jax.random.key(seed)}
        return apply(params, IDS, config=config, read_at=np.array([[5]]), rngs=rngs, **options)

    exact = drawn(0)
    np.testing.assert_array_equal(drawn(1), exact)
    assert np.array_equal(drawn(1, deterministic=False), exact) == (rate == 0)
    np.testing.assert_array_equal(drawn(1, deterministic=False), drawn(1, deterministic=False))


def test_positions_count_valid_tokens(params: Any) -> None:
    mask = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    positions = np.array([[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 3, 3]])
    np.testing.assert_array_equal(apply(params, IDS, mask, position_ids=positions), apply(params, IDS, mask))
    stretched = apply(params, IDS, mask, position_ids=positions * 2)
    assert np.max(np.abs(stretched - apply(params, IDS, mask))[mask == 1]) > 1e-3


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_recomputation_changes_nothing(params: Any, dropout: float) -> None:
    plain = dataclasses.replace(SMALL, residual_dropout=dropout)
    again = dataclasses.replace(plain, remat=True)
    assert plain != again

    def loss(config: Qwen3Config) -> Any:
        def value(params: Any) -> jax.Array:
            rngs = {"dropout": jax.random.key(3)}
            hidden = apply(params, IDS, config=config, deterministic=False, rngs=rngs)
            return jnp.sum(hidden * jnp.arange(1.0, 17.0)[None, None])

        return jax.value_and_grad(value)

    value, gradient = jax.jit(loss(plain))(params)
    value_again, gradient_again = jax.jit(loss(again))(params)
    np.testing.assert_allclose(value, value_again, rtol=1e-6)
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(gradient_again), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * float(jnp.max(jnp.abs(one))))
    # It does recompute: the layers' products stand in the backward pass a second time.
    products = [str(jax.make_jaxpr(loss(config))(params)).count("dot_general") for config in (plain, again)]
    assert products[1] > products[0]


def test_residual_dropout_only_in_training(params: Any) -> None:
    config = dataclasses.replace(SMALL, residual_dropout=0.5)
    exact = apply(params, IDS)
    np.testing.assert_array_equal(apply(params, IDS, config=config), exact)

    def drawn(seed: int) -> jax.Array:
        return apply(params, IDS, config=config, deterministic=False, rngs={"dropout": jax.random.key(seed)})

    np.testing.assert_array_equal(drawn(0), drawn(0))
    assert np.max(np.abs(drawn(0) - drawn(1))) > 1e-2 and np.max(np.abs(drawn(0) - exact)) > 1e-2


def test_layers_run_in_order(params: Any) -> None:
    flipped = params | {"layers": jax.tree.map(lambda leaf: leaf[::-1], params["layers"])}
    assert np.max(np.abs(apply(flipped, IDS) - apply(params, IDS))) > 1e-2


def test_tied_logits_are_products_with_the_embedding(params: Any) -> None:
    hidden = apply(params, IDS)
    logits = apply(params, hidden, method="logits")
    np.testing.assert_allclose(logits, hidden @ params["embed_tokens"]["embedding"].T, atol=1e-5)


def test_bfloat16_is_near_float32(params: Any) -> None:
    half = dataclasses.replace(SMALL, dtype=jnp.bfloat16)
    found, exact = np.asarray(apply(params, IDS, config=half), np.float32), np.asarray(apply(params, IDS))
    norms = np.linalg.norm(found, axis=-1) * np.linalg.norm(exact, axis=-1)
    assert 0.995 < np.min(np.sum(found * exact, -1) / norms) < 1.0
