"""The field cache: what is encoded when, what is refused, and that it holds what the encoders say."""

from __future__ import annotations

import dataclasses
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from field_frames import DTYPES, FIELDS, FrameCatalogue, random_frame
from hypothesis import given, settings
from hypothesis import strategies as st

from nqf.config import FieldsConfig
from nqf.fields.build import build
from nqf.fields.cache import candidate_text, encode_items, open_cache
from nqf.fields.category import CategoryEncoder
from nqf.fields.encoder import CacheError, LightEncoder
from nqf.fields.geo import GeoEncoder
from nqf.fields.image import ImageEncoder
from nqf.fields.number import NumberEncoder
from nqf.fields.text import TextEncoder
from nqf.fields.time import TimeEncoder
from nqf.fields.vector import VectorEncoder

CONFIG = FieldsConfig(text_width=8, image_width=3, category_width=16, chunk_rows=16)
ROOT = Path(__file__).parents[2]
LIGHT = (TextEncoder, CategoryEncoder, NumberEncoder, TimeEncoder, GeoEncoder, ImageEncoder, VectorEncoder)


@pytest.fixture
def encoded(monkeypatch):
    """Lists (encoder kind, number of values) of every call to `encode`."""
    calls = []
    for encoder in LIGHT:

        def counted(self, values, encode=encoder.encode):
            calls.append((self.kind, len(values)))
            return encode(self, values)

        monkeypatch.setattr(encoder, "encode", counted)
    return calls


def everything(cache, rows: np.ndarray) -> dict[str, np.ndarray]:
    """All vectors of some items, NaN where missing."""
    found = {}
    for name in cache.names:
        vectors, present = cache.gather(name, rows)
        found[name] = np.where(present[:, None], vectors, np.nan)
    return found


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        # Products of other shapes round differently; a step of float16 near 1 is .001.
        np.testing.assert_allclose(a[name], b[name], atol=2e-3, err_msg=name)


def test_cache_holds_what_the_encoders_say(tmp_path):
    frame = random_frame(70, 0, tmp_path / "pictures")
    cache = build(FrameCatalogue(frame), tmp_path / "cache", CONFIG)
    assert cache.names == tuple(field.name for field in FIELDS)
    for name in cache.names:
        vectors, present = cache.gather(name, np.arange(70))
        np.testing.assert_array_equal(present, frame[name].is_not_null().to_numpy())
        assert not vectors[~present].any()
        expected, ok = cache.encoder(name).encode(frame[name].drop_nulls())
        assert ok.all()
        np.testing.assert_allclose(vectors[present], expected, atol=2e-3)
        table = cache.table(name)
        assert table.values.dtype == np.float16 and table.rows.dtype == np.int32
        assert isinstance(table.values, np.memmap)
        # Each distinct value is there once, at the encoder's own width.
        distinct = frame[name].drop_nulls()
        distinct = distinct.list.unique().list.sort() if cache.modalities[name] == "category" else distinct
        assert table.values.shape == (distinct.n_unique(), cache.widths[name])
    assert cache.warnings == ()


