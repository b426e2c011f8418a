"""Times: a trend on the field's own scale and cyclic calendar parts, all from int64 unix seconds."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from nqf.config import FieldsConfig
from nqf.data.schema import Field
from nqf.fields.encoder import LightEncoder, Values
from nqf.fields.number import Scaler

DAY = 86_400
# Share of the squared norm that the trend has; the four cycles share the rest.
TREND_ENERGY = 0.7


class TimeEncoder(LightEncoder):
    """Encodes int64 seconds: trend features as of a number, then sine and cosine of day, week, month and year.

    Seconds never pass through float32, whose steps at today's epoch are two minutes.
    """

    kind = "time-trend-cycles"

    def __init__(self, options: dict[str, Any], state: dict[str, np.ndarray]):
        super().__init__(options, state)
        self._scaler = Scaler(self.state, options["frequencies"])
        self.width = self._scaler.width + 8

    @classmethod
    def settings(cls, field: Field, config: FieldsConfig) -> dict[str, Any]:
        return {"frequencies": config.number_frequencies, "fit_sample": config.fit_sample}

    @classmethod
    def fit(cls, values: Values, field: Field, config: FieldsConfig) -> TimeEncoder:
        options = cls.settings(field, config)
        # float64 holds every second within 285 million years of 1970.
        sample = np.concatenate([np.zeros(0), *(chunk.to_numpy().astype(np.float64) for chunk in values())])
        return cls(options, Scaler.fit(sample, log=False, frequencies=options["frequencies"]).state)

    def encode(self, values: pl.Series | list[int]) -> tuple[np.ndarray, np.ndarray]:
        seconds = pl.Series(values, dtype=pl.Int64).to_numpy()
        trend = self._scaler.features(seconds.astype(np.float64)) * np.sqrt(TREND_ENERGY)
        angles = 2 * np.pi * calendar_phases(seconds)
        cycles = np.concatenate([np.sin(angles), np.cos(angles)], axis=1) * np.sqrt((1 - TREND_ENERGY) / 4)
        return np.concatenate([trend, cycles], axis=1).astype(np.float32), np.ones(len(seconds), bool)


def calendar_phases(seconds: np.ndarray) -> np.ndarray:
    """Position in the UTC day, week (from Monday), month and year, each in [0, 1); float64 [n, 4]."""
    days = seconds // DAY
    of_day = (seconds - days * DAY) / DAY
    date = days.astype("datetime64[D]")
    month, year = date.astype("datetime64[M]"), date.astype("datetime64[Y]")
    # 1970-01-01 was a Thursday.
    phases = [of_day, ((days + 3) % 7 + of_day) / 7]
    for start, end in ((month, month + 1), (year, year + 1)):
        first, last = start.astype("datetime64[D]").astype(np.int64), end.astype("datetime64[D]").astype(np.int64)
        phases.append((days - first + of_day) / (last - first))
    return np.stack(phases, axis=1)
