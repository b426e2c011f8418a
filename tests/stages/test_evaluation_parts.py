"""An evaluation in parts: whoever ranks them, however often it was killed, the results are those of one process."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from nqf import files
from nqf.config import DataConfig, EvaluationConfig, SyntheticConfig
from nqf.data.load import prepare
from nqf.evaluate import main
from nqf.evaluation import shares as module
from nqf.evaluation.results import Results, evaluate
from nqf.evaluation.shares import Shares
from nqf.stages import assess as assessing
from nqf.stages.assess import assess
from nqf.stages.graph import lock_run
from nqf.stages.records import StageError
from nqf.stages.run import Run, open_run

ROOT = Path(__file__).parents[2]
CASES = 48
# The command with parts of few cases, ranked slowly.
SLOW = f"""
import sys, time
from nqf.evaluation import results, shares
shares.CASES = {CASES}
rank = results._rank
def slow(*arguments):
    time.sleep(0.1)
    return rank(*arguments)
results._rank = slow
from nqf.evaluate import main
main(sys.argv[1:])
"""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CASES", CASES)


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Run:
    return copied(tiny_run, tmp_path / "run")


def copied(tiny_run: Path, folder: Path) -> Run:
    shutil.copytree(tiny_run, folder, ignore=shutil.ignore_patterns("eval", "tensorboard", ".lock*"))
    return open_run(folder, Console(file=io.StringIO()))


def outcome(run: Run) -> tuple[bytes, dict]:
    """The table, to the byte, and the results without what tells who made them."""
    tree = json.loads((run.folder / "eval" / "results.json").read_text())
    kept = {key: value for key, value in tree.items() if key not in ("provenance", "digest")}
    return (run.folder / "eval" / "per_user.parquet").read_bytes(), kept


@pytest.fixture(scope="module")
def whole(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, dict]:
    """What one process makes that shares with nobody."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CASES", CASES)
        run = copied(tiny_run, tmp_path_factory.mktemp("whole") / "run")
        assess(run)
    return outcome(run)


def test_rows_are_made_once_by_any_number_of_processes(tmp_path: Path) -> None:
    expected = np.arange(500) ** 2
    for workers in (1, 2, 7):
        made = []

        def make(span: slice, made: list = made) -> dict[str, np.ndarray]:
            made.append(span.start)
            time.sleep(0.01)
            return {"square": np.arange(500)[span] ** 2}

        shares = Shares(folder=tmp_path / str(workers))
        with ThreadPoolExecutor(workers) as pool:
            found = list(pool.map(lambda _, shares=shares, make=make: shares.rows("x", 500, make), range(workers)))
        assert all(np.array_equal(one["square"], expected) for one in found)
        assert sorted(made) == list(range(0, 500, CASES))
    assert np.array_equal(module.ALONE.rows("x", 500, make)["square"], expected)


def test_what_is_no_part_is_refused_and_kept(tmp_path: Path) -> None:
    shares = Shares(folder=tmp_path)
    for content in (b"years", b"PK\x03\x04"):
        (tmp_path / "x-00001.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"x-00001.npz: not a part of this work .*; move it away"):
            shares.rows("x", 100, lambda span: {"row": np.arange(100)[span]})
        assert (tmp_path / "x-00001.npz").read_bytes() == content
    np.savez(tmp_path / "x-00001.npz", row=np.arange(3))
    with pytest.raises(ValueError, match="not of 48 cases"):
        shares.rows("x", 100, lambda span: {"row": np.arange(100)[span]})


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_any_number_of_processes_rank_the_same(workers: int, tmp_path: Path) -> None:
    dataset = prepare(DataConfig(format="synthetic", synthetic=SyntheticConfig(items=60, users=150)), tmp_path / "data")
    rng, cases, items = np.random.default_rng(0), dataset.split.test, len(dataset.split.cold)
    users_NxD, items_IxD = (rng.integers(-2, 3, (count, 4)).astype(np.float32) for count in (len(cases.users), items))
    models = {"vectors": (users_NxD, items_IxD), "scores": lambda rows: users_NxD[rows] @ -items_IxD.T}

    def ranked(shares: Shares) -> Results:
        config = EvaluationConfig(bootstrap=20, batch_size=16)
        events, split = dataset.interactions, dataset.split
        return evaluate(models, events, split, cases, split_name="test", config=config, seed=0, shares=shares)

    alone = ranked(module.ALONE)
    with ThreadPoolExecutor(workers) as pool:
        found = list(pool.map(ranked, [Shares(folder=tmp_path / "parts")] * workers))
    assert all(one.models == alone.models and one.frame.equals(alone.frame) for one in found)
    assert all(one.recommended == alone.recommended for one in found)
    assert len(list((tmp_path / "parts").glob("ranks-scores-*.npz"))) > 2


@pytest.mark.ci
@pytest.mark.slow
def test_processes_share_the_models_too(tiny_run: Path, run: Run, whole: tuple[bytes, dict], tmp_path: Path) -> None:
    runs, cards = [run, open_run(run.folder, run.console)], []
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda one: assess(one, parts=tmp_path / "parts", card=lambda *_: cards.append(1)), runs))
    assert outcome(run) == whole and len(cards) == 1
    assert len(list((tmp_path / "parts").glob("users-joint-*.npz"))) > 2


@pytest.mark.ci
@pytest.mark.slow
def test_a_killed_process_costs_its_part(run: Run, whole: tuple[bytes, dict], tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    command = [sys.executable, "-c", SLOW, str(run.folder), "--parts", str(parts)]
    process = subprocess.Popen(command, cwd=ROOT, env=dict(os.environ), stderr=subprocess.PIPE)
    while not list(parts.glob("ranks-*.npz")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    made = {path: path.stat().st_mtime_ns for path in parts.glob("*.npz")}
    assert not (run.folder / "eval").exists() and list(parts.glob("users-joint-*.npz"))
    # Another process trains: what is ranked stays.
    with lock_run(run.folder), pytest.raises(files.InUseError, match="in use by process"):
        assess(run, parts=parts)
    assert not (run.folder / "eval").exists() and list(parts.glob("ranks-sasrec-*.npz"))
    main([str(run.folder), "--parts", str(parts)])
    assert outcome(run) == whole and "NDCG" in (run.folder / "README.md").read_text()
    assert {path: path.stat().st_mtime_ns for path in made} == made, "what was there was not made again"


@pytest.mark.slow
def test_other_evaluations_and_other_folders_are_refused(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, mine = tmp_path / "parts", tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years")
    with pytest.raises(StageError, match=r"none of its parts, such as 'thesis.txt'"):
        assess(run, parts=mine)
    assert [path.name for path in mine.iterdir() if not path.name.startswith(".lock")] == ["thesis.txt"]

    def ended(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(assessing, "scorers", ended)
    with pytest.raises(KeyboardInterrupt):
        assess(run, parts=parts)
    for settings, name in (({"split": "valid"}, "split"), ({"ks": (3,)}, "evaluation"), ({"into": "x"}, "into")):
        with pytest.raises(StageError, match=f"holds parts of another {name}"):
            assess(run, parts=parts, **settings)
    path = run.folder / "joint" / "stage.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(StageError, match="holds parts of another run;"):
        assess(run, parts=parts)
    (run.folder / "sasrec" / "stage.json").unlink()
    with pytest.raises(StageError, match=r"--stage sasrec first"):
        assess(run, parts=parts)
