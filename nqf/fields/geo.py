"""Places: the point on the unit sphere and its coordinates at several scales."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from nqf.config import FieldsConfig
from nqf.data.schema import Field
from nqf.fields.encoder import LightEncoder, Values

# The finest octave has a period of 2 / 2**9 earth radii, about 25 km.
OCTAVES = 10


class GeoEncoder(LightEncoder):
    """Encodes [latitude, longitude] in degrees; nothing is fitted, and every vector has norm 1.

    Octaves are taken of the sphere's coordinates and not of the angles, so nothing jumps at the date line or
    the poles.
    """

    kind = "geo-sphere"
    width = 3 + 6 * OCTAVES

    @classmethod
    def settings(cls, field: Field, config: FieldsConfig) -> dict[str, Any]:
        return {"octaves": OCTAVES}

    @classmethod
    def fit(cls, values: Values, field: Field, config: FieldsConfig) -> GeoEncoder:
        return cls(cls.settings(field, config), {})

    def encode(self, values: pl.Series | list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
        degrees = pl.Series(values, dtype=pl.List(pl.Float64))
        degrees_Nx2 = np.stack([degrees.list.get(i, null_on_oob=True).to_numpy() for i in range(2)], axis=1)
        lat, lon = degrees_Nx2.T.astype(np.float64)
        ok = np.isfinite(lat) & np.isfinite(lon) & (np.abs(lat) <= 90) & (np.abs(lon) <= 180)
        lat, lon = np.radians(np.where(ok, lat, 0)), np.radians(np.where(ok, lon, 0))
        point = np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=1)
        octaves = np.arange(OCTAVES)
        # Half the energy is the point itself; each octave has half of the one before.
        energies = 2.0**-octaves / np.sum(2.0**-octaves) / 2
        angles = np.pi * 2.0**octaves * point[:, :, None]
        amplitudes = np.sqrt(energies / 3)
        scales = np.concatenate([amplitudes * np.sin(angles), amplitudes * np.cos(angles)], axis=2)
        vectors = np.concatenate([point * np.sqrt(0.5), scales.reshape(len(point), -1)], axis=1)
        return vectors.astype(np.float32), ok
