"""LoRA against peft: forward, gradients, folders both ways, every key of `adapter_config.json`, and what is refused."""

import copy
import dataclasses
import json
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from hypothesis import HealthCheck, event, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402
from tiny_qwen3 import SIZES, random_model, save  # noqa: E402

from nqf.interop.huggingface import golden_difference, load_qwen3, text_inputs  # noqa: E402
from nqf.interop.peft import _NEUTRAL, _READ, _REFUSED, export_adapter, load_adapter, save_adapter  # noqa: E402
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


def edit(folder: Path, change: dict[str, Any]) -> Path:
    """Changes keys of the configuration; None stays null."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return folder


def read_by_peft(folder: Path, *, causal_lm: bool = False) -> np.ndarray:
    """Hidden states of the base of these tests with an adapter, as peft reads it."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # peft's on what it ignores; that is what the comparison shows.
        model = peft.PeftModel.from_pretrained(random_model(causal_lm=causal_lm), folder).eval()
        return hidden_of(model).numpy()


@pytest.fixture(scope="module")
def plain(base: Path) -> tuple[Qwen3, Any, Any]:
    model, params = load_qwen3(base)
    return model, params, jax.jit(lambda params: model.apply({"params": params}, IDS))


def read_by_us(folder: Path, plain: Any) -> np.ndarray:
    """The same by nqf; adapters are merged, so that nothing is compiled for each of them."""
    model, params, apply = plain
    config, lora = load_adapter(folder, model.config)
    return np.asarray(apply(merge_lora(params, lora, scale=config.lora_scale)))


def test_every_key_of_peft_is_known() -> None:
    """A new peft adds a key: it has to be put into one of the tables, after reading what it does."""
    tables = [*_READ, *_NEUTRAL, *_REFUSED]
    assert len(set(tables)) == len(tables)
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} <= set(tables)
    docs = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    assert [key for key in tables if f"`{key}`" not in docs] == []


