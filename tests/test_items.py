"""Items added, updated and removed after training: `nqf.items`, the overlay and what the Recommender makes of it."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import polars as pl
import pytest

from nqf import Recommender, items
from nqf.data.errors import DataError
from nqf.fields.cache import encode_items
from nqf.fields.encoder import CacheError
from nqf.serving import overlay
from nqf.stages.artifacts import status
from nqf.stages.graph import STAGES
from nqf.stages.run import Run, open_run

pytestmark = pytest.mark.slow


def digests(run: Path) -> dict[str, str]:
    """Content of every file of the run outside of items/."""
    paths = [path for path in run.rglob("*") if path.is_file() and "items" not in path.relative_to(run).parts]
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def change(action: str, run: Path, rows: list[dict], folder: Path) -> None:
    path = folder / f"{action}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    items.main([action, str(run), str(path)])


def read(run: Run) -> overlay.Overlay:
    return overlay.read_overlay(run.folder / "items", run.dataset.catalogue, run.cache)


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


@pytest.fixture(scope="module")
def trained(tiny_run: Path) -> Recommender:
    return Recommender.load(tiny_run)


NEW = [
    {"item_id": "new-1", "title": "Fine oak desk", "description": "A desk of oak", "price": 12.5},
    {"item_id": "new-2", "title": "Walnut lamp", "brand": "Verdant", "released": "2023-05-01"},
    {"item_id": "new-3"},
]


def test_changes_touch_nothing_else(run: Path, trained: Recommender, tmp_path: Path, capsys) -> None:
    before = digests(run)
    change("add", run, NEW, tmp_path)
    change("update", run, [{"item_id": "item-00003", "title": "Something else entirely"}], tmp_path)
    change("remove", run, [{"item_id": "item-00004"}, {"item_id": "new-3"}], tmp_path)
    assert "241: 240 of its training; since then 3 added, 1 updated, 2 removed" in capsys.readouterr().out

    assert digests(run) == before
    config = open_run(run).config
    assert [status(config, stage, run) for stage in STAGES] == [""] * len(STAGES)

    changed = Recommender.load(run)
    count, row = len(trained.item_ids), trained.item_ids.index("item-00003")
    assert changed.item_ids == [*trained.item_ids, "new-1", "new-2", "new-3"]
    same = np.arange(count) != row
    assert changed.item_vectors[:count][same].tobytes() == trained.item_vectors[same].tobytes()
    assert not np.array_equal(changed.item_vectors[row], trained.item_vectors[row])
    history = ["item-00001", "item-00002"]
    assert changed.encode_users([history]).tobytes() == trained.encode_users([history]).tobytes()

    everything = changed.recommend(history=history, k=count + 3)
    assert set(changed.item_ids) - set(everything["item_id"]) == {"item-00004", "new-3", *history}
    assert "Something else entirely" in everything["title"].to_list()
    # A removed item still says something about who has met it.
    assert len(changed.recommend(history=["item-00004", "new-1"], k=3)) == 3
    open_again = changed.recommend(history=history, k=count + 3, repeats=True)
    assert "item-00004" not in open_again["item_id"].to_list()
    assert set(history) <= set(open_again["item_id"])
    for frame in changed.recommend_all(k=count):
        assert not {"item-00004", "new-3"} & set(frame["item_id"])

    # In memory it is the same as on disk.
    trained_again = Recommender.load(shutil.copytree(run, tmp_path / "plain", ignore=shutil.ignore_patterns("items")))
    trained_again.add_items(NEW)
    assert trained_again.item_vectors[count:].tobytes() == changed.item_vectors[count:].tobytes()
    assert trained_again.available.all()
    with pytest.raises(DataError, match=r"in the catalogue already, such as item_id 'new-1'"):
        trained_again.add_items(NEW[:1])


def test_user_stage_reads_changes_too(run: Path, tmp_path: Path) -> None:
    before = Recommender.load(run, stage="user")
    change("add", run, NEW, tmp_path)
    after = Recommender.load(run, stage="user")
    assert after.item_vectors[: len(before.item_ids)].tobytes() == before.item_vectors.tobytes()
    assert len(after.item_ids) == len(before.item_ids) + len(NEW)


def test_a_copy_of_an_item_has_its_content(tiny_run: Path, trained: Recommender) -> None:
    """The frozen half of a new item's vector is that of an item with the same text, under the weight of new items; the
    learned half has no part that training gave to the item alone."""
    frame = pl.read_parquet(tiny_run / "data" / "items.parquet").head(1)
    copy = Recommender.load(tiny_run)
    copy.add_items(frame.with_columns(item_id=pl.lit("copy")))
    config = copy._run.config
    # What the stage `score` added for texts is not multiplied.
    width, weight = config.candidates.width, copy._trained.parts.module.new_item_weight
    assert 1 < weight <= config.evaluation.new_item_weight
    np.testing.assert_allclose(copy.item_vectors[-1, width:], weight * copy.item_vectors[0, width:], atol=1e-3)
    assert not np.allclose(copy.item_vectors[-1, :width], copy.item_vectors[0, :width], atol=1e-3)


def test_update_keeps_what_the_file_lacks(tiny_run: Path, run: Path, tmp_path: Path) -> None:
    stored = pl.read_parquet(tiny_run / "data" / "items.parquet")
    opened = open_run(run)
    change("update", run, [{"item_id": "item-00007", "price": 3.25}], tmp_path)
    row = read(opened).frame.row(0, named=True)
    assert row == stored.row(7, named=True) | {"price": 3.25}
    change("add", run, NEW, tmp_path)
    change("update", run, [{"item_id": "item-00007", "title": "A lamp"}], tmp_path)
    change("update", run, [{"item_id": "new-1", "brand": "B"}], tmp_path)
    rows = {row["item_id"]: row for row in read(opened).frame.iter_rows(named=True)}
    assert rows["item-00007"] == stored.row(7, named=True) | {"price": 3.25, "title": "A lamp"}
    assert (rows["new-1"]["brand"], rows["new-1"]["title"]) == (["B"], "Fine oak desk")
    # A column that is there and empty takes the value away.
    change("update", run, [{"item_id": "item-00007", "price": None}], tmp_path)
    assert read(opened).frame.filter(item_id="item-00007")["price"].item() is None


def test_removed_items_can_come_back(run: Path, tmp_path: Path) -> None:
    opened = open_run(run)
    change("remove", run, [{"item_id": "item-00004"}], tmp_path)
    with pytest.raises(DataError, match="were removed, such as item_id 'item-00004'; add them first"):
        change("update", run, [{"item_id": "item-00004", "price": 1}], tmp_path)
    change("add", run, [{"item_id": "item-00004", "title": "Back again"}], tmp_path)
    assert read(opened).removed == frozenset()
    assert read(opened).frame["title"].to_list() == ["Back again"]


@pytest.mark.parametrize(
    ("action", "row", "message"),
    [
        ("add", {"item_id": "item-00004", "title": "A"}, "in the catalogue already, such as item_id 'item-00004'"),
        ("add", {"item_id": "x", "price": "cheap"}, "the new item 'x': price is not a number: 'cheap'"),
        ("update", {"item_id": "nobody", "price": 1}, "not in the catalogue or were removed, such as item_id 'nobody'"),
        ("remove", {"item_id": "nobody"}, "not in the catalogue or were removed, such as item_id 'nobody'"),
        ("add", {"item_id": "x", "prize": 1}, "none of its columns is in the schema: item_id, prize"),
        ("add", {"which": "x"}, "no column 'item_id' and none of a common name for it; it has which"),
    ],
)
def test_refusals_change_nothing(
    tiny_run: Path, run: Path, tmp_path: Path, action: str, row: dict, message: str
) -> None:
    change("add", run, NEW, tmp_path)
    before = (run / "items" / "items.json").read_bytes()
    with pytest.raises(DataError, match=message):
        change(action, run, [row], tmp_path)
    assert (run / "items" / "items.json").read_bytes() == before


def test_what_cannot_be_read_is_said(run: Path, tmp_path: Path, capsys) -> None:
    change("add", run, [{"item_id": "x", "title": "Desk", "image": "nowhere.png", "color": "red"}], tmp_path)
    out = capsys.readouterr().out
    assert "warning  1 values of 'image' could not be read and count as missing" in out
    assert "columns that the schema does not name are passed over: color" in out


KILLED = """
import os, sys
from pathlib import Path
from nqf import items
from nqf.fields import tables
from nqf.serving import overlay

