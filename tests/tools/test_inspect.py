"""`nqf.tools.inspect`: every kind of table, guesses of modalities, and suggestions that load."""

import gzip
import json
from pathlib import Path

import polars as pl
import pytest
import yaml

from nqf.config import load_config
from nqf.data.errors import DataError
from nqf.data.load import prepare
from nqf.data.schema import schema_from_tree
from nqf.tools import data as command
from nqf.tools.inspect import Column, inspect_interactions, inspect_items, open_table, suggest_config, suggest_schema

WORDS = "oak desk lamp tall chair small walnut green shelf round table blue".split()


def item_rows(count: int = 60) -> list[dict]:
    return [
        {
            "item_id": f"i{row}",
            "product_name": f"{WORDS[row % 12]} {WORDS[row % 7]} number {row} of the house",
            "brand": f"maker {row % 6}",
            "tags": "|".join(WORDS[row % 5 : row % 5 + 1 + row % 3]),
            "price": 1.5 * row if row % 4 else None,
            "released": f"2021-0{1 + row % 9}-11",
            "updated_at": 1_600_000_000 + row,
            "photo": f"pictures/{row}.jpg",
            "link": f"https://example.org/{row}",
            "latitude": 48.0 + row / 100,
            "longitude": 11.0,
            "sales_rank": row * 13,
            "embedding": f"[{row}.5, 1, -2e-3, 4]",
            "sku": f"SKU{row:05d}",
            "zip": f"0{row:04d}",
            "currency": "EUR",
            "_hidden": row,
            "nothing": None,
        }
        for row in range(count)
    ]


EXPECTED = {
    "product_name": "text",
    "brand": "category",
    "tags": "category",
    "price": "number",
    "released": "time",
    "updated_at": "time",
    "photo": "image",
    "latitude": "number",
    "longitude": None,
    "sales_rank": "number",
    "embedding": "vector",
    "zip": "category",
    "_hidden": "number",
}