class TestEqualToPeft:
    """Every key that is read, and every one that changes nothing."""

    @pytest.mark.parametrize(
        "options",
        [
            {"target_modules": r"layers\.(1|2)\.self_attn\.(q_proj|v_proj)"},
            {"exclude_modules": ["layers.0.mlp.up_proj", "k_proj"]},
            {"exclude_modules": r".*\.(0|2)\..*"},
            {"layers_to_transform": [0, 2], "layers_pattern": "layers"},
            {"layers_to_transform": 1, "layers_pattern": ["h", "layers"]},
            {"rank_pattern": {"v_proj": 2, r"layers\.0\.mlp.*": 7}},
            {"rank_pattern": {"q_proj": 4}},
            {"alpha_pattern": {"^layers.0.self_attn.v_proj": 16, "v_proj": -3, "up_proj": 0}},
            {"rank_pattern": {"v_proj": 9}, "alpha_pattern": {"v_proj": 16}, "use_rslora": True},
            {"target_modules": "all-linear", "use_rslora": True},
            {"target_modules": ["q_proj", "layers.1.self_attn.v_proj"]},
            {"use_qalora": True, "qalora_group_size": 8},
            {"bias": "all", "fan_in_fan_out": True},
            {"init_lora_weights": "orthogonal"},
            {"init_lora_weights": "mica"},
            {"init_lora_weights": False, "lora_dropout": 0.3},
            {"megatron_core": "other", "ensure_weight_tying": True, "inference_mode": True},
        ],
        ids=lambda options: "-".join(options),
    )
    def test_as_peft_writes_it(self, options: dict[str, Any], plain: Any, tmp_path: Path) -> None:
        theirs = adapted(random_model(causal_lm=False), **options)
        theirs.save_pretrained(tmp_path)
        found = read_by_us(tmp_path, plain)
        np.testing.assert_allclose(found, hidden_of(theirs).detach().numpy(), atol=1e-4)
        np.testing.assert_allclose(found, read_by_peft(tmp_path), atol=1e-4)
        assert np.max(np.abs(found - plain[2](plain[1]))) > 0.05

    @pytest.mark.parametrize(
        "change",
        [
            {"target_modules": "ALL-linear"},
            {"rank_pattern": None, "alpha_pattern": None, "layers_to_transform": []},
            {"lora_dropout": 0, "use_rslora": None, "layers_pattern": None},
            # As alpaca-lora and Unsloth wrote it, and a newer peft with what is off.
            {"enable_lora": None, "merge_weights": False, "trainable_token_indices": None, "of_tomorrow": False},
        ],
        ids=lambda change: "-".join(change),
    )
    def test_as_others_write_it(self, change: dict[str, Any], theirs: Any, plain: Any, tmp_path: Path) -> None:
        theirs.save_pretrained(tmp_path)
        found = read_by_us(edit(tmp_path, change), plain)
        np.testing.assert_allclose(found, hidden_of(theirs).detach().numpy(), atol=1e-4)

    def test_no_targets_are_those_of_peft(self, plain: Any, tmp_path: Path) -> None:
        adapted(random_model(causal_lm=False), target_modules=["q_proj", "v_proj"]).save_pretrained(tmp_path)
        edit(tmp_path, {"target_modules": None})
        np.testing.assert_allclose(read_by_us(tmp_path, plain), read_by_peft(tmp_path), atol=1e-4)

    @pytest.mark.parametrize("options", [{}, {"layers_to_transform": [0, 2]}, {"target_modules": r"model\..*_proj"}])
    def test_of_a_causal_model(self, options: dict[str, Any], plain: Any, tmp_path: Path) -> None:
        """Names are matched under `model.`; peft loads such a file into the same class alone (peft#2412)."""
        theirs = adapted(random_model(causal_lm=True), **options)
        theirs.save_pretrained(tmp_path)
        model, params, apply = plain
        # The causal model draws the same numbers, but for its output projection.
        params = load_qwen3(save(theirs.unload(), tmp_path / "base"))[1]
        found = read_by_us(tmp_path, (model, params, apply))
        np.testing.assert_allclose(found, read_by_peft(tmp_path, causal_lm=True), atol=1e-4)

    def test_pissa_that_peft_converted(self, plain: Any, tmp_path: Path) -> None:
        theirs = peft.get_peft_model(random_model(causal_lm=False), peft.LoraConfig(r=4, init_lora_weights="pissa"))
        theirs.save_pretrained(tmp_path / "start")
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if "lora_" in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        options = {"path_initial_model_for_weight_conversion": str(tmp_path / "start")}
        theirs.save_pretrained(tmp_path / "end", **options)
        expected = hidden_of(theirs.eval()).detach().numpy()
        np.testing.assert_allclose(read_by_us(tmp_path / "end", plain), expected, atol=1e-4)

    def test_absent_pairs_stay_the_base(
        self, theirs: Any, plain: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        theirs.save_pretrained(tmp_path)
        path = tmp_path / "adapter_model.safetensors"
        save_file({name: tensor for name, tensor in load_file(path).items() if "layers.1." not in name}, path)
        with caplog.at_level(logging.WARNING):
            found = read_by_us(tmp_path, plain)
        np.testing.assert_allclose(found, read_by_peft(tmp_path), atol=1e-4)
        assert "7 of 21 projections" in caplog.text and "layers.1." in caplog.text
        with pytest.raises(ValueError, match=r"7 of 21 projections .* this initialization changes them"):
            read_by_us(edit(tmp_path, {"init_lora_weights": False}), plain)

    def test_what_is_filled_up_stays_zero_in_training(self, base: Path, tmp_path: Path) -> None:
        options = {"rank_pattern": {"v_proj": 2}, "exclude_modules": ["layers.0.self_attn.q_proj"]}
        adapted(random_model(causal_lm=False), **options).save_pretrained(tmp_path)
        model, params = load_qwen3(base)
        config, lora = load_adapter(tmp_path, model.config)
        weight = np.random.default_rng(1).normal(size=SIZES["hidden_size"]).astype(np.float32)
        gradient = jax.grad(lambda lora: jnp.mean(Qwen3(config).apply({"params": params, "lora": lora}, IDS) @ weight))
        found = gradient(lora)["layers"]["self_attn"]
        assert not np.any(found["v_proj"]["lora_a"][..., 2:]) and not np.any(found["v_proj"]["lora_b"][:, 2:])
        assert not np.any(found["q_proj"]["lora_a"][0]) and not np.any(found["q_proj"]["lora_b"][0])
        assert np.any(found["v_proj"]["lora_b"][:, :2]) and np.any(found["q_proj"]["lora_b"][1])


_NAMES = [
    "q_proj",
    "v_proj",
    "up_proj",
    "layers.0.self_attn.k_proj",
    "self_attn.o_proj",
    "proj",
    "layers.2.mlp.down_proj",
]
_REGEXES = [r".*\.[qv]_proj", r"layers\.[01]\..*_proj", r".*(0|2).mlp.*proj", "all-linear"]
_PATTERNS = [*_NAMES[:5], r"layers\.1\..*", "^layers.0.mlp.up_proj", r".*\d.self.*", "nothing"]
_LAYERS = st.sampled_from(
    [
        {"layers_to_transform": layers, "layers_pattern": pattern}
        for layers in (0, 1, [0, 2], [])
        for pattern in ("layers", ["h", "layers"], r"lay\w+")
    ]
)
_OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "exclude_modules": st.lists(st.sampled_from(_NAMES), max_size=2) | st.sampled_from([*_REGEXES[:3], None]),
        "rank_pattern": st.dictionaries(st.sampled_from(_PATTERNS), st.sampled_from([1, 2, 6]), max_size=2),
        "alpha_pattern": st.dictionaries(st.sampled_from(_PATTERNS), st.sampled_from([1, 0.5, -8, 0]), max_size=2),
        "r": st.sampled_from([2, 6]),
        "lora_alpha": st.sampled_from([1, 7, 0.25, -2]),
        "use_rslora": st.booleans(),
        "init_lora_weights": st.sampled_from([True, True, False, "gaussian", "eva", "mica", "orthogonal"]),
        "bias": st.sampled_from(["none", "all", "lora_only"]),
        "use_qalora": st.booleans(),
    },
)
_LISTS = st.lists(st.sampled_from(_NAMES), min_size=1, max_size=4, unique=True) | st.none()
_WRITTEN = st.builds(
    lambda targets, layers, options: {"target_modules": targets} | layers | options,
    _LISTS,
    st.just({}) | _LAYERS,
    _OPTIONS,
) | st.builds(lambda targets, options: {"target_modules": targets} | options, st.sampled_from(_REGEXES), _OPTIONS)
# What stands in the file afterwards and was not there when the tensors were written.
_LATER = st.sampled_from(
    [
        *({key: value} for key in _REFUSED for value in (None, True, {}, [])),
        *({key: value} for key in ("r", "lora_alpha", "lora_dropout") for value in (0, "4", None, 5, -1.5)),
        *({"init_lora_weights": value} for value in ("pissa", "olora", "corda", "loftq", "lora_ga", "mica", False)),
        *({"target_modules": value} for value in ("(", "", [], [1], ["v_proj"], "layers.*", {"a": 1}, 3)),
        *({key: {"(": 2}} for key in ("rank_pattern", "alpha_pattern")),
        *({"rank_pattern": {"q_proj": value}} for value in (2, 2.0, 0, True)),
        *({"alpha_pattern": {"q_proj": value}} for value in (3, 0, "3")),
        *({"layers_to_transform": value} for value in ([1], 1, "1", [5])),
        {"layers_to_transform": [1], "layers_pattern": "layers"},
        {"layers_pattern": "("},
        {"exclude_modules": ["q_proj"]},
        {"use_rslora": True},
        {"peft_type": "LOHA"},
        {"of_tomorrow": True},
    ]
)


