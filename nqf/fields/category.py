"""Categories: a fixed pseudo-random unit vector per value, averaged over a set of values."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
from scipy import sparse

from nqf.config import FieldsConfig
from nqf.data.schema import Field
from nqf.fields.encoder import LightEncoder, Values, unit_rows
from nqf.fields.hashing import mix, string_keys


class CategoryEncoder(LightEncoder):
    """Encodes sets of strings; nothing is fitted, so a value met for the first time is as good as any other."""

    kind = "category-hash"

    def __init__(self, options: dict[str, Any], state: dict[str, np.ndarray]):
        super().__init__(options, state)
        self.width = options["width"]

    @classmethod
    def settings(cls, field: Field, config: FieldsConfig) -> dict[str, Any]:
        return {"width": config.category_width}

    @classmethod
    def fit(cls, values: Values, field: Field, config: FieldsConfig) -> CategoryEncoder:
        return cls(cls.settings(field, config), {})

    def encode(self, values: pl.Series | list[list[str]]) -> tuple[np.ndarray, np.ndarray]:
        sets = pl.Series(values, dtype=pl.List(pl.String)).list.drop_nulls().list.unique()
        long = pl.DataFrame({"row": np.arange(len(sets)), "value": sets}).explode("value").drop_nulls()
        names = long["value"].unique(maintain_order=True)
        column = long.join(names.to_frame("value").with_row_index("at"), on="value", how="left", maintain_order="left")
        ones = np.ones(len(long), np.float32)
        member = sparse.csr_matrix((ones, (long["row"], column["at"])), shape=(len(sets), len(names)))
        return unit_rows(member @ gaussian_vectors(names.to_list(), self.width)), np.diff(member.indptr) > 0


def gaussian_vectors(names: list[str], width: int) -> np.ndarray:
    """Unit vectors in random directions, float32 [n, width], a function of the name alone.

    A counter hashed with the name's digest feeds Box and Muller's transform; NumPy's generators do not promise
    the same stream in the next version (NEP 19), and cached vectors must outlive it.
    """
    seeds = string_keys(names)
    counters = np.arange(2 * width, dtype=np.uint64)
    bits = mix(mix(seeds[:, :1] + counters) ^ seeds[:, 1:])
    # 53 random bits, moved off zero, whose logarithm is infinite.
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    radius, angle = np.sqrt(-2 * np.log(uniform[:, :width])), 2 * np.pi * uniform[:, width:]
    return unit_rows(radius * np.cos(angle))
