"""Delimited text is read as Python's csv module reads it, or refused with the first bad line."""

import codecs
import csv
import gzip
import io
import tempfile
from pathlib import Path

import pandas as pd
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nqf.config import DialectConfig
from nqf.data.errors import DataError
from nqf.data.readers import open_table, read_table
from nqf.data.text import PLAIN, guess_dialect

HEADER = ["item_id", "title", "price"]


def rows_of(path: Path, dialect: DialectConfig = PLAIN) -> list[dict]:
    table = open_table(path, dialect)
    return [dict(zip(table.names, row, strict=True)) for row in table.rows(table.names)]


def notes_of(path: Path, dialect: DialectConfig = PLAIN) -> list[str]:
    table = open_table(path, dialect)
    list(table.rows(table.names))
    return table.notes


def with_csv(path: Path, encoding: str = "utf-8", **options) -> list[dict]:
    with path.open(encoding=encoding, newline="") as file:
        return list(csv.DictReader(file, **options))


# The events of a shop, with a column that nobody reads and inch marks in it.
MARKS = "".join(f"u{n},p{n},{n},{'Vinyl 12' + chr(34) if n % 7 == 1 else 'Lamp'}\n" for n in range(2_000))
READ = {
    "d01: quotes inside fields": "user_id,item_id,timestamp,product\n" + MARKS,
    "d01: one inch mark": 'item_id,title,price\np1,9 cm,1\np2,12",2\np3,9 cm,3\n',
    "d01: two inch marks": 'item_id,title,price\np1,9",1\np2,12",2\np3,9 cm,3\n',
    "d01: in the last column": 'item_id,size\np1,12"\np2,9 cm\np3,7"\n',
    "d02: text behind a closing quote": 'item_id,title,price\np1,"Weird Al" Yankovic,1\np2,"x" "y",2\n',
    "d12b: semicolons": '"item_id";"title";"price"\n"p1";"Café; bar";"1,50"\n"p2";"Lamp";"2,50"\n',
    "d17: index of pandas": "Unnamed: 0,item_id,title\n0,p1,a\n1,p2,b\n",
    "d26: quoted newlines": 'item_id,title\np1,"two\nlines"\np2,"and\r\nmore"\np3,x\n',
    "d26: carriage returns alone": "item_id,title\rp1,a\rp2,b\r",
    "blank lines": "item_id,title\n\np1,a\n\n\np2,b\n\n",
    "quotes doubled": 'item_id,title\np1,"a ""b"" c"\np2,""""\np3,""\n',
    "tabs in a .csv": "item_id\ttitle\np1\ta, b\np2\tc, d\n",
    "one column": "item_id\np1\np2\n",
    "no newline at the end": "item_id,title\np1,a\np2,b",
    "a separator in every title": "item_id,title\np1,a;b\np2,c;d\n",
    "a quoted newline behind row 5,000": "item_id,address\n"
    + "".join(f'p{n},"{n} Street\nTown"\n' if n == 5_001 else f"p{n},x\n" for n in range(8_000)),
    "blanks behind commas": "userId,movieId,rating\n1, 1, 1.0\n1, 2, 4.0\n",
    "the character that ends files elsewhere": "item_id,title\np1,a\x1ab\np2,c\n",
}


