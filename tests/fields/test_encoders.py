"""The light field encoders: what survives, what is unreadable, and that a saved encoder is the same encoder."""

from __future__ import annotations

import calendar
import dataclasses
import datetime

import numpy as np
import polars as pl
import pytest
from field_frames import DTYPES, FIELDS, random_frame
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import sparse

from nqf.config import FieldsConfig
from nqf.data.schema import Field
from nqf.fields import image
from nqf.fields.category import gaussian_vectors
from nqf.fields.encoder import CacheError
from nqf.fields.number import NumberEncoder
from nqf.fields.registry import light_encoder, load_encoder
from nqf.fields.text import truncated_svd
from nqf.fields.time import DAY, calendar_phases

CONFIG = FieldsConfig(text_width=16, image_width=4, category_width=32)
PRICE = Field(name="price", modality="number", columns=("price",))


def fitted(field: Field, values: list, config: FieldsConfig = CONFIG):
    series = pl.Series(values, dtype=DTYPES.get(field.name))
    return light_encoder(field.modality).fit(lambda: iter([series[:5], series[5:]]), field, config)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_saved_encoder_gives_the_same_vectors(field, tmp_path):
    values = random_frame(200, 0, tmp_path / "pictures")[field.name].drop_nulls()
    encoder = fitted(field, values)
    vectors, ok = encoder.encode(values)
    assert ok.all()
    assert vectors.shape == (len(values), encoder.width) and vectors.dtype == np.float32
    # About unit norm on average, in every modality.
    assert 0.8 < np.sqrt(np.mean(np.sum(vectors**2, axis=1))) < 1.2
    (tmp_path / "saved").mkdir()
    encoder.save(tmp_path / "saved")
    loaded = load_encoder(tmp_path / "saved", field, CONFIG)
    assert loaded.identity == encoder.identity
    np.testing.assert_array_equal(loaded.encode(values)[0], vectors)


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_a_value_is_encoded_alike_alone_and_in_a_batch(field, tmp_path):
    values = random_frame(60, 1, tmp_path)[field.name].drop_nulls()
    encoder = fitted(field, values)
    together, _ = encoder.encode(values)
    alone = np.concatenate([encoder.encode(values[row : row + 1])[0] for row in range(len(values))])
    np.testing.assert_allclose(alone, together, atol=1e-5)


def test_damaged_encoder_is_refused(tmp_path):
    fitted(PRICE, [1.0, 2.0, 3.0]).save(tmp_path)
    fitted(PRICE, [1.0, 2.0, 4.0]).save(other := tmp_path)
    np.savez(other / "state.npz", **fitted(PRICE, [1.0, 2.0, 3.0]).state)
    with pytest.raises(CacheError, match="differs"):
        load_encoder(other, PRICE, CONFIG)
    (other / "state.npz").write_bytes(b"PK")
    with pytest.raises(CacheError, match=r"state\.npz: not readable"):
        load_encoder(other, PRICE, CONFIG)


def test_encoder_of_an_unknown_kind_asks_for_its_factory(tmp_path):
    (tmp_path / "encoder.json").write_text('{"kind": "bert"}')
    with pytest.raises(CacheError, match="pass the factory"):
        load_encoder(tmp_path, PRICE, CONFIG)


# Numbers


def test_magnitude_survives():
    rng = np.random.default_rng(0)
    encoder = fitted(PRICE, list(rng.lognormal(3, 1.2, 2_000)))
    vectors, _ = encoder.encode([4.5, 9.99, 10.5, 129.99, 50_000.0])
    # The reference's normalized encoder has cosines of .9997 and .998 here (REFERENCE D34).
    assert cosine(vectors[1], vectors[3]) < 0.7
    assert cosine(vectors[0], vectors[4]) < 0.5
    assert cosine(vectors[1], vectors[2]) > 0.9
    assert np.linalg.norm(vectors[1] - vectors[3]) > 3 * np.linalg.norm(vectors[1] - vectors[2])


@settings(max_examples=60, deadline=None)
@given(
    sample=st.lists(st.floats(-1e6, 1e6) | st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=40),
    log=st.sampled_from([None, True, False]),
    low=st.floats(-1e9, 1e9),
    step=st.floats(1e-3, 1e9),
)
@example(sample=[0.0, 2.2250738585e-313], log=None, low=0.0, step=1.0)
@example(sample=[-1.7e308, 1.7e308], log=False, low=0.0, step=1.0)
def test_numbers_are_finite_and_their_first_component_never_falls(sample, log, low, step):
    encoder = NumberEncoder.fit(
        lambda: iter([pl.Series(sample, dtype=pl.Float64)]),
        Field(name="x", modality="number", columns=("x",), log=log),
        CONFIG,
    )
    vectors, ok = encoder.encode([low, low + step, *sample])
    assert ok.all() and np.isfinite(vectors).all()
    assert vectors[0, 0] <= vectors[1, 0]
    assert vectors[0, 1] <= vectors[1, 1]


