"""Names of columns: as configured, or by common names and announced; never ignored in silence."""

from pathlib import Path

import pytest
import yaml

from nqf.config import ColumnsConfig, DataConfig
from nqf.data.columns import identify_interactions
from nqf.data.errors import DataError
from nqf.data.load import Dataset, prepare

WHERE = Path("events.csv")
SHOPS = {
    "MovieLens": ("userId movieId rating timestamp", "userId movieId timestamp rating"),
    "Amazon 2014": (
        "reviewerID asin reviewerName helpful reviewText overall summary unixReviewTime reviewTime",
        "reviewerID asin unixReviewTime overall reviewText",
    ),
    "Amazon 2023, only numbers": ("user_id parent_asin rating timestamp", "user_id parent_asin timestamp rating"),
    "Yelp": ("review_id user_id business_id stars date text", "user_id business_id date stars text"),
    "Book-Crossing": ("User-ID ISBN Book-Rating", "User-ID ISBN - Book-Rating"),
    "RetailRocket": ("timestamp visitorid event itemid transactionid", "visitorid itemid timestamp"),
    "H&M": ("t_dat customer_id article_id price sales_channel_id", "customer_id article_id t_dat"),
    "Online Retail": (
        "InvoiceNo StockCode Description Quantity InvoiceDate UnitPrice CustomerID Country",
        "CustomerID StockCode InvoiceDate",
    ),
    "Goodreads": (
        "user_id book_id review_id rating review_text date_added",
        "user_id book_id date_added rating review_text",
    ),
    "Steam in RecBole": ("user_id product_id timestamp", "user_id product_id timestamp"),
    "Yoochoose": ("session_id timestamp item_id category", "session_id item_id timestamp"),
    "a shop": ("customer_id sku ordered_at stars", "customer_id sku ordered_at stars"),
    "blanks in the header": (
        "user_id, item_id, rating".replace(",", "").replace(" ", "  "),
        "user_id item_id - rating",
    ),
    "an unknown name of a time": ("user item bought_on", "user item bought_on"),
}


@pytest.mark.parametrize("shop", SHOPS)
def test_common_names_are_found_and_announced(shop: str) -> None:
    names, expected = (text.split() for text in SHOPS[shop])
    found, notes = identify_interactions(WHERE, names, ColumnsConfig())
    roles = dict(zip(("user", "item", "time", "rating", "review"), expected, strict=False))
    assert found == {role: name for role, name in roles.items() if name != "-"}
    text = "\n".join(notes)
    usual = {"user_id", "item_id", "timestamp", "rating", "review"}
    for name in found.values():
        assert (f"'{name}'" in text) == (name not in usual)
    unused = [name for name in names if name not in found.values()]
    assert ("columns that are not used" in text) == bool(unused)
    assert all(name in text for name in unused)
    assert ("no column of times was found" in text) == ("time" not in found)


def test_given_names_win_and_unknown_ones_are_refused() -> None:
    names = ["user_id", "buyer", "item_id", "sku", "created_at", "ordered_at"]
    config = ColumnsConfig(user="buyer", item="sku", time="ordered_at")
    found, notes = identify_interactions(WHERE, names, config)
    assert found == {"user": "buyer", "item": "sku", "time": "ordered_at"}
    assert notes == ["events.csv: columns that are not used: user_id, item_id, created_at"]
    with pytest.raises(
        DataError, match=r"no column 'byer' \(data\.columns\.user or nqf\.fit's user\); did you mean 'buyer'"
    ):
        identify_interactions(WHERE, names, ColumnsConfig(user="byer"))
    _, notes = identify_interactions(WHERE, ["user", "item", "created_at", "ordered_at"], ColumnsConfig())
    assert "the time is taken from the column 'created_at', not ordered_at" in "\n".join(notes)


