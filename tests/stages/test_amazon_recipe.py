"""configs/amazon-2023-qwen3.yaml: from files as `nqf data fetch` lays them to recommendations, and its variants."""

import gzip
import json
import random
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import unirec_files  # noqa: E402
from published import TOKENIZER, clip_folder, model_options, qwen3_folder  # noqa: E402

from nqf import train  # noqa: E402
from nqf.serving.recommender import Recommender  # noqa: E402
from nqf.stages.run import open_run  # noqa: E402

CONFIG = Path(__file__).parents[2] / "configs" / "amazon-2023-qwen3.yaml"
SMALL = """
    --item.qformer.width 16 --item.qformer.layers 1 --item.qformer.heads 2 --item.qformer.mlp-width 32
    --item.optim.epochs 2 --item.optim.batch-size 64 --candidates.width 16
    --user.qformer.width 16 --user.qformer.layers 1 --user.qformer.heads 2 --user.qformer.mlp-width 32
    --user.optim.epochs 2 --user.optim.batch-size 16 --joint.backbone.lora-rank 4 --joint.micro-batch 4
    --joint.optim.epochs 2 --joint.optim.batch-size 8 --evaluation.bootstrap 20 --evaluation.batch-size 16
""".split()


def variants() -> dict[str, list[str]]:
    """The options that the head of the file gives for other machines and sizes."""
    lines = re.findall(r"^#   (.+?): +(--.+)$", CONFIG.read_text(), re.M)
    return {name: shlex.split(options) for name, options in lines}


@pytest.mark.parametrize("name", variants())
def test_variants_are_configurations(name: str) -> None:
    options = train.parse(["--config", str(CONFIG), *variants()[name]])
    joint, mesh = options.joint, options.training.mesh
    # A part of a batch is split over the devices as the batch is.
    assert joint.micro_batch % max(mesh.data, 1) == 0 and joint.micro_batch % mesh.fsdp == 0
    assert joint.optim.batch_size % joint.micro_batch == 0
    assert ("4B" in name) == joint.backbone.path.endswith("4B") and ("8B" in name) == joint.backbone.path.endswith("8B")


@pytest.mark.slow
@pytest.mark.ci
def test_from_files_to_recommendations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata, reviews = unirec_files.raw_tables(tmp_path, 120, 30, random.Random(0))
    downloads = tmp_path / "data" / "amazon-2023-All_Beauty" / "downloads"
    downloads.mkdir(parents=True)
    for name, rows in (("meta_All_Beauty", metadata), ("All_Beauty", reviews)):
        with gzip.open(downloads / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(f"{json.dumps(row)}\n" for row in rows)
    base, clip = qwen3_folder(tmp_path / "base", bool(TOKENIZER)), clip_folder(tmp_path / "clip")
    monkeypatch.chdir(tmp_path)
    train.main(["--config", "amazon-2023-qwen3", "--run", "run", *model_options(base, clip), *SMALL])
    run = open_run(tmp_path / "run")
    assert run.cache.modalities["main_image"] == "image" and run.cache.reviews is not None
    assert len(run.dataset.split.test.users) and (run.folder / "eval" / "results.json").is_file()
    recommender = Recommender.load(run.folder)
    history = [metadata[0]["parent_asin"], metadata[7]["parent_asin"]]
    bare = recommender.recommend(history=history, k=110)
    told = recommender.recommend(history=history, k=110, ratings=[1.0, 5.0], reviews=["Not for me", "Good"])
    both = bare.join(told, on="item_id", suffix="_told")
    assert np.abs(both["score"] - both["score_told"]).max() > 1e-4
