"""Values that hold several, and files that hold tables: JSON in every shape, folders, Excel, the hub's exports."""

import contextlib
import datetime
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import openpyxl
import pandas as pd
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nqf.config import DataConfig
from nqf.data import amazon
from nqf.data.catalogue import canonical
from nqf.data.errors import DataError
from nqf.data.load import prepare
from nqf.data.nested import elements, parse_python, scalar, unpacked
from nqf.data.readers import open_table, read_table
from nqf.data.schema import schema_from_tree
from nqf.tools import inspect

SCHEMA = schema_from_tree(
    {
        "title": "title",
        "fields": {
            "title": "text",
            "genres": "category",
            "tags": {"modality": "category", "multi_valued": True, "separator": ","},
            "v": "vector",
            "picture": "image",
        },
    }
)
COLUMNS = {"item_id": None} | {field.name: field for field in SCHEMA.fields}


def one(path: Path, scratch: Path, **row: Any) -> dict:
    """The canonical values of one row that was written to a file."""
    row = {"item_id": "p1", **{name: None for name in COLUMNS if name != "item_id"}, **row}
    frame = pl.DataFrame(
        {name: pl.Series([value], dtype=None if value is not None else pl.String) for name, value in row.items()}
    )
    if path.suffix == ".csv":
        frame.write_csv(path)
    elif path.suffix == ".parquet":
        frame.write_parquet(path)
    else:
        path.write_text(json.dumps(row) + "\n")
    return canonical(read_table(path, scratch, COLUMNS), SCHEMA, Path("/")).collect().to_dicts()[0]


LISTS = {
    "Python": ("['Sci-Fi & Fantasy', 'Action']", ["Sci-Fi & Fantasy", "Action"]),
    "JSON": ('["Sci-Fi & Fantasy", "Action"]', ["Sci-Fi & Fantasy", "Action"]),
    "an apostrophe": ("[\"Ocean's, Eleven\", 'b']", ["Ocean's, Eleven", "b"]),
    "numpy": ("['Sci-Fi & Fantasy' 'Action'\n 'x']", ["Sci-Fi & Fantasy", "Action", "x"]),
    "numpy of numbers": ("[ 98 117  1.5]", ["98", "117", "1.5"]),
    "numpy of truth values": ("[False  True\n False]", ["false", "true", "false"]),
    "a tuple": ("('a', 'b')", ["a", "b"]),
    "a set": ("{'b', 'a'}", ["a", "b"]),
    "missing ones": ("['a', None]", ["a"]),
    "lists of lists, as Amazon 2014": ("[['Beauty', 'Hair'], ['Sale']]", ["Beauty", "Hair", "Sale"]),
    "objects with names, as TMDB": (
        "[{'id': 16, 'name': 'Animation'}, {'id': 35, 'name': 'Comedy'}]",
        ["Animation", "Comedy"],
    ),
    "an object, as Yelp": ('{"WiFi": "free", "Price": 2}', ["WiFi: free", "Price: 2"]),
    "numbers": ("[1, 2]", ["1", "2"]),
    "none": ("[]", None),
    "NaN in JSON": ('["a", NaN]', ["a"]),
}


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("case", LISTS)
def test_lists_that_are_written_as_text(case: str, ending: str, tmp_path: Path) -> None:
    text, expected = LISTS[case]
    row = one(tmp_path / f"t.{ending}", tmp_path, genres=text, tags=text)
    assert row["genres"] == expected
    assert row["tags"] == expected


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_texts_that_only_look_like_lists(ending: str, tmp_path: Path) -> None:
    for title in ("[REC]", "[7]", "(Un)happy", "{x}", "['68", "[a, b]"):
        assert one(tmp_path / f"t.{ending}", tmp_path, title=title)["title"] == title
    row = one(
        tmp_path / f"t.{ending}",
        tmp_path,
        title="['Mild', 'Green']",
        genres="[Live]",
        tags="[a, 'b c']",
        picture="['x.jpg', 'y.jpg']",
    )
    assert row["title"] == "Mild Green"
    assert row["genres"] == ["[Live]"]
    assert row["tags"] == ["a", "b c"]
    assert row["picture"] == "//x.jpg"


