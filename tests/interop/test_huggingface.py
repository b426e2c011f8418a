"""Qwen3 against transformers' own, module by module and whole, and its folders both ways."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import transformers  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402
from sentence_transformers import SentenceTransformer  # noqa: E402
from tiny_qwen3 import SIZES, random_model, save  # noqa: E402
from transformers.models.qwen3 import modeling_qwen3  # noqa: E402

from nqf import embed  # noqa: E402
from nqf.interop.encoders import load_text_embedder  # noqa: E402
from nqf.interop.huggingface import (  # noqa: E402
    check_embedding,
    export_merged,
    golden_difference,
    list_tensors,
    load_qwen3,
    pooled_vectors,
    save_qwen3,
    text_inputs,
    write_sentence_config,
)
from nqf.interop.tokenizer import load_tokenizer, train_byte_bpe  # noqa: E402
from nqf.interop.unirec.embeddings import read_candidate_embeddings  # noqa: E402
from nqf.models.lora import LoRADense  # noqa: E402
from nqf.models.qwen3 import MLP, Attention, DecoderLayer, Qwen3, RMSNorm  # noqa: E402
from nqf.ops.rope import apply_rope, rope_tables  # noqa: E402

TEXTS = ["red lamp", "a long blue curtain for the kitchen", "cup", "two of them, with 3 handles"]


@pytest.fixture(scope="module")
def original() -> Any:
    return random_model()


@pytest.fixture(scope="module")
def folder(original: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(original, tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[Qwen3, Any]:
    return load_qwen3(folder)


@pytest.fixture(scope="module")
def inputs() -> tuple[np.ndarray, np.ndarray]:
    """Ids and masks [4, 7]: no padding, left, right, and a single token."""
    ids = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (4, 7))
    mask = np.ones((4, 7), np.int32)
    mask[1, :3], mask[2, 4:], mask[3, 1:] = 0, 0, 0
    return ids, mask


def torch_hidden(model: Any, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    with torch.no_grad():
        output = getattr(model, "model", model)(
            input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), position_ids=torch.tensor(positions)
        )
    return output.last_hidden_state.numpy()


def close(ours: Any, theirs: Any, tolerance: float) -> None:
    theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.std(theirs) > 0.05  # Two constants would agree whatever made them.
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=tolerance)


class TestModules:
    """Each module, fed with the same input as the original's module of the same name."""

    layer = 1

    @pytest.fixture
    def x(self) -> np.ndarray:
        return np.random.default_rng(1).normal(size=(2, 5, SIZES["hidden_size"])).astype(np.float32)

    @pytest.fixture
    def theirs(self, original: Any) -> Any:
        return original.model.layers[self.layer]

    @pytest.fixture
    def ours(self, loaded: tuple[Qwen3, Any]) -> Any:
        return jax.tree.map(lambda leaf: leaf[self.layer], loaded[1]["layers"])

    @pytest.fixture
    def rotation(self, original: Any) -> tuple[Any, Any, Any, Any]:
        positions = np.broadcast_to(np.arange(5) + 2, (2, 5))
        cos, sin = original.model.rotary_emb(torch.zeros(1), torch.tensor(positions))
        return (cos, sin, *rope_tables(jnp.asarray(positions), SIZES["head_dim"], 5000.0))

    @pytest.mark.parametrize("name", ["input_layernorm", "post_attention_layernorm", "q_norm", "k_norm"])
    def test_norms(self, name: str, x: np.ndarray, theirs: Any, ours: Any, loaded: Any) -> None:
        in_attention = name in ("q_norm", "k_norm")
        module = getattr(theirs.self_attn if in_attention else theirs, name)
        params = (ours["self_attn"] if in_attention else ours)[name]
        assert module.weight.shape == params["scale"].shape and np.std(params["scale"]) > 0.1
        x = 3 * x[..., : module.weight.shape[0]]
        close(RMSNorm(loaded[0].config).apply({"params": params}, x), module(torch.tensor(x)), 1e-5)

    @pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    def test_projections(self, name: str, theirs: Any, ours: Any) -> None:
        block = "self_attn" if name[0] in "qkvo" else "mlp"
        module = getattr(getattr(theirs, block), name)
        x = np.random.default_rng(2).normal(size=(3, module.in_features)).astype(np.float32)
        dense = LoRADense(features=module.out_features)
        close(dense.apply({"params": ours[block][name]}, x), module(torch.tensor(x)), 1e-5)

    def test_rotation(self, rotation: tuple[Any, Any, Any, Any]) -> None:
        cos, sin, our_cos, our_sin = rotation
        close(our_cos, cos[..., : SIZES["head_dim"] // 2], 1e-5)
        close(our_sin, sin[..., : SIZES["head_dim"] // 2], 1e-5)
        q, k = (np.random.default_rng(i).normal(size=(2, 5, h, 12)).astype(np.float32) for i, h in ((0, 4), (1, 2)))
        their_q, their_k = modeling_qwen3.apply_rotary_pos_emb(
            torch.tensor(q), torch.tensor(k), cos, sin, unsqueeze_dim=2
        )
        close(apply_rope(q, our_cos, our_sin), their_q, 1e-5)
        close(apply_rope(k, our_cos, our_sin), their_k, 1e-5)

    def test_mlp(self, x: np.ndarray, theirs: Any, ours: Any, loaded: Any) -> None:
        close(MLP(loaded[0].config).apply({"params": ours["mlp"]}, x, True), theirs.mlp(torch.tensor(x)), 1e-5)

    @pytest.mark.parametrize("whole", [False, True], ids=["attention", "layer"])
    def test_attention_and_layer(
        self, whole: bool, x: np.ndarray, theirs: Any, ours: Any, loaded: Any, rotation: Any
    ) -> None:
        cos, sin, our_cos, our_sin = rotation
        causal = np.tril(np.ones((5, 5), bool))[None, None]
        options = {
            "position_embeddings": (cos, sin),
            "attention_mask": torch.tensor(np.where(causal, 0.0, -np.inf).astype(np.float32)),
        }
        arguments = x, causal, our_cos, our_sin, None, True
        if whole:
            found, kept = DecoderLayer(loaded[0].config).apply({"params": ours}, *arguments, False)
            assert kept is None
            close(found, theirs(torch.tensor(x), **options), 1e-4)
        else:
            found, _ = Attention(loaded[0].config).apply({"params": ours["self_attn"]}, *arguments)
            close(found, theirs.self_attn(torch.tensor(x), **options)[0], 1e-5)


def test_whole_model_and_logits(original: Any, loaded: Any, inputs: Any) -> None:
    ids, mask = inputs
    model, params = loaded
    ours = model.apply({"params": params}, ids, mask)
    theirs = torch_hidden(original, ids, mask)
    close(ours[mask == 1], theirs[mask == 1], 1e-4)
    logits = model.apply({"params": params}, ours[:1], method="logits")
    close(logits, original(input_ids=torch.tensor(ids[:1])).logits, 1e-4)


def test_base_gradients_agree(original: Any, loaded: Any, inputs: Any) -> None:
    ids, _mask = inputs
    model, params = loaded
    weight = np.random.default_rng(3).normal(size=SIZES["hidden_size"]).astype(np.float32)
    gradients = jax.jit(jax.grad(lambda p: jnp.sum(model.apply({"params": p}, ids[:1]) @ weight)))(params)
    original.zero_grad()
    (original.model(input_ids=torch.tensor(ids[:1])).last_hidden_state @ torch.tensor(weight)).sum().backward()
    for layer, theirs in enumerate(original.model.layers):
        attention = gradients["layers"]["self_attn"]
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            theirs_grad = getattr(theirs.self_attn, name).weight.grad.numpy().T
            scale = np.abs(theirs_grad).max()
            np.testing.assert_allclose(attention[name]["kernel"][layer] / scale, theirs_grad / scale, atol=1e-4)
    original.zero_grad()


@pytest.mark.parametrize("causal_lm", [True, False], ids=["causal_lm", "bare"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_names_with_and_without_prefix_tied_and_untied(
    causal_lm: bool, tied: bool, inputs: Any, tmp_path: Path
) -> None:
    original = random_model(causal_lm=causal_lm, tied=tied, seed=4)
    save(original, tmp_path / "theirs")
    names = list_tensors(sorted((tmp_path / "theirs").glob("*.safetensors")))
    assert ("model.norm.weight" in names) == causal_lm
    model, params = load_qwen3(tmp_path / "theirs")
    assert ("lm_head" in params) == (causal_lm and not tied)
    ids, mask = inputs
    close(model.apply({"params": params}, ids)[:2], torch_hidden(original, ids, np.ones_like(mask))[:2], 1e-4)
    # And back.
    save_qwen3(tmp_path / "ours", model.config, params)
    kind = transformers.AutoModelForCausalLM if causal_lm else transformers.AutoModel
    again, report = kind.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    for name, tensor in original.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert again.config.rope_parameters["rope_theta"] == 5000.0
    assert again.config.tie_word_embeddings == tied and again.config.head_dim == 12


def test_many_shards_both_ways(original: Any, loaded: Any, inputs: Any, tmp_path: Path) -> None:
    save(original, tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 2
    params = load_qwen3(tmp_path / "theirs")[1]
    jax.tree.map(np.testing.assert_array_equal, params, loaded[1])
    save_qwen3(tmp_path / "ours", loaded[0].config, loaded[1], shard_bytes=20_000)
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 2
    again, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for name, tensor in original.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_an_absent_shard_is_named(original: Any, tmp_path: Path) -> None:
    save(original, tmp_path, max_shard_size="20KB")
    gone = sorted(tmp_path.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ValueError, match=gone.name):
        load_qwen3(tmp_path)


def test_bfloat16_file_and_bfloat16_model(original: Any, inputs: Any, tmp_path: Path) -> None:
    half = random_model().to(torch.bfloat16)
    save(half, tmp_path)
    assert {tensor.dtype for tensor in list_tensors([tmp_path / "model.safetensors"]).values()} == {
        np.dtype(ml_dtypes.bfloat16)
    }
    ids, mask = inputs
    # Widened to float32, the numbers are those of the file, so the float32 original of them agrees.
    model, params = load_qwen3(tmp_path, dtype=jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    # Read again: `half.float()` would keep rotary frequencies that were rounded to bfloat16.
    widened = transformers.AutoModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    exact = torch_hidden(widened, ids, mask)
    close(model.apply({"params": params}, ids, mask)[mask == 1], exact[mask == 1], 1e-4)
    # In bfloat16 the type stays, and vectors point where the exact ones do.
    model, params = load_qwen3(tmp_path, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    rough = model.apply({"params": params}, ids, mask)
    assert rough.dtype == jnp.bfloat16
    a, b = np.asarray(rough, np.float32)[mask == 1], exact[mask == 1]
    assert np.min(np.sum(a * b, -1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)) > 0.995
    save_qwen3(tmp_path / "again", model.config, params)
    for name, array in load_file(tmp_path / "model.safetensors").items():
        assert np.array_equal(load_file(tmp_path / "again" / "model.safetensors")[name], array), name


def test_sharding_is_the_callers_choice(folder: Path, loaded: Any) -> None:
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    asked = {}

    def choose(path: tuple[str, ...], shape: tuple[int, ...]) -> jax.sharding.Sharding:
        asked[path] = shape
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    params = load_qwen3(folder, sharding=choose)[1]
    assert asked["layers", "mlp", "up_proj", "kernel"] == (3, 32, 48)
    assert all(isinstance(leaf.sharding, jax.sharding.NamedSharding) for leaf in jax.tree.leaves(params))
    jax.tree.map(np.testing.assert_array_equal, params, loaded[1])


def test_each_device_reads_its_part(folder: Path) -> None:
    code = """
import sys, jax, numpy as np, nqf
from jax.sharding import AxisType, NamedSharding, PartitionSpec
mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
# Every axis of stacked kernels and of the embedding is split by turns.
specs = {2: [("a", "b"), (None, "a")], 3: [(None, "a", "b"), (None, None, "b"), (None, ("a", "b"), None)]}
whole = nqf.load_qwen3(sys.argv[1])[1]
for turn in range(6):
    def choose(path, shape):
        spec = specs.get(len(shape), [()])[turn % len(specs.get(len(shape), [()]))]
        fits = all(size % (4 if isinstance(axis, tuple) else 2) == 0 for size, axis in zip(shape, spec) if axis)
        return NamedSharding(mesh, PartitionSpec(*spec) if fits else PartitionSpec())
    parts = nqf.load_qwen3(sys.argv[1], sharding=choose)[1]
    jax.tree.map(np.testing.assert_array_equal, parts, whole)
    shards = parts["layers"]["mlp"]["up_proj"]["kernel"].addressable_shards
    assert len(shards) == 4 and shards[0].data.size < whole["layers"]["mlp"]["up_proj"]["kernel"].size
"""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr


class TestConfig:
    def tree(self, folder: Path) -> dict[str, Any]:
        return json.loads((folder / "config.json").read_text())

    def test_older_and_newer_form(self, folder: Path, tmp_path: Path, loaded: Any) -> None:
        tree = self.tree(folder)
        assert tree["rope_parameters"]["rope_theta"] == 5000.0 and "rope_theta" not in tree
        older = {key: value for key, value in tree.items() if key != "rope_parameters"} | {
            "rope_theta": 5000.0,
            "rope_scaling": None,
        }
        shutil.copytree(folder, tmp_path / "older")
        (tmp_path / "older" / "config.json").write_text(json.dumps(older))
        assert load_qwen3(tmp_path / "older")[0].config == loaded[0].config
        assert loaded[0].config.rope_theta == 5000.0

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"model_type": "llama"}, "'llama', not 'qwen3'"),
            ({"attention_bias": True}, "attention_bias"),
            ({"use_sliding_window": True}, "use_sliding_window"),
            ({"hidden_act": "gelu"}, "gelu"),
            ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}}, "yarn"),
            ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "linear"),
        ],
    )
    def test_what_is_not_implemented_is_refused(
        self, change: dict[str, Any], message: str, folder: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "config.json").write_text(json.dumps(self.tree(folder) | change))
        with pytest.raises(ValueError, match=message):
            load_qwen3(tmp_path)

    def test_missing_keys_are_all_named(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"model_type": "qwen3", "vocab_size": 8}')
        with pytest.raises(ValueError, match=r"config\.json.*'hidden_size'.*'num_hidden_layers'"):
            load_qwen3(tmp_path)


class TestDamage:
    def test_all_mismatches_in_one_message(self, folder: Path, tmp_path: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(48, np.float32)
        tensors["model.layers.7.mlp.up_proj.weight"] = np.zeros((48, 32), np.float32)
        tensors["model.layers.2.self_attn.k_proj.weight"] = np.zeros((32, 24), np.float32)
        shutil.copy(folder / "config.json", tmp_path)
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(ValueError) as error:
            load_qwen3(tmp_path)
        message = str(error.value)
        assert "5 tensors" in message
        assert "missing model.layers.1.mlp.up_proj.weight (48, 32)" in message
        assert "missing model.norm.weight (32,)" in message
        assert "surplus model.layers.0.self_attn.q_proj.bias (48,)" in message
        assert "surplus model.layers.7.mlp.up_proj.weight (48, 32)" in message
        assert "model.layers.2.self_attn.k_proj.weight has shape (32, 24), expected (24, 32)" in message

    def test_untied_model_without_its_projection(self, tmp_path: Path) -> None:
        save(random_model(tied=False), tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        del tensors["lm_head.weight"]
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=r"missing lm_head\.weight"):
            load_qwen3(tmp_path)

    @pytest.mark.parametrize("keep", [0, 4, 100, -4])
    def test_cut_file(self, keep: int, folder: Path, tmp_path: Path) -> None:
        shutil.copy(folder / "config.json", tmp_path)
        (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:keep])
        with pytest.raises(ValueError, match=r"model\.safetensors: not readable"):
            load_qwen3(tmp_path)

    def test_integer_weights_are_refused(self, folder: Path, tmp_path: Path) -> None:
        shutil.copy(folder / "config.json", tmp_path)
        save_file({"model.norm.weight": np.zeros(32, np.int8)}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=r"model\.norm\.weight is of type I8"):
            load_qwen3(tmp_path)

    def test_no_weights(self, folder: Path, tmp_path: Path) -> None:
        shutil.copy(folder / "config.json", tmp_path)
        with pytest.raises(ValueError, match=r"no model\.safetensors and no pytorch_model\.bin"):
            load_qwen3(tmp_path)
        (tmp_path / "pytorch_model.bin").write_bytes(b"no zip file")
        with pytest.raises(ValueError, match=r"pytorch_model\.bin: not in torch's zip format"):
            load_qwen3(tmp_path)


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with weights and a tokenizer."""
    folder = tmp_path_factory.mktemp("embedder")
    tokenizer = train_byte_bpe(TEXTS * 3, 290)
    sizes = SIZES | {"vocab_size": 300}
    config = transformers.Qwen3Config(**sizes, tie_word_embeddings=True)
    torch.manual_seed(5)
    model = transformers.Qwen3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.3)
    save(model, folder)
    tokenizer.save(folder)
    write_sentence_config(folder, sizes["hidden_size"])
    return folder


def test_merged_export_loads_with_transformers(embedder: Path, tmp_path: Path) -> None:
    model, params = load_qwen3(embedder)
    tokenizer = load_tokenizer(embedder)
    model = Qwen3(dataclasses.replace(model.config, lora_rank=4, lora_alpha=6.0))
    lora = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["lora"]
    lora = jax.tree.map(lambda leaf: 0.3 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), lora)
    variables = {"params": params, "lora": lora}
    golden = text_inputs(tokenizer, TEXTS)
    export_merged(tmp_path, model, variables, tokenizer, golden=golden)

    unmerged = pooled_vectors(model, variables, golden)
    assert np.max(np.abs(unmerged - pooled_vectors(*load_qwen3(embedder)[:1], {"params": params}, golden))) > 0.05
    # Ours again.
    again, again_params = load_qwen3(tmp_path)
    assert golden_difference(tmp_path, again, {"params": again_params}) < 1e-5
    np.testing.assert_allclose(pooled_vectors(again, {"params": again_params}, golden), unmerged, atol=1e-4)
    # And transformers, with its own tokenizer, last token and unit norm, as the sentence files ask.
    theirs, their_tokenizer = transformers.AutoModel.from_pretrained(tmp_path).eval(), None
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, padding_side="left")
    batch = their_tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        hidden = theirs(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=positions
        ).last_hidden_state[:, -1]
    vectors = torch.nn.functional.normalize(hidden, dim=-1).numpy()
    np.testing.assert_allclose(vectors, load_file(tmp_path / "golden.safetensors")["vectors"], atol=1e-4)
    modules = json.loads((tmp_path / "modules.json").read_text())
    assert [entry["type"].rsplit(".", 1)[-1] for entry in modules] == ["Transformer", "Pooling", "Normalize"]
    pooling = json.loads((tmp_path / modules[1]["path"] / "config.json").read_text())
    assert [key for key, value in pooling.items() if value is True] == ["pooling_mode_lasttoken", "include_prompt"]
    assert theirs.config.eos_token_id == tokenizer.eos_id == their_tokenizer.eos_token_id
    # And the library that those files are for.
    sentences = SentenceTransformer(str(tmp_path), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(sentences, load_file(tmp_path / "golden.safetensors")["vectors"], atol=1e-4)


@pytest.mark.parametrize("instruction", ["", "Find what fits"])
def test_text_embedder_equals_the_transformers_loop(embedder: Path, instruction: str) -> None:
    found = load_text_embedder(embedder, dtype=jnp.float32, instruction=instruction).embed(TEXTS)
    theirs = transformers.AutoModel.from_pretrained(embedder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(embedder)
    prompt = f"Instruct: {instruction}\nQuery:" if instruction else ""
    for text, vector in zip(TEXTS, found, strict=True):
        ids = tokenizer(prompt + text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            last = theirs(input_ids=ids).last_hidden_state[0, -1]
        np.testing.assert_allclose(vector, torch.nn.functional.normalize(last, dim=0).numpy(), atol=1e-4)
    short = load_text_embedder(embedder, dtype=jnp.float32, instruction=instruction, dimensions=8).embed(TEXTS)
    expected = found[:, :8] / np.linalg.norm(found[:, :8], axis=1, keepdims=True)
    np.testing.assert_allclose(short, expected, atol=1e-5)


def test_embed_writes_the_references_candidate_embeddings(embedder: Path, tmp_path: Path) -> None:
    items = {"B1": {"title": "red lamp", "brand": "Sun"}, "A2": "cup"}
    (tmp_path / "items.json").write_text(json.dumps(items))
    arguments = ["--model", embedder, "--input", tmp_path / "items.json", "--output", tmp_path / "vectors.json"]
    embed.main([str(argument) for argument in arguments])
    ids, vectors = read_candidate_embeddings(tmp_path / "vectors.json")
    assert ids == ["B1", "A2"]
    expected = load_text_embedder(embedder).embed(["red lamp\nbrand: Sun", "cup"])
    np.testing.assert_array_equal(vectors, expected)


def test_golden_vectors_notice_another_model(embedder: Path, tmp_path: Path) -> None:
    model, params = load_qwen3(embedder)
    tokenizer = load_tokenizer(embedder)
    export_merged(tmp_path, model, {"params": params}, tokenizer, golden=text_inputs(tokenizer, TEXTS))
    kernel = params["layers"]["mlp"]["up_proj"]["kernel"]
    changed = jax.tree.map(lambda leaf: leaf[::-1] if leaf is kernel else leaf, params)
    assert golden_difference(tmp_path, model, {"params": changed}) > 0.01


class TestSelfTest:
    def parts(self, embedder: Path) -> tuple[Qwen3, Any, Any]:
        return (*load_qwen3(embedder), load_tokenizer(embedder))

    def test_passes_on_a_good_folder(self, embedder: Path) -> None:
        check_embedding(embedder, *self.parts(embedder))
        model, params = load_qwen3(embedder, dtype=jnp.bfloat16)
        check_embedding(embedder, model, params, load_tokenizer(embedder))

    def test_refuses_another_pooling(self, embedder: Path, tmp_path: Path) -> None:
        (tmp_path / "1_Pooling").mkdir()
        (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
        with pytest.raises(ValueError, match="mean_tokens"):
            check_embedding(tmp_path, *self.parts(embedder))

    def test_the_default_precision_of_a_cpu_is_near_float32(self, embedder: Path) -> None:
        default, exact = (load_text_embedder(embedder, dtype=dtype).embed(TEXTS) for dtype in (None, jnp.float32))
        assert 0.999 < np.sum(default * exact, axis=1).min() and np.any(default != exact)

    def test_refuses_a_doubled_end_token(self, embedder: Path) -> None:
        model, params, tokenizer = self.parts(embedder)
        plain = tokenizer.encode
        tokenizer.encode = lambda texts, **options: [[*ids, tokenizer.eos_id] for ids in plain(texts, **options)]
        with pytest.raises(ValueError, match="exactly one end token"):
            check_embedding(embedder, model, params, tokenizer)

    def test_refuses_a_model_that_reads_padding(self, embedder: Path) -> None:
        model, params, tokenizer = self.parts(embedder)

        class Blind(Qwen3):
            def __call__(self, input_ids: Any, attention_mask: Any) -> Any:
                return super().__call__(input_ids)

        with pytest.raises(ValueError, match="padding on the left"):
            check_embedding(embedder, Blind(model.config), params, tokenizer)

    def test_refuses_a_vocabulary_that_does_not_fit(self, embedder: Path, loaded: Any) -> None:
        with pytest.raises(ValueError, match=r"tokens, the embedding 97 rows"):
            check_embedding(embedder, *loaded, load_tokenizer(embedder))

    def test_refuses_equal_vectors(self, embedder: Path) -> None:
        model, params, tokenizer = self.parts(embedder)
        same = jax.tree.map(jnp.zeros_like, params["layers"])
        with pytest.raises(ValueError, match="same vector"):
            check_embedding(embedder, model, params | {"layers": same}, tokenizer)
