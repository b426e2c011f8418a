"""Readers: every format gives the same values, and damage is named."""

import gzip
import json
from pathlib import Path

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nqf.config import MISSING_WORDS
from nqf.data import amazon, readers, unirec
from nqf.data.catalogue import canonical
from nqf.data.errors import DataError
from nqf.data.readers import read_table
from nqf.data.schema import schema_from_tree

SCHEMA = schema_from_tree(
    {
        "title": "name",
        "fields": {
            "name": "text",
            "tags": {"modality": "category", "multi_valued": True, "separator": "|"},
            "price": "number",
            "v": "vector",
        },
    }
)
COLUMNS = {"item_id": None} | {column: field for field in SCHEMA.fields for column in field.columns}
ROWS = [
    {"item_id": "007", "name": 'A "fine", thing', "tags": "x|y", "price": "1.5", "v": "1 2"},
    {"item_id": "b", "name": None, "tags": None, "price": "", "v": None},
    {"item_id": "c", "name": "Ünïcode", "tags": "x", "price": "-3", "v": "0.5 -1"},
]
EXPECTED = [
    {"item_id": "007", "title": 'A "fine", thing', "tags": ["x", "y"], "price": 1.5, "v": [1.0, 2.0]},
    {"item_id": "b", "title": None, "tags": None, "price": None, "v": None},
    {"item_id": "c", "title": "Ünïcode", "tags": ["x"], "price": -3.0, "v": [0.5, -1.0]},
]


def write(path: Path, rows: list[dict]) -> Path:
    """Writes rows in the format that the name says."""
    name = path.name.removesuffix(".gz")
    frame = pl.DataFrame(rows, infer_schema_length=None)
    if name.endswith(".parquet"):
        frame.write_parquet(path)
        return path
    if name.endswith(".csv"):
        text = frame.write_csv()
    elif name.endswith(".tsv"):
        text = frame.write_csv(separator="\t", quote_style="never")
    else:
        text = "".join(json.dumps(row) + "\n\n" for row in rows)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def values(table: pl.LazyFrame) -> list[dict]:
    frame = canonical(table, SCHEMA, Path()).collect()
    return frame.select("item_id", "title", "tags", "price", "v").to_dicts()


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "ndjson", "parquet", "csv.gz", "tsv.gz", "jsonl.gz"])
def test_every_format_gives_the_same(ending: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"items.{ending}", ROWS)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    assert values(read_table(path, scratch, COLUMNS)) == EXPECTED


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_lists_stay_lists(ending: str, tmp_path: Path) -> None:
    rows = [
        {"item_id": "007", "name": "n", "tags": ["x", "y|z"], "price": 1.5, "v": [1.0, 2.5]},
        {"item_id": "b", "name": None, "tags": [], "price": None, "v": None},
    ]
    table = read_table(write(tmp_path / f"items.{ending}", rows), tmp_path, COLUMNS)
    assert values(table) == [
        {"item_id": "007", "title": "n", "tags": ["x", "y|z"], "price": 1.5, "v": [1.0, 2.5]},
        {"item_id": "b", "title": None, "tags": None, "price": None, "v": None},
    ]


TEXTS = st.text(st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp")), min_size=1, max_size=12).filter(
    lambda text: text.strip() not in MISSING_WORDS
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(st.lists(st.tuples(TEXTS, st.none() | st.integers(-(10**12), 10**12)), min_size=1, max_size=6))
def test_csv_and_jsonl_read_back_what_was_written(tmp_path: Path, pairs: list[tuple]) -> None:
    schema = schema_from_tree({"fields": {"name": "text", "price": "number"}})
    columns = {"item_id": None} | {field.name: field for field in schema.fields}
    rows = [{"item_id": str(row), "name": name, "price": price} for row, (name, price) in enumerate(pairs)]
    wanted = [(name.strip() or None, None if price is None else float(price)) for name, price in pairs]
    for ending in ("csv", "jsonl.gz"):
        table = read_table(write(tmp_path / f"t.{ending}", rows), tmp_path, columns)
        frame = canonical(table, schema, Path()).collect()
        assert frame.select("name", "price").rows() == wanted


def test_half_a_surrogate_pair_is_a_question_mark(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"item_id": "x\\ud83d", "name": "\\ud83d\\ude00 \\uDE00"}\n')
    table = read_table(tmp_path / "a.jsonl", tmp_path, {"item_id": None, "name": None})
    assert table.collect().rows() == [("x?", "😀 ?")]
    (tmp_path / "a.json").write_text('{"x\\ud83d": {"name": "\\ud83d\\ude00"}}')
    assert readers.read_json(tmp_path / "a.json", dict) == {"x?": {"name": "😀"}}


def test_an_optional_column_may_be_absent(tmp_path: Path) -> None:
    for ending in ("csv", "jsonl", "parquet"):
        path = write(tmp_path / f"events.{ending}", [{"user_id": "u", "item_id": "i"}])
        columns = {"user_id": None, "item_id": None, "rating": None}
        table = read_table(path, tmp_path, columns, ["rating"])
        assert table.collect().to_dicts() == [{"user_id": "u", "item_id": "i", "rating": None}]
        with pytest.raises(DataError, match=rf"events\.{ending}: no column 'rating'"):
            read_table(path, tmp_path, columns)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"item_id,nmae\n1,x\n", "no column 'name'; did you mean 'nmae'"),
        ("a.csv", b"item_id,name,name\n1,x,y\n", "duplicate column 'name'"),
        ("a.csv", b"", "the file is empty"),
        ("a.csv", b"item_id,name\n1,caf\xe9\n", r"line 2: not UTF-8 text \(.*\); set its encoding"),
        ("a.csv.gz", b"no gzip", "not readable as gzip"),
        ("a.csv.gz", gzip.compress(b"item_id,name\n" * 999, mtime=0)[:-20], "not readable"),
        ("a.jsonl", b'{"item_id": 1, "name": "x"}\n{oops\n', "line 2: not JSON"),
        ("a.jsonl", b'{"item_id": 1, "name": "x"}\n[1]\n', "line 2: expected a JSON object, found list"),
        ("a.jsonl", b'{"item_id": 1, "name": "\xff"}\n', "not UTF-8"),
        ("a.jsonl.gz", gzip.compress(b'{"item_id": 1}\n' * 999, mtime=0)[:-20], "not readable"),
        ("a.parquet", b"PAR1 nonsense", "not readable as Parquet"),
        ("a.xlsx", b"", "not readable as an Excel file"),
        ("a.xls", b"", "unknown kind of table; known: .csv.*save it as .xlsx or .csv"),
    ],
)
def test_damage_is_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read_table(tmp_path / name, tmp_path, {"item_id": None, "name": None})
    assert str(tmp_path / name) in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for read in (read_table, amazon.read_items, unirec.read_items):
        with pytest.raises(DataError, match=r"nowhere\.csv: no such file"):
            read(tmp_path / "nowhere.csv", tmp_path, {"item_id": None})


