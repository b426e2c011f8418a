"""Precomputed vectors: passed through, scaled to unit root-mean-square norm."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from nqf.config import FieldsConfig
from nqf.data.schema import Field
from nqf.fields.encoder import LightEncoder, Values, rms_scale


class VectorEncoder(LightEncoder):
    """Encodes float lists of one length; one factor for the field, so lengths of vectors keep their ratios."""

    kind = "vector-rms"

    def __init__(self, options: dict[str, Any], state: dict[str, np.ndarray]):
        super().__init__(options, state)
        self.width = int(state["width"])

    @classmethod
    def settings(cls, field: Field, config: FieldsConfig) -> dict[str, Any]:
        return {"fit_sample": config.fit_sample}

    @classmethod
    def fit(cls, values: Values, field: Field, config: FieldsConfig) -> VectorEncoder:
        width, rows, energy = 0, 0, 0.0
        for chunk in values():
            width = width or len(chunk[0])
            vectors, ok = _matrix(chunk, width)
            rows += int(ok.sum())
            energy += float(np.sum(np.square(vectors[ok], dtype=np.float64)))
        # One row of the mean energy has the same root-mean-square norm.
        scale = rms_scale(np.full((1, 1), np.sqrt(energy / max(rows, 1))))
        return cls(
            cls.settings(field, config),
            {"scale": np.asarray(scale, np.float64), "width": np.asarray(max(width, 1), np.int64)},
        )

    def encode(self, values: pl.Series | list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
        vectors, ok = _matrix(pl.Series(values, dtype=pl.List(pl.Float32)), self.width)
        return vectors * np.float32(self.state["scale"]), ok


def _matrix(values: pl.Series, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the right length, all finite, as float32 [n, width] and bool [n]; zero elsewhere."""
    fits = (values.list.len() == width).fill_null(False).to_numpy()
    vectors = np.zeros((len(values), width), np.float32)
    if fits.any():
        vectors[fits] = values.filter(fits).explode().to_numpy().reshape(-1, width)
    ok = fits & np.isfinite(vectors).all(axis=1)
    return np.where(ok[:, None], vectors, 0), ok
