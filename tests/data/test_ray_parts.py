"""Parquet parts that Ray Data wrote, and parts of several types: read as they are, or refused in a sentence."""

import datetime
import itertools
import tarfile
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from ray_folders import READ, REFUSED, ROWS, read

from nqf.data.errors import DataError
from nqf.data.readers import open_table, read_table
from nqf.tools import data as command


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `ray_folders.write` made."""
    folder = tmp_path_factory.mktemp("ray")
    with tarfile.open(Path(__file__).with_name("ray_parts.tar.gz")) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize("name", READ)
def test_folders_of_ray_are_read_as_they_are(name: str, parts: Path, tmp_path: Path) -> None:
    fields, first, last = READ[name]
    rows, notes = read(parts / name, fields, tmp_path)
    assert [list(row[1:]) for row in (rows[0], rows[-1])] == [first, last]
    # Blocks in their order, and ids as the raw table had them.
    ids = {"filtered": ["i0", "i1"], "id_types": ["1", "007"]}.get(name, [f"i{k}" for k in range(ROWS)])
    assert [row[0] for row in rows] == ids
    assert notes == []


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_column_of_values_is_refused(name: str, parts: Path, tmp_path: Path) -> None:
    column, message = REFUSED[name]
    with pytest.raises(DataError, match=message):
        read_table(parts / name, tmp_path, {column: None})
    if name == "partitioned":
        return
    # Nobody needs it: the others are read, and that it is not is said.
    table = open_table(parts / name)
    assert any(f"column '{column}'" in note and note.endswith("it is not read") for note in table.notes)
    assert table.read({"item_id": None}, tmp_path).collect()["item_id"].null_count() == 0
    if name != "time_types":
        assert all(row[column] is None for row in table.records())


def test_a_folder_that_was_written_twice_is_told(parts: Path, tmp_path: Path) -> None:
    rows, notes = read(parts / "twice", {"title": "text"}, tmp_path)
    assert len(rows) == 4 and len(notes) == 1
    assert "was written to 2 times" in notes[0] and "mode='overwrite'" in notes[0]


def test_a_column_that_some_parts_lack_is_told(parts: Path, tmp_path: Path) -> None:
    rows, notes = read(parts / "lacking", {"title": "text"}, tmp_path)
    assert rows == [("1", "a"), ("2", None)]
    assert len(notes) == 1 and "1 of 2 parts, such as" in notes[0] and "have no column 'title'" in notes[0]


def test_a_schema_is_made_of_the_other_columns(parts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["inspect", str(parts / "objects")])
    printed = " ".join(capsys.readouterr().out.split())
    assert "title: text n: number" in printed and "it is not read" in printed


def test_types_that_say_nonsense_of_themselves_are_refused(tmp_path: Path) -> None:
    for metadata in ("[", "7", '{"shape": 3}', "{}", '["x", {}]', "null"):
        name, stored = "ray.data.arrow_tensor_v2", pl.Series("v", [[1.0, 2.0]])
        dtype = pl.Extension(name, stored.dtype, metadata)
        stored.ext.to(dtype).to_frame().write_parquet(tmp_path / "v.parquet")
        with pytest.raises(DataError, match=r"column 'v' (says of its type 'ray|holds arrays of)"):
            read_table(tmp_path / "v.parquet", tmp_path, {"v": None})


def folder_of(folder: Path, *values: pl.Series) -> Path:
    folder.mkdir()
    for number, series in enumerate(values):
        pl.DataFrame({"v": series}).write_parquet(folder / f"{number}.parquet")
    return folder


DAY = datetime.datetime(2024, 1, 1)
KINDS = {
    "numbers": (pl.Series([7]), pl.Series([7.5]), pl.Series(["1.25"]).cast(pl.Decimal(10, 2))),
    "times": (pl.Series([DAY]), pl.Series([DAY]).cast(pl.Datetime("ms")), pl.Series([DAY.date()])),
    "truth values": (pl.Series([True]),),
    "durations": (pl.Series([datetime.timedelta(1)]),),
    "times of the day": (pl.Series([datetime.time(1)]),),
    "bytes": (pl.Series([b"x"]),),
    "lists": (pl.Series([[1, 2]]), pl.Series([["a"]]), pl.Series([[1.0, 2.0]], dtype=pl.Array(pl.Float32, 2))),
    "objects": (pl.Series([{"name": "x"}]), pl.Series([{"name": "x", "id": 1}])),
}
TEXTS = (pl.Series(["x"]), pl.Series(["x"], dtype=pl.Categorical))


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(KINDS, 2)))
def test_kinds_are_not_mixed(one: str, other: str, tmp_path: Path) -> None:
    for number, (first, second) in enumerate(itertools.product(KINDS[one], KINDS[other])):
        folder = folder_of(tmp_path / str(number), first, second)
        with pytest.raises(DataError, match=f"'v' holds {one} in 0.parquet and {other} in 1.parquet; write it"):
            read_table(folder, tmp_path, {"v": None})


def test_the_kinds_that_do_not_fit_are_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "t", pl.Series(["x"]), pl.Series([7]), pl.Series([DAY]))
    with pytest.raises(DataError, match=r"'v' holds numbers in 1\.parquet and times in 2\.parquet"):
        read_table(folder, tmp_path, {"v": None})


@pytest.mark.parametrize("kind", KINDS)
def test_types_of_one_kind_are_read_together(kind: str, tmp_path: Path) -> None:
    nothing = pl.Series([None])
    for number, (first, second) in enumerate(itertools.product(KINDS[kind], repeat=2)):
        table = read_table(folder_of(tmp_path / str(number), first, nothing, second), tmp_path, {"v": None}).collect()
        assert [value is None for value in table["v"].to_list()] == [False, True, False]


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_read_beside_what_has_one_spelling(kind: str, tmp_path: Path) -> None:
    for number, (first, text) in enumerate(itertools.product(KINDS[kind], TEXTS)):
        folder = folder_of(tmp_path / str(number), first, text)
        if kind in ("lists", "objects", "durations"):
            with pytest.raises(DataError, match=f"'v' holds {kind} in 0.parquet and texts in 1.parquet"):
                read_table(folder, tmp_path, {"v": None})
        else:
            assert read_table(folder, tmp_path, {"v": None}).collect()["v"].to_list()[1] == "x"


def test_kinds_inside_of_lists_and_objects_are_not_mixed(tmp_path: Path) -> None:
    for number, make in enumerate((lambda value: [value], lambda value: {"at": value}, lambda value: [{"at": value}])):
        folder = folder_of(tmp_path / str(number), pl.Series([make(DAY)]), pl.Series([make(1_700_000_000)]))
        with pytest.raises(DataError, match=r"'v(\.at)?' holds times in 0.parquet and numbers in 1.parquet"):
            read_table(folder, tmp_path, {"v": None})


def test_times_of_several_zones_are_the_same_instants(tmp_path: Path) -> None:
    zones = (None, "Europe/Paris", "Asia/Tokyo")
    instants = [pl.Series([DAY]).dt.replace_time_zone(zone) for zone in zones]
    found = read_table(folder_of(tmp_path / "t", *instants), tmp_path, {"v": None}).collect()["v"].dt.epoch("s")
    assert (found - found[0]).to_list() == [0, -3_600, -9 * 3_600]


def test_digits_that_a_part_has_lost_are_told(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "t", pl.Series([2.0**24], dtype=pl.Float32), pl.Series([2**24 + 1]))
    assert any("'v' is Float32 in some parts" in note for note in open_table(folder).notes)
    folder = folder_of(tmp_path / "u", pl.Series([2.0]), pl.Series([3]))
    assert open_table(folder).notes == []


def test_an_empty_part_may_lack_columns(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "t", pl.Series([1]))
    pl.DataFrame({"w": pl.Series([], dtype=pl.String)}).write_parquet(folder / "1.parquet")
    table = open_table(folder)
    assert table.read({"v": None}, tmp_path).collect()["v"].to_list() == [1]
    # The first one has rows, and lacks what the empty one has.
    assert len(table.notes) == 1 and "no column 'w'" in table.notes[0]


@pytest.mark.parametrize(("log", "kind"), [("_delta_log", "Delta Lake"), (".hoodie", "Hudi")])
def test_tables_with_a_log_of_versions_are_refused(log: str, kind: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "t", pl.Series([1]))
    (folder / log).mkdir()
    with pytest.raises(DataError, match=f"is a table of {kind}, .* write its present rows as plain Parquet"):
        open_table(folder)


NAMES: dict[str, tuple[list[str], int]] = {
    "Ray": ([f"0356JR_{'a' * 32}_00000{k}-0.parquet" for k in range(3)], 1),
    "Ray, again": ([f"{write * 32}_000000_00000{k}-0.parquet" for write in "ab" for k in range(3)], 2),
    "Spark": ([f"part-0000{k}-{'a' * 8}-1234-1234-1234-{'b' * 12}-c000.snappy.parquet" for k in range(3)], 1),
    "Spark, again": ([f"part-00000-{write * 8}-1234-1234-1234-{'b' * 12}-c000.parquet" for write in "abc"], 3),
    "others": (["part.0.parquet", "part.1.parquet", "000000000000.parquet"], 1),
}


@pytest.mark.parametrize("writer", NAMES)
def test_names_tell_how_often_a_folder_was_written(writer: str, tmp_path: Path) -> None:
    names, writes = NAMES[writer]
    for name in names:
        pl.DataFrame({"v": [1]}).write_parquet(tmp_path / name)
    notes: list[Any] = open_table(tmp_path).notes
    assert [f"was written to {writes} times" in note for note in notes] == [True] * (writes > 1)