@given(st.lists(st.text(st.characters(exclude_categories=("Cs",))), max_size=5))
def test_what_python_and_json_and_numpy_write_reads_back(values: list[str]) -> None:
    for text in (str(values), json.dumps(values), json.dumps(values, ensure_ascii=False)):
        assert elements(unpacked(text)) == values
    if len(values) > 1 and not any("\n" in value for value in values):
        with np.printoptions(linewidth=10_000):
            # numpy pads nothing and writes each element as Python does.
            assert parse_python(str(np.array(values, object))) == values


def test_objects_of_parquet_files(tmp_path: Path) -> None:
    frame = pl.DataFrame(
        {
            "item_id": ["p1"],
            "genres": [[{"name": "A", "id": 1}, {"name": "B", "id": 2}]],
            "tags": [{"x": 1, "y": None}],
            "title": ["t"],
            "v": [[1.0]],
            "picture": [["a.png"]],
        }
    )
    frame.write_parquet(tmp_path / "t.parquet")
    row = canonical(read_table(tmp_path / "t.parquet", tmp_path, COLUMNS), SCHEMA, Path("/")).collect().to_dicts()[0]
    assert (row["genres"], row["tags"]) == (["A", "B"], ["x: 1"])


ROWS = [{"item_id": "p1", "title": "a"}, {"item_id": "p2", "title": "b"}, {"item_id": "p3", "title": None}]
FRAME = pd.DataFrame(ROWS)
JSONS = {
    "lines": "".join(json.dumps(row) + "\n" for row in ROWS),
    "lines with a mark": "\ufeff" + "".join(json.dumps(row) + "\r\n" for row in ROWS),
    "an array": json.dumps(ROWS, indent=1),
    "pandas, columns": FRAME.to_json(),
    "pandas, records": FRAME.to_json(orient="records"),
    "pandas, index": FRAME.to_json(orient="index"),
    "pandas, split": FRAME.to_json(orient="split"),
    "pandas, table": FRAME.to_json(orient="table"),
    "a dictionary by id": json.dumps({row["item_id"]: {"title": row["title"]} for row in ROWS}),
    "Python's dictionaries": "".join(f"{row}\n" for row in ROWS),
}