def test_numbers_beyond_the_fitted_range_still_differ():
    vectors, _ = fitted(PRICE, list(np.linspace(0, 100, 500))).encode([200.0, 2_000.0, 20_000.0])
    assert np.all(np.diff(vectors[:, 0]) > 0.1)
    assert vectors[2, 0] < 20


def test_scale_is_chosen_by_skew_and_by_the_schema():
    skewed, even = list(np.random.default_rng(0).lognormal(3, 1.5, 1_000)), list(np.linspace(1, 5, 50))
    assert fitted(PRICE, skewed).state["log"]
    assert not fitted(PRICE, even).state["log"]
    assert not fitted(PRICE, [-x for x in skewed]).state["log"]
    assert not fitted(Field(name="price", modality="number", columns=("p",), log=False), skewed).state["log"]


def test_unreadable_numbers_are_not_zero_dollars():
    vectors, ok = fitted(PRICE, [1.0, 2.0]).encode([float("nan"), float("inf"), 0.0])
    assert ok.tolist() == [False, False, True]
    assert np.isfinite(vectors).all()


# Text


def test_related_texts_are_near_and_new_words_are_read_by_their_parts():
    texts = [f"{a} {b}" for a in ("red", "blue", "green") for b in ("cotton shirt", "silk scarf", "leather boots")] * 2
    # As many components as texts would whiten all of them to equal distances.
    encoder = fitted(FIELDS[0], texts, dataclasses.replace(CONFIG, text_width=4))
    vectors, ok = encoder.encode(["red cotton shirt", "blue cotton shirt", "blue leather boots", "cottons", "東京"])
    assert ok.tolist() == [True] * 4 + [False]
    assert cosine(vectors[0], vectors[1]) > cosine(vectors[0], vectors[2])
    assert cosine(vectors[3], vectors[0]) > cosine(vectors[3], vectors[2])
    assert not vectors[4].any()


def test_text_is_read_to_its_longest_length():
    short = Field(name="title", modality="text", columns=("title",), max_length=2)
    vectors, _ = fitted(short, ["red shirt", "blue shirt", "red hat", "blue hat"]).encode(["red hat", "red hat blue"])
    np.testing.assert_array_equal(vectors[0], vectors[1])


def test_texts_longer_than_a_slice_are_not_mixed_up(monkeypatch):
    texts = random_frame(50, 3)["title"].drop_nulls()
    encoder = fitted(FIELDS[0], texts)
    whole, _ = encoder.encode(texts)
    monkeypatch.setattr("nqf.fields.text.CHARACTERS", 30)
    np.testing.assert_allclose(encoder.encode(texts)[0], whole, atol=1e-6)


@pytest.mark.parametrize("texts", [["word"], ["...", "!"], ["a", "a b"], ["x\ny", "x\ty"]])
def test_tiny_and_empty_vocabularies(texts):
    encoder = fitted(FIELDS[0], texts)
    vectors, ok = encoder.encode(texts)
    assert np.isfinite(vectors).all()
    assert ok.tolist() == [any(character.isalnum() for character in text) for text in texts]


def test_vocabulary_is_bounded():
    texts = [" ".join(f"w{(i * j) % 97}" for j in range(9)) for i in range(300)]
    encoder = fitted(FIELDS[0], texts, FieldsConfig(text_width=8, text_features=40))
    words = encoder.state["words"].tobytes().count(b"\n") + 1
    assert words == 20
    assert words + len(encoder.state["pairs"]) == 40


def test_singular_vectors_equal_the_dense_decomposition():
    rng = np.random.default_rng(0)
    dense = (rng.standard_normal((120, 12)) * 0.5 ** np.arange(12)) @ rng.standard_normal((12, 90))
    matrix = sparse.csr_matrix(dense.astype(np.float32))
    _, expected, right = np.linalg.svd(matrix.toarray().astype(np.float64), full_matrices=False)
    singular, vectors = truncated_svd(matrix, 6)
    np.testing.assert_allclose(singular, expected[:6], rtol=1e-5)
    np.testing.assert_allclose(np.abs(np.sum(vectors.T * right[:6], axis=1)), 1, atol=1e-4)
    # No direction is made up where the rank is lower than the width.
    rank_two = sparse.csr_matrix((rng.random((30, 2)) @ rng.random((2, 20))).astype(np.float32))
    assert truncated_svd(rank_two, 6)[1].shape == (20, 2)


# Categories, times, places, vectors


