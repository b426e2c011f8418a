"""Values of tables as strangers have them: times, numbers, words for nothing, ids; each kind beside a property."""

import datetime
from collections.abc import Sequence
from pathlib import Path

import pandas
import polars as pl
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from nqf.config import MISSING_WORDS, DataConfig
from nqf.data import numbers, times
from nqf.data.catalogue import canonical_items
from nqf.data.errors import DataError
from nqf.data.load import Dataset, prepare
from nqf.data.schema import schema_from_tree

UTC = datetime.UTC
TEN = 1_546_336_800
"""2019-01-01 10:00:00 UTC."""


def seconds(cells: Sequence[object]) -> list[int | None]:
    return times.guessed(pl.Series(cells))[0].to_list()


def said(cells: Sequence[object], **options: bool) -> str:
    return " ".join(times.decide(pl.DataFrame({"x": cells}).lazy(), "x", **options).notes)


def pandas_seconds(cells: Sequence[str]) -> list[int]:
    return [int(time.floor("s").timestamp()) for time in pandas.to_datetime(list(cells), utc=True, format="mixed")]


def number_of(cells: Sequence[str]) -> tuple[list[float | None], str]:
    table = pl.DataFrame({"x": cells})
    reading = numbers.decide(table.lazy(), "x")
    read = table.select(numbers.number(pl.col("x"), pl.String(), formats=reading.formats))["x"]
    return read.to_list(), " ".join(reading.notes)


SPELLINGS = {
    "ISO": "%Y-%m-%dT%H:%M:%S",
    "ISO, microseconds": "%Y-%m-%dT%H:%M:%S.%f",
    "ISO, comma": "%Y-%m-%d %H:%M:%S,%f",
    "Z": "%Y-%m-%dT%H:%M:%SZ",
    "basic": "%Y%m%dT%H%M%SZ",
    "BigQuery": "%Y-%m-%d %H:%M:%S UTC",
    "HTTP": "%a, %d %b %Y %H:%M:%S GMT",
    "C and Unix": "%a %b %d %H:%M:%S %Y",
    "date": "%a %b %d %H:%M:%S UTC %Y",
    "X": "%a %b %d %H:%M:%S +0000 %Y",
    "SQL Server": "%b %d %Y %I:%M:%S%p",
    "Play Store": "%B %d, %Y %H:%M:%S",
    "IMDb": "%d %B %Y %H:%M:%S",
    "last.fm": "%d %b %Y, %H:%M:%S",
    "Takeout": "%b %d, %Y, %I:%M:%S %p UTC",
    "Excel": "%m/%d/%Y %I:%M:%S %p",
    "slashes": "%Y/%m/%d %H:%M:%S",
    "file name": "%Y-%m-%d_%H:%M:%S",
    "digits": "%Y%m%d%H%M%S",
}


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.datetimes(datetime.datetime(1902, 1, 1), datetime.datetime(2099, 12, 31)), min_size=1, max_size=5),
    st.sampled_from(sorted(SPELLINGS)),
)
def test_times_in_every_spelling_read_back_equal(moments: list[datetime.datetime], name: str) -> None:
    # One date that can be nothing but month first, where a spelling leaves it open.
    moments = [*moments, datetime.datetime(2019, 5, 31, 23, 59, 59)]
    cells = [moment.strftime(SPELLINGS[name]) for moment in moments]
    expected = [int(moment.replace(microsecond=0, tzinfo=UTC).timestamp()) for moment in moments]
    assert seconds(cells) == expected
    if name != "file name":
        assert pandas_seconds(cells) == expected


