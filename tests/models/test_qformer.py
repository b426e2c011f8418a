"""The Q-Former against transformers' Blip2QFormerModel, both ways, and what its masks mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nqf.config import QFormerConfig
from nqf.interop.tensors import assemble, disassemble
from nqf.interop.unirec import qformer_table
from nqf.models.qformer import Attention, QFormer

# Cross-attention in layers 0 and 2 only; the states are narrower than the queries.
CONFIG = QFormerConfig(width=32, layers=3, heads=4, mlp_width=48, queries=5, cross_every=2, dropout=0.3)
STATES, STATE_WIDTH, BATCH = 7, 20, 3


# One query reads the states by maps put on its own side, five by keys and values.
@pytest.fixture(scope="module", params=[5, 1])
def inputs(request):
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(BATCH, request.param, CONFIG.width)).astype(np.float32)
    states = rng.normal(size=(BATCH, STATES, STATE_WIDTH)).astype(np.float32)
    mask = np.arange(STATES)[None] < np.array([[7], [4], [1]])
    return queries, states, mask


@pytest.fixture(scope="module")
def params(inputs):
    params = jax.jit(QFormer(config=CONFIG).init)(jax.random.key(0), *inputs[:2])["params"]
    # Biases start at zero and norms at one; random ones make sure that none is forgotten or swapped.
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return tree.unflatten([x + 0.3 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)])


def blip2():
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    model = transformers.Blip2QFormerModel(
        transformers.Blip2QFormerConfig(
            hidden_size=CONFIG.width,
            num_hidden_layers=CONFIG.layers,
            num_attention_heads=CONFIG.heads,
            intermediate_size=CONFIG.mlp_width,
            cross_attention_frequency=CONFIG.cross_every,
            encoder_hidden_size=STATE_WIDTH,
        )
    )
    return torch, model.eval()


def run_blip2(torch, model, queries, states, mask):
    with torch.no_grad():
        output = model(
            query_embeds=torch.tensor(queries),
            encoder_hidden_states=torch.tensor(states),
            encoder_attention_mask=torch.tensor(mask).long(),
        )
    return output.last_hidden_state.numpy()


@pytest.mark.slow
def test_equals_blip2_from_its_weights(inputs) -> None:
    torch, model = blip2()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    abstract = jax.eval_shape(QFormer(config=CONFIG).init, jax.random.key(0), *inputs[:2])["params"]
    shapes = {name: array.shape for name, array in state.items()}
    loaded = assemble(qformer_table(CONFIG, blip2=True), abstract, shapes, state.get, where="model")
    output = QFormer(config=CONFIG).apply({"params": loaded}, *inputs)
    np.testing.assert_allclose(output, run_blip2(torch, model, *inputs), atol=1e-5)
    unmasked = run_blip2(torch, model, *inputs[:2], np.ones_like(inputs[2]))
    assert np.abs(unmasked[1] - output[1]).max() > 1e-2, "the mask did nothing, so its parity shows nothing"


@pytest.mark.slow
def test_blip2_equals_it_from_our_weights(inputs, params) -> None:
    torch, model = blip2()
    state = disassemble(qformer_table(CONFIG, blip2=True), params)
    model.load_state_dict({name: torch.tensor(array) for name, array in state.items()}, strict=True)
    output = QFormer(config=CONFIG).apply({"params": params}, *inputs)
    np.testing.assert_allclose(run_blip2(torch, model, *inputs), output, atol=1e-5)


def test_masked_states_do_not_matter(inputs, params) -> None:
    queries, states, mask = inputs
    apply = jax.jit(QFormer(config=CONFIG).apply)
    output = apply({"params": params}, queries, states, mask)
    garbage = np.where(mask[..., None], states, 1e4).astype(np.float32)
    np.testing.assert_array_equal(apply({"params": params}, queries, garbage, mask), output)
    assert np.abs(apply({"params": params}, queries, garbage) - output).max() > 1e-2


def test_query_that_may_read_nothing_gets_nothing(inputs, params) -> None:
    queries, states, _ = inputs
    nothing = np.zeros((BATCH, STATES), bool)
    output = QFormer(config=CONFIG).apply({"params": params}, queries, states, nothing)
    # As if every value vector of the cross-attention were zero.
    silent = {
        layer: {**leaves, "value": jax.tree.map(jnp.zeros_like, leaves["value"])}
        if layer.endswith("crossattention")
        else leaves
        for layer, leaves in params.items()
    }
    np.testing.assert_allclose(output, QFormer(config=CONFIG).apply({"params": silent}, queries, states), atol=1e-6)
    assert np.isfinite(
        jax.grad(lambda s: QFormer(config=CONFIG).apply({"params": params}, queries, s, nothing).sum())(states)
    ).all()


def test_cross_mask_and_query_mask_separate_the_queries(inputs, params) -> None:
    queries, states, _ = inputs
    alone = np.eye(queries.shape[1], dtype=bool)[None, None]
    # Query q reads state q only, and no other query.
    cross = np.eye(queries.shape[1], STATES, dtype=bool)[None, None]
    module = QFormer(config=CONFIG)
    gradient = jax.jacobian(
        lambda s: module.apply({"params": params}, queries, s, query_mask=alone, cross_mask=cross)[0].sum(-1)
    )(jnp.asarray(states))[:, 0]
    seen = np.abs(gradient).sum(-1) > 0
    np.testing.assert_array_equal(seen, cross[0, 0])


def test_cross_bias_of_minus_infinity_is_a_mask(inputs, params) -> None:
    queries, states, mask = inputs
    bias = np.where(mask, 0, -1e9).astype(np.float32)[:, None, None, :]
    bias = np.broadcast_to(bias, (BATCH, CONFIG.heads, queries.shape[1], STATES))
    module = QFormer(config=CONFIG)
    np.testing.assert_allclose(
        module.apply({"params": params}, queries, states, cross_bias=bias),
        module.apply({"params": params}, queries, states, mask),
        atol=1e-6,
    )


def test_one_set_of_queries_serves_the_batch_and_dropout_only_acts_in_training(inputs, params) -> None:
    queries, states, mask = inputs
    module = QFormer(config=CONFIG)
    shared = module.apply({"params": params}, queries[:1], states, mask)
    repeated = module.apply({"params": params}, np.repeat(queries[:1], BATCH, 0), states, mask)
    np.testing.assert_array_equal(shared, repeated)
    rngs = {"dropout": jax.random.key(0)}
    trained = module.apply({"params": params}, queries[:1], states, mask, deterministic=False, rngs=rngs)
    assert np.abs(trained - shared).max() > 1e-2


def test_maps_on_the_side_of_the_queries_compute_the_same(inputs, params, monkeypatch) -> None:
    queries, states, mask = inputs
    rngs = {"dropout": jax.random.key(0)}

    def loss(params, states):
        # A fresh trace each time: the choice is made while tracing.
        output, kept = QFormer(config=CONFIG).apply(
            {"params": params}, queries, states, mask, deterministic=False, rngs=rngs, mutable="intermediates"
        )
        return jnp.sum(jnp.square(output)), (output, kept)

    found = {}
    for absorbs in (False, True):
        monkeypatch.setattr(Attention, "_absorbs", lambda self, queries, states, absorbs=absorbs: absorbs)
        found[absorbs] = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, states)
    # Three post-norm layers take the last digits of float32 logits to the fifth place of a gradient, of its largest; a
    # sum that nearly cancels has no digits of its own. Key biases have no gradient at all.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * max(1.0, np.abs(a).max()), rtol=0),
        found[False],
        found[True],
    )


def test_bfloat16_stays_near_float32(inputs, params) -> None:
    full = QFormer(config=CONFIG).apply({"params": params}, *inputs)
    half = QFormer(config=CONFIG, dtype=jnp.bfloat16).apply({"params": params}, *inputs)
    assert half.dtype == jnp.bfloat16
    # 8 bits of mantissa, three post-norm layers: a few percent of outputs of size one.
    assert 0 < np.abs(half.astype(np.float32) - full).max() < 0.2
