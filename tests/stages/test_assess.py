"""Results of one kind do not overwrite those of another, and none leave the run folder."""

import shutil
from pathlib import Path

import pytest

from nqf import evaluate
from nqf.stages.assess import assess
from nqf.stages.records import StageError
from nqf.stages.run import open_run


@pytest.mark.ci
@pytest.mark.slow
def test_results_lie_by_split_protocol_and_trial(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    before = {path: path.read_bytes() for path in (run / "README.md", *(run / "eval").glob("*.*"))}
    for options, folder in (
        (["--split", "valid"], "valid"),
        (["--split", "valid", "--cooccurrence-weight", "2"], "valid-cooccurrence-weight-2"),
        (["--protocol", "legacy"], "test-legacy"),
        (["--keep-seen"], "test-keep-seen"),
    ):
        evaluate.main([str(run), *options])
        assert (run / "eval" / folder / "results.json").is_file(), folder
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("into", ["../elsewhere", "/tmp/elsewhere"])
def test_results_stay_in_the_run_folder(tiny_run: Path, into: str) -> None:
    with pytest.raises(StageError, match="outside of the run folder"):
        assess(open_run(tiny_run), into=into)