def test_unchanged_catalogue_encodes_nothing_and_writes_the_same_manifest(tmp_path, encoded):
    catalogue = FrameCatalogue(random_frame(40, 0, tmp_path / "pictures"))
    build(catalogue, tmp_path / "cache", CONFIG, reviews=["fine", None])
    files = {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    encoded.clear()
    build(catalogue, tmp_path / "cache", CONFIG, reviews=["fine", None])
    assert encoded == []
    assert {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file()} == files


def test_changing_one_field_encodes_that_field_alone(tmp_path, encoded):
    frame = random_frame(40, 0, tmp_path / "pictures")
    build(FrameCatalogue(frame), tmp_path / "cache", CONFIG)
    encoded.clear()
    fields = [dataclasses.replace(field, log=False) if field.name == "price" else field for field in FIELDS]
    cache = build(FrameCatalogue(frame, tuple(fields)), tmp_path / "cache", CONFIG)
    assert {kind for kind, _ in encoded} == {NumberEncoder.kind}
    assert not cache.encoder("price").state["log"]
    encoded.clear()
    build(FrameCatalogue(frame, tuple(fields)), tmp_path / "cache", dataclasses.replace(CONFIG, category_width=8))
    assert {kind for kind, _ in encoded} == {CategoryEncoder.kind}


def test_added_items_encode_new_values_with_the_old_encoder(tmp_path, encoded):
    frame = random_frame(40, 0, tmp_path / "pictures")
    first = build(FrameCatalogue(frame), tmp_path / "cache", CONFIG)
    before = everything(first, np.arange(40))
    identities = {name: first.encoder(name).identity for name in first.names}
    new = random_frame(10, 7, tmp_path / "pictures")
    distinct = {
        name: len(set(map(str, new[name].drop_nulls().to_list())) - set(map(str, frame[name].to_list())))
        for name in ("price", "released", "place", "features")
    }
    encoded.clear()
    second = build(FrameCatalogue(pl.concat([new, frame])), tmp_path / "cache", CONFIG)
    kinds = {"price": NumberEncoder, "released": TimeEncoder, "place": GeoEncoder, "features": VectorEncoder}
    for name, kind in kinds.items():
        assert sum(count for called, count in encoded if called == kind.kind) == distinct[name], name
    assert {name: second.encoder(name).identity for name in second.names} == identities
    after = everything(second, np.arange(10, 50))
    for name in before:
        np.testing.assert_array_equal(after[name], before[name])


def test_removed_items_leave_no_values_behind(tmp_path, encoded):
    frame = random_frame(60, 0, tmp_path / "pictures")
    kept = everything(build(FrameCatalogue(frame), tmp_path / "cache", CONFIG), np.arange(20, 60))
    encoded.clear()
    cache = build(FrameCatalogue(frame[20:]), tmp_path / "cache", CONFIG)
    assert encoded == []
    for name, vectors in everything(cache, np.arange(40)).items():
        np.testing.assert_array_equal(vectors, kept[name])
        assert set(np.asarray(cache.table(name).rows)) - {-1} == set(range(len(cache.table(name).values)))
    named = {file["file"] for table in cache.manifest["tables"] for file in table["files"].values()}
    assert {f"tables/{path.name}" for path in (tmp_path / "cache" / "tables").iterdir()} == named


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**31), cut=st.integers(1, 29), chunk=st.integers(1, 40))
def test_order_chunks_and_steps_do_not_matter(tmp_path_factory, seed, cut, chunk):
    """Whatever the order of items and builds, a value has the same vector under the same encoders."""
    folder = tmp_path_factory.mktemp("cache")
    frame = random_frame(30, seed)
    build(FrameCatalogue(frame), folder, CONFIG)
    order = np.random.default_rng(seed).permutation(30)
    config = dataclasses.replace(CONFIG, chunk_rows=chunk)
    build(FrameCatalogue(frame[order[:cut]]), folder, config)
    stepwise = build(FrameCatalogue(frame[order]), folder, config)
    scratch = encode_items(stepwise, frame[order])
    for name in stepwise.names:
        vectors, present = stepwise.gather(name, np.arange(30))
        np.testing.assert_array_equal(present, scratch[name][1])
        np.testing.assert_allclose(vectors, scratch[name][0], atol=2e-3)


@pytest.mark.parametrize("permute", [False, True])
def test_fit_does_not_depend_on_order(tmp_path, permute):
    frame = random_frame(50, 3, tmp_path / "pictures")
    order = np.random.default_rng(0).permutation(50) if permute else np.arange(50)
    config = dataclasses.replace(CONFIG, fit_sample=20)
    first = build(FrameCatalogue(frame), tmp_path / "first", config)
    second = build(FrameCatalogue(frame[order]), tmp_path / "second", config)
    for name in ("price", "released", "features"):
        a, b = first.encoder(name), second.encoder(name)
        np.testing.assert_allclose(a.encode(frame[name].drop_nulls())[0], b.encode(frame[name].drop_nulls())[0], 1e-5)


# What is missing or cannot be read


def test_missing_values_are_never_vectors(tmp_path):
    frame = pl.DataFrame(
        {"item_id": ["a", "b", "c"], "price": [0.0, None, -0.0]}, schema_overrides={"price": pl.Float64}
    )
    cache = build(FrameCatalogue(frame, FIELDS[2:3], None), tmp_path, CONFIG)
    vectors, present = cache.gather("price", np.arange(3))
    assert present.tolist() == [True, False, True]
    assert vectors[0].any() and not vectors[1].any()
    np.testing.assert_array_equal(vectors[0], vectors[2])
    assert cache.candidates is None and cache.reviews is None