def look(path: Path, tmp_path: Path) -> dict[str, Column]:
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    return {column.name: column for column in inspect_items(path, scratch)}


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".csv.gz", ".jsonl", ".jsonl.gz", ".parquet"])
def test_every_kind_of_table(tmp_path: Path, suffix: str) -> None:
    frame = pl.DataFrame(item_rows())
    path = tmp_path / f"items{suffix}"
    kind = suffix.removesuffix(".gz")
    if kind == ".parquet":
        frame.write_parquet(path)
    elif kind == ".jsonl":
        path.write_text(frame.write_ndjson())
    else:
        separator, quotes = (",", "necessary") if kind == ".csv" else ("\t", "never")
        path.write_text(frame.write_csv(separator=separator, quote_style=quotes))
    if suffix.endswith(".gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    columns = look(path, tmp_path)
    assert list(columns) == frame.columns
    found = {name: column.options.get("modality") for name, column in columns.items() if name in EXPECTED}
    assert found == EXPECTED
    assert columns["tags"].options == {"modality": "category", "multi_valued": True, "separator": "|"}
    assert columns["sales_rank"].options["after_the_fact"] is True
    assert columns["price"].filled == pytest.approx(0.75)
    assert columns["price"].distinct == 45
    notes = {name: column.note for name, column in columns.items() if not column.options}
    assert notes == {
        "item_id": "the id of an item",
        "link": "links",
        "longitude": "the same value in every row",
        "sku": "a code that differs in every row",
        "currency": "the same value in every row",
        "nothing": "no value at all",
    }


def test_lists_and_nested_values(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    rows = [
        {
            "item_id": str(row),
            "genres": WORDS[row % 5 : row % 5 + 2],
            "vector": [row / 7, 1.0, -2.0],
            "features": ["It has four legs and a top of solid wood", "It weighs less than one might think it does"],
            "extra": {"a": row},
        }
        for row in range(30)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = look(path, tmp_path)
    found = {name: column.options.get("modality") for name, column in columns.items()}
    assert found["genres"] == "category"
    assert found["vector"] == "vector"
    assert look(path, tmp_path)["features"].note == "the same value in every row"
    pl.DataFrame(rows).write_parquet(tmp_path / "items.parquet")
    columns = look(tmp_path / "items.parquet", tmp_path)
    assert columns["vector"].options == {"modality": "vector"}
    assert "nested" in columns["extra"].note


def test_amazon_metadata_and_dictionary(tmp_path: Path) -> None:
    rows = [
        {
            "parent_asin": f"B{row}",
            "title": f"A {WORDS[row % 12]} with {row} legs for the garden",
            "features": ["It has legs and a top of solid wood"] * (row % 3),
            "images": [{"variant": "MAIN", "large": f"https://example.org/{row}.jpg"}],
            "details": {"Brand": f"maker {row % 3}"},
            "average_rating": 3 + row / 30,
        }
        for row in range(30)
    ]
    path = tmp_path / "meta_X.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    columns = look(path, tmp_path)
    assert {"item_id", "title", "brand", "main_image"} <= columns.keys()
    assert not {"parent_asin", "details", "images"} & columns.keys()
    assert columns["item_id"].distinct == 30
    assert columns["average_rating"].options["after_the_fact"] is True
    assert "amazon-2023" in suggest_config(path, path, tmp_path)
    dictionary = tmp_path / "dict.json"
    dictionary.write_text(json.dumps({row.pop("parent_asin"): row for row in rows}))
    assert look(dictionary, tmp_path).keys() == columns.keys()


def test_recbole(tmp_path: Path) -> None:
    path = tmp_path / "x.item"
    path.write_text(
        "item_id:token\tname:token_seq\tprice:float\n" + "".join(f"{r}\toak desk\t{r}.5\n" for r in range(9))
    )
    assert list(look(path, tmp_path)) == ["item_id", "name", "price"]
    events = tmp_path / "x.inter"
    events.write_text(
        "user_id:token\titem_id:token\ttimestamp:float\n" + "".join(f"u\t{r}\t{r}00000000\n" for r in range(5))
    )
    lines = dict(inspect_interactions(events, tmp_path, pl.Series([*map(str, range(3)), "9"])))
    assert lines["interactions"] == "5"
    assert lines["with unknown items"] == "2"
    assert lines["items without any interaction"] == "1"
    assert "format: recbole" in suggest_config(path, events, tmp_path)


def test_interactions_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "events.csv"
    rows = [("a", "1", 0), ("a", "2", 0), ("a", "3", 86_400), ("b", "1", 86_400), ("b", "1", 200_000)]
    path.write_text("user_id,item_id,timestamp,rating\n" + "".join(f"{u},{i},{t},4\n" for u, i, t in rows))
    lines = dict(inspect_interactions(path, tmp_path))
    assert lines["users"] == "2"
    assert lines["users with fewer than 3"] == "1"
    assert lines["the same user and item again"] == "1"
    assert lines["history length"] == "2 to 3, median 2.5, mean 2.5, 95 % at most 3"
    assert lines["timestamps"] == "100.0% filled, 1970-01-01 to 1970-01-03"
    assert lines["consecutive, at the same time"] == "33.3%"
    assert lines["ratings"] == "100.0% filled, 4 to 4, mean 4.00"


def test_suggestions_are_ready_to_train(tmp_path: Path, capsys) -> None:
    """What `inspect --output` writes is read by the fields stage as it stands."""
    pl.DataFrame(item_rows()).write_csv(tmp_path / "items.csv")
    events = [
        (f"u{user}", f"i{(user * 7 + step * step) % 60}", 10**9 + 1000 * step)
        for user in range(20)
        for step in range(6)
    ]
    pl.DataFrame(events, schema=["user_id", "item_id", "timestamp"], orient="row").write_csv(tmp_path / "events.csv")
    folder = tmp_path / "my shop"
    arguments = ["inspect", str(tmp_path / "items.csv"), "--interactions", str(tmp_path / "events.csv")]
    command.main([*arguments, "--output", str(folder)])
    out = capsys.readouterr().out
    schema = schema_from_tree(yaml.safe_load((folder / "schema.yaml").read_text()))
    assert yaml.safe_load((folder / "schema.yaml").read_text())["title"] == "product_name"
    place = next(field for field in schema.fields if field.name == "place")
    assert (place.modality, place.columns) == ("geo", ("latitude", "longitude"))
    assert next(field for field in schema.fields if field.name == "hidden").columns == ("_hidden",)
    assert "# sku: left out, a code that differs in every row" in out
    dataset = prepare(load_config(folder / "config.yaml").data, tmp_path / "data")
    assert dataset.report["items"]["missing"]["price"] == 15
    assert dataset.report["items"]["missing"]["place"] == 0
    assert not dataset.report["items"]["bad_values"]
    assert dataset.report["fields_left_out"] == ["sales_rank"]
    with pytest.raises(FileExistsError, match=r"schema.yaml: there already"):
        command.main([*arguments, "--output", str(folder)])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("items.xlsx", b"PK", "unknown kind of table"),
        ("items.csv", b"", "the file is empty"),
        ("items.csv", b"item_id,title\n", "there is no row in it"),
        ("items.parquet", b"PAR1", "not readable as Parquet"),
        ("nowhere.csv", None, "no such file"),
    ],
)
def test_refusals(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        inspect_items(tmp_path / name, tmp_path)


def test_interactions_need_users_and_items(tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_text("userId,item_id\na,1\n")
    with pytest.raises(DataError, match=r"no column 'user_id'; it has userId, item_id; rename the one that is meant"):
        inspect_interactions(tmp_path / "events.csv", tmp_path)


def test_schema_without_a_title(tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_text("item_id,price\n" + "".join(f"{row},{row}.5\n" for row in range(9)))
    columns = list(look(tmp_path / "items.csv", tmp_path).values())
    assert schema_from_tree(yaml.safe_load(suggest_schema(columns))).title is None
    assert open_table(tmp_path / "items.csv", tmp_path).collect().shape == (9, 2)
