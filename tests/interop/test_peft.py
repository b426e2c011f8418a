"""LoRA against peft: forward, gradients, folders both ways, and what is refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from safetensors.numpy import load_file, save_file  # noqa: E402
from tiny_qwen3 import SIZES, random_model, save  # noqa: E402

from nqf.interop.huggingface import golden_difference, load_qwen3, text_inputs  # noqa: E402
from nqf.interop.peft import export_adapter, load_adapter, save_adapter  # noqa: E402
from nqf.interop.tokenizer import load_tokenizer, train_byte_bpe  # noqa: E402
from nqf.models.lora import merge_lora  # noqa: E402
from nqf.models.qwen3 import LORA_TARGETS, Qwen3  # noqa: E402

IDS = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (2, 6))


def adapted(base: Any, **options: Any) -> Any:
    """A peft model whose adapters are all random: B = 0 would hide A."""
    settings = {"r": 4, "lora_alpha": 10, "lora_dropout": 0.25, "target_modules": list(LORA_TARGETS)} | options
    model = peft.get_peft_model(base, peft.LoraConfig(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.2)
    return model


def hidden_of(model: Any) -> Any:
    inner = model.base_model.model
    return getattr(inner, "model", inner)(input_ids=torch.tensor(IDS)).last_hidden_state


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(random_model(causal_lm=False), tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def theirs() -> Any:
    return adapted(random_model(causal_lm=False))


@pytest.fixture(scope="module")
def ours(base: Path, theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Qwen3, Any, Any]:
    folder = tmp_path_factory.mktemp("adapter")
    theirs.save_pretrained(folder)
    model, params = load_qwen3(base)
    config, lora = load_adapter(folder, model.config)
    return Qwen3(config), params, lora


def test_adapter_of_peft(ours: Any, theirs: Any, base: Path) -> None:
    model, params, lora = ours
    config = model.config
    assert (config.lora_rank, config.lora_alpha, config.lora_dropout) == (4, 10.0, 0.25)
    assert config.lora_targets == LORA_TARGETS
    weight = theirs.base_model.model.layers[2].mlp.up_proj.lora_A["default"].weight.detach().numpy()
    np.testing.assert_array_equal(lora["layers"]["mlp"]["up_proj"]["lora_a"][2], weight.T)
    found = model.apply({"params": params, "lora": lora}, IDS)
    np.testing.assert_allclose(found, hidden_of(theirs).detach().numpy(), atol=1e-4)
    bare = load_qwen3(base)[0].apply({"params": params}, IDS)
    assert np.max(np.abs(found - bare)) > 0.1  # The adapters do something.


@pytest.mark.parametrize("remat", [False, True])
def test_gradients_of_every_adapter(ours: Any, theirs: Any, remat: bool) -> None:
    model, params, lora = ours
    model = Qwen3(dataclasses.replace(model.config, remat=remat))
    weight = np.random.default_rng(1).normal(size=SIZES["hidden_size"]).astype(np.float32)

    @jax.jit
    @jax.grad
    def gradient(lora: Any) -> jax.Array:
        return jnp.mean(model.apply({"params": params, "lora": lora}, IDS) @ weight)

    gradients = gradient(lora)
    theirs.zero_grad()
    (hidden_of(theirs) @ torch.tensor(weight)).mean().backward()
    compared = 0
    for layer, module in enumerate(theirs.base_model.model.layers):
        for block in ("self_attn", "mlp"):
            for name, found in gradients["layers"][block].items():
                projection = getattr(getattr(module, block), name)
                for ours_leaf, theirs_leaf in (("lora_a", projection.lora_A), ("lora_b", projection.lora_B)):
                    expected = theirs_leaf["default"].weight.grad.numpy().T
                    assert np.abs(expected).max() > 1e-3
                    np.testing.assert_allclose(found[ours_leaf][layer], expected, atol=1e-4)
                    compared += 1
    assert compared == 3 * 7 * 2


@pytest.mark.parametrize("causal_lm", [False, True], ids=["bare", "causal_lm"])
def test_peft_loads_our_adapter(causal_lm: bool, ours: Any, tmp_path: Path) -> None:
    model, params, lora = ours
    save_adapter(tmp_path, model.config, lora, base="base", causal_lm=causal_lm)
    again = peft.PeftModel.from_pretrained(random_model(causal_lm=causal_lm), tmp_path).eval()
    if not causal_lm:
        found = hidden_of(again).detach().numpy()
        np.testing.assert_allclose(found, model.apply({"params": params, "lora": lora}, IDS), atol=1e-4)
    state = {name: tensor for name, tensor in again.state_dict().items() if "lora_" in name}
    assert len(state) == 3 * 7 * 2
    written = load_file(tmp_path / "adapter_model.safetensors")
    for name, tensor in state.items():
        np.testing.assert_array_equal(tensor.numpy(), written[name.replace(".default", "")])
    config, reread = load_adapter(tmp_path, dataclasses.replace(model.config, lora_rank=0))
    assert config == model.config
    jax.tree.map(np.testing.assert_array_equal, reread, lora)


def test_some_targets_by_a_pattern_and_rank_stabilized(base: Path, tmp_path: Path) -> None:
    theirs = adapted(
        random_model(causal_lm=False), target_modules=r".*\.self_attn\.[qv]_proj", use_rslora=True, lora_alpha=6
    )
    theirs.save_pretrained(tmp_path)
    model, params = load_qwen3(base)
    config, lora = load_adapter(tmp_path, model.config)
    assert config.lora_targets == ("q_proj", "v_proj")
    assert config.lora_scale == pytest.approx(6 / 2.0)
    assert set(lora["layers"]) == {"self_attn"} and set(lora["layers"]["self_attn"]) == {"q_proj", "v_proj"}
    found = Qwen3(config).apply({"params": params, "lora": lora}, IDS)
    np.testing.assert_allclose(found, hidden_of(theirs).detach().numpy(), atol=1e-4)


def test_merge_equals_peft(ours: Any, theirs: Any) -> None:
    model, params, lora = ours
    merged = merge_lora(params, lora, scale=model.config.lora_scale)
    layer = theirs.base_model.model.layers[1].mlp.down_proj
    expected = layer.base_layer.weight + layer.get_delta_weight("default")
    found = merged["layers"]["mlp"]["down_proj"]["kernel"][1]
    np.testing.assert_allclose(found, expected.detach().numpy().T, atol=1e-5)
    plain = Qwen3(dataclasses.replace(model.config, lora_rank=0)).apply({"params": merged}, IDS)
    np.testing.assert_allclose(plain, model.apply({"params": params, "lora": lora}, IDS), atol=1e-4)


def test_export_with_golden_vectors(tmp_path: Path) -> None:
    texts = ["red lamp", "a long blue curtain"]
    tokenizer = train_byte_bpe(texts * 5, 280)
    original = random_model(causal_lm=False)
    original.resize_token_embeddings(300)
    model, params = load_qwen3(save(original, tmp_path / "base"))
    model = Qwen3(dataclasses.replace(model.config, lora_rank=2, lora_targets=("q_proj", "up_proj")))
    lora = model.init(jax.random.key(0), IDS)["lora"]
    lora = jax.tree.map(lambda leaf: 0.2 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), lora)
    variables = {"params": params, "lora": lora}
    inputs = text_inputs(tokenizer, texts)
    export_adapter(tmp_path / "out", model, variables, tokenizer, golden=inputs, base=str(tmp_path / "base"))

    # Ours, from the two folders alone.
    again, again_params = load_qwen3(tmp_path / "base")
    config, again_lora = load_adapter(tmp_path / "out", again.config)
    assert golden_difference(tmp_path / "out", Qwen3(config), {"params": again_params, "lora": again_lora}) < 1e-6
    assert load_tokenizer(tmp_path / "out").encode(texts) == tokenizer.encode(texts)
    # Theirs: `AutoPeftModel` finds the base by its name.
    theirs = peft.AutoPeftModelForFeatureExtraction.from_pretrained(tmp_path / "out").eval()
    golden = load_file(tmp_path / "out" / "golden.safetensors")
    ids, mask = torch.tensor(golden["input_ids"]).long(), torch.tensor(golden["attention_mask"])
    with torch.no_grad():
        hidden = theirs(input_ids=ids, attention_mask=mask).last_hidden_state
    last = hidden[torch.arange(2), mask.sum(1) - 1]
    np.testing.assert_allclose(torch.nn.functional.normalize(last, dim=-1).numpy(), golden["vectors"], atol=1e-4)


def test_injected_prompt_in_golden_file(ours: Any, theirs: Any, tmp_path: Path) -> None:
    model, params, lora = ours
    tokenizer = train_byte_bpe(["abc"], 270)
    embeds = np.random.default_rng(2).normal(size=(2, 5, SIZES["hidden_size"])).astype(np.float32)
    # Two branches, 2-3 and 4, over the trunk 0-1, as the joint stage's prompt.
    tree = np.tril(np.ones((5, 5), bool))
    tree[4, 2:4] = False
    inputs = {
        "inputs_embeds": embeds,
        "attention_mask": np.ones((2, 5), np.int32),
        "position_ids": np.broadcast_to(np.array([0, 1, 2, 3, 2], np.int32), (2, 5)),
        "mask": np.broadcast_to(tree, (2, 1, 5, 5)),
    }
    export_adapter(tmp_path, model, {"params": params, "lora": lora}, tokenizer, golden=inputs, base="base")
    assert golden_difference(tmp_path, model, {"params": params, "lora": lora}) < 1e-6
    # peft, from what the file holds; transformers' eager attention adds the mask to its logits.
    golden = load_file(tmp_path / "golden.safetensors")
    with torch.no_grad():
        hidden = theirs.base_model.model(
            inputs_embeds=torch.tensor(golden["inputs_embeds"]),
            attention_mask=torch.tensor(np.where(golden["mask"], 0.0, -np.inf).astype(np.float32)),
            position_ids=torch.tensor(golden["position_ids"]).long(),
        ).last_hidden_state
    vectors = torch.nn.functional.normalize(hidden[:, -1], dim=-1).numpy()
    np.testing.assert_allclose(vectors, golden["vectors"], atol=1e-4)
    zero = jax.tree.map(jnp.zeros_like, lora)
    assert golden_difference(tmp_path, model, {"params": params, "lora": zero}) > 0.01


def test_a_model_without_adapters_is_not_exported(base: Path, tmp_path: Path) -> None:
    model, params = load_qwen3(base)
    with pytest.raises(ValueError, match="no adapters"):
        export_adapter(tmp_path, model, {"params": params}, train_byte_bpe([], 270), golden={}, base="base")


class TestRefused:
    @pytest.fixture
    def folder(self, theirs: Any, tmp_path: Path) -> Path:
        theirs.save_pretrained(tmp_path)
        return tmp_path

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"peft_type": "IA3"}, "'IA3', not 'LORA'"),
            ({"use_dora": True}, "use_dora"),
            ({"bias": "all"}, "bias 'all'"),
            ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
            ({"modules_to_save": ["norm"]}, "modules_to_save"),
        ],
    )
    def test_other_adapters(self, change: dict[str, Any], message: str, folder: Path, ours: Any) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(ValueError, match=message):
            load_adapter(folder, ours[0].config)

    def test_all_mismatches_in_one_message(self, folder: Path, ours: Any) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        start = "base_model.model.layers."
        del tensors[f"{start}0.mlp.up_proj.lora_A.weight"]
        tensors[f"{start}1.self_attn.q_proj.lora_B.weight"] = np.zeros((5, 4), np.float32)
        tensors[f"{start}9.self_attn.q_proj.lora_B.weight"] = np.zeros((48, 4), np.float32)
        save_file(tensors, path)
        with pytest.raises(ValueError) as error:
            load_adapter(folder, ours[0].config)
        message = str(error.value)
        assert "3 tensors" in message
        assert f"missing {start}0.mlp.up_proj.lora_A.weight (4, 32)" in message
        assert f"surplus {start}9.self_attn.q_proj.lora_B.weight" in message
        assert f"{start}1.self_attn.q_proj.lora_B.weight has shape (5, 4), expected (48, 4)" in message

    def test_resized_embeddings_only_on_request(self, folder: Path, ours: Any) -> None:
        path = folder / "adapter_model.safetensors"
        save_file(load_file(path) | {"base_model.model.embed_tokens.weight": np.zeros((99, 32), np.float32)}, path)
        with pytest.raises(ValueError, match=r"surplus base_model\.model\.embed_tokens\.weight"):
            load_adapter(folder, ours[0].config)
        lora = load_adapter(folder, ours[0].config, ignore_embeddings=True)[1]
        jax.tree.map(np.testing.assert_array_equal, lora, ours[2])

    def test_adapter_of_another_model(self, folder: Path, ours: Any) -> None:
        path = folder / "adapter_model.safetensors"
        save_file({"base_model.model.h.0.attn.c_attn.lora_A.weight": np.zeros((4, 32), np.float32)}, path)
        with pytest.raises(ValueError, match="no adapter of a Qwen3 projection"):
            load_adapter(folder, ours[0].config)

    def test_no_adapter(self, tmp_path: Path, ours: Any) -> None:
        with pytest.raises(ValueError, match=r"adapter_config\.json: not readable"):
            load_adapter(tmp_path, ours[0].config)
