"""Whitening: unit variance along uncorrelated axes, kept on disk, bounded by the rank; fields beside each other."""

from pathlib import Path

import numpy as np

from nqf.fields.tables import FieldTable
from nqf.fields.whitening import field_features, fit_whitening, load_whitenings, save_whitenings


def table(values: np.ndarray) -> FieldTable:
    return FieldTable(values=values, rows=np.arange(len(values), dtype=np.int32), modality="text")


def test_components_are_uncorrelated_and_of_equal_variance(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(2_000, 12)) @ rng.normal(size=(12, 12)) + rng.normal(size=12)
    whitening = fit_whitening(table(values.astype(np.float16)), 8)
    white = whitening.apply(values.astype(np.float16))
    np.testing.assert_allclose(white.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(white.T @ white / len(white), np.eye(8) / 8, atol=1e-3)
    # Names of fields are the user's.
    save_whitenings(tmp_path / "whitening.npz", {"a/b ü": whitening, "_candidate": fit_whitening(table(values), 3)})
    loaded = load_whitenings(tmp_path / "whitening.npz")
    assert list(loaded) == ["a/b ü", "_candidate"]
    np.testing.assert_array_equal(loaded["a/b ü"].apply(values), whitening.apply(values))


def test_no_more_components_than_directions() -> None:
    rng = np.random.default_rng(0)
    flat = rng.normal(size=(300, 3)) @ rng.normal(size=(3, 10))
    assert fit_whitening(table(flat.astype(np.float32)), 8).matrix.shape == (10, 3)
    alike = fit_whitening(table(np.ones((5, 4), np.float16)), 8)
    np.testing.assert_array_equal(alike.apply(np.ones((2, 4))), np.zeros((2, 1)))


def test_fields_stand_beside_each_other_with_the_same_variance_and_nothing_where_they_are_missing() -> None:
    rng = np.random.default_rng(0)
    values = {name: 100 * scale * rng.normal(size=(2_000, width)) for name, width, scale in (("a", 6, 1), ("b", 3, 9))}
    whitenings = {name: fit_whitening(table(vectors), 4) for name, vectors in values.items()}
    present = {"a": rng.random(2_000) < 0.7, "b": np.ones(2_000, bool)}
    features = field_features(whitenings, {name: (values[name], present[name]) for name in values})
    assert (features.shape, features.dtype) == ((2_000, 4 + 3), np.float16)
    features = features.astype(np.float32)
    np.testing.assert_array_equal(features[~present["a"], :4], 0)
    np.testing.assert_allclose(features[present["a"], :4].std(axis=0), 1, atol=0.05)
    np.testing.assert_allclose(features[:, 4:].std(axis=0), 1, atol=0.01)
