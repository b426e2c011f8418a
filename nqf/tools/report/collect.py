"""What the report shows of a run, read from its folder."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import yaml
from sklearn.decomposition import PCA

from nqf.config import to_tree
from nqf.evaluation.results import read_results
from nqf.stages.artifacts import differences
from nqf.stages.graph import NAMES
from nqf.stages.records import read_artifact
from nqf.stages.run import Run
from nqf.tools.report.page import Map, Report, render
from nqf.tools.report.users import sample_users

_POINTS = 3_000


def make_page(run: Run, *, users: int = 6) -> str:
    """The page about a run; its results are those of the test split.

    Args:
      run: The run.
      users: Number of sample users.

    Raises:
      FileNotFoundError: The run was never evaluated, or on validation cases alone.
    """
    results = read_results(run.folder)
    if results.split != "test":
        raise FileNotFoundError(
            f"{run.folder / 'eval'}: results of the {results.split} split, and the report shows those of the test "
            f"split; run python -m nqf.evaluate {run.folder} first"
        )
    config, dataset = run.config, run.dataset
    artifacts = {stage: read_artifact(run.folder, stage) for stage in NAMES}
    stages = {stage: artifact.result for stage, artifact in artifacts.items() if artifact is not None}
    log = run.folder / "metrics.jsonl"
    item = stages.get("item", {})
    samples, vectors = sample_users(run, results, users)
    backbone = config.joint.backbone.path or "a small Qwen3 trained from scratch"
    return render(
        Report(
            name=config.name,
            summary=f"A nested Q-Former recommender: {results.items:,} items, {len(dataset.interactions.user_ids):,} "
            f"users, {len(dataset.interactions.items):,} interactions ({config.data.format}, split "
            f"{config.data.split}). Language model: {backbone}. Seed {config.seed}.",
            results=results,
            metrics=[json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else [],
            stages=stages,
            reconstruction=item.get("reconstruction", {}),
            validated_on=item.get("validated_on", ""),
            map=_map(run, vectors),
            users=samples,
            users_chosen="Drawn at random (seed 0): first some whose target is among the first ten, then some whose is "
            "not, then one whose target no training has seen, where there are such users. The item that was really "
            "chosen next has a green frame.",
            changed=[
                line for line in differences(to_tree(type(config)()), to_tree(config)) if not line.startswith("data.")
            ],
            settings=yaml.safe_dump(to_tree(config), sort_keys=False),
            data={key: value for key, value in dataset.report.items() if isinstance(value, (int, float, str))},
            warnings=dataset.split.warnings,
        )
    )


def _map(run: Run, vectors: dict[str, np.ndarray]) -> Map | None:
    """Items on the principal components of their vectors; a sample of large catalogues."""
    path = run.folder / "tokens" / "vectors.npy"
    if path.is_file():
        vectors = {"Item Q-Former": np.load(path, mmap_mode="r"), **vectors}
    if not vectors:
        return None
    dataset = run.dataset
    items = len(dataset.catalogue)
    rows = np.sort(np.random.default_rng(0).permutation(items)[:_POINTS])
    layouts, explained = {}, {}
    for name, table in vectors.items():
        chosen = np.asarray(table[rows], np.float32)
        chosen /= np.maximum(np.linalg.norm(chosen, axis=1, keepdims=True), 1e-12)
        pca = PCA(2, random_state=0)
        layouts[name] = pca.fit_transform(chosen)
        explained[name] = float(pca.explained_variance_ratio_.sum())
    fields = [field.name for field in dataset.catalogue.schema.fields if field.modality == "category"]
    # The first value, which is the most general one where categories are nested.
    first = [pl.col(name).list.first().fill_null("") for name in fields]
    table = pl.scan_parquet(dataset.catalogue.path, glob=False).select("item_id", "title", *first).collect()[rows]
    # The fields with the fewest categories color best.
    fields = sorted((name for name in fields if table[name].n_unique() > 1), key=lambda name: table[name].n_unique())
    counts = np.bincount(dataset.interactions.items[dataset.split.train], minlength=items)
    return Map(
        layouts=layouts,
        explained=explained,
        titles=[title or item_id for title, item_id in zip(table["title"], table["item_id"], strict=True)],
        popularity=counts[rows],
        categories={name: table[name].to_list() for name in fields[:3]},
        items=items,
    )
