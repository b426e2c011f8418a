"""CLIP's vision tower and preprocessing against transformers, both ways."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
import transformers  # noqa: E402

from nqf.interop.clip import Preprocessing, clip_table, load_clip  # noqa: E402
from nqf.interop.tensors import disassemble  # noqa: E402
from nqf.models.clip import ClipVision, ClipVisionConfig  # noqa: E402

pytestmark = pytest.mark.slow
VISION = {
    "image_size": 12,
    "patch_size": 4,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
CONFIG = ClipVisionConfig(**VISION, projection_dim=20)


def randomized(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval()


def tower(activation="quick_gelu"):
    config = transformers.CLIPVisionConfig(**VISION, projection_dim=20, hidden_act=activation)
    return randomized(transformers.CLIPVisionModelWithProjection(config))


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).normal(size=(3, 12, 12, 3)).astype(np.float32)


def run(model, pixels):
    with torch.no_grad():
        return model(torch.tensor(pixels).permute(0, 3, 1, 2)).image_embeds.numpy()


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_equals_transformers_from_its_folder(pixels, tmp_path, activation) -> None:
    model = tower(activation)
    model.save_pretrained(tmp_path)
    module, params, _ = load_clip(tmp_path)
    assert module.config.hidden_act == activation
    np.testing.assert_allclose(module.apply({"params": params}, pixels), run(model, pixels), atol=1e-5)


def test_equals_the_tower_of_a_whole_clip(pixels, tmp_path) -> None:
    text = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=20)
    model = randomized(transformers.CLIPModel(config))
    model.save_pretrained(tmp_path)
    module, params, _ = load_clip(tmp_path)
    with torch.no_grad():
        features = model.get_image_features(torch.tensor(pixels).permute(0, 3, 1, 2))
    expected = getattr(features, "pooler_output", features).numpy()
    np.testing.assert_allclose(module.apply({"params": params}, pixels), expected, atol=1e-5)


def test_transformers_equals_it_from_our_weights(pixels) -> None:
    params = ClipVision(config=CONFIG).init(jax.random.key(0), pixels)["params"]
    params = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.key(x.size), x.shape), params)
    model = tower()
    state = {name: torch.tensor(array) for name, array in disassemble(clip_table(CONFIG), params).items()}
    result = model.load_state_dict(state, strict=False)
    assert not result.unexpected_keys and all("position_ids" in key for key in result.missing_keys)
    expected = ClipVision(config=CONFIG).apply({"params": params}, pixels)
    np.testing.assert_allclose(run(model, pixels), expected, atol=1e-5)


def image(mode: str, size: tuple[int, int]) -> Image.Image:
    rng = np.random.default_rng(0)
    channels = {"L": (), "RGB": (3,), "RGBA": (4,), "LA": (2,)}[mode]
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], *channels)).astype(np.uint8), mode)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA"])
@pytest.mark.parametrize("size", [(301, 200), (57, 224), (224, 225), (31, 30), (17, 40)])
@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated")
def test_preprocessing_equals_transformers(mode, size) -> None:
    original = transformers.CLIPImageProcessorPil()
    picture = image(mode, size)
    expected = original(picture, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    ours = Preprocessing()(picture)
    assert ours.shape == (224, 224, 3) and ours.dtype == np.float32
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_preprocessing_of_a_palette_with_transparency_equals_transformers(tmp_path) -> None:
    picture = image("L", (60, 50)).convert("P")
    picture.save(tmp_path / "x.png", transparency=7)
    with Image.open(tmp_path / "x.png") as opened:
        expected = transformers.CLIPImageProcessorPil()(opened, return_tensors="np")["pixel_values"][0]
        np.testing.assert_allclose(Preprocessing()(opened), expected.transpose(1, 2, 0), atol=1e-5)


def test_preprocessing_comes_from_the_folder(tmp_path) -> None:
    tower().save_pretrained(tmp_path)
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 14}, crop_size={"height": 12, "width": 12}, image_mean=[0.1, 0.2, 0.3]
    )
    processor.save_pretrained(tmp_path)
    _, _, preprocessing = load_clip(tmp_path)
    picture = image("RGB", (40, 33))
    expected = processor(picture, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    np.testing.assert_allclose(preprocessing(picture), expected, atol=1e-5)
    # The form of OpenAI's first files.
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 14, "crop_size": 12, "resample": 3}))
    assert load_clip(tmp_path)[2] == Preprocessing(resize=14, crop=12)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"resample": 2}, "not CLIP's"),
        ({"do_center_crop": False}, "not CLIP's"),
        ({"crop_size": 10}, "the model reads 12"),
        ({"image_processor_type": "SiglipImageProcessor"}, "image_processor_type"),
        ({"do_sharpen": True}, "do_sharpen is unknown"),
    ],
)
def test_other_preprocessing_is_refused(tmp_path, change, reason) -> None:
    tower().save_pretrained(tmp_path)
    config = {"size": 14, "crop_size": 12, **change}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=reason):
        load_clip(tmp_path)


def test_extreme_shapes_are_refused_before_they_take_memory() -> None:
    with pytest.raises(ValueError, match="too long and narrow"):
        Preprocessing()(Image.new("L", (1, 2_000_000)))


def test_preprocessing_inside_a_processor_file(tmp_path) -> None:
    tower().save_pretrained(tmp_path)
    part = {"size": {"shortest_edge": 14}, "crop_size": 12, "image_mean": [0.1, 0.2, 0.3]}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": part, "tokenizer": {}}))
    assert load_clip(tmp_path)[2] == Preprocessing(resize=14, crop=12, mean=(0.1, 0.2, 0.3))


@pytest.mark.parametrize(
    "change",
    [{"num_channels": 4}, {"layer_scale": 0.1}, {"vision_config_dict": {"hidden_size": 8}}, {"hidden_size": "x"}],
)
def test_other_towers_are_refused(tmp_path, change) -> None:
    tower().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=next(iter(change))):
        load_clip(tmp_path)
