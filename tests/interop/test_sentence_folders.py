"""Folders of sentence-transformers: the vectors of the original, or a refusal that names the file."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
import peft  # noqa: E402
import safetensors.numpy  # noqa: E402
import transformers  # noqa: E402
from sentence_transformers import SentenceTransformer  # noqa: E402

from nqf.interop.encoders import load_text_embedder  # noqa: E402
from nqf.interop.settings import understood  # noqa: E402
from nqf.interop.tensors import list_tensors, resolve_folder  # noqa: E402
from nqf.interop.tokenizer import train_byte_bpe  # noqa: E402

pytestmark = pytest.mark.slow
WORDS = "red wool scarf a cup the history of northern railways in three volumes query : [unused0]".split()
TEXTS = [
    "red wool scarf",
    "A Cup",
    "the history of the northern railways in three volumes " * 3,
    "cup [SEP] <|endoftext|> of wool",
]
PACKAGE = "sentence_transformers.models."
WIDTH = 16


def randomized(model: Any) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.eval()


def write(path: Path, content: Any) -> None:
    """JSON, or arrays as weights."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        safetensors.numpy.save_file(content, path)
    else:
        path.write_text(json.dumps(content))


def change(path: Path, **keys: Any) -> None:
    tree = {**(json.loads(path.read_text()) if path.is_file() else {}), **keys}
    write(path, {key: value for key, value in tree.items() if value is not ...})


def modules(folder: Path, *rest: str | tuple[str, Any] | tuple[str, Any, Any], at: str = "") -> None:
    """`modules.json`, and `config.json` and weights of the modules after the transformer."""
    entries = [{"idx": 0, "name": "0", "path": at, "type": f"{PACKAGE}Transformer"}]
    for index, entry in enumerate(rest, 1):
        kind, config, *weights = entry if isinstance(entry, tuple) else (entry, {})
        path = f"{index}_{kind}"
        entries.append({"idx": index, "name": str(index), "path": path, "type": f"{PACKAGE}{kind}"})
        write(folder / path / "config.json", config)
        if weights:
            write(folder / path / "model.safetensors", weights[0])
    write(folder / "modules.json", entries)


def pooling(*modes: str, width: int = WIDTH, **options: Any) -> tuple[str, Any]:
    return "Pooling", {"embedding_dimension": width, "pooling_mode": list(modes), "include_prompt": True, **options}


def dense(inputs: int, outputs: int, activation: str = "activation.Tanh", **options: Any) -> tuple[str, Any, Any]:
    rng = np.random.default_rng(inputs + outputs)
    weights = {"linear.weight": rng.normal(0, 0.5, (outputs, inputs)).astype(np.float32)}
    if options.get("bias", True):
        weights["linear.bias"] = rng.normal(0, 0.5, outputs).astype(np.float32)
    if options.get("use_residual") and inputs != outputs:
        weights["residual.weight"] = rng.normal(0, 0.5, (outputs, inputs)).astype(np.float32)
    config = {"in_features": inputs, "out_features": outputs, "activation_function": f"torch.nn.modules.{activation}"}
    return "Dense", config | options, weights


@pytest.fixture(scope="module")
def bert_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=40,
    )
    randomized(transformers.BertModel(config)).save_pretrained(folder)
    modules(folder, pooling("mean"), "Normalize")
    return folder


@pytest.fixture(scope="module")
def qwen_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen")
    train_byte_bpe(TEXTS * 3, 290).save(folder)
    config = transformers.Qwen3Config(
        vocab_size=300,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
    )
    randomized(transformers.Qwen3Model(config)).save_pretrained(folder)
    modules(folder, pooling("lasttoken"), "Normalize")
    return folder


@pytest.fixture
def bert(bert_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bert_base, tmp_path / "model"))


@pytest.fixture
def qwen(qwen_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(qwen_base, tmp_path / "model"))