def test_recbole(tmp_path: Path) -> None:
    (tmp_path / "x.item").write_text(
        "item_id:token\tname:token_seq\ttags:token_seq\tprice:float\tv:float_seq\n"
        '1\tA "quoted\tx y\t2.5\t1 2\n2\t\t\t\t\n'
    )
    assert values(read_table(tmp_path / "x.item", tmp_path, COLUMNS)) == [
        {"item_id": "1", "title": 'A "quoted', "tags": ["x", "y"], "price": 2.5, "v": [1.0, 2.0]},
        {"item_id": "2", "title": None, "tags": None, "price": None, "v": None},
    ]
    for header, message in (
        ("item_id\tname:token", "column 'item_id' is not of the form name:type"),
        ("item_id:token\titem_id:float", "duplicate column 'item_id'"),
        ("item:token", "no column 'item_id'; did you mean 'item'"),
    ):
        (tmp_path / "y.item").write_text(header + "\n")
        with pytest.raises(DataError, match=message):
            read_table(tmp_path / "y.item", tmp_path, {"item_id": None})


META = {
    "parent_asin": "B1",
    "title": "Soap",
    "features": ["Mild", "Green"],
    "price": 3.5,
    "store": "Shop",
    "categories": ["Beauty", "Soap"],
    "images": [
        {"variant": "PT01", "large": "https://x/2.jpg"},
        {"variant": "MAIN", "large": None, "hi_res": "https://x/1.jpg"},
    ],
    "details": {"Brand": "Acme", "Item Form": "Bar"},
}
FLAT = {
    "item_id": "B1",
    "title": "Soap",
    "features": "Mild Green",
    "price": "3.5",
    "brand": ["Acme"],
    "categories": ["Beauty", "Soap"],
    "main_image": "https://x/1.jpg",
    "details.Item Form": ["Bar"],
}


def amazon_columns() -> dict:
    modalities = {"title": "text", "features": "text", "price": "number", "brand": "category", "main_image": "image"}
    modalities |= {"categories": "category", "details.Item Form": "category"}
    fields = {f.columns[0]: f for f in schema_from_tree({"title": "title", "fields": modalities}).fields}
    return {"item_id": None, **fields}


def test_amazon(tmp_path: Path) -> None:
    (tmp_path / "meta.jsonl").write_text(json.dumps(META) + "\n" + json.dumps({"parent_asin": "B2", "images": None}))
    first, second = amazon.read_items(tmp_path / "meta.jsonl", tmp_path, amazon_columns()).collect().to_dicts()
    assert first == FLAT
    assert second == {**dict.fromkeys(FLAT), "item_id": "B2"}
    (tmp_path / "reviews.jsonl").write_text(
        '{"user_id": "u", "parent_asin": "B1", "asin": "Z", "timestamp": 1588687728923, "rating": 4.0, '
        '"title": "Nice ", "text": "Smells good"}\n'
    )
    columns = dict.fromkeys(("user_id", "item_id", "timestamp", "rating", "review"))
    assert amazon.read_reviews(tmp_path / "reviews.jsonl", tmp_path, columns).collect().row(0) == (
        "u",
        "B1",
        "1588687728923",
        "4.0",
        "Nice\nSmells good",
    )


def test_reference_item_dictionaries(tmp_path: Path) -> None:
    raw = {"B1": {key: value for key, value in META.items() if key != "parent_asin"}}
    reduced = {"B1": {"title": "Soap", "brand": "Acme", "main_image": "https://x/1.jpg", "price": 3.5}}
    for tree in (raw, reduced):
        (tmp_path / "items.json").write_text(json.dumps(tree))
        row = unirec.read_items(tmp_path / "items.json", tmp_path, amazon_columns()).collect().to_dicts()[0]
        assert {key: row[key] for key in ("item_id", "title", "brand", "main_image", "price")} == {
            key: FLAT[key] for key in ("item_id", "title", "brand", "main_image", "price")
        }


@settings(deadline=None)
@given(st.data())
def test_overlapping_samples_give_the_sequence_back(data: st.DataObject) -> None:
    sequence = [f"i{n}" for n in data.draw(st.permutations(range(data.draw(st.integers(4, 15)))))]
    sequences: list[str] = []
    width = data.draw(st.integers(2, 5))
    for end in range(2, len(sequence) + 1):
        unirec.append(sequences, sequence[max(0, end - width) : end])
    assert sequences == sequence