def test_absent_field_is_left_out_with_a_warning_and_comes_back_with_its_first_value(tmp_path):
    frame = random_frame(20, 0).with_columns(pl.lit(None, dtype=pl.Float64).alias("price"))
    catalogue = FrameCatalogue(frame, FIELDS[:3])
    cache = build(catalogue, tmp_path, CONFIG)
    assert cache.names == ("title", "brand")
    assert any("'price' is absent from every item" in warning for warning in cache.warnings)
    assert [table["unique"] for table in cache.manifest["tables"] if table["field"]["name"] == "price"] == [0]
    with pytest.raises(CacheError, match="no item has a readable value"):
        cache.table("price")
    with pytest.raises(CacheError, match="not a field of the schema"):
        cache.table("prize")
    priced = frame.with_columns(pl.lit(2.0).alias("price"))
    assert "price" in build(FrameCatalogue(priced, FIELDS[:3]), tmp_path, CONFIG).names


def test_links_alone_name_the_encoder_that_reads_them(tmp_path):
    frame = random_frame(3, 0).with_columns(pl.Series("picture", [f"https://example.org/{n}.png" for n in "abc"]))
    cache = build(FrameCatalogue(frame, [FIELDS[0], FIELDS[5]]), tmp_path / "cache", CONFIG)
    assert cache.names == ("title",) and len(cache.warnings) == 1
    assert "3 of 3 pictures are links" in cache.warnings[0] and "fields.image_encoder" in cache.warnings[0]


def test_given_candidates_stand_in_the_place_of_the_texts_and_new_items_have_none(tmp_path):
    frame = random_frame(4, 0)
    vectors = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    given_ = pl.Series([vectors[0].tolist(), None, *vectors[2:].tolist()], dtype=pl.List(pl.Float32))
    cache = build(FrameCatalogue(frame, FIELDS[:2]), tmp_path / "cache", CONFIG, candidates=given_)
    table = cache.candidates
    assert table.modality == "vector" and (np.asarray(table.rows) >= 0).tolist() == [True, False, True, True]
    made, _ = table.gather(np.array([0, 2, 3]))
    # One factor for all, so cosines are theirs.
    ratio = made / vectors[[0, 2, 3]]
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=5e-3)
    assert not encode_items(cache, frame)["_candidate"][1].any()


def test_unreadable_images_are_counted_and_tried_again(tmp_path):
    frame = random_frame(12, 0, tmp_path / "pictures")
    bad = tmp_path / "pictures" / "bad.png"
    bad.write_bytes(b"\x89PNG\r\n")
    paths = [str(bad), str(bad), "https://example.org/a.png", str(tmp_path / "none.png")]
    frame = frame.with_columns(pl.Series("picture", paths + [str(tmp_path / "pictures" / "0.png")] * 8))
    catalogue = FrameCatalogue(frame, FIELDS[5:6], None)
    cache = build(catalogue, tmp_path / "cache", CONFIG)
    assert cache.gather("picture", np.arange(12))[1].tolist() == [False] * 4 + [True] * 8
    assert "1 of 12 pictures are links, which only a CLIP model reads" in cache.warnings[0]
    assert "set fields.image_encoder" in cache.warnings[0] and "data.without: [picture]" in cache.warnings[0]
    assert cache.warnings[1:] == ("field 'picture': 3 image values could not be read and count as missing",)
    # A picture that is replaced under its old name is another value.
    bad.write_bytes((tmp_path / "pictures" / "1.png").read_bytes())
    cache = build(catalogue, tmp_path / "cache", CONFIG)
    assert cache.gather("picture", np.arange(12))[1].tolist() == [True] * 2 + [False] * 2 + [True] * 8


class _External:
    """A pretrained encoder's stand-in: not light, made by a factory."""

    width = 2

    def __init__(self, revision: str):
        self.identity = {"kind": "external", "revision": revision}
        self.seen: list[str] = []

    def encode(self, values):
        assert isinstance(values, list)
        self.seen += values
        vectors = np.array([[len(value), 1e9 if "huge" in value else 1.0] for value in values], np.float32)
        return vectors, np.array(["bad" not in value for value in values])

    def save(self, directory: Path) -> None:
        (directory / "encoder.json").write_text(json.dumps(self.identity))