@settings(deadline=None, max_examples=60)
@given(
    st.datetimes(datetime.datetime(1902, 1, 1), datetime.datetime(2099, 12, 31)),
    st.integers(-14 * 60, 14 * 60),
    st.sampled_from(["{sign}{h:02}:{m:02}", "{sign}{h:02}{m:02}", " {sign}{h:02}{m:02}", " UTC{sign}{h:02}:{m:02}"]),
)
def test_zones_in_every_spelling(moment: datetime.datetime, minutes: int, spelling: str) -> None:
    zone = datetime.timezone(datetime.timedelta(minutes=minutes))
    sign, (h, m) = "+-"[minutes < 0], divmod(abs(minutes), 60)
    cell = moment.strftime("%Y-%m-%d %H:%M:%S") + spelling.format(sign=sign, h=h, m=m)
    expected = int(moment.replace(microsecond=0, tzinfo=zone).timestamp())
    assert seconds([cell]) == [expected]
    # dateutil reads UTC+3 as POSIX does, three hours west; sites mean three hours east.
    if "UTC" not in spelling:
        assert pandas_seconds([cell]) == [expected]


@pytest.mark.parametrize(
    "cell",
    [
        "2019-01-01T10Z",
        "2019-01-01 10:00:00+00",
        "2019-01-01 10:00:00.000 -0000",
        "2019-01-01T10:00:00.123456789Z",
        "2019-01-01t10:00z",
        "2019-01-01 10-00-00",
        "Jan  1 2019 10:00AM",
        "Tuesday, January 1, 2019 10:00:00 AM",
        "2019-Jan-01 10:00",
        "1 January 2019 10:00:00 UTC",
        "1/1/2019 10:00",
        "01.01.2019 10:00",
        "1/1/19 10:00:00 AM",
        "20190101 10:00:00",
        "1st January 2019 10:00",
        "2019 01 01 10:00",
    ],
)
def test_spellings_of_one_moment_as_pandas_reads_them(cell: str) -> None:
    assert seconds([cell]) == [TEN] == pandas_seconds([cell])


@pytest.mark.parametrize(
    "cell",
    [
        "2019-01-01T11:00:00+01:00[Europe/Paris]",
        "Tue Jan 01 2019 11:00:00 GMT+0100 (Central European Standard Time)",
        "01-JAN-19 10.00.00.000000 AM",
        "01/Jan/2019:10:00:00 +0000",
        "2019-01-01-10.00.00.000000",
        'ISODate("2019-01-01T10:00:00Z")',
        "Jan 1, 2019, 10:00:00\u202fAM UTC",
        "2019-01-01T05:00:00\u221205:00",
        "2019-01-01 05:00:00 EST",
    ],
)
def test_spellings_of_databases_and_sites_that_pandas_may_not_read(cell: str) -> None:
    assert seconds([cell]) == [TEN]


@pytest.mark.parametrize("cell", ["today", "10:00", "Jan 5", "2019-02-30", "13 PM", "2019-01-01 10:00:00 Mars", "5 kg"])
def test_what_is_no_moment_is_not_read(cell: str) -> None:
    assert seconds([cell, "2019-01-01T10:00:00Z"]) == [None, TEN]


def test_numbers_have_one_unit_decided_from_the_whole_column() -> None:
    # Milliseconds around 1970: alone, the small ones could be seconds.
    films = [-104_630_400, 5_097_600, 70_243_200, 816_998_400, 0]
    assert seconds([1_000 * film for film in films]) == films
    for scale in (1, 10**3, 10**6, 10**9):
        for kind in (int, float, str):
            cells = [kind(scale * time) for time in (-TEN, 0, 400_000, TEN)]
            assert seconds(cells) == [-TEN, 0, 400_000, TEN], (scale, kind)
    assert seconds(["1.54634e+09", "1546336800.9", "-1.5"]) == [1_546_340_000, TEN, -2]
    assert seconds(["1546336800000.0"]) == [TEN]


