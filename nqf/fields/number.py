"""Numbers: per-field scaling, quantile position and Fourier features, with the magnitude kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from nqf.config import FieldsConfig
from nqf.data.schema import Field
from nqf.fields.encoder import LightEncoder, Values, rms_scale

# Points of the fitted distribution function.
KNOTS = 257
# A field of non-negative numbers whose upper half spans this many times its lower half is read on a log scale.
SKEW = 4.0
_SMALLEST, _LARGEST = 1e-290, 1e150


class Scaler:
    """Features of one real variable: scaled value, quantile position, Fourier features of the position.

    The scaled value is sign(z) log(1 + |z|) of z = (t - median) / spread, with t the value or its signed
    log(1 + |x|): strictly monotone, without a bound, and tame outside the fitted range. Quantile position and
    Fourier features resolve what is dense inside the range and are constant outside it.

    Attributes:
      state: `knots`, float64, ascending, of t; `positions`, float64 in [0, 1]; `center`, `spread`, `log`, `scale`.
      frequencies: Fourier frequencies.
    """

    def __init__(self, state: dict[str, np.ndarray], frequencies: int):
        self.state = state
        self.frequencies = frequencies
        self.width = 2 + 2 * frequencies

    @classmethod
    def fit(cls, values: np.ndarray, *, log: bool | None, frequencies: int) -> Scaler:
        """Fits on finite float64 values; `log` None decides by the skew of the values."""
        if not len(values):
            values = np.zeros(1)
        values = _tame(values)
        low, median, high = np.quantile(values, [0.01, 0.5, 0.99])
        if log is None:
            log = bool(values.min() >= 0 and high - median > SKEW * (median - low) and high > 0)
        t = _signed_log(values) if log else values
        quarters = np.quantile(t, [0.25, 0.5, 0.75])
        # 1.349 is the interquartile range of a standard normal variable.
        spread = (quarters[2] - quarters[0]) / 1.349 or float(np.std(t)) or 1.0
        positions = np.linspace(0, 1, KNOTS)
        knots, first, counts = np.unique(np.quantile(t, positions), return_index=True, return_counts=True)
        state = {
            "knots": knots,
            # A value that fills several knots stands in the middle of them.
            "positions": positions[first] + (counts - 1) / 2 * positions[1],
            "center": np.float64(quarters[1]),
            "spread": np.float64(spread),
            "log": np.bool_(log),
            "scale": np.float64(1),
        }
        scaler = cls(state, frequencies)
        state["scale"] = np.float64(rms_scale(scaler.features(values)))
        return scaler

    def features(self, values: np.ndarray) -> np.ndarray:
        """Features of finite float64 [n], float32 [n, width], of root-mean-square norm 1 over the fitted values."""
        state = self.state
        t = _signed_log(_tame(values)) if state["log"] else _tame(values)
        with np.errstate(over="ignore"):
            standard = np.nan_to_num((t - state["center"]) / state["spread"])
        scaled = _signed_log(standard)
        position = 2 * np.interp(t, state["knots"], state["positions"]) - 1
        octaves = np.arange(self.frequencies)
        angles = np.pi / 2 * 2.0**octaves * position[:, None]
        # Energy halves with each octave: near values stay near, the finest octave still tells them apart.
        amplitudes = 2.0 ** (-octaves / 2)
        parts = [scaled[:, None], position[:, None], amplitudes * np.sin(angles), amplitudes * np.cos(angles)]
        return (np.concatenate(parts, axis=1) * state["scale"]).astype(np.float32)


class NumberEncoder(LightEncoder):
    """Encodes float64 values; what is not finite is unreadable."""

    kind = "number-quantile-fourier"

    def __init__(self, options: dict[str, Any], state: dict[str, np.ndarray]):
        super().__init__(options, state)
        self._scaler = Scaler(self.state, options["frequencies"])
        self.width = self._scaler.width

    @classmethod
    def settings(cls, field: Field, config: FieldsConfig) -> dict[str, Any]:
        return {"frequencies": config.number_frequencies, "log": field.log, "fit_sample": config.fit_sample}

    @classmethod
    def fit(cls, values: Values, field: Field, config: FieldsConfig) -> NumberEncoder:
        options = cls.settings(field, config)
        sample = np.concatenate([np.zeros(0), *(chunk.to_numpy() for chunk in values())])
        sample = sample[np.isfinite(sample)]
        return cls(options, Scaler.fit(sample, log=field.log, frequencies=options["frequencies"]).state)

    def encode(self, values: pl.Series | list[float]) -> tuple[np.ndarray, np.ndarray]:
        numbers = pl.Series(values, dtype=pl.Float64).to_numpy()
        ok = np.isfinite(numbers)
        return self._scaler.features(np.where(ok, numbers, 0.0)), ok


def _signed_log(x: np.ndarray) -> np.ndarray:
    return np.sign(x) * np.log1p(np.abs(x))


def _tame(x: np.ndarray) -> np.ndarray:
    # So that neither squares overflow nor the inverse of a difference.
    return np.where(np.abs(x) < _SMALLEST, 0.0, np.clip(x, -_LARGEST, _LARGEST))