@pytest.fixture(params=["bert", "qwen"])
def either(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def theirs(folder: Path, texts: list[str] = TEXTS) -> np.ndarray:
    return SentenceTransformer(str(folder), device="cpu", local_files_only=True).encode(texts)


def ours(folder: Path, texts: list[str] = TEXTS, **options: Any) -> np.ndarray:
    return load_text_embedder(folder, dtype=jnp.float32, **options).embed(texts)


def check(folder: Path, texts: list[str] = TEXTS) -> np.ndarray:
    expected = theirs(folder, texts)
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(ours(folder, texts), expected, atol=1e-4)
    return expected


def differs(folder: Path, base: Path) -> None:
    """The case says something: what it changes changes the vectors, and both agree on how."""
    expected, plain = check(folder), theirs(base)
    assert expected.shape != plain.shape or np.abs(expected - plain).max() > 1e-2


MODULES: dict[str, list[Any]] = {
    "no normalization": [pooling("mean")],
    "dense": [pooling("mean"), dense(WIDTH, 8, "linear.Identity", bias=False), "Normalize"],
    "dense of the same width": [pooling("mean"), dense(WIDTH, WIDTH), "Normalize"],
    "two dense, one before": [pooling("mean"), "Normalize", dense(WIDTH, 12, "activation.GELU"), dense(12, 6)],
    "residual": [pooling("mean"), dense(WIDTH, 8, "activation.ReLU", use_residual=True)],
    "residual of the same width": [pooling("mean"), dense(WIDTH, WIDTH, "activation.SiLU", use_residual=True)],
    "default activation": [pooling("mean"), ("Dense", {"in_features": WIDTH, "out_features": 4}, dense(WIDTH, 4)[2])],
    "dense on tokens": [
        dense(WIDTH, 10, "activation.Sigmoid", module_input_name="token_embeddings"),
        pooling("max", width=10),
        "Normalize",
    ],
    "normalized tokens": [("Normalize", {"module_input_name": "token_embeddings"}), pooling("mean")],
    "layer norm and dropout": [
        pooling("mean"),
        ("Dropout", {"dropout": 0.5}),
        (
            "LayerNorm",
            {"dimension": WIDTH},
            {"norm.weight": np.linspace(0.5, 2, WIDTH, dtype=np.float32), "norm.bias": np.ones(WIDTH, np.float32)},
        ),
    ],
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_after_the_transformer(name: str, bert: Path, bert_base: Path) -> None:
    modules(bert, *MODULES[name])
    differs(bert, bert_base)


@pytest.mark.parametrize(
    "modes", [("cls",), ("max",), ("mean_sqrt_len_tokens",), ("weightedmean",), ("lasttoken",), ("max", "mean")]
)
def test_every_pooling(modes: tuple[str, ...], either: Path) -> None:
    modules(either, pooling(*modes))
    check(either)
    # The older form has a flag each, and an order of its own.
    flags = {"mean": "mean_tokens", "max": "max_tokens", "cls": "cls_token", "weightedmean": "weightedmean_tokens"}
    names = [f"pooling_mode_{flags.get(mode, mode)}" for mode in modes]
    write(either / "1_Pooling" / "config.json", {"word_embedding_dimension": WIDTH, **dict.fromkeys(names, True)})
    check(either)


@pytest.mark.parametrize(
    ("modes", "include"), [(("mean",), True), (("mean", "weightedmean"), False), (("cls", "lasttoken"), False)]
)
def test_default_prompts(modes: tuple[str, ...], include: bool, either: Path) -> None:
    modules(either, pooling(*modes, include_prompt=include))
    prompts = {"prompts": {"query": "query : ", "none": None}, "default_prompt_name": "query"}
    write(either / "config_sentence_transformers.json", prompts)
    check(either)
    write(either / "config_sentence_transformers.json", {**prompts, "default_prompt_name": "none"})
    check(either)


def test_prompts_that_are_not_the_default_are_named(bert: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(bert / "config_sentence_transformers.json", {"prompts": {"passage": "a : "}})
    check(bert)
    assert "no prompt is the default" in caplog.text and "passage" in caplog.text


@pytest.mark.parametrize(("asked", "own"), [(None, ...), (None, 4), (5, ...), (5, 4), (4, 10**30), (40, 7)])
def test_longest_text(asked: int | None, own: Any, either: Path) -> None:
    write(either / "sentence_bert_config.json", {"max_seq_length": asked, "do_lower_case": False})
    change(either / "tokenizer_config.json", model_max_length=own)
    check(either)
    assert np.abs(ours(either, max_length=3)[2] - ours(either)[2]).max() > 1e-3


def test_a_limit_beyond_the_positions_of_a_bert_is_said(bert: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(bert / "sentence_bert_config.json", {"max_seq_length": 512})
    check(bert)
    ours(bert, ["cup " * 100])
    assert "has 40 positions" in caplog.text


@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_side_and_arguments_for_the_tokenizer(side: str, either: Path) -> None:
    change(either / "tokenizer_config.json", truncation_side=side)
    write(either / "sentence_bert_config.json", {"tokenizer_args": {"model_max_length": 6}, "model_args": {}})
    check(either)


def test_lower_case(bert: Path, bert_base: Path) -> None:
    for key in ("do_lower_case", "strip_accents"):
        change(bert / "tokenizer_config.json", **{key: False})
    differs(bert, bert_base)
    write(bert / "sentence_bert_config.json", {"do_lower_case": True})
    check(bert, [*TEXTS, "A [MASK] SCARF Σ"])


def test_the_template_decides_the_end_token(qwen: Path, qwen_base: Path) -> None:
    path = qwen / "tokenizer.json"
    tree = json.loads(path.read_text())
    write(path, tree | {"post_processor": None})
    differs(qwen, qwen_base)
    with pytest.raises(ValueError, match=r"have no vector, e\.g\. ''"):
        ours(qwen, ["cup", ""])
    write(path, tree)
    for key in ("add_bos_token", "add_eos_token"):
        change(qwen / "tokenizer_config.json", **{key: True, "bos_token": "<|spare_0|>", "eos_token": "<|spare_1|>"})
        check(qwen)


def test_settings_inside_tokenizer_json(qwen: Path) -> None:
    path = qwen / "tokenizer.json"
    truncation = {"direction": "Left", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "strategy": "BatchLongest",
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    write(path, json.loads(path.read_text()) | {"truncation": truncation, "padding": padding})
    check(qwen)
    write(qwen / "sentence_bert_config.json", {"max_seq_length": 5})
    check(qwen)


def test_special_tokens_in_texts(either: Path) -> None:
    change(either / "tokenizer_config.json", split_special_tokens=True)
    check(either)


def test_a_vocabulary_alone(bert: Path) -> None:
    (bert / "tokenizer.json").unlink()
    write(bert / "tokenizer_config.json", {"do_lower_case": False, "tokenizer_class": "BertTokenizer"})
    check(bert)


def test_transformer_in_its_own_folder(either: Path) -> None:
    (either / "0_Transformer").mkdir()
    for path in [path for path in either.iterdir() if path.is_file() and path.name != "modules.json"]:
        path.rename(either / "0_Transformer" / path.name)
    write(either / "0_Transformer" / "sentence_bert_config.json", {"max_seq_length": 7})
    modules(either, pooling("mean"), "Normalize", at="0_Transformer")
    check(either)


@pytest.mark.parametrize("causal", [True, False])
def test_without_modules(causal: bool, qwen: Path, caplog: pytest.LogCaptureFixture) -> None:
    (qwen / "modules.json").unlink()
    write(qwen / "config_sentence_transformers.json", {"prompts": {"q": "a "}, "default_prompt_name": "q"})
    change(qwen / "config.json", architectures=["Qwen3ForCausalLM" if causal else "Qwen3Model"])
    check(qwen)
    assert ("lasttoken" if causal else "mean") in caplog.text and "are not read" in caplog.text
    change(qwen / "tokenizer_config.json", chat_template="{{ messages }}")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: has a chat_template"):
        ours(qwen)


def test_shorter_vectors(either: Path) -> None:
    write(either / "config_sentence_transformers.json", {"truncate_dim": 5})
    assert check(either).shape == (len(TEXTS), 5)


def state(folder: Path) -> dict[str, Any]:
    return {
        name: torch.tensor(array) for name, array in safetensors.numpy.load_file(folder / "model.safetensors").items()
    }


def rename_norms(name: str) -> str:
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


@pytest.mark.parametrize(
    "rename", [rename_norms, lambda name: f"bert.{rename_norms(name)}", lambda name: f"bert.{name}"]
)
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_names_of_tensors(rename: Callable[[str], str], file: str, bert: Path) -> None:
    tensors = {rename(name): tensor for name, tensor in state(bert).items()}
    tensors |= {rename("embeddings.position_ids"): torch.arange(40)[None], "cls.predictions.bias": torch.zeros(3)}
    (bert / "model.safetensors").unlink()
    if file.endswith(".bin"):
        torch.save(tensors, bert / file)
    else:
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        safetensors.numpy.save_file(arrays, bert / file, metadata={"format": "pt"})
    check(bert)


def test_pickled_weights_of_both_families(either: Path) -> None:
    tensors = list(state(either).items())
    (either / "model.safetensors").unlink()
    parts = {"pytorch_model-1.bin": dict(tensors[::2]), "pytorch_model-2.bin": dict(tensors[1::2])}
    for name, part in parts.items():
        torch.save(part, either / name)
    index = {name: file for file, part in parts.items() for name in part}
    write(either / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": index})
    check(either)
    modules(either, pooling("mean"), dense(WIDTH, 8))
    torch.save(state(either / "2_Dense"), either / "2_Dense" / "pytorch_model.bin")
    (either / "2_Dense" / "model.safetensors").unlink()
    check(either)
    # Rows in another order than in memory are refused, not read as they lie.
    name, tensor = next((name, tensor) for name, tensor in parts["pytorch_model-1.bin"].items() if tensor.ndim == 2)
    torch.save({**parts["pytorch_model-1.bin"], name: tensor.T.contiguous().T}, either / "pytorch_model-1.bin")
    with pytest.raises(ValueError, match=r"pytorch_model-1\.bin: .* is not stored row by row"):
        ours(either)


@pytest.mark.parametrize("beside", [True, False])
def test_adapters(beside: bool, qwen: Path, qwen_base: Path, tmp_path: Path) -> None:
    base = shutil.copytree(qwen, tmp_path / "base")
    adapted = peft.get_peft_model(
        transformers.AutoModel.from_pretrained(base),
        peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    )
    adapted.save_pretrained(qwen)
    assert json.loads((qwen / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    if not beside:
        for name in ("config.json", "model.safetensors"):
            (qwen / name).unlink()
    differs(qwen, qwen_base)
    change(qwen / "adapter_config.json", base_model_name_or_path="../base")
    before = ours(qwen)
    change(qwen / "adapter_config.json", base_model_name_or_path=str(tmp_path / "none"))
    if beside:
        np.testing.assert_array_equal(ours(qwen), before)
    else:
        with pytest.raises(ValueError, match=r"adapter_config\.json: base_model_name_or_path"):
            ours(qwen)


def test_an_adapter_of_a_bert_is_refused(bert: Path) -> None:
    write(bert / "adapter_config.json", {"peft_type": "LORA"})
    with pytest.raises(ValueError, match=r"adapter_config\.json: adapters of a BERT"):
        ours(bert)


def test_what_todays_libraries_save(either: Path, tmp_path: Path) -> None:
    model = SentenceTransformer(str(either), device="cpu")
    model.max_seq_length = 9
    model.save(str(tmp_path / "saved"))
    np.testing.assert_array_equal(check(tmp_path / "saved"), model.encode(TEXTS))


REFUSED: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "unknown key of a model": ("either", "config.json", {"scale_embeddings": 2.0}, "scale_embeddings is unknown"),
    "own code": ("either", "config.json", {"auto_map": {"AutoModel": "m.M"}}, "auto_map is unknown"),
    "quantized": ("either", "config.json", {"quantization_config": {"bits": 4}}, "quantization_config"),
    "epsilon": ("bert", "config.json", {"layer_norm_eps": 1e-5}, "layer_norm_eps"),
    "activation": ("bert", "config.json", {"hidden_act": "gelu_new"}, "hidden_act"),
    "decoder": ("bert", "config.json", {"is_decoder": True}, "is_decoder"),
    "sizes of another kind": ("bert", "config.json", {"hidden_size": "wide"}, "config.json"),
    "yarn": ("qwen", "config.json", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
    "rotated part": ("qwen", "config.json", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "two bases": ("qwen", "config.json", {"rope_scaling": {"type": "default", "rope_theta": 2.0}}, "rope_theta"),
    "unknown key of rotation": (
        "qwen",
        "config.json",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mscale": 2.0}},
        "rope_parameters: mscale",
    ),
    "windows": ("qwen", "config.json", {"layer_types": ["sliding_attention"]}, "layer_types"),
    "both directions": ("qwen", "config.json", {"is_causal": False}, "is_causal"),
    "both directions, other name": ("qwen", "config.json", {"use_bidirectional_attention": True}, "bidirectional"),
    "another model": ("either", "config.json", {"model_type": "roberta"}, "'roberta'"),
    "unknown key of the transformer": ("either", "sentence_bert_config.json", {"pad_to": 8}, "pad_to is unknown"),
    "configuration replaced": (
        "either",
        "sentence_bert_config.json",
        {"config_kwargs": {"num_hidden_layers": 1}},
        "config_kwargs: num_hidden_layers",
    ),
    "chat": (
        "either",
        "sentence_bert_config.json",
        {"modality_config": {"message": {"method": "forward", "method_output_name": "last_hidden_state"}}},
        "modality_config",
    ),
    "processing": (
        "either",
        "sentence_bert_config.json",
        {"processing_kwargs": {"text": {"max_length": 3}}},
        "processing",
    ),
    "task": ("either", "sentence_bert_config.json", {"transformer_task": "fill-mask"}, "transformer_task"),
    "length": ("either", "sentence_bert_config.json", {"max_seq_length": -1}, "max_seq_length is -1"),
    "no room": ("bert", "sentence_bert_config.json", {"max_seq_length": 2}, "leave no room"),
    "sparse": ("either", "config_sentence_transformers.json", {"model_type": "SparseEncoder"}, "SparseEncoder"),
    "absent prompt": (
        "either",
        "config_sentence_transformers.json",
        {"default_prompt_name": "x"},
        "none of the prompts",
    ),
    "unknown key": ("either", "config_sentence_transformers.json", {"scale": 3}, "scale is unknown"),
    "unknown pooling": ("either", "1_Pooling/config.json", {"pooling_mode": "attention"}, "'attention'"),
    "unknown key of pooling": ("either", "1_Pooling/config.json", {"pooling_mode_eos": True}, "pooling_mode_eos"),
    "padding of a BERT": ("bert", "tokenizer_config.json", {"padding_side": "left"}, "padding_side"),
    "no mask": ("either", "tokenizer_config.json", {"model_input_names": ["input_ids"]}, "attention_mask"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_the_name_of_file_and_key(name: str, request: pytest.FixtureRequest) -> None:
    family, file, keys, reason = REFUSED[name]
    folder = request.getfixturevalue("bert" if family == "either" else family)
    change(folder / file, **keys)
    with pytest.raises(ValueError) as error:
        ours(folder)
    assert reason in str(error.value)
    assert Path(file).name in str(error.value) or name == "no room"


@pytest.mark.parametrize(
    ("after", "reason"),
    [
        ([pooling("mean"), "CNN"], "module 'CNN' is not supported"),
        ([("Pooling", {})], "1_Pooling/config.json: missing or empty"),
        ([pooling("mean"), "Dense"], "2_Dense/config.json: no in_features"),
        ([pooling("mean"), dense(9, 4)], "module 'Dense' reads 9 components, and there are 16"),
        (
            [pooling("mean"), dense(WIDTH, 4, "activation.PReLU")],
            "activation_function is 'torch.nn.modules.activation.PReLU'",
        ),
        ([pooling("mean"), dense(WIDTH, 4, scale=2)], "scale is unknown"),
        ([pooling("mean"), (*dense(WIDTH, 4)[:2], dense(WIDTH, 5)[2])], "2_Dense: weights are"),
        ([pooling("mean"), dense(WIDTH, 4)[:2]], "2_Dense: no model.safetensors"),
        ([dense(WIDTH, 4), pooling("mean")], "reads 'sentence_embedding', which none before it writes"),
        (["Normalize"], "no module makes one vector of a text"),
        ([pooling("mean"), "Transformer"], "module 'Transformer' is not supported"),
    ],
)
def test_modules_that_are_not_computed(after: list[Any], reason: str, bert: Path) -> None:
    modules(bert, *after)
    with pytest.raises(ValueError) as error:
        ours(bert)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ([{"type": "my_code.Transformer", "path": ""}], "code of the folder's own"),
        ([{"type": f"{PACKAGE}Pooling", "path": ""}], "'Pooling' is not supported as the first one"),
        ([{"type": f"{PACKAGE}Transformer", "path": "../other"}], "leads out of the folder"),
        ([{"type": f"{PACKAGE}Transformer", "path": "/other"}], "leads out of the folder"),
        ([{"type": f"{PACKAGE}Transformer", "path": "", "kwargs": ["task"]}], "kwargs is unknown"),
        ([{"type": f"{PACKAGE}Transformer", "path": "", "name": "a"}] * 2, "the same name"),
        ([], "has no module 'Transformer'"),
        ({"a": 1}, "not a list of modules"),
        ([[]], "not a list of modules"),
    ],
)
def test_modules_json_that_is_refused(entries: Any, reason: str, bert: Path) -> None:
    write(bert / "modules.json", entries)
    with pytest.raises(ValueError, match=r"modules\.json: ") as error:
        ours(bert)
    assert reason in str(error.value)


def test_a_tokenizer_without_a_limit(qwen: Path) -> None:
    change(qwen / "tokenizer_config.json", model_max_length=10**30)
    write(qwen / "sentence_bert_config.json", {"max_seq_length": None, "tokenizer_args": {"model_max_length": 10**30}})
    check(qwen, ["cup " * 100])
    for bad in ("512", -3, 0, [8]):
        change(qwen / "sentence_bert_config.json", tokenizer_args={"model_max_length": bad})
        with pytest.raises(ValueError, match="model"):
            ours(qwen)


def test_unknown_keys_may_be_off() -> None:
    understood({"new": None, "old": False, "list": [], "object": {}, "text": ""}, {}, where="config.json")
    with pytest.raises(ValueError, match=r"config\.json: new is unknown \(it is 1\); two is unknown"):
        understood({"new": 1, "two": "x" * 10_000}, {}, where="config.json")
    for tree in ({"k" * 10_000: "x" * 10_000}, dict.fromkeys(map(str, range(10_000)), 1)):
        with pytest.raises(ValueError) as error:
            understood(tree, {}, where="config.json")
        assert len(str(error.value)) < 1_000


@st.composite
def folders(draw: st.DrawFn) -> tuple[str, Callable[[Path], None], bool]:
    """A family, what to do to its folder, and whether an unknown key is switched on somewhere."""
    family = draw(st.sampled_from(["bert", "qwen"]))
    modes = draw(
        st.lists(
            st.sampled_from(["cls", "max", "mean", "weightedmean", "lasttoken"]), min_size=1, max_size=2, unique=True
        )
    )
    width, after = WIDTH * len(modes), []
    for kind in draw(st.lists(st.sampled_from(["Dense", "Normalize", "Dropout"]), max_size=3)):
        outputs = draw(st.integers(1, 9))
        options = {"bias": draw(st.booleans()), "use_residual": draw(st.booleans())}
        activation = draw(st.sampled_from(["activation.Tanh", "linear.Identity", "activation.GELU"]))
        after.append(dense(width, outputs, activation, **options) if kind == "Dense" else kind)
        width = outputs if kind == "Dense" else width
    prompts = draw(st.fixed_dictionaries({}, optional={"a": st.sampled_from(["", "query : ", "the "]), "b": st.none()}))
    model = {"prompts": prompts, "default_prompt_name": draw(st.sampled_from([None, *prompts]))}
    model["truncate_dim"] = draw(st.none() | st.integers(1, 8))
    limits = {"max_seq_length": draw(st.none() | st.integers(3, 30)), "do_lower_case": draw(st.booleans())}
    tokens = {
        "model_max_length": draw(st.sampled_from([..., 3, 7, 10**30])),
        "truncation_side": draw(st.sampled_from(["left", "right"])),
    }
    include = draw(st.booleans())
    files = ["config.json", "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json"]
    unknown = draw(st.none() | st.tuples(st.sampled_from(files), st.sampled_from([None, False, 2, "x"])))

    def build(folder: Path) -> None:
        modules(folder, pooling(*modes, include_prompt=include), *after)
        write(folder / "config_sentence_transformers.json", model)
        write(folder / "sentence_bert_config.json", limits)
        change(folder / "tokenizer_config.json", **tokens)
        if unknown:
            change(folder / unknown[0], of_tomorrow=unknown[1])

    return family, build, bool(unknown and unknown[1])


@pytest.mark.ci
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=folders())
def test_any_combination_equals_the_original_or_is_refused(
    case: tuple[str, Callable[[Path], None], bool],
    bert_base: Path,
    qwen_base: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    family, build, is_unknown = case
    folder = tmp_path_factory.mktemp("drawn") / "model"
    shutil.copytree(bert_base if family == "bert" else qwen_base, folder)
    build(folder)
    if is_unknown:
        with pytest.raises(ValueError, match="of_tomorrow is unknown"):
            ours(folder)
        return
    try:
        found = ours(folder)
    except ValueError as error:
        # The one thing that a drawn folder can lack: a token that counts beside the prompt.
        assert "have no vector" in str(error)
        return
    for path in (folder / "sentence_bert_config.json", folder / "1_Pooling" / "config.json"):
        change(path, of_tomorrow=...)
    np.testing.assert_allclose(found, theirs(folder), atol=1e-4)


def test_hostile_headers(tmp_path: Path, record: Callable[..., None]) -> None:
    path = tmp_path / "model.safetensors"
    good = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    bad: list[Any] = [
        {"x": good | {"data_offsets": [-8, 0]}},
        {"x": good | {"shape": [-1, -2]}},
        {"x": good | {"shape": [2**62, 4]}},
        {"x": good | {"shape": [2.0]}},
        {"x": good | {"shape": [True, 2]}},
        {"x": good | {"data_offsets": [8, 0]}},
        {"x": good | {"data_offsets": [0]}},
        {"x": good | {"data_offsets": [1 << 70, (1 << 70) + 8]}},
        {"x": good | {"dtype": "F4"}},
        {"x": good | {"dtype": ["F32"]}},
        {"x": 3},
        [good],
    ]
    for header in [*(json.dumps(tree) for tree in bad), "[" * 100_000, "\ud800", "{", ""]:
        data = header.encode(errors="surrogatepass")
        path.write_bytes(len(data).to_bytes(8, "little") + data + bytes(8))
        with pytest.raises(ValueError, match=r"model\.safetensors: not readable as safetensors"):
            list_tensors([path])
    for length in (2**64 - 1, 2**40, 10):
        path.write_bytes(length.to_bytes(8, "little") + b"{}")
        with pytest.raises(ValueError, match="the header is cut short"):
            list_tensors([path])
    record(
        "a safetensors header that lies about sizes, nests or is cut short",
        tried=len(bad) + 7,
        survived=len(bad) + 7,
        seen="refused with the file",
    )


def test_hostile_tokenizers(bert: Path, record: Callable[..., None]) -> None:
    path = bert / "tokenizer.json"
    tree = json.loads(path.read_text())
    vocabulary = tree["model"]["vocab"]
    texts = ["{", "[" * 100_000, "[]", json.dumps({"model": 3}), "\x00"]
    trees = [
        tree | {"model": tree["model"] | {"vocab": dict.fromkeys(vocabulary, "x")}},
        tree | {"model": tree["model"] | {"vocab": dict.fromkeys(vocabulary, -1)}},
        tree | {"model": tree["model"] | {"vocab": {"cup": 2**40}}},
        tree | {"model": tree["model"] | {"type": "Unigram", "vocab": []}},
        tree | {"post_processor": {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": 3}},
        tree | {"added_tokens": [{"id": -1, "content": "x"}]},
        tree | {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}},
        tree | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    ]
    for content in [*texts, *map(json.dumps, trees)]:
        path.write_text(content)
        try:
            found = ours(bert)
        except ValueError as error:
            assert str(bert) in str(error)
        else:
            # What transformers does not read of the file cannot do harm.
            np.testing.assert_allclose(found, theirs(bert), atol=1e-4)
    record(
        "a tokenizer.json that is damaged or of impossible entries",
        tried=len(texts) + len(trees),
        survived=len(texts) + len(trees),
        seen="the vectors of transformers, where it does not read the entry either, or an error with the folder",
    )


def test_pickles_are_not_run(bert: Path, record: Callable[..., None]) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (exec, ("raise SystemExit('executed')",))

    (bert / "model.safetensors").unlink()
    torch.save({"x": Evil()}, bert / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: mentions '.*exec'"):
        ours(bert)
    record(
        "a pytorch_model.bin that would run code",
        tried=1,
        survived=1,
        seen="refused with what it mentions; nothing is run",
    )


def test_pickles_are_fetched_only_where_there_is_nothing_else(bert_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot_download(name: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append("*.bin" in allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    for folder, expected in ((bert_base, [False]), (bert_base / "1_Pooling", [False, True])):
        asked.clear()
        assert resolve_folder("some/model") == folder and asked == expected
