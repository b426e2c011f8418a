"""A run folder that version 0.1 made loads, recommends and evaluates as it did then. It is stored, 40 items small."""

import dataclasses
import json
import tarfile
from pathlib import Path

import pytest
from rich.console import Console

from nqf.serving.recommender import Recommender
from nqf.stages.artifacts import status
from nqf.stages.assess import assess
from nqf.stages.folder import owned
from nqf.stages.graph import STAGES, wanted
from nqf.stages.run import open_run
from nqf.stages.score import make_counts, make_score

# What version 0.1 recommended to user-00001, compiled as tests/conftest.py has it.
RECOMMENDED = {
    "item-00016": 0.728341,
    "item-00011": 0.672750,
    "item-00005": 0.638234,
    "item-00007": 0.498935,
    "item-00029": 0.478498,
    "item-00000": 0.452565,
    "item-00028": 0.394569,
    "item-00010": 0.390697,
    "item-00012": 0.374959,
    "item-00024": 0.371199,
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    with tarfile.open(Path(__file__).with_name("run_of_version_0_1.tar.gz")) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "old"


def test_it_is_fresh_and_recommends_what_it_did(run: Path) -> None:
    opened = open_run(run)
    # Without the two that choose the score, which are of version 0.3.
    stages = [stage for stage in STAGES if stage.name in wanted(opened.config) and stage.make is not make_counts]
    stages = [stage for stage in stages if stage.make is not make_score]
    assert [status(opened.config, stage, run) for stage in stages] == [""] * 5
    frame = Recommender.load(run).recommend(user="user-00001", k=10)
    assert frame["item_id"].to_list() == list(RECOMMENDED)
    assert frame["score"].to_list() == pytest.approx(list(RECOMMENDED.values()), abs=1e-5)


def test_it_evaluates_as_it_did(run: Path) -> None:
    stored = json.loads((run / "eval" / "results.json").read_text())["models"]
    found = assess(dataclasses.replace(open_run(run), console=Console(quiet=True)), split="test").models
    assert found.keys() == stored.keys()
    for model, segments in stored.items():
        for metric, value in segments["all"].items():
            assert found[model]["all"][metric] == pytest.approx(value, abs=1e-6), (model, metric)
    assert "eval" in owned(run)
