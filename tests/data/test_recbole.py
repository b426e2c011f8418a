"""RecBole's atomic files, as RecBole (that is, pandas) reads them."""

import csv
from pathlib import Path

import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from nqf.config import ColumnsConfig, Config, DataConfig, DialectConfig
from nqf.data.errors import DataError
from nqf.data.load import Dataset, prepare
from nqf.data.recbole import open_interactions
from nqf.stages.artifacts import source_digest

ITEMS = "item_id:token\ttitle:token_seq\tgenres:token_seq\tv:float_seq\n" + "".join(
    f"{n}\tFilm {n}\tAction Drama\t0.5 {n}\n" for n in range(1, 9)
)
EVENTS = "user_id:token\titem_id:token\ttimestamp:float\n" + "".join(
    f"{user}\t{item}\t{880000000 + item}.0\n" for user in range(4) for item in range(1 + user, 6 + user) if item < 9
)
SCHEMA = {"title": "title", "fields": {"title": "text", "genres": "category", "v": "vector"}}


def prepared(
    folder: Path, items: str = ITEMS, schema: dict = SCHEMA, interactions: str = "x.inter", **files: str
) -> Dataset:
    (folder / "x.item").write_text(items)
    for name, text in files.items():
        (folder / f"{name.replace('_', '.')}").write_text(text)
    (folder / "schema.yaml").write_text(yaml.safe_dump(schema))
    paths = {"items": "x.item", "interactions": interactions, "schema": "schema.yaml"}
    return prepare(
        DataConfig(format="recbole", **{key: str(folder / path) for key, path in paths.items()}), folder / "data"
    )


def values(dataset: Dataset, *columns: str) -> list[tuple]:
    return next(dataset.catalogue.chunks(list(columns), 99)).rows()


def sequences(dataset: Dataset) -> dict[str, list[str]]:
    events = dataset.interactions
    items = [dataset.catalogue.item_ids[row] for row in events.items]
    return {user: items[events.offsets[row] : events.offsets[row + 1]] for row, user in enumerate(events.user_ids)}


def test_sequences_are_lists(tmp_path: Path) -> None:
    dataset = prepared(tmp_path, x_inter=EVENTS)
    assert values(dataset, "title", "genres", "v")[1] == ("Film 2", ["Action", "Drama"], [0.5, 2.0])


def test_quoted_items(tmp_path: Path) -> None:
    """RecBole reads with pandas and so does not keep the quotes that pandas writes."""
    frame = pd.DataFrame(
        {"item_id:token": ["1", "2", "3"], "title:token_seq": ['Golden "Special" Eye', "A\tB", "plain"]}
    )
    frame.to_csv(tmp_path / "x.item", sep="\t", index=False)
    items = (tmp_path / "x.item").read_text() + "".join(f"{n}\tFilm\n" for n in range(4, 9))
    dataset = prepared(tmp_path, items, {"title": "title", "fields": {"title": "text"}}, x_inter=EVENTS)
    assert [title for (title,) in values(dataset, "title")[:3]] == ['Golden "Special" Eye', "A\tB", "plain"]
    assert list(pd.read_csv(tmp_path / "x.item", sep="\t", engine="python")["title:token_seq"][:3]) == list(
        frame["title:token_seq"]
    )


def test_values_with_blanks_need_a_separator_and_that_is_said(tmp_path: Path) -> None:
    items = ITEMS.replace("Action Drama", "Hair Care, Bath")
    dataset = prepared(tmp_path, items, x_inter=EVENTS)
    assert values(dataset, "genres")[0] == (["Hair", "Care,", "Bath"],)
    assert "8 sequences of genres have commas in them" in "\n".join(dataset.report["warnings"])
    field = {"modality": "category", "multi_valued": True, "separator": ","}
    dataset = prepared(tmp_path, items, {"fields": {"genres": field}}, x_inter=EVENTS)
    assert values(dataset, "genres")[0] == (["Hair Care", "Bath"],)
    assert "commas" not in "\n".join(dataset.report["warnings"])
    dataset = prepared(tmp_path, ITEMS.replace("Action Drama", "['Hair Care', 'Bath']"), x_inter=EVENTS)
    assert values(dataset, "genres")[0] == (["Hair Care", "Bath"],)


def test_ids_of_other_names(tmp_path: Path) -> None:
    dataset = prepared(
        tmp_path, ITEMS.replace("item_id", "product_id"), x_inter=EVENTS.replace("item_id", "product_id")
    )
    assert dataset.report["interactions"]["unknown_items"] == 0
    assert "the item is taken from the column 'product_id'" in "\n".join(dataset.report["warnings"])


