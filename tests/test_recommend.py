"""`python -m nqf.recommend`: histories in every form, one setting for repeats, ids and titles as text."""

import shutil
from pathlib import Path

import polars as pl
import pytest
import yaml

from nqf.cli import guard
from nqf.recommend import RecommendArguments, _history, main


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    status = 0
    try:
        guard(main, [*map(str, arguments)])
    except SystemExit as error:
        status = int(error.code or 0)
    output = capsys.readouterr()
    return status, output.out + output.err


def test_ids_with_commas_can_be_given(tmp_path: Path) -> None:
    ids = ["Tyler, The Creator", "i3"]
    assert _history(RecommendArguments(run=tmp_path, item=tuple(ids))) == ids
    file = tmp_path / "history.txt"
    for text in ("Tyler, The Creator\ni3\n", "\ufeff Tyler, The Creator \r\n\r\ni3", "Tyler, The Creator\ni3"):
        file.write_text(text, encoding="utf-8", newline="")
        assert _history(RecommendArguments(run=tmp_path, history_file=file)) == ids
    assert _history(RecommendArguments(run=tmp_path, history=" i3 ,, i4 ")) == ["i3", "i4"]


def test_forms_of_a_history_and_repeats(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    ids = pl.read_parquet(run / "data" / "items.parquet")["item_id"].to_list()
    one, two = ids[:2]
    (tmp_path / "history.txt").write_text(f"{one}\n{two}\n")
    common = (run, "--stage", "user", "--k", len(ids))
    status, first = said(capsys, *common, "--history", f"{one},{two}")
    assert status == 0 and first.count("\n") == len(ids) - 2 + 2
    assert said(capsys, *common, "--item", one, "--item", two) == (0, first)
    assert said(capsys, *common, "--history-file", tmp_path / "history.txt") == (0, first)
    # The setting of the evaluation is that of the recommendations.
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree["evaluation"]["repeats"] = True
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    status, repeated = said(capsys, *common, "--item", one, "--item", two)
    assert status == 0 and repeated.count("\n") == len(ids) + 2
    assert f" {one} " in repeated.split("\n", 2)[2] and f" {one} " not in first.split("\n", 2)[2]
    status, error = said(capsys, *common, "--history", "Tyler, The Creator")
    assert status == 1 and "'The Creator', 'Tyler'; ids that hold commas are given by --item or --history-file" in error
    status, error = said(capsys, run, "--item", one, "--user", "u")
    assert status == 1 and "give exactly one of --user ID" in error
    status, error = said(capsys, run, "--history-file", tmp_path / "absent.txt")
    assert status == 1 and "absent.txt: no such file" in error
