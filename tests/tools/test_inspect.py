"""`nqf.tools.inspect`: every kind of table, guesses of modalities, and suggestions that load."""

import gzip
import json
from pathlib import Path

import polars as pl
import pytest
import yaml

from nqf.config import load_config
from nqf.data.amazon import schema_text
from nqf.data.errors import DataError
from nqf.data.load import prepare
from nqf.data.numbers import amounts_of
from nqf.data.schema import schema_from_tree
from nqf.tools import data as command
from nqf.tools.inspect import (
    Column,
    examine,
    inspect_interactions,
    inspect_items,
    open_events,
    open_items,
    suggest_schema,
)

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
    return {column.name: column for column in inspect_items(examine(path), scratch)}


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
    assert columns["extra"].options == {"modality": "category"}


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
    assert examine(path).format == "amazon-2023"
    assert suggest_schema(examine(path), list(columns.values())) == schema_text()
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
    opened = open_events(events, tmp_path, examine(path))
    lines = dict(inspect_interactions(opened, pl.Series([*map(str, range(3)), "9"])))
    assert lines["interactions"] == "5"
    assert lines["with unknown items"] == "2"
    assert lines["items without any interaction"] == "1"
    assert (examine(path).format, opened.format) == ("recbole", "recbole")


def test_interactions_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "events.csv"
    rows = [("a", "1", 0), ("a", "2", 0), ("a", "3", 86_400), ("b", "1", 86_400), ("b", "1", 200_000)]
    path.write_text("user_id,item_id,timestamp,rating\n" + "".join(f"{u},{i},{t},4\n" for u, i, t in rows))
    lines = dict(inspect_interactions(open_events(path, tmp_path)))
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
    assert load_config(folder / "config.yaml").data.split == "temporal"
    with pytest.raises(FileExistsError, match=r"schema.yaml: there already; --force replaces it"):
        command.main([*arguments, "--output", str(folder)])
    (folder / "config.yaml").write_text("name: mine\n")
    command.main([*arguments, "--output", str(folder), "--force"])
    assert load_config(folder / "config.yaml").data.split == "temporal"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("items.doc", b"PK", "unknown kind of table"),
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
        inspect_items(examine(tmp_path / name), tmp_path)