def test_category_vectors_are_fixed_directions():
    names = [f"value {index}" for index in range(400)]
    vectors = gaussian_vectors(names, 256)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    products = (vectors @ vectors.T)[~np.eye(400, dtype=bool)]
    # Independent directions have products of mean 0 and deviation 1 / sqrt(width).
    assert abs(products.mean()) < 0.005
    assert abs(products.std() * 16 - 1) < 0.05
    # Cached vectors must outlive versions of NumPy and this program: a change of these numbers is a new format.
    np.testing.assert_allclose(gaussian_vectors(["acme"], 4)[0], GOLDEN_ACME, atol=1e-6)


GOLDEN_ACME = [-0.7092038, 0.6052476, -0.3002785, -0.2013406]


def test_sets_of_categories_have_no_order():
    encoder = fitted(FIELDS[1], [["a"]])
    vectors, ok = encoder.encode([["a", "b"], ["b", "a", "a"], ["a"], [], [None]])
    assert ok.tolist() == [True, True, True, False, False]
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-6)
    assert 0.4 < cosine(vectors[0], vectors[2]) < 0.95


@settings(max_examples=200, deadline=None)
@given(st.datetimes(datetime.datetime(1900, 1, 1), datetime.datetime(2200, 1, 1)))
def test_calendar_phases_equal_the_standard_library(when):
    when = when.replace(microsecond=0)
    seconds = int((when - datetime.datetime(1970, 1, 1)).total_seconds())
    day, week, month, year = calendar_phases(np.array([seconds]))[0]
    of_day = (when.hour * 3_600 + when.minute * 60 + when.second) / DAY
    assert day == pytest.approx(of_day, abs=1e-9)
    assert week * 7 == pytest.approx(when.weekday() + of_day, abs=1e-9)
    new_year = datetime.datetime(when.year, 1, 1)
    assert year == pytest.approx((when - new_year) / (datetime.datetime(when.year + 1, 1, 1) - new_year), abs=1e-9)
    length = calendar.monthrange(when.year, when.month)[1]
    assert month * length == pytest.approx(when.day - 1 + of_day, abs=1e-9)


def test_times_an_hour_apart_differ_in_today_s_epoch():
    encoder = fitted(FIELDS[3], [1_500_000_000, 1_700_000_000, 1_600_000_000])
    vectors, _ = encoder.encode([1_700_000_000, 1_700_003_600])
    assert np.abs(vectors[0] - vectors[1]).max() > 0.01


def test_places_meet_at_the_date_line_and_the_poles():
    encoder = fitted(FIELDS[4], [[0.0, 0.0]])
    vectors, ok = encoder.encode([[10.0, 180.0], [10.0, -180.0], [90.0, 0.0], [90.0, 77.0], [91.0, 0.0], [1.0]])
    assert ok.tolist() == [True] * 4 + [False] * 2
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-5)
    np.testing.assert_allclose(vectors[2], vectors[3], atol=1e-5)
    # London is nearer to Paris than to Sydney, and two ends of a city are still told apart.
    london, paris, sydney, outskirts = encoder.encode([[51.5, -0.1], [48.9, 2.4], [-33.9, 151.2], [51.4, -0.3]])[0]
    assert cosine(london, paris) > cosine(london, sydney)
    assert 0.001 < np.linalg.norm(london - outskirts) < np.linalg.norm(london - paris)


def test_vectors_keep_their_ratios_and_bad_ones_are_unreadable():
    encoder = fitted(FIELDS[6], [[3.0, 4.0], [6.0, 8.0]])
    vectors, ok = encoder.encode([[3.0, 4.0], [6.0, 8.0], [1.0], [float("nan"), 1.0]])
    assert ok.tolist() == [True, True, False, False]
    np.testing.assert_allclose(vectors[1], 2 * vectors[0], atol=1e-6)


# Images


def test_unreadable_images_are_counted_and_not_decoded(tmp_path, monkeypatch):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "good.png")
    Image.new("LA", (40, 30), (0, 0)).save(tmp_path / "clear.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    (tmp_path / "text.png").write_text("not an image")
    Image.new("L", (200, 100)).save(tmp_path / "large.png")
    monkeypatch.setattr(image, "MAX_PIXELS", 200 * 100 - 1)
    names = ["good.png", "clear.png", "cut.png", "text.png", "large.png", "absent.png"]
    pixels, ok = image.thumbnails([*(str(tmp_path / name) for name in names), "https://example.org/a.png"])
    assert ok.tolist() == [True, True] + [False] * 5
    np.testing.assert_array_equal(pixels[0].reshape(-1, 3)[0], [1, 0, 0])
    assert (pixels[1] == 1).all()


def test_colors_are_told_apart(tmp_path):
    frame = random_frame(80, 5, tmp_path)
    encoder = fitted(FIELDS[5], frame["picture"].drop_nulls())
    vectors, _ = encoder.encode(frame["picture"].drop_nulls().unique())
    distances = np.linalg.norm(vectors[:, None] - vectors[None], axis=2)
    assert distances[~np.eye(len(vectors), dtype=bool)].min() > 0.3
