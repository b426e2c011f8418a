"""With Ray Data itself, on this machine: what it writes today, and launch_scripts/prepare_with_ray.py.

Ray is no dependency of nqf: run these in an environment that has both, `pip install 'ray[data]'`.
"""

import csv
import importlib.util
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import polars as pl
import pytest
import ray_folders

from nqf.config import ColumnsConfig, DataConfig
from nqf.data.errors import DataError
from nqf.data.interactions import Interactions
from nqf.data.load import prepare
from nqf.data.readers import read_table

ray = pytest.importorskip("ray")
pytest.importorskip("ray.data")
pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parents[2] / "launch_scripts" / "prepare_with_ray.py"
COLUMNS = ["--columns", "user=buyer", "item=sku", "time=ordered_at", "rating=stars", "review=words", "id=code"]
SCHEMA = """
title: title
fields: {title: text, price: number, tags: category, vector: vector, added: time}
"""


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("prepare_with_ray", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclass looks itself up, and workers have no such module.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "prepare_with_ray", module)
        spec.loader.exec_module(module)
        ray.cloudpickle.register_pickle_by_value(module)
        yield module


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ray")
    ray_folders.write(folder)
    return folder


def test_what_ray_writes_today_is_read_as_it_is(written: Path, tmp_path: Path) -> None:
    for name, (fields, first, last) in ray_folders.READ.items():
        rows, notes = ray_folders.read(written / name, fields, tmp_path)
        assert [list(row[1:]) for row in (rows[0], rows[-1])] == [first, last], name
        assert notes == [], name
    for name, (column, message) in ray_folders.REFUSED.items():
        with pytest.raises(DataError, match=message):
            read_table(written / name, tmp_path, {column: None})
    assert "was written to 2 times" in ray_folders.read(written / "twice", {"title": "text"}, tmp_path)[1][0]