name, real = sys.argv[1], os.replace

def replace(source, target):
    if Path(target).name.startswith(name):
        os.kill(os.getpid(), 9)
    real(source, target)

os.replace = replace
items.main(sys.argv[2:])
"""


@pytest.mark.parametrize("moment", ["rows-", "encoded-", "items.json"])
def test_killed_in_the_middle(run: Path, tmp_path: Path, moment: str, record: Callable[..., None]) -> None:
    change("add", run, NEW, tmp_path)
    opened = open_run(run)
    before = read(opened)
    table = tmp_path / "more.csv"
    table.write_text("item_id,title\nnew-4,Cedar chest\n")
    done = subprocess.run([sys.executable, "-c", KILLED, moment, "add", str(run), str(table)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    after = read(opened)
    assert after.frame.equals(before.frame)
    for name, pair in before.encoded.items():
        for old, new in zip(pair, after.encoded[name], strict=True):
            assert old.tobytes() == new.tobytes()
    items.main(["add", str(run), str(table)])
    assert read(opened).frame["item_id"].to_list() == ["new-1", "new-2", "new-3", "new-4"]
    assert len(os.listdir(run / "items")) == 4, "two tables, the manifest and the lock"
    record(
        "SIGKILL while items are added: at their rows, their vectors, their list",
        tried=1,
        survived=1,
        seen="nothing: the items of before are there, and the same command adds the new ones",
    )


def test_other_encoders_encode_again(run: Path, tmp_path: Path) -> None:
    change("add", run, NEW, tmp_path)
    opened = open_run(run)
    manifest = json.loads((run / "items" / "items.json").read_text())
    manifest["encoders"]["title"] = "encoders/title-of-another-fit"
    (run / "items" / "items.json").write_text(json.dumps(manifest))
    assert overlay._encoders(opened.cache) != manifest["encoders"]
    found, expected = read(opened).encoded, encode_items(opened.cache, read(opened).frame)
    for name, pair in expected.items():
        np.testing.assert_array_equal(found[name][0], pair[0])
        np.testing.assert_array_equal(found[name][1], pair[1])


def test_damage_is_refused(run: Path, tmp_path: Path) -> None:
    change("add", run, NEW, tmp_path)
    opened = open_run(run)
    path = next((run / "items").glob("rows-*"))
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"x")
    with pytest.raises(CacheError, match="altered"):
        read(opened)
    path.write_bytes(content)
    (run / "items" / "items.json").write_text("{")
    with pytest.raises(CacheError, match=r"delete .* and add the items again"):
        read(opened)


def test_items_at_an_address(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/shop/new.jsonl", "".join(json.dumps(row) + "\n" for row in NEW).encode())
    try:
        items.main(["add", str(run), "memory://shop/new.jsonl"])
        assert "add: 3 items" in capsys.readouterr().out
        assert set(read(open_run(run)).frame["item_id"]) == {row["item_id"] for row in NEW}
        with pytest.raises(DataError, match=r"^memory://shop/none\.jsonl: no such file or folder"):
            items.main(["add", str(run), "memory://shop/none.jsonl"])
        memory.pipe_file("/shop/other.csv", b"item_id,weight\na,1\n")
        with pytest.raises(DataError, match=r"^memory://shop/other\.csv: none of its columns is in the schema"):
            items.main(["add", str(run), "memory://shop/other.csv"])
    finally:
        memory.store.clear()
