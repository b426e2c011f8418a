"""Studies: the shipped ones can be read, and one command trains variants with everything that is off by default."""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from nqf import export
from nqf.ablate import load_study
from nqf.config import ConfigError, load_config
from nqf.files import PARTIAL
from nqf.serving.recommender import Recommender
from nqf.stages.assess import assess
from nqf.stages.graph import take_over
from nqf.stages.records import StageError, read_artifact
from nqf.stages.run import open_run
from nqf.tools.ablate import folder_names
from nqf.tools.study import write_studies

ROOT = Path(__file__).parents[1]
EVERYTHING = {
    # Two more variants have it.
    "baselines.sasrec": False,
    "item.optim.epochs": 0,
    "user.ranking_weight": 0.0,
    "candidates.learn_temperature": False,
    "joint.candidates": "qwen3",
    "joint.micro_batch": 12,
    "joint.mining.count": 3,
    "joint.loss.negatives": "sampled",
    "joint.loss.samples": 64,
    "joint.loss.duplicate_cosine": 0.9,
}
REFIT = {"data.refit": True, "joint.train_item_qformer": True, "joint.loss.negatives": "in-batch"}


@pytest.mark.parametrize("study", sorted((ROOT / "configs" / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_studies_can_be_read(study: Path, tmp_path: Path) -> None:
    variants = load_study(study, tmp_path, (0, 1), ())
    assert len({variant.folder for variant in variants}) == len(variants)
    # A variant changes something, and no two are the same.
    configs = {repr(variant.config) for variant in variants}
    assert len(configs) == len(variants)


def test_a_variant_that_cannot_be_is_named(tmp_path: Path) -> None:
    study = tmp_path / "study.yaml"
    study.write_text(yaml.safe_dump({"config": str(ROOT / "tests/tiny.yaml"), "variants": {"bad": {"joint.epoch": 1}}}))
    with pytest.raises(ConfigError, match="variant 'bad': joint: unknown key 'epoch'"):
        load_study(study, tmp_path, (0,), ())
    with pytest.raises(ConfigError, match="no variant other; there are bad"):
        load_study(study, tmp_path, (0,), ("other",))


@pytest.mark.parametrize("changes", [3, [1], {"seed": 1, "seed.x": 2}, {3: 1}])
def test_changes_that_are_none_are_named(changes: object, tmp_path: Path) -> None:
    study = tmp_path / "study.yaml"
    study.write_text(yaml.safe_dump({"config": str(ROOT / "tests/tiny.yaml"), "variants": {"bad": changes}}))
    with pytest.raises(ConfigError, match="variant 'bad': expected dotted keys and values"):
        load_study(study, tmp_path, (0,), ())


@pytest.mark.parametrize("variants", [3, [], {}, {"1": {}, 1: {}}])
def test_a_study_without_variants_is_refused(variants: object, tmp_path: Path) -> None:
    study = tmp_path / "study.yaml"
    study.write_text(yaml.safe_dump({"config": str(ROOT / "tests/tiny.yaml"), "variants": variants}))
    with pytest.raises(ConfigError, match=r"a study has the keys|two variants are called '1'"):
        load_study(study, tmp_path, (0,), ())


LIKELY = ["a b", "a-b", "A B", "..", ".", "", "/etc", "a/../b", "v1.5", "v1.6"]


@settings(deadline=None)
@given(st.lists(st.text(max_size=30) | st.sampled_from(LIKELY), unique=True))
def test_every_variant_has_a_folder_of_its_own(names: list[str]) -> None:
    """Inside the study's folder, whatever the names are, also where file systems ignore case."""
    folders = folder_names(names)
    assert set(folders) == set(names)
    assert len({folder.lower() for folder in folders.values()}) == len(names)
    for folder in folders.values():
        assert re.fullmatch(r"[A-Za-z0-9_+=@][A-Za-z0-9_.+=@-]*", folder) and len(folder) < 120
        assert Path("runs", folder).parent == Path("runs")


def test_names_of_folders_are_those_of_before() -> None:
    assert folder_names(["all", "no text", "v1.5"]) == {"all": "all", "no text": "no-text", "v1.5": "v1.5"}
    folders = folder_names(["a b", "a-b"])
    assert folders["a-b"] == "a-b" and folders["a b"].startswith("a-b-")


@pytest.fixture
def runs(tiny_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_run, tmp_path / "runs" / "tiny", ignore=shutil.ignore_patterns("checkpoints", "tensorboard"))
    return tmp_path / "runs"


STAGES = ("fields", "counts", "item", "tokens", "user", "joint", "score")


def stages_of(folder: Path) -> dict[str, str]:
    return {stage: (folder / stage / "stage.json").read_text() for stage in STAGES}


def files_in(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*")}


@pytest.mark.ci
def test_a_kill_while_a_stage_is_taken_over(runs: Path, record: Callable[..., None]) -> None:
    """Wherever it comes, the next study resumes, and no half stage is ever taken for a whole one."""
    code = (
        "import os, shutil, signal, sys; from pathlib import Path; from nqf.config import load_config\n"
        "from nqf import files; from nqf.stages.graph import take_over\n"
        "folder, left = Path(sys.argv[1]), int(sys.argv[2])\n"
        "def counted(work):\n"
        "    def call(*arguments, **options):\n"
        "        global left; left -= 1\n"
        "        if left < 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return work(*arguments, **options)\n"
        "    return call\n"
        "files.publish = counted(files.publish)\n"
        "shutil.copyfile = counted(shutil.copyfile)\n"
        "take_over(load_config(folder.parent / 'tiny' / 'config.yaml'), folder, [folder.parent / 'tiny'])"
    )
    made, tried = stages_of(runs / "tiny"), 0
    for calls in (0, 1, 3, 7, 8, 9, 12, 20, 30):
        folder = runs / f"cut-{calls}"
        command = [sys.executable, "-c", code, str(folder), str(calls)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == -signal.SIGKILL, done.stderr
        whole = [stage for stage in made if (folder / stage / "stage.json").is_file()]
        for stage in whole:
            assert files_in(folder / stage) == files_in(runs / "tiny" / stage)
        take_over(load_config(runs / "tiny" / "config.yaml"), folder, [runs / "tiny"])
        assert stages_of(folder) == made
        assert not [path for path in folder.iterdir() if path.name.endswith(PARTIAL)]
        tried += 1
    record("SIGKILL while a study takes a stage over", tried=tried, survived=tried, seen="the next study takes it over")


def test_a_folder_that_is_no_run_is_left_alone(runs: Path) -> None:
    mine = runs / "mine"
    (mine / "data").mkdir(parents=True)
    (mine / "data" / "items.csv").write_text("mine")
    with pytest.raises(StageError, match="not a run folder and not empty"):
        take_over(load_config(runs / "tiny" / "config.yaml"), mine, [runs / "tiny"])
    assert (mine / "data" / "items.csv").read_text() == "mine"
    assert sorted(path.name for path in mine.iterdir()) == ["data"]


def test_hostile_names_are_text_in_the_page_of_studies(tmp_path: Path) -> None:
    row = json.loads((ROOT / "docs/results/parts.json").read_text())["rows"][0]
    evil = "x | y\n# z <script>alert(1)</script> [a](javascript:b)"
    row |= {"variant": evil, "changes": {"name": "`" + evil}}
    tree = {"study": "s", "command": "c", "rows": [row]}
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "s.json").write_text(json.dumps(tree))
    write_studies(tmp_path / "docs", tmp_path / "docs.md")
    rendered = MarkdownIt("commonmark").enable("table").render((tmp_path / "docs.md").read_text())
    assert "<script" not in rendered and "<a " not in rendered and rendered.count("<h1>") == 1
    assert rendered.count("<td><strong>x | y # z") == 1


@pytest.mark.slow
@pytest.mark.ci
def test_one_command_trains_and_tabulates(tiny_run: Path, tmp_path: Path) -> None:
    study, runs = tmp_path / "study.yaml", tmp_path / "runs"
    variants = {"all": {}, "everything": EVERYTHING, "refit": REFIT}
    study.write_text(yaml.safe_dump({"config": str(ROOT / "tests/tiny.yaml"), "variants": variants}))
    # The first variant is there already.
    shutil.copytree(tiny_run, runs / "all-seed0")
    command = [sys.executable, "-m", "nqf.ablate", str(study), "--runs", str(runs), "--results", str(tmp_path / "docs")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    logs = "".join(path.read_text() for path in runs.glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    # Taken over, not made again.
    made, taken = (runs / f"{name}-seed0" / "fields" / "stage.json" for name in ("all", "everything"))
    assert made.read_text() == taken.read_text()
    rows = json.loads((tmp_path / "docs" / "study.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == ["all", "everything", "refit"]
    assert {"sasrec", "cooccurrence_text"} <= set(rows[0]["against"]["joint"])
    page = (tmp_path / "docs.md").read_text()
    results = {name: read_artifact(runs / f"{name}-seed0", "joint").result for name in ("all", "refit")}
    assert "ndcg@10" in results["all"]
    assert "ndcg@10" not in results["refit"]
    assert results["refit"]["best_step"] == results["refit"]["steps"]
    with pytest.raises(StageError, match="trained on its validation cases"):
        assess(open_run(runs / "refit-seed0"), split="valid")
    assert "**everything**" in page and "`joint.candidates: qwen3`" in page

    folder = runs / "everything-seed0"
    assert (folder / "joint" / "negatives.npy").is_file()
    recommender = Recommender.load(folder)
    history = recommender.item_ids[:3]
    frame = recommender.recommend(history=history, k=4)
    before = recommender.item_vectors.copy()
    explanation = recommender.explain(history, frame["item_id"][0])
    assert explanation.rank == pytest.approx(1, abs=0.5)
    recommender.add_items([{"item_id": "new", "title": "A new lamp"}])
    assert recommender.item_vectors.shape == (len(before) + 1, before.shape[1])
    assert (recommender.item_vectors[:-1] == before).all()
    for format in ("index", "huggingface"):
        export.main([str(folder), "--format", format, "--output", str(tmp_path / format)])
