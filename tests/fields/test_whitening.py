"""Whitening: unit variance along uncorrelated axes, kept on disk, bounded by the rank."""

from pathlib import Path

import numpy as np

from nqf.fields.tables import FieldTable
from nqf.fields.whitening import fit_whitening, load_whitening


def table(values: np.ndarray) -> FieldTable:
    return FieldTable(values=values, rows=np.arange(len(values), dtype=np.int32), modality="text")


def test_components_are_uncorrelated_and_of_equal_variance(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(2_000, 12)) @ rng.normal(size=(12, 12)) + rng.normal(size=12)
    whitening = fit_whitening(table(values.astype(np.float16)), 8)
    white = whitening.apply(values.astype(np.float16))
    np.testing.assert_allclose(white.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(white.T @ white / len(white), np.eye(8) / 8, atol=1e-3)
    whitening.save(tmp_path / "text.npz")
    np.testing.assert_array_equal(load_whitening(tmp_path / "text.npz").apply(values), whitening.apply(values))


def test_no_more_components_than_directions() -> None:
    rng = np.random.default_rng(0)
    flat = rng.normal(size=(300, 3)) @ rng.normal(size=(3, 10))
    assert fit_whitening(table(flat.astype(np.float32)), 8).matrix.shape == (10, 3)
    alike = fit_whitening(table(np.ones((5, 4), np.float16)), 8)
    np.testing.assert_array_equal(alike.apply(np.ones((2, 4))), np.zeros((2, 1)))
