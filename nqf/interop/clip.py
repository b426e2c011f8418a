"""Loads CLIP's vision tower from Hugging Face folders, with the preprocessing that belongs to it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from nqf.fields.image import MAX_PIXELS
from nqf.files import read_json
from nqf.interop.settings import CLIP, CLIP_IMAGES, check_sizes, understood
from nqf.interop.tensors import assemble, layer_norm, linear, list_tensors, resolve_folder, weight_files
from nqf.models.clip import ClipVision, ClipVisionConfig
from nqf.ops.products import DotGeneral

# The text tower and the contrastive scale.
_UNUSED = r"text_model\..*|text_projection\.weight|logit_scale|vision_model\.embeddings\.position_ids"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """`CLIPImageProcessor`: shorter edge to `resize` by bicubic interpolation, center crop, normalization.

    Attributes:
      resize: Shorter edge after resizing, in pixels.
      crop: Side of the square that is cut out of the middle, in pixels.
      mean: Mean per channel of values in [0, 1]; the defaults are those of OpenAI's models.
      std: Standard deviation per channel.
    """

    resize: int = 224
    crop: int = 224
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Prepares an image: float32 [crop, crop, 3].

        Raises:
          ValueError: Too large before or after resizing.
        """
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            image = image.convert("RGBA")
            # Transparent parts are white.
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
        shorter = min(image.size)
        width, height = (self.resize if side == shorter else int(self.resize * side / shorter) for side in image.size)
        if width * height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are too long and narrow")
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = ((side - self.crop) // 2 for side in image.size)
        pixels = np.asarray(image, np.float32)[top : top + self.crop, left : left + self.crop] / np.float32(255)
        return (pixels - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)


def load_clip(
    name: str | Path, *, dtype: Any = jnp.float32, dot_general: DotGeneral = None
) -> tuple[ClipVision, dict[str, Any], Preprocessing]:
    """Loads the vision tower and projection of a CLIP folder or hub name.

    Args:
      name: Local folder or hub name.
      dtype: Type of the parameters and of the computation.
      dot_general: The projections' product; see `nqf.models.clip.ClipVision`.

    Raises:
      ValueError: Another model, unreadable files, or tensors that do not fit; all of them are named.
    """
    folder = resolve_folder(name)
    where = folder / "config.json"
    tree = read_json(where)
    try:
        config = ClipVisionConfig.from_hf(tree)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error
    for part in (tree, tree.get("vision_config", {})):
        understood(part, CLIP, where=where)
        check_sizes(part, where=where)
    module = ClipVision(config=config, dtype=dtype, dot_general=dot_general)
    pixels = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, 3), jnp.float32)
    abstract = jax.eval_shape(module.init, jax.random.key(0), pixels)["params"]
    tensors = list_tensors(weight_files(folder), skip=_UNUSED)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    read = lambda name: tensors[name].read()  # noqa: E731
    params = assemble(clip_table(config), abstract, shapes, read, where=str(folder), dtype=dtype)
    path, whole = folder / "preprocessor_config.json", folder / "processor_config.json"
    # Transformers 5 writes the parts of a processor into one file.
    path = path if path.is_file() or not whole.is_file() else whole
    said = read_json(path) if path.is_file() else {}
    said = said if path != whole else said.get("image_processor")
    # All published models resize to just what they read.
    default = Preprocessing(resize=config.image_size, crop=config.image_size)
    preprocessing = _preprocessing(path, said) if said else default
    if preprocessing.crop != config.image_size:
        raise ValueError(f"{path}: images are cut to {preprocessing.crop} pixels, the model reads {config.image_size}")
    return module, params, preprocessing


def clip_table(config: ClipVisionConfig) -> dict[str, tuple[str, ...]]:
    """Table of `nqf.models.clip.ClipVision` for `nqf.interop.tensors`."""
    tower = "vision_model"
    table = {
        f"{tower}.embeddings.class_embedding": ("class_embedding",),
        f"{tower}.embeddings.patch_embedding.weight": ("patch_embedding", "kernel"),
        f"{tower}.embeddings.position_embedding.weight": ("position_embedding", "embedding"),
        "visual_projection.weight": ("visual_projection", "kernel"),
    }
    # "layrnorm" is how the published weights spell it.
    for name in ("pre_layrnorm", "post_layernorm"):
        table |= layer_norm(f"{tower}.{name}", (name,))
    for layer in range(config.num_hidden_layers):
        source = f"{tower}.encoder.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            table |= linear(f"{source}.self_attn.{name}", (f"layer_{layer}_{name}",))
        for name in ("fc1", "fc2"):
            table |= linear(f"{source}.mlp.{name}", (f"layer_{layer}_{name}",))
        for name in ("layer_norm1", "layer_norm2"):
            table |= layer_norm(f"{source}.{name}", (f"layer_{layer}_{name}",))
    return table


def _preprocessing(path: Path, config: dict[str, Any]) -> Preprocessing:
    understood(config, CLIP_IMAGES, where=path)
    size, crop, default = config.get("size", 224), config.get("crop_size", 224), Preprocessing()
    # Older files have a number where newer ones have a dictionary.
    resize = size.get("shortest_edge") if isinstance(size, dict) else size
    if isinstance(crop, dict):
        crop = crop["height"] if crop.get("height") == crop.get("width") else None
    flags = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
    off = [flag for flag in flags if config.get(flag, True) is False]
    bicubic = config.get("resample", Image.Resampling.BICUBIC) == Image.Resampling.BICUBIC
    factor = config.get("rescale_factor", 1 / 255)
    if off or not bicubic or not resize or not crop or crop > resize or abs(factor - 1 / 255) > 1e-9:
        raise ValueError(f"{path}: not CLIP's preprocessing (bicubic, shorter edge, square center crop, normalization)")
    mean, std = config.get("image_mean", default.mean), config.get("image_std", default.std)
    return Preprocessing(resize=resize, crop=crop, mean=tuple(mean), std=tuple(std))