def test_pretrained_encoder_by_factory(tmp_path):
    frame = pl.DataFrame({"item_id": list("abcd"), "title": ["one", "bad", "huge", "one"]})
    catalogue = FrameCatalogue(frame, FIELDS[:1])
    made = []

    def factory(revision):
        return {"text": lambda field, config: made.append(_External(revision)) or made[-1]}

    cache = build(catalogue, tmp_path, CONFIG, factories=factory("1"))
    # Neither what the encoder refuses nor what float16 cannot hold is a value.
    assert cache.gather("title", np.arange(4))[1].tolist() == [True, False, False, True]
    made.clear()
    encode_items(cache, frame)
    assert [encoder.seen for encoder in made] == [["one", "bad", "huge", "one"]] * 2
    with pytest.raises(CacheError, match="pass the factory of the 'text' encoder"):
        open_cache(tmp_path).encoder("title")
    with pytest.raises(CacheError, match="configure the same one"):
        open_cache(tmp_path, factories=factory("2")).encoder("title")
    made.clear()
    build(catalogue, tmp_path, CONFIG, factories=factory("1"))
    assert not any("one" in encoder.seen for encoder in made)
    made.clear()
    build(catalogue, tmp_path, CONFIG, factories=factory("2"))
    assert all("one" in encoder.seen for encoder in made)


# Candidates, reviews, new items


def test_candidate_text_joins_texts_and_categories():
    frame = pl.DataFrame(
        {
            "title": ["Red shirt", None, None],
            "brand": [["acme"], ["bolt", "cord"], None],
            "note": ["warm", None, None],
            "price": [1.0, 2.0, 3.0],
        }
    )
    fields = (FIELDS[1], dataclasses.replace(FIELDS[0], name="note"), FIELDS[0], FIELDS[2])
    documents = candidate_text(frame, fields, "title").to_list()
    assert documents == ["Red shirt\nbrand: acme\nnote: warm", "brand: bolt, cord", None]


def test_candidates_and_reviews_have_their_own_rows(tmp_path):
    frame = random_frame(25, 0)
    reviews = ["liked it much", None, "did not like it", "liked it much", ""] * 3
    cache = build(FrameCatalogue(frame), tmp_path, CONFIG, reviews=reviews)
    assert "_candidate" not in cache.names and "_review" not in cache.names
    assert cache.candidates.rows.shape == (25,) and cache.reviews.rows.shape == (15,)
    assert (np.asarray(cache.reviews.rows) >= 0).tolist() == [True, False, True, True, False] * 3
    assert cache.reviews.values.shape[0] == 2
    assert build(FrameCatalogue(frame), tmp_path, CONFIG, reviews=[None] * 4).reviews is None


def test_new_items_are_encoded_as_the_cache_would(tmp_path):
    frame = random_frame(40, 0, tmp_path / "pictures")
    cache = build(FrameCatalogue(frame), tmp_path / "cache", CONFIG)
    encoded = encode_items(cache, frame[5:20])
    assert encoded.keys() == {*cache.names, "_candidate"}
    for name, (vectors, present) in encoded.items():
        expected, expected_present = cache.table(name).gather(np.arange(5, 20))
        np.testing.assert_array_equal(present, expected_present)
        np.testing.assert_allclose(vectors, expected, atol=2e-3)
    only_titles = encode_items(cache, frame.select("title")[:3])
    assert not any(only_titles[name][1].any() for name in cache.names if name != "title")


# Refusal


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    catalogue = FrameCatalogue(random_frame(30, 0))
    build(catalogue, folder, CONFIG)
    return folder, catalogue


def test_opened_cache_is_the_built_one(finished):
    folder, catalogue = finished
    cache = open_cache(folder, item_ids=catalogue.item_ids, verify=True)
    assert_same(everything(cache, np.arange(30)), everything(pickle.loads(pickle.dumps(cache)), np.arange(30)))
    # What goes to a loader's worker is a path and not the data.
    assert len(pickle.dumps(cache.table("title"))) < 600


def test_cache_of_another_catalogue_is_refused(finished):
    folder, catalogue = finished
    for ids, reason in (
        (catalogue.item_ids[:-1], "30 items, this one has 29"),
        (catalogue.item_ids[::-1], "other ids or another order"),
        ([*catalogue.item_ids[:-1], "x"], "other ids or another order"),
    ):
        with pytest.raises(CacheError, match=reason):
            open_cache(folder, item_ids=ids)


