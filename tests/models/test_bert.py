"""BERT against transformers, both ways, and its settings from folders of sentence-transformers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
import transformers  # noqa: E402

from nqf.interop.bert import bert_table, load_bert  # noqa: E402
from nqf.interop.tensors import disassemble  # noqa: E402
from nqf.models.bert import Bert, BertConfig  # noqa: E402

pytestmark = pytest.mark.slow
SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 16,
    "type_vocab_size": 2,
}


def original(kind=transformers.BertModel):
    model = kind(transformers.BertConfig(**SIZES)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


@pytest.fixture(scope="module")
def inputs():
    ids = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (3, 9)).astype(np.int32)
    return ids, (np.arange(9)[None] < np.array([[9], [5], [1]])).astype(np.int32)


def run(model, ids, mask):
    with torch.no_grad():
        return model(torch.tensor(ids).long(), attention_mask=torch.tensor(mask)).last_hidden_state.numpy()


def test_equals_transformers_from_its_folder(inputs, tmp_path) -> None:
    model = original()
    model.save_pretrained(tmp_path)
    module, params = load_bert(tmp_path)
    output = module.apply({"params": params}, *inputs)
    valid = inputs[1].astype(bool)
    np.testing.assert_allclose(output[valid], run(model, *inputs)[valid], atol=1e-5)
    assert np.abs(run(model, inputs[0], np.ones_like(inputs[1]))[1] - output[1]).max() > 1e-2, "the mask did nothing"


def test_embeddings_alone_equal_transformers(inputs) -> None:
    model = original()
    with torch.no_grad():
        expected = model.embeddings(torch.tensor(inputs[0]).long()).numpy()
    config = BertConfig(**{**SIZES, "num_hidden_layers": 0})
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    table = bert_table(config)
    params = {}
    for name, path in table.items():
        params.setdefault(path[0], {})[path[1]] = state[name]
    np.testing.assert_allclose(Bert(config=config).apply({"params": params}, *inputs), expected, atol=1e-5)


def test_transformers_equals_it_from_our_weights(inputs) -> None:
    config = BertConfig(**SIZES)
    params = Bert(config=config).init(jax.random.key(0), *inputs)["params"]
    params = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), params)
    model = transformers.BertModel(transformers.BertConfig(**SIZES), add_pooling_layer=False).eval()
    state = disassemble(bert_table(config), params)
    model.load_state_dict({name: torch.tensor(array) for name, array in state.items()}, strict=True)
    valid = inputs[1].astype(bool)
    output = Bert(config=config).apply({"params": params}, *inputs)
    np.testing.assert_allclose(run(model, *inputs)[valid], output[valid], atol=1e-5)


def test_folders_with_a_head_load(inputs, tmp_path) -> None:
    model = original(transformers.BertForMaskedLM)
    model.save_pretrained(tmp_path)
    module, params = load_bert(tmp_path)
    valid = inputs[1].astype(bool)
    expected = run(model.bert, *inputs)[valid]
    np.testing.assert_allclose(module.apply({"params": params}, *inputs)[valid], expected, atol=1e-5)


def test_bfloat16_folders_are_read_to_the_wanted_type(inputs, tmp_path) -> None:
    model = original().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    _, params = load_bert(tmp_path)
    expected = model.embeddings.word_embeddings.weight.detach().float().numpy()
    np.testing.assert_array_equal(params["word_embeddings"]["embedding"], expected)
    _, half = load_bert(tmp_path, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}


def test_many_shards_equal_one(inputs, tmp_path) -> None:
    model = original()
    for folder, size in (("one", "1GB"), ("many", "20KB")):
        model.save_pretrained(tmp_path / folder, max_shard_size=size)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    (_, one), (_, many) = load_bert(tmp_path / "one"), load_bert(tmp_path / "many")
    jax.tree.map(np.testing.assert_array_equal, one, many)


def test_all_mismatches_are_named_at_once(tmp_path) -> None:
    original().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"num_hidden_layers": 4, "intermediate_size": 47}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError) as error:
        load_bert(tmp_path)
    assert "missing encoder.layer.3.attention.self.query.weight" in str(error.value)
    assert "encoder.layer.0.intermediate.dense.weight has shape (48, 32), expected (47, 32)" in str(error.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "roberta"}, "model_type is 'roberta'"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps"),
        ({"position_embedding_type": "relative_key"}, "relative_key"),
    ],
)
def test_other_models_are_refused(change, reason) -> None:
    with pytest.raises(ValueError, match=reason):
        BertConfig.from_hf({"model_type": "bert", "hidden_act": "gelu", **SIZES, **change})