def test_digits_of_a_calendar_and_serial_days() -> None:
    assert seconds(["2015", "2016", "0"]) == [1_420_070_400, 1_451_606_400, None]
    assert seconds([201501, 201512]) == [1_420_070_400, 1_448_928_000]
    assert seconds([20140128.0, 20140203.0]) == [1_390_867_200, 1_391_385_600]
    assert seconds(["2019010110", "2019010111", "2019010112"]) == [TEN, TEN + 3_600, TEN + 7_200]
    assert seconds(["201901011000", "20190101100000", "20190101100000999"]) == [TEN] * 3
    # Precision as known: MusicBrainz and Goodreads have years, months and days in one column.
    assert seconds(["2019", "2019-02", "2019-02-03", None]) == [1_546_300_800, 1_548_979_200, 1_549_152_000, None]
    serial = [43466.416666666664, 43466.4167, 43467.0]
    days = pandas.to_datetime(pandas.Series(serial), unit="D", origin="1899-12-30").dt.round("ms").dt.floor("s")
    assert seconds(serial) == [int(day.timestamp()) for day in days] == [TEN, TEN + 2, 1_546_387_200]
    assert "Excel" in said(serial) and "calendar" in said([20140128, 20140203])


def test_order_of_day_and_month_is_that_of_the_column() -> None:
    assert seconds(["03/04/2019", "13/04/2019"]) == pandas_seconds(["2019-04-03", "2019-04-13"])
    assert seconds(["03/04/2019", "04/13/2019"]) == pandas_seconds(["2019-03-04", "2019-04-13"])
    assert "month-first, as no other date of it tells" in said(["03/04/2019", "05/06/2019"])
    assert "can only be day-first and 1 that can only be month-first" in said(["13/04/2019", "04/13/2019"])
    assert said(["01/01/2019", "2019-01-01"]) == ""


@pytest.mark.parametrize("cells", [[datetime.timedelta(days=2)], [datetime.time(10)], [["a"]], [True], [None]])
def test_other_types_are_no_times(cells: list) -> None:
    assert seconds(cells) == [None]
    assert times.guessed(pl.Series(cells))[1].unreadable == (cells != [None])


def test_strange_times_are_said_with_an_example() -> None:
    assert "before March 1973" in said([3, 4, 5])
    assert "'9999-12-31', read as 9999-12-31 00:00:00" in said(["9999-12-31", "2019-01-01"])
    assert "'1815-06-18'" in said(["1815-06-18", "2019-01-01"], events=True)
    assert said(["1815-06-18", "2019-01-01"]) == ""
    single = pl.DataFrame({"x": pl.Series([978_300_760], dtype=pl.Float32)})
    assert "to 64 or 128 alone" in " ".join(times.decide(single.lazy(), "x").notes)
    assert "as 75% of them suggest" in said([TEN, TEN + 1, TEN + 2, TEN * 1000])


def test_columns_that_people_reported() -> None:
    # dbeley/lastfm-scraper#19: line numbers, then unix seconds.
    assert seconds(["1", "2", "1255352473", "1255353306"]) == [1, 2, 1_255_352_473, 1_255_353_306]
    assert "1 times of 'x' are before 1980" in said(["1", "1255352473", "1255353306"], events=True)
    # fishglob/FishGlob_data#18.
    spelled = ["2021-03-01", "2021-03", "03/2021", "1983"]
    assert seconds(spelled) == pandas_seconds(["2021-03-01"] * 3 + ["1983-01-01"])
    # pandas-dev/pandas#26304, #12585, #12583, #27454; sfu-db/dataprep#627.
    for cells, days in (
        (["12.01.2017 17:18", "15.04.2017 02:40"], ["12 Jan 2017 17:18", "15 Apr 2017 02:40"]),
        (["03/09/2018 12:02:00", "14/09/2018 14:09:00"], ["3 Sep 2018 12:02", "14 Sep 2018 14:09"]),
        (["31/12/2014", "10/03/2011"], ["31 Dec 2014", "10 Mar 2011"]),
        (["05-01-2019 00:37", "15-01-2019 00:37"], ["5 Jan 2019 00:37", "15 Jan 2019 00:37"]),
        (["12-01-06", "12-04-06", "20-12-06"], ["12 Jan 2006", "12 Apr 2006", "20 Dec 2006"]),
    ):  # fmt: skip
        assert seconds(cells) == pandas_seconds(days) and "day-first" in said(cells)
    # pola-rs/polars#18797, jseutter/ofxparse#77, aniav/ynab-csv#2, scrapinghub/price-parser#94; pandas-dev/pandas#4598.
    assert number_of(["1.299,99", "265,64", "-2,40", ",99"])[0] == [1299.99, 265.64, -2.4, 0.99]
    assert number_of(["€ 1.000.000,00", "4405,95"])[0] == [1_000_000, 4405.95]
    assert number_of(["2,334.01", "13", "5"])[0] == [2334.01, 13, 5]


