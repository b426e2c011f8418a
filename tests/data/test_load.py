"""Prepared data folders: from every format, with everything dropped counted and every bad table refused."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml

from nqf.config import ConfigError, DataConfig, SyntheticConfig
from nqf.data.errors import DataError
from nqf.data.interactions import MISSING_TIME
from nqf.data.load import Dataset, open_dataset, prepare

ITEMS = "item_id,name,price,picture\na,Apple,1.5,pics/a.png\nb,Bread,x,\nc,,,https://x/c.png\nd,Dill,4,\n"
EVENTS = "user_id,item_id,timestamp,rating\n" + "".join(
    f"{user},{item},{time},{rating}\n"
    for user, item, time, rating in [
        ("u", "b", 20, 4),
        ("u", "a", 10, 5),
        ("u", "c", 20, ""),
        ("u", "z", 15, 1),
        ("u", "d", 30, 3),
        ("v", "a", 5, 2),
        ("w", "a", "soon", 2),
        ("w", "b", 1, 2),
        ("w", "d", 2, 2),
    ]
)
SCHEMA = {
    "title": "name",
    "fields": {"name": "text", "price": "number", "image": {"modality": "image", "column": "picture"}},
}


def config_of(folder: Path, items: str = ITEMS, events: str = EVENTS, schema: dict = SCHEMA, **options) -> DataConfig:
    (folder / "items.csv").write_text(items)
    (folder / "events.csv").write_text(events)
    (folder / "schema.yaml").write_text(yaml.safe_dump(schema))
    paths = {"items": "items.csv", "interactions": "events.csv", "schema": "schema.yaml"}
    return DataConfig(format="table", **{key: str(folder / name) for key, name in paths.items()}, **options)


def sequence(dataset: Dataset, user: str) -> str:
    row, interactions = dataset.interactions.user_row(user), dataset.interactions
    span = slice(interactions.offsets[row], interactions.offsets[row + 1])
    return "".join(dataset.catalogue.item_ids[item] for item in interactions.items[span])


def test_tables_are_read_checked_and_split(tmp_path: Path) -> None:
    dataset = prepare(config_of(tmp_path), tmp_path / "run" / "data")
    assert dataset.catalogue.item_ids == list("abcd")
    assert next(dataset.catalogue.chunks(["name", "title", "price", "image"], 9)).rows() == [
        ("Apple", "Apple", 1.5, f"{tmp_path.resolve()}/pics/a.png"),
        ("Bread", "Bread", None, None),
        (None, None, None, "https://x/c.png"),
        ("Dill", "Dill", 4.0, None),
    ]
    assert dataset.interactions.user_ids == ["u", "w"]
    assert sequence(dataset, "u") == "abcd"
    # An interaction without a time stays where it is in the source.
    assert sequence(dataset, "w") == "abd"
    np.testing.assert_array_equal(dataset.interactions.times, [10, 20, 20, 30, MISSING_TIME, 1, 2])
    np.testing.assert_array_equal(dataset.interactions.ratings, [5, 4, np.nan, 3, 2, 2, 2])
    assert dataset.split.test.cuts.tolist() == [3, 6]
    report = dataset.report
    assert report["items"] == {
        "count": 4,
        "missing": {"name": 1, "price": 2, "image": 2},
        "missing_words": {},
        "bad_values": {"price": 1},
    }
    assert report["interactions"] == {
        "read": 9,
        "formats": {"timestamp": ["seconds", "month-first"], "rating": ["decimal-point"]},
        "missing_words": {},
        "bad_values": {"timestamp": 1},
        "missing_ids": 0,
        "duplicates": 0,
        "unknown_items": 1,
        "short_users": 1,
        "short_user_interactions": 1,
        "count": 7,
        "users": 2,
    }
    assert report["tied_share"] == pytest.approx(1 / 5)
    for words in (
        "1 values of 'price' could not be read",
        "1 values of 'timestamp' could not be read, such as 'soon'",
        "1 interactions are with items that",
        "1 users with fewer than 3 interactions",
        "20% of consecutive interactions share their time",
    ):
        assert any(words in warning for warning in dataset.split.warnings), words
    assert report["warnings"] == list(dataset.split.warnings)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["data"]


def test_what_was_prepared_opens_again_and_is_replaced_as_a_whole(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    first = prepare(config, tmp_path / "data")
    again = open_dataset(tmp_path / "data")
    assert again.report == first.report
    assert again.catalogue.schema == first.catalogue.schema
    (tmp_path / "data" / "stray").touch()
    with pytest.raises(DataError):
        prepare(config_of(tmp_path, items="item_id\n"), tmp_path / "data")
    # A failure leaves what there was.
    assert (tmp_path / "data" / "stray").exists()
    assert open_dataset(tmp_path / "data").report == first.report
    prepare(config_of(tmp_path), tmp_path / "data")
    assert not (tmp_path / "data" / "stray").exists()


def test_folders_that_are_incomplete_or_mixed_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"items\.parquet: no such file; run .* --stage fields"):
        open_dataset(tmp_path)
    prepare(config_of(tmp_path), tmp_path / "data")
    frame = pl.read_parquet(tmp_path / "data" / "items.parquet")
    frame.head(2).write_parquet(tmp_path / "data" / "items.parquet")
    with pytest.raises(DataError, match=r"split\.npz is of other tables"):
        open_dataset(tmp_path / "data")


AFTER = {"fields": {"name": "text", "price": {"modality": "number", "after_the_fact": True}}}


def test_fields_known_only_after_the_fact_are_left_out_unless_asked_for(tmp_path: Path) -> None:
    dataset = prepare(config_of(tmp_path, schema=AFTER), tmp_path / "data")
    assert [field.name for field in dataset.catalogue.schema.fields] == ["name"]
    assert dataset.report["fields_left_out"] == ["price"]
    dataset = prepare(config_of(tmp_path, schema=AFTER, use_after_the_fact=True), tmp_path / "data")
    assert [field.name for field in dataset.catalogue.schema.fields] == ["name", "price"]
    assert next(dataset.catalogue.chunks(["title"], 9))["title"].null_count() == 4
    with pytest.raises(DataError, match="no field is left"):
        prepare(
            config_of(tmp_path, schema={"fields": {"price": AFTER["fields"]["price"]}}),
            tmp_path / "data",
        )


def test_a_field_absent_from_every_item_is_a_warning(tmp_path: Path) -> None:
    items = "item_id,name,price,picture\na,,1,\nb,,1,\nc,,1,\nd,,1,\n"
    dataset = prepare(config_of(tmp_path, items=items), tmp_path / "data")
    assert any("no item has a value of 'name'" in warning for warning in dataset.split.warnings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"items": "item_id,name,price,picture\na,,,\nb,,,\na,,,\n"},
            r"items\.csv: duplicate item_id 'a' in rows 1 and 3",
        ),
        ({"items": "item_id,name,price,picture\na,,,\n ,,,\n"}, r"items\.csv: row 2 has no item_id"),
        ({"items": "item_id,name,price,picture\n"}, r"items\.csv: there is no item"),
        ({"items": "item_id,name,prise,picture\na,,,\n"}, r"items\.csv: no column 'price'; did you mean 'prise'"),
        (
            {"items": "item_id,name,price,picture\na,,,\nb,,,,,,\n"},
            r"items\.csv: line 3: 7 fields, and the header has 4",
        ),
        ({"events": "user_id,thing\nu,a\n"}, r"events\.csv: no column 'item_id' and none of a common name"),
        ({"events": "user_id,item_id\nu,a\n,a\n"}, r"events\.csv: row 2 has no user_id"),
        ({"events": "user_id,item_id\nu,a\nu,\n"}, r"events\.csv: row 2 has no item_id"),
        ({"events": "user_id,item_id\nu,y\nu,z\n"}, r"no interaction is left of 2: 2 are with unknown items"),
        ({"events": "user_id,item_id\nu,a\nu,b\n"}, r"2 of users with fewer than data\.min_interactions"),
        ({"events": "user_id,item_id\nu,a\nu,b\n", "min_interactions": 2}, "the validation split is empty"),
        ({"unknown_items": "refuse"}, r"such as 'z'; add the items or set data\.unknown_items: drop"),
        ({"bad_values": "refuse"}, r"items\.csv: row 2 \(item_id 'b'\): price is not a number: 'x'; there are 1 such"),
        (
            {"bad_values": "refuse", "items": ITEMS.replace(",x,", ",2,")},
            r"events\.csv: row 7 \(user_id 'w'\): timestamp cannot be read: 'soon'",
        ),
        ({"cold_share": 0.99}, "the training split is empty"),
        ({"schema": {"fields": {"name": "texts"}}}, r"schema\.yaml: name: unknown modality 'texts'"),
    ],
)
def test_bad_tables_are_refused(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        prepare(config_of(tmp_path, **changes), tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_missing_paths_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"items: format 'table' needs this path"):
        DataConfig(format="table")
    config = config_of(tmp_path)
    (tmp_path / "events.csv").unlink()
    with pytest.raises(DataError, match=r"events\.csv: no such file"):
        prepare(config, tmp_path / "data")


def test_vectors_of_different_lengths_are_refused(tmp_path: Path) -> None:
    items = 'item_id,v\na,1 2\nb,"1,2,3"\n'
    with pytest.raises(DataError, match="vectors of 'v' have different lengths, such as 2 and 3"):
        prepare(config_of(tmp_path, items=items, schema={"fields": {"v": "vector"}}), tmp_path / "data")


def test_recbole_files(tmp_path: Path) -> None:
    (tmp_path / "x.item").write_text("item_id:token\tname:token_seq\na\tApple\nb\tBread\nc\tCorn\n")
    (tmp_path / "x.inter").write_text(
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\nu\tb\t1\t978300760.0\nu\ta\t2\t978300750.0\nu\tc\t3\t9.9e8\n"
    )
    (tmp_path / "schema.yaml").write_text("title: name\nfields: {name: text}\n")
    config = DataConfig(
        format="recbole",
        items=str(tmp_path / "x.item"),
        interactions=str(tmp_path / "x.inter"),
        schema=str(tmp_path / "schema.yaml"),
    )
    dataset = prepare(config, tmp_path / "data")
    assert sequence(dataset, "u") == "abc"
    assert dataset.interactions.times.tolist() == [978300750, 978300760, 990000000]


def test_amazon_files_with_the_shipped_schema(tmp_path: Path) -> None:
    meta = [{"parent_asin": name, "title": f"Soap {name}", "store": "S", "details": {}} for name in "ABCD"]
    reviews = [
        {"user_id": "u", "parent_asin": name, "timestamp": 1588687728923 + place, "rating": 5.0, "text": f"t{name}"}
        for place, name in enumerate("BADC")
    ]
    for name, rows in (("meta", meta), ("reviews", reviews)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = DataConfig(
        format="amazon-2023",
        items=str(tmp_path / "meta.jsonl"),
        interactions=str(tmp_path / "reviews.jsonl"),
        schema=str(Path(__file__).parents[2] / "configs" / "schemas" / "amazon-2023.yaml"),
    )
    dataset = prepare(config, tmp_path / "data")
    assert sequence(dataset, "u") == "BADC"
    assert dataset.interactions.reviews == ["tB", "tA", "tD", "tC"]
    assert set(dataset.interactions.times.tolist()) == {1588687728}
    assert dataset.report["fields_left_out"] == ["average_rating", "rating_number"]


def test_reference_files(tmp_path: Path) -> None:
    (tmp_path / "items.json").write_text(json.dumps({name: {"title": f"Soap {name}"} for name in "ABCDE"}))
    common = {"user_id": "u", "candidate": ["A", "B"]}
    train, test = {"history": ["A", "B"], "ground_truth": "C"}, {"history": ["B", "C"], "ground_truth": "D"}
    (tmp_path / "x_train_LRanker.json").write_text(json.dumps([common | train]))
    (tmp_path / "x_test_LRanker.json").write_text(json.dumps([common | test]))
    config = DataConfig(
        format="unirec",
        items=str(tmp_path / "items.json"),
        interactions=str(tmp_path / "x_train_LRanker.json"),
        schema=str(Path(__file__).parents[2] / "configs" / "schemas" / "amazon-2023.yaml"),
    )
    dataset = prepare(config, tmp_path / "data")
    assert sequence(dataset, "u") == "ABCD"
    assert (dataset.interactions.times == MISSING_TIME).all()
    (tmp_path / "x_train_LRanker.json").write_text(json.dumps([common | train | {"history": None}]))
    with pytest.raises(DataError, match=r"x_train_LRanker\.json: entry 0: 'history' is missing or of the wrong type"):
        prepare(config, tmp_path / "data")
    (tmp_path / "x_train_LRanker.json").write_text("{}")
    with pytest.raises(DataError, match="expected a list at the top, found dict"):
        prepare(config, tmp_path / "data")


@pytest.mark.parametrize("split", ["leave-one-out", "temporal"])
def test_synthetic(split: str, tmp_path: Path) -> None:
    small = SyntheticConfig(items=120, users=40, min_events=5, max_events=9)
    dataset = prepare(DataConfig(split=split, synthetic=small), tmp_path / "data")
    assert len(dataset.catalogue) == 120
    assert len(dataset.interactions.user_ids) == 40
    images = next(dataset.catalogue.chunks(["image"], 120))["image"].drop_nulls()
    assert len(images)
    assert all(Path(path).is_file() for path in images)


SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data sets are not redistributed; no ../shared/data here")
@pytest.mark.parametrize(
    ("name", "users", "items", "events", "tied", "left_out"),
    [
        ("goodbooks", 2_672, 9_990, 298_176, 0.0, ["average_rating", "rating_number"]),
        ("ml-100k", 943, 1_682, 100_000, 0.51, ["average_rating", "rating_number"]),
        ("amazon-beauty", 22_363, 12_101, 198_502, 0.44, ["sales_rank"]),
        ("ml-1m", 6_040, 3_416, 999_611, 0.0, []),
    ],
)
def test_real_data(name: str, users: int, items: int, events: int, tied: float, left_out: list, tmp_path: Path) -> None:
    folder = SHARED / name
    config = DataConfig(
        format="table",
        items=str(folder / "items.parquet"),
        interactions=str(folder / "interactions.parquet"),
        schema=str(Path(__file__).parents[2] / "configs" / "schemas" / f"{name}.yaml"),
    )
    dataset = prepare(config, tmp_path / "data")
    interactions = dataset.interactions
    assert len(interactions.user_ids) == len(dataset.split.test.users) == users
    assert len(interactions.items) == events
    assert len(np.unique(interactions.items)) == items
    assert interactions.tied_share == pytest.approx(tied, abs=0.006)
    assert dataset.report["fields_left_out"] == left_out
    assert not any(dataset.report[table]["bad_values"] for table in ("items", "interactions"))
    # The source knows the order of every user's rows, ties and missing times included.
    source = pl.read_parquet(folder / "interactions.parquet")
    order = pl.DataFrame({"user_id": interactions.user_ids}).with_row_index("user")
    source = source.join(order, on="user_id").sort("user", "position")
    ids = pl.Series(dataset.catalogue.item_ids)
    assert ids.gather(interactions.items).to_list() == source["item_id"].to_list()
    if name == "ml-100k":
        images = next(dataset.catalogue.chunks(["image"], 2_000))["image"].drop_nulls()
        assert len(images) == 1_663
        assert all(Path(path).is_file() for path in images)


def test_shuffled_ties_move_within_their_user_and_time_alone(tmp_path):
    rng = np.random.default_rng(3)
    # Runs of equal times in random file order, some times unknown.
    rows = [
        (f"u{user}", item, int(rng.integers(3)) if rng.random() > 0.1 else "") for user in range(30) for item in "abcd"
    ]
    events = "user_id,item_id,timestamp,rating\n" + "".join(f"{user},{item},{time},\n" for user, item, time in rows)
    prepare(config_of(tmp_path, events=events), tmp_path / "plain")
    found = {}
    for seed in (0, 1):
        prepare(config_of(tmp_path, events=events, shuffle_ties=True, seed=seed), tmp_path / f"s{seed}")
        found[seed] = open_dataset(tmp_path / f"s{seed}").interactions
    plain = open_dataset(tmp_path / "plain").interactions
    assert not np.array_equal(found[0].items, plain.items) and not np.array_equal(found[0].items, found[1].items)
    for shuffled in found.values():
        np.testing.assert_array_equal(shuffled.times, plain.times)
        unknown = plain.times == MISSING_TIME
        assert unknown.any()
        np.testing.assert_array_equal(shuffled.items[unknown], plain.items[unknown])
        for user in range(len(plain.offsets) - 1):
            where = slice(plain.offsets[user], plain.offsets[user + 1])
            pairs = [sorted(zip(part.times[where], part.items[where], strict=True)) for part in (shuffled, plain)]
            assert pairs[0] == pairs[1]
