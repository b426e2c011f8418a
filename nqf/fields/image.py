"""Images without a download: principal components of small thumbnails of local files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from PIL import Image

from nqf.config import FieldsConfig
from nqf.data.schema import Field
from nqf.fields.encoder import LightEncoder, Values, rms_scale

# Side of a thumbnail in pixels.
SIDE = 24
# Larger pictures are refused before they are decoded: 64 megapixels are 192 MB of RGB.
MAX_PIXELS = 64_000_000
# Pictures of catalogues. Pillow knows more, and hands some of them (EPS) to other programs.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# Else Pillow loads a decoder when the first picture needs it, which two threads must not do at once.
Image.init()
# Thumbnails have 1,728 numbers; more samples do not change their first components.
FIT_IMAGES = 10_000
# Thumbnails decoded at a time.
BATCH = 1_024


class ImageEncoder(LightEncoder):
    """Encodes paths of local files; what is missing, damaged, too large or a URL is unreadable."""

    kind = "thumbnail-pca"

    def __init__(self, options: dict[str, Any], state: dict[str, np.ndarray]):
        super().__init__(options, state)
        self.width = state["components"].shape[1]

    @classmethod
    def settings(cls, field: Field, config: FieldsConfig) -> dict[str, Any]:
        return {"width": config.image_width, "side": SIDE, "fit_sample": min(config.fit_sample, FIT_IMAGES)}

    @classmethod
    def fit(cls, values: Values, field: Field, config: FieldsConfig) -> ImageEncoder:
        # scikit-learn takes a second to import and encoding does not need it.
        from sklearn.decomposition import IncrementalPCA

        settings = cls.settings(field, config)
        mean, components = np.zeros(SIDE * SIDE * 3, np.float32), np.zeros((SIDE * SIDE * 3, 1), np.float32)
        scale, pending, pca = 1.0, np.zeros((0, SIDE * SIDE * 3), np.float32), None
        for paths in _batches(values()):
            pixels, ok = thumbnails(paths)
            pending = np.concatenate([pending, pixels[ok]])
            # A batch must have as many rows as there are components, so the last one waits for company.
            if len(pending) >= 2 * max(BATCH, config.image_width):
                pca = pca or IncrementalPCA(config.image_width)
                pca.partial_fit(pending[: len(pending) // 2])
                pending = pending[len(pending) // 2 :]
        # A single picture has no components: its vector is zero, as are those of pictures that are all alike.
        if len(pending) > 1:
            pca = pca or IncrementalPCA(min(config.image_width, *pending.shape))
            pca.partial_fit(pending)
            mean, components = np.asarray(pca.mean_, np.float32), np.asarray(pca.components_, np.float32).T
            scale = rms_scale((pending - mean) @ components)
        return cls(
            settings,
            {"mean": mean, "components": np.ascontiguousarray(components), "scale": np.asarray(scale, np.float64)},
        )

    def encode(self, values: pl.Series | Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        vectors, readable = [np.zeros((0, self.width), np.float32)], [np.zeros(0, bool)]
        for paths in _batches([pl.Series(values, dtype=pl.String)]):
            pixels, ok = thumbnails(paths)
            projected = (pixels - self.state["mean"]) @ self.state["components"] * np.float32(self.state["scale"])
            vectors.append(np.where(ok[:, None], projected, 0))
            readable.append(ok)
        return np.concatenate(vectors), np.concatenate(readable)


@contextlib.contextmanager
def open_picture(path: str | Path) -> Iterator[Image.Image]:
    """A local picture, which is not decoded before it is used.

    Raises:
      OSError, ValueError: It is missing, no regular file, of none of `FORMATS`, or has more than `MAX_PIXELS`; a
        damaged one may raise anything that a decoder can.
    """
    # A pipe would never end.
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: not a file")
    with Image.open(path, formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
        yield image


def thumbnails(paths: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """RGB thumbnails in [0, 1] of local files, float32 [n, side * side * 3], and bool [n], which could be read."""
    # Pillow decodes and resizes without Python's lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(_thumbnail, paths))
    ok = np.array([pixels is not None for pixels in found], bool)
    empty = np.zeros(SIDE * SIDE * 3, np.float32)
    return np.stack([empty if pixels is None else pixels for pixels in found]) if found else empty[None][:0], ok


def _thumbnail(path: str) -> np.ndarray | None:
    try:
        with open_picture(path) as image:
            # JPEG decodes straight to a smaller size.
            image.draft("RGB", (4 * SIDE, 4 * SIDE))
            if image.mode != "RGB":
                # Transparent parts are white, as on the page they were made for.
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
            small = image.resize((SIDE, SIDE), Image.Resampling.BOX)
    except Exception:
        # A damaged file may raise anything that a decoder of forty formats can.
        return None
    return np.asarray(small, np.float32).ravel() / 255


def _batches(chunks: Iterable[pl.Series]) -> Iterator[list[str]]:
    for chunk in chunks:
        for start in range(0, len(chunk), BATCH):
            yield chunk[start : start + BATCH].to_list()