@pytest.mark.parametrize("shape", JSONS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_every_shape_of_json(shape: str, encoding: str, tmp_path: Path) -> None:
    path = tmp_path / ("t.jsonl" if "Python" in shape else "t.json")
    path.write_bytes(JSONS[shape].encode(encoding))
    if shape == "lines with a mark" and encoding == "utf-16":
        path.write_bytes(JSONS["lines"].encode(encoding))
    table = read_table(path, tmp_path, {"item_id": None, "title": None})
    assert table.collect().rows() == [("p1", "a"), ("p2", "b"), ("p3", None)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"items": [{"a": 1}]}', "no column 'a'; known: items"),
        ('[{"a": 1}, 2]', "entry 2: expected an object, found int"),
        ("3", "expected an object or a list at the top, found int"),
        ("{", "not readable as JSON"),
        ('{"a": 1}\n{"a": 2\n', "line 2: not JSON that can be read"),
        ("{'a': 1}\n{'a': print()}\n", "not readable as JSON|line 2: not JSON"),
    ],
)
def test_json_that_is_no_table(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(DataError, match=message):
        read_table(tmp_path / "t.json", tmp_path, {"a": None})


def test_values_that_json_does_not_have() -> None:
    assert [scalar(value) for value in (True, 1.0, "a", b"a", b"\xff", datetime.date(2020, 1, 2), Decimal("1.50"))] == [
        "true", "1.0", "a", "a", "ff", "2020-01-02", "1.50",
    ]  # fmt: skip
    assert elements({"a": datetime.timedelta(days=1), "b": None}) == ["a: 1 day, 0:00:00"]


def test_folders_of_parts(tmp_path: Path) -> None:
    for kind, write in (
        ("csv", pl.DataFrame.write_csv),
        ("parquet", pl.DataFrame.write_parquet),
        ("json", pl.DataFrame.write_ndjson),
    ):
        folder = tmp_path / f"items.{kind}"
        folder.mkdir()
        for number, part in enumerate(([("p1", "a"), ("p2", "b")], [("p3", "c")])):
            frame = pl.DataFrame(part, schema=["item_id", "title"], orient="row")
            name = f"part-0000{number}-{'c000' if kind == 'csv' else 'x.snappy'}.{kind}"
            write(frame, folder / name)
            (folder / f".{name}.crc").write_bytes(b"x")
        (folder / "_SUCCESS").touch()
        if kind != "parquet":
            (folder / f"part-00002.{kind}").touch()
        frame = read_table(folder, tmp_path, {"item_id": None, "title": None}).collect()
        assert frame.rows() == [("p1", "a"), ("p2", "b"), ("p3", "c")]
    (tmp_path / "items.csv" / "part-00009.csv").write_text("item_id,name\np9,x\n")
    with pytest.raises(DataError, match=r"part-00009\.csv: other columns than part-00000-c000\.csv: name, title"):
        open_table(tmp_path / "items.csv")
    (tmp_path / "items.parquet" / "day=1").mkdir()
    with pytest.raises(DataError, match="has folders in it, such as day=1"):
        open_table(tmp_path / "items.parquet")
    (tmp_path / "empty.csv").mkdir()
    with pytest.raises(DataError, match="the folder has no files in it"):
        open_table(tmp_path / "empty.csv")


def test_excel(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    sheet = book.active
    sheet.append(["item_id", "title", "added", None])
    sheet.append([7, "Lamp", datetime.datetime(2024, 5, 1, 10, 30), 1])
    sheet.append([None, None, None, None])
    sheet.append(["007", "Ünïcode", datetime.datetime(2024, 5, 2), None])
    book.create_sheet("notes")
    book.save(tmp_path / "t.xlsx")
    table = open_table(tmp_path / "t.xlsx")
    assert table.names == ["item_id", "title", "added", "Unnamed: 3"]
    assert "of 2 sheets the first, Sheet, is read" in table.notes[0]
    assert table.read({"item_id": None, "title": None, "added": None}, tmp_path).collect().rows() == [
        ("7", "Lamp", "2024-05-01T10:30:00"),
        ("007", "Ünïcode", "2024-05-02T00:00:00"),
    ]
    (tmp_path / "u.xlsx").write_bytes(b"PK no workbook")
    with pytest.raises(DataError, match=r"not readable as an Excel file: .*; save the table as CSV"):
        open_table(tmp_path / "u.xlsx")


META = {
    "parent_asin": "B1",
    "title": "Cream",
    "price": "0.99",
    "features": ["soft", "small"],
    "description": [],
    "images": {
        "hi_res": [None, "https://x/h.jpg"],
        "large": ["https://x/2.jpg", "https://x/1.jpg"],
        "variant": ["PT01", "MAIN"],
    },
    "details": '{"Brand": "Acme", "Color": "red"}',
}


@pytest.mark.parametrize(
    "texts", [(), ("details",), ("images",), ("details", "images"), ("details", "images", "features", "description")]
)
@pytest.mark.parametrize("ending", ["jsonl", "parquet", "csv"])
def test_amazon_as_the_hub_exports_it(ending: str, texts: tuple[str, ...], tmp_path: Path) -> None:
    row = {**META, "details": json.loads(META["details"])}
    row |= {name: json.dumps(row[name]) if ending == "jsonl" else str(row[name]) for name in texts}
    frame = pd.DataFrame([row])
    path = tmp_path / f"meta.{ending}"
    if ending == "jsonl":
        path.write_text(json.dumps(row) + "\n")
    elif ending == "csv":
        frame.to_csv(path, index=False)
    else:
        pl.DataFrame([row]).write_parquet(path)
    modalities = {
        "title": "text",
        "brand": "category",
        "color": "category",
        "main_image": "image",
        "features": "text",
        "description": "text",
    }
    schema = schema_from_tree({"title": "title", "fields": modalities})
    columns = {"item_id": None} | {field.name: field for field in schema.fields}
    (found,) = canonical(amazon.read_items(path, tmp_path, columns), schema, Path("/")).collect().to_dicts()
    assert found["item_id"] == "B1"
    assert (found["brand"], found["color"], found["main_image"]) == (["Acme"], ["red"], "https://x/1.jpg")
    assert (found["features"], found["description"]) == ("soft small", None)


def test_other_files_are_no_amazon_metadata(tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_text("item_id,title\np1,a\n")
    with pytest.raises(DataError, match="no column 'parent_asin', as Amazon's metadata has; it has item_id, title"):
        amazon.read_items(tmp_path / "items.csv", tmp_path, {"item_id": None})
    with pytest.raises(DataError, match="no columns user_id and parent_asin, as Amazon's reviews have"):
        amazon.read_reviews(tmp_path / "items.csv", tmp_path, {"item_id": None})


TYPES = {
    "bytes": [bytes([n, 255]) for n in range(12)],
    "decimals": [Decimal(n) for n in range(12)],
    "times of day": [datetime.time(n) for n in range(12)],
    "durations": [datetime.timedelta(days=n) for n in range(12)],
    "lists": [["a", "b"]] * 12,
    "lists of numbers": [[n] for n in range(12)],
    "empty lists": [[]] * 12,
    "lists of lists": [[["a"], ["b"]]] * 12,
    "objects": [{"a": n, "b": Decimal(n)} for n in range(12)],
    "lists of objects": [[{"a": n}] for n in range(12)],
    "nothing": [None] * 12,
    "categories": pl.Series([f"s{n}" for n in range(12)], dtype=pl.Categorical),
    "an enumeration": pl.Series(["x"] * 12, dtype=pl.Enum(["x"])),
    "arrays": pl.Series([[1.0, 2.0]] * 12, dtype=pl.Array(pl.Float64, 2)),
    "very large numbers": pl.Series([2**64 - 1 - n for n in range(12)], dtype=pl.UInt64),
}


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_of_parquet_is_read_or_refused(kind: str, tmp_path: Path) -> None:
    """In every role, by training and by inspection: never another error than that of bad data."""
    modalities = ("text", "category", "number", "time", "image", "vector")
    ids = [f"p{n}" for n in range(12)]
    for role in ("item", "user_id", "item_id", "timestamp", "rating", "review"):
        items = {"item_id": ids, "title": [f"Thing {n} in the shop" for n in range(12)]}
        events = {"user_id": [f"u{n // 4}" for n in range(12)], "item_id": ids, "timestamp": list(range(12))}
        for name in modalities if role == "item" else (role,):
            (items if role == "item" else events)[name] = TYPES[kind]
        pl.DataFrame(items, strict=False).write_parquet(tmp_path / "items.parquet")
        pl.DataFrame(events, strict=False).write_parquet(tmp_path / "events.parquet")
        fields = {"title": "text"} | ({name: name for name in modalities} if role == "item" else {})
        (tmp_path / "schema.yaml").write_text(json.dumps({"title": "title", "fields": fields}))
        paths = {"items": "items.parquet", "interactions": "events.parquet", "schema": "schema.yaml"}
        config = DataConfig(format="table", **{key: str(tmp_path / name) for key, name in paths.items()})
        with contextlib.suppress(DataError):
            prepare(config, tmp_path / "data")
        with contextlib.suppress(DataError):
            source = inspect.examine(tmp_path / "items.parquet")
            inspect.suggest_schema(source, inspect.inspect_items(source, tmp_path))
            inspect.inspect_interactions(inspect.open_events(tmp_path / "events.parquet", tmp_path, source))