@pytest.mark.parametrize(
    ("cell", "number"),
    [
        ("$12.99", 12.99), ("12.99 USD", 12.99), ("EUR 5", 5), ("5 €", 5), ("US$1,299.00", 1299), ("-$3.50", -3.5),
        ("1,234,567", 1_234_567), ("1.234.567", 1_234_567), ("1,29,900.00", 129_900), ("1.299,00", 1299),
        ("1 299,50 zł", 1299.5), ("1’299.00", 1299), ("12,99", 12.99), ("0,123", 0.123), ("R$ 10,50", 10.5),
        ("$12.99 - $20.00", 12.99), ("12.99–20.00", 12.99), ("from 14.99", 14.99), ("5 to 7", 5), ("₹ 499", 499),
        ("1e3", 1000), (".5", 0.5), ("$.99", 0.99), (",99", 0.99), ("5,-", 5), ("+7", 7), ("49 kr.", 49),
        ("2019-01-05", None), ("555-1234", None), ("12 kg", None), ("1.2.3", None), ("15%", None), ("—", None),
        ("free", None), ("1,2,3", None), ("inf", None), ("0x10", None), ("$", None),
    ],
)  # fmt: skip
def test_prices(cell: str, number: float | None) -> None:
    assert number_of([cell])[0] == [number]


def test_separators_are_those_of_the_column() -> None:
    values, notes = number_of(["1.299", "2,50"])
    assert values == [1299, 2.5] and "'1.299' are read with a decimal comma" in notes
    assert number_of(["1,299", "2.50"])[0] == [1299, 2.5]
    assert number_of(["1.299", "2.5"]) == ([1.299, 2.5], "")
    # Both in one column: what can be either is not guessed.
    values, notes = number_of(["1,299", "2.50", "2,50", "1.299,00"])
    assert values == [None, 2.5, 2.5, 1299] and "'1,299'" in notes and "cannot be read" in notes
    values, notes = number_of(["$5", "€5", "6 - 7"])
    assert values == [5, 5, 6] and "2 currencies ($, €) are not converted" in notes and "lower end counts" in notes


@settings(deadline=None, max_examples=80)
@given(st.lists(st.floats(0.01, 1e9).map(lambda value: round(value, 2)), min_size=1, max_size=5), st.data())
def test_amounts_with_separators_read_back_equal(amounts: list[float], data: st.DataObject) -> None:
    thousands, decimal = data.draw(st.sampled_from([(",", "."), (".", ","), (" ", ","), ("\xa0", ","), ("'", ".")]))
    before, after = data.draw(st.sampled_from([("", ""), ("$", ""), ("", " €"), ("CHF ", ""), ("", " kr")]))

    def spelled(amount: float) -> str:
        plain = f"{amount:,.2f}".replace(",", "T").replace(".", decimal).replace("T", thousands)
        return f"{before}{plain}{after}"

    assert number_of([spelled(amount) for amount in amounts])[0] == pytest.approx(amounts, rel=1e-12)


EVENTS = "user_id,item_id,timestamp\n" + "".join(
    f"u{user},{item},{1_600_000_000 + item}\n" for user in range(3) for item in range(1, 6)
)
ITEMS = "item_id,title\n" + "".join(f"{item},Thing {item}\n" for item in range(1, 7))
FIELDS = {"title": "text", "brand": "category", "price": "number", "added": "time"}