def test_another_separator(tmp_path: Path) -> None:
    dataset = prepared(tmp_path, x_inter=EVENTS.replace("\t", " "))
    assert len(dataset.interactions.items) == 20
    assert "the separator is taken to be blank" in "\n".join(dataset.report["warnings"])


HISTORIES = {
    "train": "user_id:token\titem_id_list:token_seq\titem_id:token\n0\t1\t2\n0\t1 2\t3\n1\t3\t4\n1\t3 4\t3\n",
    "valid": "user_id:token\titem_id_list:token_seq\titem_id:token\n0\t1 2 3\t4\n1\t3 4 3\t6\n",
    "test": "user_id:token\titem_id_list:token_seq\titem_id:token\n0\t1 2 3 4\t5\n1\t4 3 6\t7\n",
}


@pytest.mark.parametrize("named", ["train", "valid", "test"])
def test_histories_of_benchmark_files_become_sequences(named: str, tmp_path: Path) -> None:
    files = {f"x_{name}_inter": text for name, text in HISTORIES.items()}
    dataset = prepared(tmp_path, interactions=f"x.{named}.inter", **files)
    assert sequences(dataset) == {"0": list("12345"), "1": list("34367")}
    warnings = "\n".join(dataset.report["warnings"])
    assert "x.train.inter, x.valid.inter, x.test.inter are read together" in warnings
    assert "item_id_list is read as what the user did before" in warnings


def test_another_file_of_the_benchmark_makes_results_stale(tmp_path: Path) -> None:
    for name in ("train", "test"):
        (tmp_path / f"x.{name}.inter").write_text(HISTORIES[name])
    paths = {"items": "x.item", "interactions": "x.test.inter", "schema": "schema.yaml"}
    config = Config(data=DataConfig(format="recbole", **{key: str(tmp_path / name) for key, name in paths.items()}))
    before = source_digest(config)
    (tmp_path / "x.train.inter").write_text(HISTORIES["train"].replace("4", "5"))
    assert source_digest(config) != before


def test_rows_of_benchmark_files_are_put_together(tmp_path: Path) -> None:
    header, *rows = EVENTS.splitlines(keepends=True)
    files = {"x_train_inter": rows[:10], "x_valid_inter": rows[10:14], "x_test_inter": rows[14:]}
    dataset = prepared(
        tmp_path, interactions="x.train.inter", **{name: header + "".join(part) for name, part in files.items()}
    )
    assert sequences(dataset) == sequences(prepared(tmp_path, x_inter=EVENTS))


def test_times_of_histories_are_kept(tmp_path: Path) -> None:
    (tmp_path / "x.inter").write_text(
        "user_id:token\titem_id_list:token_seq\ttimestamp_list:float_seq\titem_id:token\ttimestamp:float\tlabel:float\n"
        "u\ta b\t1 2\tc\t3\t1\nu\ta b c\t1 2 3\td\t9\t0\n"
    )
    table = open_interactions(tmp_path / "x.inter", DialectConfig(), ColumnsConfig())
    assert list(table.rows(["user_id", "item_id", "timestamp"])) == [
        ["u", item, time] for item, time in zip("abcd", "1239", strict=True)
    ]
    assert f"{tmp_path / 'x.inter'}: columns that are not used: label" in table.notes


def test_histories_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.inter").write_text("user_id:token\titem_id_list:token_seq\titem_id:token\nu\ta b\tc\nu\tx y z\tw\n")
    table = open_interactions(tmp_path / "x.inter", DialectConfig(), ColumnsConfig())
    with pytest.raises(DataError, match=r"the histories of user 'u' do not continue each other"):
        list(table.rows(["item_id"]))


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_samples_of_a_sequence_in_any_order_give_it_back(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("recbole")
    users = {f"u{n}": [f"{n}-{m}" for m in range(data.draw(st.integers(2, 8)))] for n in range(3)}
    rows = [(user, " ".join(items[:end]), items[end]) for user, items in users.items() for end in range(1, len(items))]
    with (folder / "x.inter").open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["user_id:token", "item_id_list:token_seq", "item_id:token"])
        writer.writerows(data.draw(st.permutations(rows)))
    table = open_interactions(folder / "x.inter", DialectConfig(), ColumnsConfig())
    found: dict[str, list[str]] = {}
    for user, item in table.rows(["user_id", "item_id"]):
        found.setdefault(user, []).append(item)
    assert found == users