def events() -> list[list[Any]]:
    """Many of the same second, so that their order is that of the source or is lost."""
    return [[f"{k % 7:03d}", f"{k * 5 % 11:03d}", 1_690_000_000 + k // 40, k % 5 + 1, f"é, {k}"] for k in range(400)]


def items() -> list[dict[str, Any]]:
    return [
        {
            "code": f"{k:03d}", "title": f"Lamp {k}", "price": None if k < 4 else k if k % 2 else k + 0.5,
            "tags": ["a", "b", "c"][: k % 4], "vector": [k * 0.5, 1.0], "added": f"2024-01-{k + 1:02d}T10:00:00Z",
        }
        for k in range(11)
    ]  # fmt: skip


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Events in files of which the first are the largest, and items."""
    folder = tmp_path / "raw"
    (folder / "events").mkdir(parents=True)
    rows = events()
    for number, (start, stop) in enumerate([(0, 250), (250, 350), (350, 395), (395, 400)]):
        with open(folder / "events" / f"part-{number}.csv", "w", newline="") as file:
            csv.writer(file).writerows([["buyer", "sku", "ordered_at", "stars", "words"], *rows[start:stop]])
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in items()))
    (folder / "schema.yaml").write_text(SCHEMA)
    return folder


def make(script: ModuleType, raw: Path, output: Path, *options: str, **paths: Path) -> Path:
    given = {"items": raw / "items.jsonl", "events": raw / "events"} | paths
    words = [word for name, path in given.items() for word in (f"--{name}", str(path))]
    script.run(script.parse([*words, "--output", str(output), *COLUMNS, *options]))
    return output


def prepared(raw: Path, folder: Path, **tables: Any) -> tuple[Interactions, pl.DataFrame]:
    config = DataConfig(format="table", schema=str(raw / "schema.yaml"), min_interactions=2, **tables)
    dataset = prepare(config, folder)
    return dataset.interactions, pl.read_parquet(folder / "items.parquet")


def test_nqf_makes_the_same_of_prepared_tables(script: ModuleType, raw: Path, tmp_path: Path) -> None:
    output = make(script, raw, tmp_path / "prepared")
    columns = ColumnsConfig(user="buyer", item="sku", time="ordered_at", rating="stars", review="words", id="code")
    tables = {"items": str(raw / "items.jsonl"), "interactions": str(raw / "events")}
    before = prepared(raw, tmp_path / "before", columns=columns, **tables)
    tables = {"items": str(output / "items"), "interactions": str(output / "events")}
    after = prepared(raw, tmp_path / "after", **tables)
    assert before[1].equals(after[1])
    one, other = (interactions for interactions, _ in (before, after))
    assert one.user_ids == other.user_ids and one.reviews == other.reviews
    for name in ("offsets", "items", "times", "ratings"):
        assert getattr(one, name).tobytes() == getattr(other, name).tobytes(), name
    assert one.tied_share > 0.5
    parts = sorted((output / "events").iterdir())
    assert len({tuple(pl.read_parquet_schema(part).items()) for part in parts}) == 1
    assert pl.read_parquet_schema(parts[0]) == {
        "user_id": pl.String, "item_id": pl.String, "timestamp": pl.Int64, "rating": pl.Float64, "review": pl.String
    }  # fmt: skip


def test_parquet_of_the_script_is_raw_data_too(script: ModuleType, raw: Path, tmp_path: Path) -> None:
    output = make(script, raw, tmp_path / "one")
    words = ["--items", str(output / "items"), "--events", str(output / "events"), "--output", str(tmp_path / "two")]
    script.run(script.parse(words))
    for name in ("items", "events"):
        assert pl.read_parquet(tmp_path / "two" / name).equals(pl.read_parquet(output / name))


def test_folders_of_others_are_left_alone(script: ModuleType, raw: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    (mine / "items").mkdir(parents=True)
    (mine / "items" / "letter.txt").write_text("dear")
    for options in ([], ["--replace"]):
        with pytest.raises(script.Refused, match="holds what this program did not make"):
            make(script, raw, mine, *options)
    assert [path.name for path in mine.rglob("*")] == ["items", "letter.txt"]
    output = make(script, raw, tmp_path / "made")
    (output / "own.txt").write_text("dear")
    before = sorted(path.name for path in (output / "events").iterdir())
    with pytest.raises(script.Refused, match="was made earlier; --replace makes it again"):
        make(script, raw, output)
    assert before == sorted(path.name for path in (output / "events").iterdir())
    with pytest.raises(script.Refused, match="holds the raw table"):
        make(script, raw, output, "--replace", items=output / "items")
    make(script, raw, output, "--replace")
    assert len(pl.read_parquet(output / "events")) == 400 and (output / "own.txt").read_text() == "dear"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("sku,", r"part-0\.csv: no column sku in some or all of it; there is buyer, .* --columns"),
        (",1690000000,", r"1 values of timestamp cannot be read, such as 'soon'"),
        ("000,000,", r"1 rows have no user_id; fix them, or leave them out with --drop-missing-ids"),
        (",1,", r"1 values of rating cannot be read, such as 'bad'"),
    ],
)
def test_events_are_checked_before_anything_is_written(
    change: str, message: str, script: ModuleType, raw: Path, tmp_path: Path
) -> None:
    path = raw / "events" / "part-0.csv"
    to = {"sku,": "article,", ",1690000000,": ",soon,", "000,000,": " ,000,", ",1,": ",bad,"}[change]
    path.write_text(path.read_text().replace(change, to, 1))
    with pytest.raises(script.Refused, match=message):
        make(script, raw, tmp_path / "prepared")
    assert not (tmp_path / "prepared").exists()


def test_rows_without_ids_are_left_out_if_asked(
    script: ModuleType, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = raw / "events" / "part-1.csv"
    lines = path.read_text().splitlines()
    lines[1:3] = [line[line.index(",") :] for line in lines[1:3]]
    path.write_text("\n".join(lines) + "\n")
    output = make(script, raw, tmp_path / "prepared", "--drop-missing-ids")
    assert "400 rows, of which 2 without ids are left out" in capsys.readouterr().out
    assert len(pl.read_parquet(output / "events")) == 398


def test_one_row_of_an_item_is_kept_whatever_the_order(script: ModuleType, raw: Path, tmp_path: Path) -> None:
    rows = items()
    rows += [row | {"title": "older", "added": "2023-01-01T00:00:00Z"} for row in rows[:5]]
    rows += [row | {"title": title} for row in rows[5:8] for title in ("A lamp", "The lamp")]
    tables = []
    for seed in range(2):
        random.Random(seed).shuffle(rows)
        (raw / "many").mkdir(exist_ok=True)
        for number in range(3):
            lines = (json.dumps(row) + "\n" for row in rows[number::3])
            (raw / "many" / f"{number}.jsonl").write_text("".join(lines))
        if not seed:
            with pytest.raises(script.Refused, match=r"item '0\d\d' is there \d times; keep one row per item"):
                make(script, raw, tmp_path / "refused", items=raw / "many")
        options = ("--deduplicate", "--newest", "added")
        output = make(script, raw, tmp_path / f"{seed}", *options, items=raw / "many")
        tables.append(pl.read_parquet(output / "items"))
    assert tables[0].equals(tables[1])
    assert tables[0]["item_id"].to_list() == [f"{k:03d}" for k in range(11)]
    titles = [f"Lamp {k}" for k in range(5)] + ["The lamp"] * 3 + [f"Lamp {k}" for k in range(8, 11)]
    assert tables[0]["title"].to_list() == titles


def test_item_columns_of_several_kinds_are_refused_or_texts(script: ModuleType, raw: Path, tmp_path: Path) -> None:
    (raw / "many").mkdir()
    for number, price in enumerate(["cheap", 3]):
        rows = [row | {"price": price} for row in items()[number::2]]
        (raw / "many" / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(script.Refused, match=r"price is integer in some rows and text in others; .* --text price"):
        make(script, raw, tmp_path / "refused", items=raw / "many")
    output = make(script, raw, tmp_path / "made", "--text", "price", "--keep", "title", "price", items=raw / "many")
    table = pl.read_parquet(output / "items")
    assert table.columns == ["item_id", "title", "price"] and set(table["price"]) == {"cheap", "3"}
    (raw / "many" / "1.jsonl").write_text("[1]\n")
    with pytest.raises(script.Refused, match=r"1 lines are no JSON objects, such as '\[1\]'"):
        make(script, raw, tmp_path / "refused", items=raw / "many")


@pytest.mark.parametrize(
    ("unit", "value", "expected"),
    [
        ("seconds", "1690000000", 1_690_000_000),
        ("seconds", "-1.5", -2),
        ("milliseconds", "1690000000999", 1_690_000_000),
        ("nanoseconds", "1690000000999999999", 1_690_000_000),
        ("seconds", "2023-07-22T04:26:40Z", 1_690_000_000),
        ("seconds", "2023-07-22 06:26:40.9+02:00", 1_690_000_000),
        ("seconds", "2023-07-22", 1_689_984_000),
        ("seconds", "", None),
        ("seconds", "soon", None),
    ],
)
def test_times(unit: str, value: str, expected: int | None, script: ModuleType) -> None:
    pa = pytest.importorskip("pyarrow")
    per_second = script.UNITS[unit]
    for batch in ([value], [value, None, "1690000000"], [None, value, "2024-01-01"]):
        column = script.plain(pa.table({"t": pa.array(batch, pa.string())}), "t")
        assert script.seconds(column, per_second)[batch.index(value)].as_py() == expected
    if value.isdigit():
        column = script.plain(pa.table({"t": [int(value)]}), "t")
        assert script.seconds(column, per_second).to_pylist() == [expected]


def test_words_for_nothing_are_missing_times_and_ratings(script: ModuleType) -> None:
    pa = pytest.importorskip("pyarrow")
    options = script.Options(names=script.EVENTS, per_second=1, text=frozenset(), keep=frozenset())
    batch = pa.table({"user_id": ["NA"], "item_id": ["1"], "timestamp": ["NULL"], "rating": ["nan"]})
    row = {"user_id": "NA", "item_id": "1", "timestamp": None, "rating": None, "review": None}
    assert script.read_events(batch, options).to_pylist() == [row]
    tally = json.loads(script.tally_events(batch, options)["tally"][0].as_py())
    assert tally["unreadable"] == {} and tally["without"] == 0


def test_ids(script: ModuleType) -> None:
    pa = pytest.importorskip("pyarrow")
    for values, expected in (
        ([" 007", "", None], ["007", None, None]),
        ([7, None, 2**62], ["7", None, str(2**62)]),
        ([7.0, None, float("nan")], ["7", None, None]),
        # No ids: they have lost digits, or are none.
        ([7.5, 2.0**53, 1.0], [None, None, "1"]),
        ([True, False, None], [None, None, None]),
    ):
        assert script.ids(script.plain(pa.table({"v": pa.array(values)}), "v")).to_pylist() == expected