def test_missing_cache_and_other_versions_are_refused(tmp_path):
    with pytest.raises(CacheError, match="no field cache here"):
        open_cache(tmp_path)
    for content, reason in (
        ("{", "not readable as JSON"),
        ("[]", "not the manifest"),
        ('{"format": "nqf-fields", "format_version": 99}', "format version 99"),
    ):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(CacheError, match=reason):
            open_cache(tmp_path)


def copy_of(finished: Path, folder: Path) -> Path:
    for path in finished.rglob("*"):
        if path.is_file():
            target = folder / path.relative_to(finished)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return folder


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_change_of_any_file_is_refused(finished, tmp_path_factory, data):
    folder = copy_of(finished[0], tmp_path_factory.mktemp("mutated"))
    path = data.draw(st.sampled_from(sorted(path for path in folder.rglob("*") if path.is_file())))
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    how = data.draw(st.sampled_from(["flip", "truncate", "extend", "delete"]))
    if how == "flip":
        content[at] ^= data.draw(st.integers(1, 255))
    elif how == "truncate":
        content = content[:at]
    else:
        content += b"\0"
    path.unlink()
    if how != "delete":
        path.write_bytes(content)
    if how == "flip" and path.name == "manifest.json":
        # White space may turn into other white space.
        try:
            same = json.loads(content) == json.loads((finished[0] / "manifest.json").read_bytes())
        except ValueError:
            same = False
        if same:
            return
    with pytest.raises(CacheError, match=r"delete the cache|run the fields stage|not the manifest"):
        open_cache(folder, verify=True)


def test_truncated_table_is_refused_without_reading_it_all(finished, tmp_path):
    folder = copy_of(finished[0], tmp_path)
    for path in (folder / "tables").iterdir():
        content = path.read_bytes()
        path.write_bytes(content[:-2])
        with pytest.raises(CacheError, match="truncated or altered"):
            open_cache(folder)
        path.write_bytes(b"\0" * len(content))
        with pytest.raises(CacheError, match=r"no readable \.npy header"):
            open_cache(folder)
        path.write_bytes(content)
    open_cache(folder)


def test_build_replaces_a_damaged_cache_and_says_so(finished, tmp_path):
    folder = copy_of(finished[0], tmp_path)
    next((folder / "tables").glob("title-values-*")).write_bytes(b"")
    cache = build(finished[1], folder, CONFIG)
    assert "could not be used" in cache.warnings[0] and "title-values" in cache.warnings[0]
    assert_same(everything(cache, np.arange(30)), everything(open_cache(finished[0]), np.arange(30)))


def test_build_that_fails_leaves_the_old_cache(finished, tmp_path, monkeypatch):
    folder = copy_of(finished[0], tmp_path)

    def fail(self, values):
        raise OSError("disk full")

    monkeypatch.setattr(TimeEncoder, "encode", fail)
    grown = FrameCatalogue(pl.concat([finished[1].frame, random_frame(9, 4)]))
    with pytest.raises(OSError, match="disk full"):
        build(grown, folder, CONFIG)
    monkeypatch.undo()
    assert_same(
        everything(open_cache(folder, verify=True), np.arange(30)), everything(open_cache(finished[0]), np.arange(30))
    )
    # What the failed build left is cleared by the next one.
    build(finished[1], folder, CONFIG)
    assert {path.name for path in (folder / "tables").iterdir()} == {
        path.name for path in (finished[0] / "tables").iterdir()
    }


def test_progress_covers_all_tables(tmp_path):
    seen = []
    build(FrameCatalogue(random_frame(40, 0)), tmp_path, CONFIG, progress=lambda *step: seen.append(step))
    last = {name: (done, total) for name, done, total in seen}
    assert last == {name: (40, 40) for name in [*DTYPES, "_candidate"]}
    assert len(seen) > len(last)


def test_importing_the_package_pulls_in_no_accelerator_and_no_framework():
    code = (
        "import sys, nqf.fields.build, nqf.fields.text, nqf.fields.image\n"
        "print(sorted({'jax', 'torch', 'transformers', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_all_light_encoders_are_counted():
    assert set(LIGHT) == set(LightEncoder.__subclasses__())