@pytest.mark.ci
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    written=_WRITTEN,
    later=st.just({}) | st.just({}) | _LATER,
    drop=st.sampled_from([None, None, None, "layers.2.", "lora_A", "0.self_attn.q_proj.lora_B"]),
)
def test_any_configuration_is_equal_or_refused(
    written: dict[str, Any], later: dict[str, Any], drop: str | None, plain: Any
) -> None:
    """An adapter as peft writes it, then perhaps another configuration beside it, or tensors lost."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                adapted(random_model(causal_lm=False), **written).save_pretrained(folder)
        except Exception:  # peft's own refusals are of many types.
            event("peft does not write it")
            adapted(random_model(causal_lm=False)).save_pretrained(folder)
            later = written
        edit(folder, later)
        if drop:
            path = folder / "adapter_model.safetensors"
            kept = {name: tensor for name, tensor in load_file(path).items() if drop not in name}
            save_file(kept, path)
        try:
            found = read_by_us(folder, plain)
        except ValueError as error:
            event("refused")
            assert str(folder) in str(error) and len(str(error)) < 6_000
            return
        try:
            expected = read_by_peft(folder)
        except ValueError as error:
            # A pattern that names norms beside projections: there is no number to differ from.
            assert "is not supported" in str(error)
            event("peft refuses it")
            return
        event("equal")
        np.testing.assert_allclose(found, expected, atol=1e-4)


class TestPickles:
    def test_equal(self, theirs: Any, plain: Any, tmp_path: Path) -> None:
        theirs.save_pretrained(tmp_path, safe_serialization=False)
        assert not list(tmp_path.glob("*.safetensors"))
        found = read_by_us(tmp_path, plain)
        np.testing.assert_allclose(found, hidden_of(theirs).detach().numpy(), atol=1e-4)

    def test_safetensors_go_before(self, theirs: Any, plain: Any, tmp_path: Path) -> None:
        theirs.save_pretrained(tmp_path)
        torch.save({}, tmp_path / "adapter_model.bin")
        found = read_by_us(tmp_path, plain)
        np.testing.assert_allclose(found, hidden_of(theirs).detach().numpy(), atol=1e-4)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({}, "no adapter of a Qwen3 projection"),
            ({"state_dict": {"a": 1}}, "are no tensors"),
            ([1], "are no tensors"),
            (Path, "refused"),
            (copy.deepcopy, "refused"),
        ],
        ids=["empty", "nested", "list", "class", "function"],
    )
    def test_others_are_refused(self, content: Any, message: str, theirs: Any, plain: Any, tmp_path: Path) -> None:
        theirs.save_pretrained(tmp_path)
        (tmp_path / "adapter_model.safetensors").unlink()
        torch.save(content, tmp_path / "adapter_model.bin")
        with pytest.raises(ValueError, match=rf"adapter_model\.bin: .*{message}"):
            read_by_us(tmp_path, plain)


class TestRefused:
    @pytest.fixture
    def folder(self, theirs: Any, tmp_path: Path) -> Path:
        theirs.save_pretrained(tmp_path)
        return tmp_path

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"peft_type": "IA3"}, "peft_type is 'IA3', not 'LORA'"),
            ({"bias": "some"}, "bias is 'some'"),
            ({"r": "4"}, "r is '4', not a positive whole number"),
            ({"r": 0}, "r is 0"),
            ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
            ({"rank_pattern": {"q_proj": 2}}, r"q_proj.lora_A.weight has shape \(4, 32\), expected \(2, 32\)"),
            ({"rank_pattern": {"(": 2}}, "rank_pattern is .* not patterns"),
            ({"target_modules": "("}, r"target_modules is '\(', not names or one regular expression"),
            ({"target_modules": ["lm_head"]}, "no adapter of a Qwen3 projection .* that target_modules names"),
            ({"target_modules": ["q_proj"]}, r"surplus base_model\.model\.layers\.0\.mlp\.up_proj\.lora_A"),
            ({"exclude_modules": ["q_proj"]}, r"surplus base_model\.model\.layers\.0\.self_attn\.q_proj"),
            ({"layers_to_transform": [0]}, "no adapter of a Qwen3 projection"),
            ({"layers_pattern": "layers"}, "layers_pattern without layers_to_transform"),
            ({"target_modules": ".*proj", "layers_to_transform": [0]}, "excludes layers_to_transform"),
            ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'.*merge it into the base"),
            *(
                ({"init_lora_weights": name}, f"init_lora_weights is '{name}'")
                for name in ("corda", "loftq", "lora_ga")
            ),
            *(({key: True}, f"{key} is not supported") for key in _REFUSED),
            *(({key: []}, f"{key} is not supported") for key in _REFUSED if key.endswith("_config")),
            # An empty object is a configuration with defaults.
            ({"kasa_config": {}}, "kasa_config is not supported"),
            ({"of_tomorrow": 16}, r"of_tomorrow is unknown and may change the result \(it is 16\)"),
            ({"x" * 9_000: "y" * 9_000}, r"xxx\.\.\.xxx"),
        ],
        ids=lambda value: "-".join(value)[:40] if isinstance(value, dict) else "",
    )
    def test_keys(self, change: dict[str, Any], message: str, folder: Path, ours: Any) -> None:
        with pytest.raises(ValueError, match=message) as error:
            load_adapter(edit(folder, change), ours[0].config)
        assert str(folder) in str(error.value) and len(str(error.value)) < 6_000

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'.*path_initial_model_for_weight_conversion"),
            ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
            ({"use_dora": True, "use_rslora": True}, "use_dora"),
            ({"modules_to_save": ["norm"]}, r"modules_to_save is not supported \(it is \['norm'\]\)"),
            ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
            ({"lora_bias": True}, "lora_bias"),
            (
                {"target_modules": ["embed_tokens", "q_proj"]},
                r"surplus base_model\.model\.embed_tokens\.lora_embedding_A",
            ),
            ({"target_parameters": ["q_proj.weight"], "target_modules": []}, "target_parameters"),
            ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
    )
    def test_as_peft_writes_it(self, options: dict[str, Any], message: str, ours: Any, tmp_path: Path) -> None:
        adapted(random_model(causal_lm=False), lora_dropout=0.0, **options).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=message):
            load_adapter(tmp_path, ours[0].config)

    def test_missing_keys(self, folder: Path, ours: Any) -> None:
        (folder / "adapter_config.json").write_text('{"fine_tune_type": "lora", "num_layers": 16}')
        with pytest.raises(ValueError, match="no 'peft_type'; no 'r'; no 'lora_alpha'; fine_tune_type is unknown"):
            load_adapter(folder, ours[0].config)

    @pytest.mark.parametrize("text", ["[]", "{", "[" * 100_000])
    def test_no_configuration(self, text: str, folder: Path, ours: Any) -> None:
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match=r"adapter_config\.json: (not readable|expected an object)"):
            load_adapter(folder, ours[0].config)

    def test_all_mismatches_in_one_message(self, folder: Path, ours: Any) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        start = "base_model.model.layers."
        del tensors[f"{start}0.mlp.up_proj.lora_A.weight"]
        # As DeepSpeed's ZeRO-3 leaves what it has not gathered (peft#2500).
        tensors[f"{start}1.self_attn.q_proj.lora_B.weight"] = np.zeros(0, np.float32)
        tensors[f"{start}9.self_attn.q_proj.lora_B.weight"] = np.zeros((48, 4), np.float32)
        # As a state dictionary has it; peft ignores it (peft#2699).
        tensors[f"{start}2.self_attn.q_proj.lora_B.default.weight"] = np.zeros((48, 4), np.float32)
        save_file(tensors, path)
        with pytest.raises(ValueError) as error:
            load_adapter(folder, ours[0].config)
        message = str(error.value)
        assert "4 tensors" in message
        assert f"missing {start}0.mlp.up_proj.lora_A.weight (4, 32)" in message
        assert f"surplus {start}9.self_attn.q_proj.lora_B.weight" in message
        assert f"surplus {start}2.self_attn.q_proj.lora_B.default.weight" in message
        assert f"{start}1.self_attn.q_proj.lora_B.weight has shape (0,), expected (48, 4)" in message

    def test_names_of_two_models(self, folder: Path, ours: Any) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        moved = {name.replace("model.layers.0", "model.model.layers.0"): tensor for name, tensor in tensors.items()}
        save_file(moved, path)
        with pytest.raises(ValueError, match=r"surplus base_model\.model\.layers\.1\."):
            load_adapter(folder, ours[0].config)

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


HOSTILE = (
    {"target_modules": r"(?:(?:\w|.)+)+!"},
    {"exclude_modules": r"((.*)*)*!"},
    {"rank_pattern": {r"(?:(?:.*)*)*!": 2}},
    {"alpha_pattern": {".*" * 20 + "!": 2}},
    {"layers_to_transform": [0], "layers_pattern": r"(?:(?:\w|.)+)+!"},
)


@pytest.mark.parametrize("pattern", HOSTILE, ids=lambda pattern: next(reversed(pattern)))
def test_an_expression_that_would_take_years_is_refused(
    pattern: dict[str, Any],
    ours: Any,
    theirs: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record: Callable[..., None],
) -> None:
    """peft hangs; whoever opens the folder of a stranger must not."""
    monkeypatch.setattr("nqf.interop.peft._SECONDS", 1)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | pattern))
    with pytest.raises(ValueError, match=r"adapter_config.json: patterns that take more than 1 s .*; write the names"):
        load_adapter(tmp_path, dataclasses.replace(ours[0].config, lora_rank=0))
    record(
        "a regular expression in a PEFT folder that would take years to match",
        tried=1,
        survived=1,
        seen="refused after ten seconds with the file and the patterns",
    )
