"""Studies: the shipped ones can be read, and one command trains variants with everything that is off by default."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from nqf.ablate import load_study
from nqf.config import ConfigError
from nqf.serving.recommender import Recommender
from nqf.stages.assess import assess
from nqf.stages.records import StageError, read_artifact
from nqf.stages.run import open_run

ROOT = Path(__file__).parents[1]
EVERYTHING = {
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


def test_a_study_without_variants_is_refused(tmp_path: Path) -> None:
    study = tmp_path / "study.yaml"
    study.write_text(f"config: {ROOT / 'tests/tiny.yaml'}\nvariants: 3")
    with pytest.raises(ConfigError, match="a study has the keys"):
        load_study(study, tmp_path, (0,), ())


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
        command = [
            sys.executable,
            "-m",
            "nqf.export",
            str(folder),
            "--format",
            format,
            "--output",
            str(tmp_path / format),
        ]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stdout + done.stderr