def test_a_table_without_users_or_header_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"no column 'user_id' and none of a common name .* it has who, item_id; .*columns\.user"
    ):
        identify_interactions(WHERE, ["who", "item_id"], ColumnsConfig())
    with pytest.raises(DataError, match="the first line looks like a row"):
        identify_interactions(WHERE, ["1", "1193", "5", "978300760"], ColumnsConfig())
    with pytest.raises(DataError, match=r"and 9,988 more") as error:
        identify_interactions(WHERE, [f"{'x' * 1_000}{n}" for n in range(10_000)], ColumnsConfig())
    assert len(str(error.value)) < 1_500


def prepared(folder: Path, events: str, items: str = "item_id", **options) -> Dataset:
    (folder / "items.csv").write_text(f"{items},name\n" + "".join(f"{item},Thing {item}\n" for item in "abcdef"))
    (folder / "events.csv").write_text(events)
    (folder / "schema.yaml").write_text(yaml.safe_dump({"title": "name", "fields": {"name": "text"}}))
    paths = {"items": "items.csv", "interactions": "events.csv", "schema": "schema.yaml"}
    config = DataConfig(format="table", **{key: str(folder / name) for key, name in paths.items()}, **options)
    return prepare(config, folder / "data")


# The newest first, as databases give them.
ROWS = [(user, item, 10 - place) for user in "uvw" for place, item in enumerate("abcd")]


def test_a_time_of_another_name_orders_the_events(tmp_path: Path) -> None:
    events = "customer_id,sku,ordered_at,stars\n" + "".join(f"{u},{i},{t},5\n" for u, i, t in ROWS)
    dataset = prepared(tmp_path, events, items="sku")
    first = [dataset.catalogue.item_ids[row] for row in dataset.interactions.items[:4]]
    assert first == list("dcba")
    assert dataset.interactions.ratings[:4].tolist() == [5, 5, 5, 5]
    warnings = "\n".join(dataset.report["warnings"])
    for words in ("id of an item is taken from the column 'sku'", "the user is taken from the column 'customer_id'"):
        assert words in warnings
    columns = ColumnsConfig(user="customer_id", item="sku", time="ordered_at", rating="stars")
    again = prepared(tmp_path, events, items="sku", columns=columns)
    assert again.interactions.items.tolist() == dataset.interactions.items.tolist()
    assert "is taken from" not in "\n".join(again.report["warnings"])


def test_no_time_is_said_loudly(tmp_path: Path) -> None:
    dataset = prepared(tmp_path, "user_id,item_id,moment\n" + "".join(f"{u},{i},{t}\n" for u, i, t in ROWS))
    assert [dataset.catalogue.item_ids[row] for row in dataset.interactions.items[:4]] == list("abcd")
    warnings = "\n".join(dataset.report["warnings"])
    assert "no column of times was found, so the order of the file is taken" in warnings
    assert "columns that are not used: moment" in warnings


def test_the_item_table_may_have_a_name_of_its_own(tmp_path: Path) -> None:
    events = "user_id,item_id\n" + "".join(f"{u},{i}\n" for u, i, _ in ROWS)
    columns = ColumnsConfig(id="code")
    dataset = prepared(tmp_path, events, items="code", columns=columns)
    assert dataset.report["interactions"]["unknown_items"] == 0
    with pytest.raises(DataError, match=r"no column 'item_id' and none of a common name for it; it has code, name"):
        prepared(tmp_path, events, items="code")


def test_formats_with_columns_of_their_own_refuse_names(tmp_path: Path) -> None:
    (tmp_path / "schema.yaml").write_text("title: title\nfields: {title: text}\n")
    config = DataConfig(
        format="amazon-2023", items="i.jsonl", interactions="e.jsonl", schema=str(tmp_path / "schema.yaml"),
        columns=ColumnsConfig(user="x"),
    )  # fmt: skip
    with pytest.raises(DataError, match=r"data\.columns: format 'amazon-2023' has columns of its own"):
        prepare(config, tmp_path / "data")