def test_interactions_need_users_and_items(tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_text("who,item_id\na,1\n")
    with pytest.raises(DataError, match=r"no column 'user_id' .* it has who, item_id; name the one that is meant"):
        open_events(tmp_path / "events.csv", tmp_path)


def test_schema_without_a_title(tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_text("item_id,price\n" + "".join(f"{row},{row}.5\n" for row in range(9)))
    source, columns = examine(tmp_path / "items.csv"), list(look(tmp_path / "items.csv", tmp_path).values())
    assert schema_from_tree(yaml.safe_load(suggest_schema(source, columns))).title is None
    assert open_items(source, tmp_path).collect().shape == (9, 2)


# Files as strangers have them: items, events, keys of the configuration, words that are printed.
EVENTS = "user_id,item_id,timestamp\n" + "".join(
    f"u{user},p{1 + (user + step) % 9},{1_600_000_000 + 1_000 * step + user}\n"
    for user in range(12)
    for step in range(5)
)
ITEMS = "item_id,title,price\n" + "".join(f"p{n},Thing number {n} of the shop,{n}.5\n" for n in range(1, 10))
STRANGERS = {
    "d17: row numbers of pandas": (
        (
            "items.csv",
            "Unnamed: 0,,"
            + "\n".join(f"{n - 1},{n - 1},{line}" if n else line for n, line in enumerate(ITEMS.splitlines())),
        ),
        ("events.csv", EVENTS),
        {"split": "temporal"},
        ("# 'Unnamed: 0': left out, the numbers of the rows", "# 'Unnamed: 1': left out"),
    ),
    "d12b: semicolons and Windows-1252": (
        ("items.csv", ITEMS.replace(",", ";").replace("Thing", "Café").encode("cp1252")),
        ("events.csv", EVENTS.replace(",", "\t")),
        {"items_dialect": {"separator": ";", "encoding": "cp1252"}, "interactions_dialect": {"separator": "\t"}},
        ("the separator is taken to be semicolon", "its encoding is taken to be cp1252", "taken to be tab"),
    ),
    "d18: backslashes": (
        ("items.csv", ITEMS.replace("Thing number 3 of the shop", '"Thing \\"3\\", red"')),
        ("events.csv", EVENTS),
        {"items_dialect": {"escape": "\\"}},
        ("a backslash is taken to escape quotes",),
    ),
    "d03: lists as text": (
        (
            "items.csv",
            "item_id,title,genres\n"
            + "".join(f"p{n},Thing number {n} here,\"['A & B', 'C{n % 3}']\"\n" for n in range(1, 10)),
        ),
        ("events.csv", EVENTS),
        {},
        ("genres: category",),
    ),
    "d09e: product_id": (
        (
            "x.item",
            "product_id:token\tapp_name:token\n" + "".join(f"p{n}\tGame number {n} of all\n" for n in range(1, 10)),
        ),
        (
            "x.inter",
            EVENTS.replace(",", "\t").replace(
                "user_id\titem_id\ttimestamp", "user_id:token\tproduct_id:token\ttimestamp:float"
            ),
        ),
        {"format": "recbole", "columns": {"item": "product_id"}, "split": "temporal"},
        ("the item is taken from the column 'product_id'", "title: app_name"),
    ),
    "d10: lines of objects in .json": (
        (
            "b.json",
            "".join(
                json.dumps({"business_id": f"p{n}", "name": f"Cafe number {n} there"}) + "\n" for n in range(1, 10)
            ),
        ),
        (
            "r.json",
            "".join(
                json.dumps(dict(zip(("user_id", "business_id", "date", "stars"), (*line.split(","), 4), strict=True)))
                + "\n"
                for line in EVENTS.splitlines()[1:]
            ),
        ),
        {"format": "table", "columns": {"item": "business_id", "time": "date", "rating": "stars"}},
        ("the time is taken from the column 'date'",),
    ),
    "a shop whose item table has another name": (
        ("items.csv", ITEMS.replace("item_id", "sku")),
        ("events.csv", EVENTS.replace("user_id,item_id,timestamp", "customer_id,product,ordered_at")),
        {"columns": {"user": "customer_id", "item": "product", "time": "ordered_at", "id": "sku"}},
        ("the id of an item is taken from the column 'sku'",),
    ),
    "no times": (
        ("items.csv", ITEMS),
        (
            "events.csv",
            "".join(line.rpartition(",")[0] + ",x\n" for line in EVENTS.splitlines()).replace(
                "item_id,x", "item_id,shelf"
            ),
        ),
        {"split": "leave-one-out"},
        ("no column of times was found", "columns that are not used: shelf"),
    ),
    "a title that is a category": (
        (
            "items.csv",
            "item_id,title,place,lat,lon\n" + "".join(f"p{n},T{n % 2},x{n % 3},{n},{n}.5\n" for n in range(1, 10)),
        ),
        ("events.csv", EVENTS),
        {},
        ("title_: {modality: category, column: title}", "place_: {modality: geo"),
    ),
}


@pytest.mark.parametrize("case", STRANGERS)
def test_what_is_written_can_be_trained(case: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (items, item_text), (events, event_text), expected, words = STRANGERS[case]
    for name, text in ((items, item_text), (events, event_text)):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    arguments = ["inspect", str(tmp_path / items), "--interactions", str(tmp_path / events)]
    command.main([*arguments, "--output", str(tmp_path / "out")])
    out = capsys.readouterr().out
    for word in words:
        assert word in out
    data = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["data"]
    assert expected.items() <= data.items()
    dataset = prepare(load_config(tmp_path / "out" / "config.yaml").data, tmp_path / "data")
    assert dataset.report["interactions"]["count"] == 60
    assert len(dataset.catalogue) == 9


def test_nothing_is_written_that_cannot_be_trained(tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_text(ITEMS.replace("p", "q"))
    (tmp_path / "events.csv").write_text(EVENTS)
    arguments = ["inspect", str(tmp_path / "items.csv"), "--interactions", str(tmp_path / "events.csv")]
    with pytest.raises(DataError, match="no interaction is left"):
        command.main([*arguments, "--output", str(tmp_path / "out")])
    (tmp_path / "items.csv").write_text(ITEMS.replace("item_id", "which"))
    with pytest.raises(DataError, match=r"no column 'item_id' and none of a common name"):
        command.main([*arguments, "--output", str(tmp_path / "out")])
    (tmp_path / "items.csv").write_text("item_id,title\np1,same\np2,same\n")
    with pytest.raises(DataError, match="no column of it can be a field"):
        command.main([*arguments, "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_markup_and_escapes_of_a_table_are_text(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "items.csv").write_text(
        "item_id,[bold]x[/],title\n" + "".join(f"[/red]{n},\x1b[2J{n},[link]Thing {n} [/b]\n" for n in range(5))
    )
    command.main(["inspect", str(tmp_path / "items.csv")])
    out = capsys.readouterr().out
    for text in ("[bold]x[/]", "[/red]0", "[link]Thing 0 [/b]", "\\x1b[2J0"):
        assert text in out
    assert "\x1b" not in out


@pytest.mark.parametrize(
    ("written", "numbers"),
    [
        (["12,34", "5,00", "1.234,50"], [12.34, 5.0, 1234.5]),
        (["12,99 €", "1.299,00 €"], [12.99, 1299.0]),
        (["$1,299.00", "$5", "$7.25"], [1299.0, 5.0, 7.25]),
        (["CHF 5.-", "CHF 12.50"], [5.0, 12.5]),
        (["1,234", "56", "12,345,678"], [1234.0, 56.0, 12345678.0]),
        (["10-20 EUR", "5 EUR"], [10.0, 5.0]),
    ],
)
def test_prices_as_people_write_them_are_numbers(tmp_path: Path, written: list[str], numbers: list[float]) -> None:
    """A price with a comma was taken for a list of two categories."""
    pandas = pytest.importorskip("pandas")
    rows = {"sku": [f"a{row}" for row in range(60)], "Preis": (written * 60)[:60]}
    pandas.DataFrame(rows | {"name": ["lamp", "desk", "oak chair"] * 20}).to_csv(
        tmp_path / "items.csv", sep=";", index=False
    )
    source = examine(tmp_path / "items.csv")
    (price,) = (column for column in inspect_items(source, tmp_path) if column.name == "Preis")
    assert price.options == {"modality": "number"}
    assert amounts_of(pl.Series(written)).to_list() == numbers


@pytest.mark.parametrize(
    "written",
    [["1,2", "3,15", "7"], ["1,2,3", "4"], ["030 1234567", "040 222"], ["2020-01-02"], ["4711-12"], ["a", "5"]],
)
def test_lists_and_codes_are_no_prices(written: list[str]) -> None:
    assert amounts_of(pl.Series(written)) is None


def test_decimal_commas_of_pandas_are_read_as_written(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    prices = [round(1.37 * row + 0.25, 2) for row in range(40)]
    frame = pandas.DataFrame({"id": [f"a{row}" for row in range(40)], "price": prices})
    frame["price"] = frame["price"].map("{:.2f}".format).str.replace(".", ",")
    frame.to_csv(tmp_path / "items.csv", sep=";", index=False)
    read = pandas.read_csv(tmp_path / "items.csv", sep=";", decimal=",")["price"].to_list()
    written = pl.read_csv(tmp_path / "items.csv", separator=";", infer_schema=False)["price"]
    assert amounts_of(written).to_list() == read