@pytest.mark.parametrize("case", READ)
def test_rows_are_those_of_the_csv_module(case: str, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(READ[case].encode())
    separator = ";" if "semicolons" in case else "\t" if "tabs" in case else ","
    assert rows_of(path) == with_csv(path, delimiter=separator)


def test_what_is_repaired_or_guessed_is_said(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text(READ["d02: text behind a closing quote"])
    assert [row["title"] for row in rows_of(path)] == ["Weird Al Yankovic", 'x "y"']
    (note,) = notes_of(path)
    assert "2 lines have text behind a closing quote, such as line 2" in note
    path.write_text(READ["d12b: semicolons"])
    assert notes_of(path) == [f"{path}: the separator is taken to be semicolon"]
    path.write_text(READ["d01: one inch mark"])
    assert notes_of(path) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('item_id,title,price\np1,a,1\np2,"Untitled,1\np3,c,3\n', r"line 3: .*Untitled"),
        # csv and pandas read one row here, whose title swallows another.
        ('item_id,title,price\np1,"a,1\np2,b,2\np3,"c,3\n', r'line 2: .*p1,"a,1'),
        ("item_id,title,price\np1,a,1\np2,b, red,2\n", r"line 3: 4 fields, and the header has 3: p2 \| b \|  red \| 2"),
        ("item_id,title,price\np1,a,1\np2,b\n", r"line 3: 2 fields, and the header has 3"),
        ('item_id,title,price\np1,"two\nlines",1\np2,b\n', r"line 4: 2 fields"),
        ('item_id,title\np1,"a \\"b\\", c"\n', r"line 2: a backslash before a quote; set escape"),
        # pandas takes the first column for an index and shifts all others.
        ("item_id,title,price\np1,a,1,\np2,b,2,\n", r"line 2: 4 fields"),
        ("i\0t\0e\0m\0\n\0", "zero bytes in the header; set the encoding, such as utf-16-le"),
        ("item_id,title,price\np1,a,1\n" + "x," * 5_000 + "\n", r"line 3: 5001 fields, .* and 4,996 more"),
    ],
)
def test_bad_lines_are_named(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text(content)
    with pytest.raises(DataError, match=message) as error:
        rows_of(path)
    assert len(str(error.value)) < 700


def test_bad_lines_can_be_left_out_and_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text('item_id,title,price\np1,a,1\np2,b, red,2\np3,c,3\np4,"d,4\np5,e,5\n')
    dialect = DialectConfig(bad_lines="drop")
    assert [row["item_id"] for row in rows_of(path, dialect)] == ["p1", "p3", "p5"]
    assert "2 lines could not be read and are left out, such as line 3" in notes_of(path, dialect)[0]


def test_what_a_dialect_says_is_done(tmp_path: Path) -> None:
    path = tmp_path / "table.tsv"
    path.write_text('item_id|title\np1|"Heroes"\np2|"open\n')
    title = [row["title"] for row in rows_of(path, DialectConfig(quote="", separator="|"))]
    assert title == ['"Heroes"', '"open']
    path.write_text('item_id,title\np1,"A \\"quoted\\", comma"\n')
    assert rows_of(path, DialectConfig(escape="\\", separator=","))[0]["title"] == 'A "quoted", comma'
    path.write_bytes("item_id,title\np1,Café – bar\n".encode("cp1252"))
    assert rows_of(path, DialectConfig(encoding="cp1252", separator=","))[0]["title"] == "Café – bar"
    for dialect, message in (
        (DialectConfig(separator="::"), "the dialect cannot be used: .*1-character string"),
        (DialectConfig(encoding="klingon"), "unknown encoding: klingon"),
    ):
        with pytest.raises(DataError, match=message):
            rows_of(path, dialect)
    pl.DataFrame({"a": [1]}).write_parquet(tmp_path / "t.parquet")
    with pytest.raises(DataError, match="a dialect belongs to delimited text"):
        open_table(tmp_path / "t.parquet", DialectConfig(separator=";"))


GUESSES = {
    "d18: a backslash escapes": (b'item_id,title\np1,"A \\"quoted\\", comma"\n', {"escape": "\\"}, 'A "quoted", comma'),
    "d02b: an open quote": (b'item_id,title\np1,"Untitled\np2,b\n', {"quote": ""}, '"Untitled'),
    "d12: Windows-1252": ("item_id,title\np1,Café\n".encode("cp1252"), {"encoding": "cp1252"}, "Café"),
    "latin-1": (b"item_id,title\np1,a\x81\n", {"encoding": "latin-1"}, "a\x81"),
    "UTF-16 without a mark": ("item_id,title\np1,Café\n".encode("utf-16-le"), {"encoding": "utf-16-le"}, "Café"),
    "semicolons": (b"item_id;title\np1;a\n", {"separator": ";"}, "a"),
    "as usual": (b"item_id,title\np1,a\n", {}, "a"),
    "all in quotes, one of them open": (b'item_id,title\n"p1","a"\n"p2","b\n', None, "line 3"),
    "d21: a line too long for every dialect": (b"item_id,title\np1,a\np2,b, red\n", None, "line 3: 3 fields"),
}


@pytest.mark.parametrize("case", GUESSES)
def test_inspection_tries_dialects_on_the_whole_file(case: str, tmp_path: Path) -> None:
    content, expected, title = GUESSES[case]
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    if expected is None:
        with pytest.raises(DataError, match=title):
            guess_dialect(path, separators=",;\t|")
        return
    dialect, words = guess_dialect(path, separators=",;\t|")
    assert dialect == DialectConfig(**expected)
    assert bool(words) == bool(expected)
    assert rows_of(path, dialect)[0]["title"] == title


@pytest.mark.parametrize("separator", [";", ",", "|", "~"])
def test_the_line_that_excel_declares_a_separator_by(separator: str, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text(
        f"sep={separator}\nitem_id{separator}title\np1{separator}a, b\n"
        if separator != ","
        else "sep=,\nitem_id,title\np1,a\n"
    )
    assert rows_of(path)[0]["title"][0] == "a"
    assert open_table(path).names == ["item_id", "title"]


def test_columns_without_names_get_those_of_pandas(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text(",,item_id,Unnamed: 0\n0,0,p1,x\n")
    assert open_table(path).names == ["Unnamed: 0.1", "Unnamed: 1", "item_id", "Unnamed: 0"]
    frame = pd.DataFrame({"item_id": ["p1", "p2"], "title": ["a", "b"]})
    frame.to_csv(path)
    assert open_table(path).names == list(pd.read_csv(path).columns)


@pytest.mark.parametrize("name", ["a[1].csv", "b*.csv", "c?.parquet", "[d].parquet", "e[ab].jsonl"])
def test_a_path_names_one_file(name: str, tmp_path: Path) -> None:
    for other in ("a1.csv", "bx.csv", "cx.parquet", "d.parquet", "ea.jsonl"):
        write(tmp_path / other, "wrong")
    write(tmp_path / name, "right")
    assert read_table(tmp_path / name, tmp_path, {"item_id": None}).collect()["item_id"].to_list() == ["right"]


def write(path: Path, value: str) -> None:
    frame = pl.DataFrame({"item_id": [value]})
    if path.suffix == ".parquet":
        buffer = io.BytesIO()
        frame.write_parquet(buffer)
        path.write_bytes(buffer.getvalue())
    else:
        path.write_text(frame.write_csv() if path.suffix == ".csv" else frame.write_ndjson())


ENCODINGS = {"utf-8": b"", "utf-8-sig": b"", "utf-16": b"", "utf-32": b"", "utf-16-be": codecs.BOM_UTF16_BE}
CELLS = st.text(
    st.characters(exclude_categories=("Cs",), exclude_characters="\0\ufeff") | st.sampled_from("\",;\t|\n\r\\' "),
    max_size=6,
)
TABLES = st.integers(1, 4).flatmap(
    lambda width: st.lists(st.lists(CELLS, min_size=width, max_size=width), min_size=1, max_size=6)
)


@settings(max_examples=150, deadline=None)
@given(
    table=TABLES,
    writer=st.sampled_from(["csv", "pandas", "polars"]),
    separator=st.sampled_from(",;\t|"),
    encoding=st.sampled_from(sorted(ENCODINGS)),
    newline=st.sampled_from(["\n", "\r\n"]),
    quote_all=st.booleans(),
    index=st.booleans(),
    packed=st.booleans(),
)
def test_every_dialect_reads_back(
    table: list[list[str]],
    writer: str,
    separator: str,
    encoding: str,
    newline: str,
    quote_all: bool,
    index: bool,
    packed: bool,
) -> None:
    """What csv, pandas and polars write, in whatever dialect, is read as csv reads it, with nothing said beforehand."""
    names = [f"c{n}" for n in range(len(table[0]))]
    columns = dict(zip(names, zip(*table, strict=True), strict=True))
    if writer == "csv":
        buffer = io.StringIO(newline="")
        quoting = csv.QUOTE_ALL if quote_all else csv.QUOTE_MINIMAL
        csv.writer(buffer, delimiter=separator, lineterminator=newline, quoting=quoting).writerows([names, *table])
        text = buffer.getvalue()
    elif writer == "pandas":
        quoting = csv.QUOTE_ALL if quote_all else csv.QUOTE_MINIMAL
        text = pd.DataFrame(columns).to_csv(sep=separator, index=index, lineterminator=newline, quoting=quoting)
    else:
        style = "always" if quote_all else "necessary"
        text = pl.DataFrame(columns).write_csv(separator=separator, line_terminator=newline, quote_style=style)
    data = ENCODINGS[encoding] + text.encode(encoding)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("table.csv.gz" if packed else "table.csv")
        path.write_bytes(gzip.compress(data) if packed else data)
        expected = list(csv.reader(io.StringIO(text, newline=""), delimiter=separator))
        expected = [row for row in expected if row]
        chosen = DialectConfig(separator=separator)
        found = open_table(path, chosen)
        header = [name or "Unnamed: 0" for name in expected[0]]
        assert found.names == header
        if any(len(row) != len(header) for row in expected[1:]):
            # polars does not quote a lone carriage return, at which csv ends a row.
            with pytest.raises(DataError, match=r"line \d+"):
                list(found.rows(header))
            return
        assert list(found.rows(header)) == expected[1:]
        # The separator is found out where more than one column shows it.
        if len(header) > 1:
            assert list(open_table(path).rows(open_table(path).names)) == expected[1:]


def test_a_large_table_is_read_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    with path.open("w") as file:
        file.write("item_id,title\n")
        file.writelines(f'p{n},"a, {n}"\n' for n in range(50_000))
    frame = read_table(path, tmp_path, {"item_id": None, "title": None}).collect()
    assert frame.row(49_999) == ("p49999", "a, 49999")
    assert len(frame) == 50_000
