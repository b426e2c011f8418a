"""Attention against plain numpy, and the choice of its kernel."""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nqf.ops import attention
from nqf.ops.attention import choose_implementation, dot_product_attention


def reference(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Loops over batch, heads and queries, in float64."""
    batch, targets, heads, width = q.shape
    group = heads // k.shape[2]
    out = np.zeros((batch, targets, heads, width))
    for b, t, h in np.ndindex(batch, targets, heads):
        logits = k[b, :, h // group].astype(np.float64) @ q[b, t, h] / np.sqrt(width) + bias[b, h, t]
        weights = np.where(mask[b, h, t], np.exp(logits - logits.max()), 0)
        out[b, t, h] = weights / weights.sum() @ v[b, :, h // group]
    return out


@pytest.fixture
def qkv() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = ((2, 5, 6, 4), (2, 7, 3, 4), (2, 7, 3, 4))
    return tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)


@pytest.mark.parametrize("mask_shape", [(1, 1, 5, 7), (2, 1, 5, 7), (2, 6, 5, 7)])
def test_grouped_heads_mask_and_bias(qkv: tuple, mask_shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    mask = rng.random(mask_shape) < 0.5
    mask[..., 0] = True
    bias = rng.normal(size=(1, 6, 5, 7)).astype(np.float32)
    found = dot_product_attention(*qkv, mask=jnp.asarray(mask), bias=jnp.asarray(bias))
    full = np.broadcast_to(mask, (2, 6, 5, 7)), np.broadcast_to(bias, (2, 6, 5, 7))
    np.testing.assert_allclose(found, reference(*qkv, *full), atol=1e-5)


def test_causal(qkv: tuple) -> None:
    q, k, v = qkv[0], qkv[1][:, :5], qkv[2][:, :5]
    mask = np.broadcast_to(np.tril(np.ones((5, 5), bool)), (2, 6, 5, 5))
    found = dot_product_attention(q, k, v, is_causal=True)
    np.testing.assert_allclose(found, reference(q, k, v, mask, np.zeros(mask.shape)), atol=1e-5)
    explicit = dot_product_attention(q, k, v, mask=jnp.asarray(mask[:1, :1]))
    np.testing.assert_allclose(found, explicit, atol=1e-6)


def test_causal_after_keys_of_others(qkv: tuple) -> None:
    # The last of 5 queries stands at the last of 7 keys.
    mask = np.broadcast_to(np.tril(np.ones((5, 7), bool), 2), (2, 6, 5, 7))
    found = dot_product_attention(*qkv, is_causal=True)
    np.testing.assert_allclose(found, reference(*qkv, mask, np.zeros(mask.shape)), atol=1e-5)
    readable = np.ones((1, 1, 5, 7), bool)
    readable[..., 1] = False
    found = dot_product_attention(*qkv, is_causal=True, mask=jnp.asarray(readable))
    np.testing.assert_allclose(found, reference(*qkv, mask & readable, np.zeros(mask.shape)), atol=1e-5)
    with pytest.raises(ValueError, match="7 queries and 5 keys"):
        dot_product_attention(qkv[1], qkv[0], qkv[0], is_causal=True)


@pytest.mark.parametrize(("targets", "sources"), [(5, 7), (130, 130)])
def test_splash_is_the_same_attention(targets: int, sources: int) -> None:
    """The kernel for TPUs, interpreted; of two filled-up pieces and of one, with and without keys of others."""
    rng = np.random.default_rng(2)
    shapes = ((2, targets, 4, 128), (2, sources, 2, 128), (2, sources, 2, 128))
    qkv = tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)
    weights = rng.normal(size=shapes[0]).astype(np.float32)

    def gradients(attend: Any) -> Any:
        return jax.grad(lambda *qkv: jnp.sum(weights * attend(*qkv)), (0, 1, 2))(*qkv)

    splash = functools.partial(attention._splash, interpret=True)
    causal = functools.partial(dot_product_attention, is_causal=True)
    np.testing.assert_allclose(splash(*qkv), causal(*qkv), atol=1e-5)
    for found, wanted in zip(gradients(splash), gradients(causal), strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_type_is_kept(qkv: tuple) -> None:
    half = [jnp.asarray(x, jnp.bfloat16) for x in qkv]
    assert dot_product_attention(*half).dtype == jnp.bfloat16


class TestChoice:
    @pytest.fixture
    def on_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(attention.jax, "default_backend", lambda: "gpu")

    def choose(self, asked: str, dtype: object = jnp.bfloat16, head_dim: int = 128, with_bias: bool = False) -> str:
        return choose_implementation(asked, dtype=dtype, head_dim=head_dim, with_bias=with_bias)

    def test_cpu(self) -> None:
        assert self.choose("auto") == self.choose("xla") == "xla"
        with pytest.raises(ValueError, match="the backend is cpu"):
            self.choose("cudnn")

    @pytest.mark.usefixtures("on_gpu")
    def test_gpu(self) -> None:
        assert self.choose("auto") == self.choose("cudnn") == "cudnn"
        assert self.choose("xla") == "xla"

    @pytest.mark.usefixtures("on_gpu")
    def test_gpu_with_a_mask_only_if_asked_for(self) -> None:
        choice = {"dtype": jnp.bfloat16, "head_dim": 128, "with_bias": False, "with_mask": True}
        assert choose_implementation("auto", **choice) == "xla"
        assert choose_implementation("cudnn", **choice) == "cudnn"

    @pytest.mark.usefixtures("on_gpu")
    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"dtype": jnp.float32}, "float32"),
            ({"head_dim": 132}, "132"),
            ({"head_dim": 20}, "20"),
            ({"with_bias": True}, "bias"),
        ],
    )
    def test_gpu_where_cudnn_cannot(self, options: dict, reason: str) -> None:
        assert self.choose("auto", **options) == "xla"
        with pytest.raises(ValueError, match=reason):
            self.choose("cudnn", **options)

    def test_tpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(attention.jax, "default_backend", lambda: "tpu")
        choice = {"dtype": jnp.float32, "head_dim": 128, "with_bias": False}
        assert choose_implementation("auto", **choice, is_causal=True) == "splash"
        assert choose_implementation("xla", **choice, is_causal=True) == "xla"
        assert choose_implementation("auto", **choice) == "xla"
        assert choose_implementation("auto", **choice, with_mask=True, is_causal=True) == "xla"
        assert choose_implementation("auto", **choice | {"with_bias": True}, is_causal=True) == "xla"
        assert choose_implementation("auto", **choice | {"head_dim": 64}, is_causal=True) == "xla"
        with pytest.raises(ValueError, match="the backend is tpu"):
            choose_implementation("cudnn", **choice, is_causal=True)

    def test_a_program_for_other_devices_has_their_kernel(self) -> None:
        device = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
        mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh):
            assert choose_implementation("auto", dtype=jnp.float32, head_dim=128, with_bias=False, is_causal=True) == (
                "splash"
            )

    def test_logged_once(self, caplog: pytest.LogCaptureFixture) -> None:
        attention._choose.cache_clear()
        attention._announce.cache_clear()
        with caplog.at_level(logging.INFO, logger="nqf.ops.attention"):
            for head_dim in (64, 64, 128):
                self.choose("auto", head_dim=head_dim)
        assert [record.message for record in caplog.records] == [
            "attention kernel: xla (asked for auto): the backend is cpu, not a GPU"
        ]