def shop(folder: Path, items: object = ITEMS, events: object = EVENTS, fields: object = None, **options: object):
    """Prepares two tables, each a CSV text, a list of JSON lines or a frame for Parquet."""
    paths = {}
    for name, content in (("items", items), ("interactions", events)):
        if isinstance(content, pl.DataFrame):
            paths[name] = folder / f"{name}.parquet"
            content.write_parquet(paths[name])
        else:
            paths[name] = folder / (f"{name}.jsonl" if isinstance(content, list) else f"{name}.csv")
            paths[name].write_text("\n".join(content) if isinstance(content, list) else content, encoding="utf-8")
    (folder / "schema.yaml").write_text(
        yaml.safe_dump({"title": "title", "fields": fields or {"title": "text"}}, sort_keys=False)
    )
    given = {name: str(path) for name, path in paths.items()}
    config = DataConfig(format="table", schema=str(folder / "schema.yaml"), **given, **options)
    return prepare(config, folder / "data")


def column(dataset: Dataset, name: str) -> list:
    return next(dataset.catalogue.chunks([name], 1_000))[name].to_list()


def warned(dataset: Dataset, words: str) -> bool:
    return any(words in warning for warning in dataset.report["warnings"])


@settings(deadline=None, max_examples=20)
@given(words=st.lists(st.sampled_from(["", *MISSING_WORDS]), min_size=4, max_size=4), kind=st.sampled_from("ctp"))
def test_words_for_nothing_are_missing_in_any_container(words: list[str], kind: str, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("shop")
    rows = [("1", *words), *((str(item), f"Thing {item}", "Acme", "2.5", "2019-01-01") for item in range(2, 7))]
    frame = pl.DataFrame(rows, schema=["item_id", *FIELDS], orient="row")
    kinds = {"c": frame.write_csv(), "t": frame.write_ndjson().splitlines(), "p": frame}
    dataset = shop(folder, kinds[kind], fields=FIELDS)
    assert [column(dataset, name)[0] for name in FIELDS] == [None] * 4
    assert column(dataset, "title")[1] == "Thing 2"
    assert dataset.report["items"]["bad_values"] == {}
    assert sum(dataset.report["items"]["missing_words"].values()) == sum(word != "" for word in words)
    assert warned(dataset, "words for nothing") == any(words)
    if kind == "c":
        listed = pandas.read_csv(folder / "items.csv")
        assert listed.iloc[0, 1:].isna().tolist() == [word != "\\N" for word in words]


def test_nan_of_json_and_parquet_is_missing(tmp_path: Path) -> None:
    lines = ['{"item_id": 1, "title": NaN, "brand": NaN, "price": NaN, "added": NaN}']
    lines += [f'{{"item_id": {item}, "title": "T", "brand": "A", "price": 1.5, "added": 1e9}}' for item in range(2, 7)]
    dataset = shop(tmp_path, lines, fields=FIELDS)
    assert [column(dataset, name)[0] for name in FIELDS] == [None] * 4
    values = [float("nan"), 1.0, 2.0, 3.0, 4.0, 5.0]
    dataset = shop(tmp_path, pl.DataFrame({"item_id": range(1, 7)} | dict.fromkeys(FIELDS, values)), fields=FIELDS)
    assert [column(dataset, name)[0] for name in FIELDS] == [None] * 4


def test_which_words_mean_nothing_is_an_option(tmp_path: Path) -> None:
    items = "item_id,title\n1,None\n2,NA\n3,unknown\n4,T\n5,T\n6,T\n"
    assert column(shop(tmp_path, items), "title")[:3] == [None, None, "unknown"]
    dataset = shop(tmp_path, items, missing_words=("unknown",))
    assert column(dataset, "title")[:3] == ["None", "NA", None]
    # New items are read with the words of the catalogue.
    new = canonical_items(pl.DataFrame({"item_id": ["7", "8"], "title": ["NA", "unknown"]}), dataset.catalogue.schema)
    assert new["title"].to_list() == ["NA", None]


def test_new_items_are_read_in_the_formats_of_the_catalogue(tmp_path: Path) -> None:
    items = "item_id,title,price,added\n" + "".join(
        f'{item},T,"{item},50",{10**12 + item * 10**10}\n' for item in range(1, 7)
    )
    schema = shop(tmp_path, items, fields={"title": "text", "price": "number", "added": "time"}).catalogue.schema
    assert [field.format for field in schema.fields] == [(), ("decimal-comma",), ("milliseconds", "month-first")]
    new = canonical_items(pl.DataFrame({"item_id": ["7"], "price": ["1.299"], "added": ["5097600000"]}), schema)
    assert new["price"].to_list() == [1299.0] and new["added"].to_list() == [5_097_600]


@pytest.mark.parametrize("word", ["nan", "None", "NULL", "NA", "", "\\N", " "])
@pytest.mark.parametrize("name", ["user_id", "item_id"])
def test_rows_without_ids_are_refused_left_out_or_kept(tmp_path: Path, word: str, name: str) -> None:
    line = f"{word},1,1600000000" if name == "user_id" else f"u0,{word},1600000000"
    events = EVENTS + line + "\n"
    message = rf"row 16 has {f'the {name}' if word.strip() else f'no {name}'}.*data\.missing_ids: drop"
    with pytest.raises(DataError, match=message):
        shop(tmp_path, events=events)
    dataset = shop(tmp_path, events=events, missing_ids="drop")
    assert dataset.report["interactions"]["missing_ids"] == 1 and dataset.report["interactions"]["count"] == 15
    assert warned(dataset, "1 rows are left out, as row 16 has")
    if word.strip() and name == "user_id":
        kept = shop(tmp_path, events=events, missing_ids="keep", min_interactions=1)
        assert word in kept.interactions.user_ids


def test_items_without_ids_are_refused_left_out_or_kept(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"items\.csv: row 7 has the item_id 'NaN'.*or keep where 'NaN' is an id"):
        shop(tmp_path, ITEMS + "NaN,Thing\n")
    assert shop(tmp_path, ITEMS + "NaN,Thing\n,Other\n", missing_ids="drop").catalogue.item_ids == list("123456")
    assert shop(tmp_path, ITEMS + "NaN,Thing\n", missing_ids="keep").catalogue.item_ids[-1] == "NaN"


def test_nan_as_an_id_of_json_is_missing_whatever_is_kept(tmp_path: Path) -> None:
    lines = [f'{{"user_id": "u", "item_id": {item}, "timestamp": {item}}}' for item in range(1, 6)]
    lines.append('{"user_id": NaN, "item_id": 1, "timestamp": 1}')
    with pytest.raises(DataError, match="row 6 has no user_id"):
        shop(tmp_path, events=lines, missing_ids="keep")


def test_unreadable_times_stop_where_they_are_many(tmp_path: Path) -> None:
    few = EVENTS.replace("u1,2,1600000002", "u1,2,soon")
    assert shop(tmp_path, events=few).report["interactions"]["bad_values"] == {"timestamp": 1}
    many = few.replace("u1,3,1600000003", "u1,3,later").replace("u1,4,1600000004", "u1,4,never")
    with pytest.raises(DataError, match=r"3 of 15 values of 'timestamp' are not times.*'soon' in row 7, 'later'"):
        shop(tmp_path, events=many)


def test_a_given_format_is_taken_at_its_word(tmp_path: Path) -> None:
    rows = "".join(f"u,{item},0{item}/02/2019\n" for item in range(1, 6))
    dataset = shop(tmp_path, events=f"user_id,item_id,timestamp\n{rows}", time_format=("day-first",))
    assert dataset.interactions.times.tolist() == pandas_seconds([f"2019-02-0{item}" for item in range(1, 6)])
    assert not warned(dataset, "month-first")
    dataset = shop(tmp_path, events=EVENTS.replace("16000000", "20"), time_format=("seconds",))
    assert dataset.interactions.times[0] == 2_001
    with pytest.raises(DataError, match="format excel is none of a number field"):
        schema_from_tree({"fields": {"price": {"modality": "number", "format": "excel"}}})


def test_entities_of_html_in_texts_and_categories(tmp_path: Path) -> None:
    items = (
        "item_id,title,brand\n1,Caf&eacute; &amp; Bar,Health &amp;amp; Beauty\n2,R&D &notes AT&T,a&#59;b\n"
        "3,&lt;b&gt;,x\n4,&#39;s,x\n5,&unknown;,x\n6,plain,x\n"
    )
    dataset = shop(tmp_path, items, fields={"title": "text", "brand": "category"})
    assert column(dataset, "title")[:5] == ["Café & Bar", "R&D &notes AT&T", "<b>", "'s", "&unknown;"]
    assert column(dataset, "brand")[:2] == [["Health & Beauty"], ["a;b"]]
    assert warned(dataset, "HTML's names of characters")


def test_whole_floats_are_the_integers(tmp_path: Path) -> None:
    frame = pl.DataFrame(
        {"user_id": [7.0] * 3 + [8.0] * 3, "item_id": [1.0, 2.0, 3.0] * 2, "timestamp": range(10**9, 10**9 + 6)}
    )
    text = frame.write_csv()
    for events in (frame, text, text.replace("2.0,", "2,"), frame.write_ndjson().splitlines()):
        dataset = shop(tmp_path, events=events)
        assert dataset.interactions.user_ids == ["7", "8"] and dataset.interactions.items[:3].tolist() == [0, 1, 2]
        assert warned(dataset, "every 'item_id' is a whole number, some written like 1.0")
    with pytest.raises(DataError, match=r"6 are with unknown items, such as '1\.5', and .* has '1'"):
        shop(tmp_path, events=frame.with_columns(pl.col("item_id") + 0.5))
    with pytest.raises(DataError, match=r"beyond 2\^24"):
        shop(tmp_path, events=frame.with_columns((pl.col("user_id") + 2**24).cast(pl.Float32)))
    with pytest.raises(DataError, match=r"beyond 2\^53.*text or as integers"):
        shop(tmp_path, events=frame.with_columns(pl.col("user_id") + 7.6561e16))


def test_ids_that_nearly_match_are_shown_from_both_sides(tmp_path: Path) -> None:
    items = ITEMS.replace("\n", "\n000").removesuffix("000")
    with pytest.raises(DataError, match=r"no interaction is left of 15.*by leading zeros alone, as '1' from '0001'"):
        shop(tmp_path, items)
    dataset = shop(tmp_path, ITEMS.replace("5,Thing", "A5,Thing"), EVENTS.replace(",5,", ",a5,"))
    assert warned(dataset, "3 of them differ from an item by upper and lower case alone, as 'a5' from 'A5'")


def test_ids_stay_as_they_are(tmp_path: Path) -> None:
    ids = ["a b", "a/b", "😀", "007", "08", '"x,y"', "-5", "p|q", "ümlaut", "&amp;"]
    items = "item_id,title\n" + "".join(f"{item},T\n" for item in ids)
    events = "user_id,item_id\n" + "".join(f"{user},{item}\n" for user in ids for item in ids[:4])
    dataset = shop(tmp_path, items, events)
    assert dataset.catalogue.item_ids == dataset.interactions.user_ids == [item.strip('"') for item in ids]


EVENT = st.tuples(st.sampled_from("uvw"), st.integers(1, 3), st.sampled_from([None, 10**9, 10**9 + 1]))


@settings(deadline=None, max_examples=15)
@given(rows=st.lists(EVENT, min_size=1))
def test_merging_leaves_one_of_identical_events(rows: list[tuple], tmp_path_factory) -> None:
    # Enough of everybody for the split.
    rows = [*rows, *((user, item, 10**9 - item) for user in "uvw" for item in (1, 2, 3))]
    events = pl.DataFrame(rows, schema={"user_id": pl.String, "item_id": pl.Int64, "timestamp": pl.Int64}, orient="row")
    timed = [row for row in rows if row[2] is not None]
    copies = len(timed) - len(set(timed))
    folder = tmp_path_factory.mktemp("shop")
    kept, merged = (shop(folder, events=events, duplicates=how) for how in ("keep", "merge"))
    assert kept.report["interactions"]["duplicates"] == merged.report["interactions"]["duplicates"] == copies
    assert kept.report["interactions"]["count"] == len(rows)
    assert merged.report["interactions"]["count"] == len(rows) - copies
    assert warned(merged, "they are merged") == warned(kept, "data.duplicates: merge makes one of each") == bool(copies)
