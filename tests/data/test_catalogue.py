"""Canonical columns: what every spelling of a value becomes."""

import datetime
from pathlib import Path

import polars as pl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nqf.data.catalogue import BAD, Catalogue, canonical, canonical_items
from nqf.data.errors import DataError
from nqf.data.schema import Schema, schema_from_tree


def schema_of(**fields: object) -> Schema:
    return schema_from_tree({"fields": fields})


def read(values: pl.Series | list, options: object, folder: str = "/shop") -> tuple[list, list[bool]]:
    """Canonical values of one column and which are marked as bad."""
    frame = pl.DataFrame({"x": values}).with_row_index("item_id")
    result = canonical(frame.lazy(), schema_of(x=options), Path(folder)).collect()
    return result["x"].to_list(), result[BAD + "x"].to_list()


def test_text() -> None:
    assert read(["a b ", "", "  ", None], "text")[0] == ["a b", None, None, None]
    assert read([["a", "b"], [], None], "text")[0] == ["a b", None, None]
    assert read([1.5, None], "text")[0] == ["1.5", None]


def test_categories() -> None:
    assert read(["a|b", " ", None], "category")[0] == [["a|b"], None, None]
    multiple = {"modality": "category", "multi_valued": True, "separator": ","}
    assert read(["a, b,,", ",", None], multiple)[0] == [["a", "b"], None, None]
    assert read([["a ", None, ""], [""], None], "category")[0] == [["a"], None, None]
    assert read([3, None], "category")[0] == [["3"], None]


def test_numbers() -> None:
    values, bad = read(["1.5", " 2 ", "", None, "three", "nan", "inf", "0"], "number")
    assert values == [1.5, 2.0, None, None, None, None, None, 0.0]
    assert bad == [False, False, False, False, True, False, True, False]
    values, bad = read([1.0, float("nan"), float("inf"), None], "number")
    assert values == [1.0, None, None, None]
    assert bad == [False, False, True, False]
    assert read(pl.Series([1, None]), "number")[0] == [1.0, None]


@pytest.mark.ci
@settings(deadline=None, max_examples=40)
@given(st.datetimes(datetime.datetime(1973, 6, 1), datetime.datetime(2200, 1, 1)))
# As milliseconds also a minute of a calendar, October 2, 1929.
@example(datetime.datetime(1976, 2, 11, 18, 7))
def test_every_spelling_of_a_time_is_the_same_second(moment: datetime.datetime) -> None:
    seconds = int(moment.replace(microsecond=0, tzinfo=datetime.UTC).timestamp())
    for spelling in (
        [seconds],
        [seconds * 1000 + 999],
        [seconds * 10**6 + 999_999],
        [float(seconds)],
        [str(seconds)],
        [moment],
        [moment.isoformat()],
        [moment.isoformat(" ")],
        [moment.replace(microsecond=0).isoformat() + "Z"],
        [(moment.replace(tzinfo=datetime.UTC)).astimezone(datetime.timezone(datetime.timedelta(hours=5))).isoformat()],
    ):
        assert read(spelling, "time") == ([seconds], [False]), spelling
    # Whole milliseconds of 1975 and 1976 may be minutes of a calendar; then their format has to be given.
    options = {"modality": "time", "format": "milliseconds"} if moment.year in (1975, 1976) else "time"
    assert read([f"{seconds}000.0"], options) == ([seconds], [False])
    day = moment.date()
    midnight = int(datetime.datetime.combine(day, datetime.time(), datetime.UTC).timestamp())
    assert read([day], "time")[0] == read([day.isoformat()], "time")[0] == [midnight]


def test_times_that_are_none() -> None:
    values, bad = read(["yesterday", "", None, "2020-13-01", "nan", "-5", "2020-01-01T10:30"], "time")
    assert values == [None, None, None, None, None, -5, 1577874600]
    assert bad == [True, False, False, True, False, False, False]
    assert read([float("nan"), 1e300], "time") == ([None, None], [False, True])


def test_places() -> None:
    schema = schema_of(place={"modality": "geo", "columns": ["lat", "lon"]})
    frame = pl.DataFrame(
        {"item_id": list("abcdef"), "lat": ["1", "91", None, "", "x", "-90"], "lon": ["2", "0", "3", None, "1", "180"]}
    )
    result = canonical(frame.lazy(), schema, Path()).collect()
    assert result["place"].to_list() == [[1.0, 2.0], None, None, None, None, [-90.0, 180.0]]
    assert result[BAD + "place"].to_list() == [False, True, True, False, True, False]


def test_images(tmp_path: Path) -> None:
    values, _ = read(["a/b.png", "/c.png", "https://d/e.png", " "], "image", str(tmp_path))
    assert values == [f"{tmp_path.resolve()}/a/b.png", "/c.png", "https://d/e.png", None]


def test_vectors() -> None:
    for column in ([[1, 2], [], None], ["[1, 2.0]", "", None], ["1 2", "[]", None]):
        assert read(column, "vector")[0] == [[1.0, 2.0], None, None]
    values, bad = read([[1.0, float("nan")], [1.0, None], [1.0, 2.0]], "vector")
    assert values == [None, None, [1.0, 2.0]]
    assert bad == [True, True, False]
    assert read(["1 x"], "vector") == ([None], [True])


def test_chunks_keep_the_order(tmp_path: Path) -> None:
    schema = schema_from_tree({"title": "name", "fields": {"name": "text"}})
    frame = pl.DataFrame({"item_id": range(10), "name": [f"n{row}" for row in range(10)]})
    canonical(frame.lazy(), schema, tmp_path).collect().write_parquet(tmp_path / "items.parquet")
    catalogue = Catalogue(tmp_path / "items.parquet", schema)
    assert len(catalogue) == 10
    assert catalogue.item_ids == [str(row) for row in range(10)]
    chunks = list(catalogue.chunks(["title"], 4))
    assert [len(chunk) for chunk in chunks] == [4, 4, 2]
    assert pl.concat(chunks)["title"].to_list() == frame["name"].to_list()


def test_new_items() -> None:
    schema = schema_from_tree({"title": "title", "fields": {"title": "text", "price": "number", "v": "vector"}})
    result = canonical_items(pl.DataFrame({"item_id": [7], "price": ["3"]}), schema)
    assert result.to_dicts() == [{"item_id": "7", "title": None, "price": 3.0, "v": None}]
    with pytest.raises(DataError, match="no column 'item_id'; they have id"):
        canonical_items(pl.DataFrame({"id": [7]}), schema)
    with pytest.raises(DataError, match="duplicate item_id 'a' in rows 1 and 3"):
        canonical_items(pl.DataFrame({"item_id": ["a", "b", "a"]}), schema)
    with pytest.raises(DataError, match="row 2 has no item_id"):
        canonical_items(pl.DataFrame({"item_id": ["a", ""]}), schema)
    with pytest.raises(DataError, match="new item 'b': price is not a number: 'dear'"):
        canonical_items(pl.DataFrame({"item_id": ["a", "b"], "price": ["1", "dear"]}), schema)
    with pytest.raises(DataError, match="vectors of 'v' have 1 and 2 numbers"):
        canonical_items(pl.DataFrame({"item_id": ["a", "b"], "v": [[1.0], [1.0, 2.0]]}), schema)
