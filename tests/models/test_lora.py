"""Adapters: neutral at the start, trained alone, float32 beside a bfloat16 base, dropout on their input, merge.

They are compared with peft in tests/interop/test_peft.py.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nqf.models.lora import LoRADense, merge_lora
from nqf.models.qwen3 import LORA_TARGETS, Qwen3, Qwen3Config

BASE = Qwen3Config(
    vocab_size=61,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
)
IDS = np.random.default_rng(0).integers(0, 61, (2, 6))


def init(config: Qwen3Config) -> Any:
    return jax.jit(lambda key: Qwen3(config).init(key, IDS))(jax.random.key(0))


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


# Heads as wide as the quick start's, and as every published model's.
@pytest.mark.parametrize(("dtype", "head_dim"), [(jnp.float32, 16), (jnp.bfloat16, 128)])
def test_bit_equal_to_the_base_at_the_start(dtype: Any, head_dim: int) -> None:
    base = dataclasses.replace(BASE, head_dim=head_dim, dtype=dtype, param_dtype=dtype)
    adapted = dataclasses.replace(base, lora_rank=4, lora_dropout=0.5)
    variables = init(adapted)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["params"])} == {jnp.dtype(dtype)}
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["lora"])} == {jnp.dtype("float32")}
    plain = Qwen3(base).apply({"params": variables["params"]}, IDS)
    assert plain.dtype == dtype
    assert bits(Qwen3(adapted).apply(variables, IDS)) == bits(plain)
    # And in training mode: what dropout leaves of the input is multiplied by B = 0.
    rngs = {"dropout": jax.random.key(1)}
    assert bits(Qwen3(adapted).apply(variables, IDS, deterministic=False, rngs=rngs)) == bits(plain)
    # The base's tree is the same with and without adapters.
    bare = jax.eval_shape(lambda: init(base))
    assert set(bare) == {"params"}
    assert jax.tree.structure(bare["params"]) == jax.tree.structure(variables["params"])


def test_start_of_a_and_b() -> None:
    projection = init(dataclasses.replace(BASE, hidden_size=256, lora_rank=32))["lora"]["layers"]["self_attn"]["q_proj"]
    assert projection["lora_a"].shape == (2, 256, 32) and projection["lora_b"].shape == (2, 32, 24)
    np.testing.assert_array_equal(projection["lora_b"], 0.0)
    # Uniform within 1 / sqrt(in), as peft: the standard deviation is the bound over sqrt(3).
    assert np.max(np.abs(projection["lora_a"])) <= 1 / 16
    assert np.std(projection["lora_a"]) == pytest.approx(1 / 16 / np.sqrt(3), rel=0.03)
    assert np.max(np.abs(projection["lora_a"][0] - projection["lora_a"][1])) > 0.01


def test_targets() -> None:
    config = dataclasses.replace(BASE, lora_rank=2, lora_targets=("v_proj", "down_proj"))
    layers = jax.eval_shape(lambda: init(config))["lora"]["layers"]
    assert {block: set(tree) for block, tree in layers.items()} == {"self_attn": {"v_proj"}, "mlp": {"down_proj"}}
    layers = jax.eval_shape(lambda: init(dataclasses.replace(BASE, lora_rank=2)))["lora"]["layers"]
    assert {name for tree in layers.values() for name in tree} == set(LORA_TARGETS)


def test_only_adapters_learn() -> None:
    config = dataclasses.replace(
        BASE, lora_rank=4, lora_dropout=0.1, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, remat=True
    )
    model = Qwen3(config)
    variables = init(config)
    frozen, lora = variables["params"], variables["lora"]
    before_base, before_lora = bits(frozen), jax.tree.map(np.array, lora)
    target = jax.random.normal(jax.random.key(1), (2, 6, 16))
    optimizer = optax.adam(3e-2)
    state = optimizer.init(lora)

    @jax.jit
    def step(lora: Any, state: Any, frozen: Any, key: jax.Array) -> tuple[Any, Any, jax.Array]:
        def loss(lora: Any) -> jax.Array:
            hidden = model.apply({"params": frozen, "lora": lora}, IDS, deterministic=False, rngs={"dropout": key})
            return jnp.mean(jnp.square(hidden.astype(jnp.float32) - target))

        value, gradient = jax.value_and_grad(loss)(lora)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(lora, updates), state, value

    losses = []
    for index in range(20):
        lora, state, value = step(lora, state, frozen, jax.random.fold_in(jax.random.key(2), index))
        losses.append(float(value))
    assert losses[-1] < 0.8 * losses[0]
    assert bits(frozen) == before_base
    moved = jax.tree.map(lambda old, new: float(np.max(np.abs(old - new), initial=0.0)), before_lora, lora)
    assert min(jax.tree.leaves(moved)) > 1e-3  # Every adapter of every projection.
    assert {leaf.dtype for leaf in jax.tree.leaves((lora, state[0].mu))} == {jnp.dtype("float32")}


def test_update_scale_and_merge() -> None:
    rng = np.random.default_rng(0)
    x, kernel, a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 5), (5, 7), (5, 2), (2, 7)))
    dense = LoRADense(features=7, rank=2, scale=1.5)
    variables = {"params": {"kernel": kernel}, "lora": {"lora_a": a, "lora_b": b}}
    expected = x @ (kernel + 1.5 * a @ b)
    np.testing.assert_allclose(dense.apply(variables, x), expected, atol=1e-5)
    merged = merge_lora({"block": variables["params"]}, {"block": variables["lora"]}, scale=1.5)
    np.testing.assert_allclose(LoRADense(features=7).apply({"params": merged["block"]}, x), expected, atol=1e-5)


def test_dropout_is_on_the_adapters_input_alone() -> None:
    x = np.ones((2000, 4), np.float32)
    variables = {
        "params": {"kernel": np.full((4, 1), 100.0, np.float32)},
        "lora": {"lora_a": np.eye(4, dtype=np.float32), "lora_b": np.ones((4, 1), np.float32)},
    }
    dense = LoRADense(features=1, rank=4, dropout=0.25)
    found = np.asarray(dense.apply(variables, x, False, rngs={"dropout": jax.random.key(0)}))[:, 0] - 400
    # Kept inputs are scaled by 4/3; none of the base's is lost.
    assert set(np.round(found * 0.75).astype(int)) == {0, 1, 2, 3, 4}
    assert found.mean() == pytest.approx(4.0, rel=0.02)
    np.testing.assert_array_equal(dense.apply(variables, x), 404.0)


def test_merge_is_in_float32_and_leaves_the_rest_alone() -> None:
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(2, 8, 6)), jnp.bfloat16)
    a, b = (jnp.asarray(rng.normal(size=shape) * 0.01, jnp.float32) for shape in ((2, 8, 3), (2, 3, 6)))
    other = jnp.ones(3, jnp.bfloat16)
    merged = merge_lora(
        {"layers": {"q": {"kernel": kernel}}, "norm": {"scale": other}},
        {"layers": {"q": {"lora_a": a, "lora_b": b}}},
        scale=2.0,
    )
    found = merged["layers"]["q"]["kernel"]
    assert found.dtype == jnp.float32 and merged["norm"]["scale"] is other
    exact = np.asarray(kernel, np.float64) + 2.0 * np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    np.testing.assert_allclose(found, exact, atol=1e-6)
    # The updates are below what bfloat16 could hold beside these kernels: they would have been lost.
    assert np.any(np.asarray(found.astype(jnp.bfloat16)) == np.asarray(kernel))


def test_merge_of_an_adapter_without_a_kernel() -> None:
    with pytest.raises(ValueError, match="adapter for layers/q"):
        merge_lora({}, {"layers": {"q": {"lora_a": jnp.ones((1, 1)), "lora_b": jnp.ones((1, 1))}}}, scale=1.0)
