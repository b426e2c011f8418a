"""Recommendations for everybody as parts: whoever makes them, however often it was ended, the bytes are the same."""

import itertools
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import polars as pl
import pytest

from nqf import Recommender, files
from nqf.cli import guard
from nqf.recommend import main
from nqf.serving import parts as module
from nqf.serving.parts import recommend_parts
from nqf.stages.records import StageError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rec(tiny_run: Path) -> Recommender:
    return Recommender.load(tiny_run)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "USERS", 16)


def made(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("part-*.parquet"))}


def test_one_two_and_seven_workers_write_the_same_bytes(rec: Recommender, tmp_path: Path) -> None:
    found = {}
    for workers in (1, 2, 7):
        folder = tmp_path / str(workers)
        with ThreadPoolExecutor(workers) as pool:
            lines = list(
                pool.map(
                    lambda _, folder=folder: list(recommend_parts(rec, folder, k=3)),
                    range(workers),
                )
            )
        found[workers] = made(folder)
        wrote = [line for line in itertools.chain(*lines) if line.startswith("wrote")]
        assert len(wrote) == len(set(wrote)) == len(found[workers]) > 2, "each part was made once"
        assert sorted(path.name for path in folder.iterdir() if "part-" in path.name) == sorted(found[workers])
        assert any("parts are there" in some[-1] for some in lines)
    assert found[1] == found[2] == found[7]
    together = pl.read_parquet(tmp_path / "2" / "part-*.parquet")
    assert together["user_id"].unique(maintain_order=True).to_list() == rec.user_ids
    assert together.select("user_id", "rank", "item_id").equals(
        pl.concat(rec.recommend_all(k=3)).select("user_id", "rank", "item_id")
    )


def test_what_was_ended_is_finished(rec: Recommender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, whole = tmp_path / "lists", tmp_path / "whole"
    list(recommend_parts(rec, whole, k=3))
    begun = recommend_parts(rec, folder, k=3)
    next(begun), next(begun)
    begun.close()
    # What a killed process leaves: a lock that nobody holds, and part of a part.
    (folder / ".part-00002.parquet.lock").touch()
    (folder / ".part-00002.parquet.elsewhere-1.partial").write_bytes(b"PAR1")
    first = (folder / "part-00000.parquet").stat().st_mtime_ns
    list(recommend_parts(rec, folder, k=3))
    assert made(folder) == made(whole)
    assert (folder / "part-00000.parquet").stat().st_mtime_ns == first, "what was there was not made again"
    # A part that another process is at is left to it, and said.
    (folder / "part-00001.parquet").unlink()
    with files.claimed(folder / "part-00001.parquet") as mine:
        assert mine
        (line,) = recommend_parts(rec, folder, k=3)
    assert line.startswith("1 of ")


def test_other_parts_and_other_folders_are_refused(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    rec = Recommender.load(run)
    folder = tmp_path / "lists"
    list(recommend_parts(rec, folder, k=3))
    before = made(folder)
    with pytest.raises(StageError, match="parts of another k;"):
        list(recommend_parts(rec, folder, k=4))
    (run / "joint" / "stage.json").write_text((run / "joint" / "stage.json").read_text() + " ")
    with pytest.raises(StageError, match="parts of another run;"):
        list(recommend_parts(rec, folder, k=3))
    assert made(folder) == before
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years")
    with pytest.raises(StageError, match=r"none of its parts, such as 'thesis.txt'"):
        list(recommend_parts(rec, mine, k=3))
    assert (mine / "thesis.txt").read_text() == "years" and not list(mine.glob("part*"))


def test_the_command(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    guard(main, [str(tiny_run), "--parts", str(tmp_path / "lists"), "--k", "2"])
    assert "parts are there" in " ".join(capsys.readouterr().out.split())
    assert pl.read_parquet(tmp_path / "lists" / "part-*.parquet")["rank"].max() == 2
