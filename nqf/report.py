"""`python -m nqf.report`: one HTML page about a run: results, curves, reconstruction, a map of the items, users."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from nqf.cli import guard, parse, program, terminal
from nqf.config import Few, section

if TYPE_CHECKING:
    import numpy as np

    from nqf.evaluation.results import Results
    from nqf.stages.run import Run
    from nqf.tools.report.page import Map, User

_POINTS = 3_000
_SHOWN = 8


@section
class ReportArguments:
    """Writes a self-contained HTML page about an evaluated run.

    Attributes:
      run: Run folder.
      output: HTML file; `RUN/report.html` by default.
      users: Number of users that are shown with their history, recommendations and target.
      debug: Show the traceback of an error.
    """

    run: Annotated[Path, tyro.conf.Positional]
    output: Path | None = None
    users: Few = 6
    debug: bool = False


def main(arguments: list[str]) -> None:
    """Runs the command."""
    options = parse(ReportArguments, arguments, prog=program("report"))
    import importlib.util
    import os

    if importlib.util.find_spec("matplotlib") is None:
        raise RuntimeError("the report needs Matplotlib: pip install 'nqf[viz]'")
    from nqf.stages.run import open_run

    console = terminal()
    page = make_page(open_run(options.run, console), users=options.users)
    output = options.output or options.run / "report.html"
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f"{output.name}.tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, output)
    console.print(f"wrote {output} ({len(page.encode()) / 2**20:.1f} MiB)")


def make_page(run: Run, *, users: int = 6) -> str:
    """The page about a run.

    Raises:
      FileNotFoundError: The run was never evaluated.
    """
    import json

    import yaml

    from nqf.config import to_tree
    from nqf.evaluation.results import read_results
    from nqf.stages.artifacts import differences
    from nqf.stages.graph import NAMES
    from nqf.stages.records import read_artifact
    from nqf.tools.report.page import Report, render

    results = read_results(run.folder)
    config, dataset = run.config, run.dataset
    artifacts = {stage: read_artifact(run.folder, stage) for stage in NAMES}
    stages = {stage: artifact.result for stage, artifact in artifacts.items() if artifact is not None}
    log = run.folder / "metrics.jsonl"
    item = stages.get("item", {})
    samples, vectors = _users(run, results, users)
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


def _users(run: Run, results: Results, count: int) -> tuple[list[User], dict[str, np.ndarray]]:
    """Sample users of the best trained model, and its item vectors by a name."""
    import numpy as np

    from nqf.evaluation.cooccurrence import newest_of_cases
    from nqf.evaluation.ranking import raise_some, top_k
    from nqf.evaluation.results import model_ranks
    from nqf.stages.artifacts import status
    from nqf.stages.graph import stage_of
    from nqf.stages.joint import load_joint
    from nqf.stages.user import load_users
    from nqf.tools.report.cards import item_cards
    from nqf.tools.report.page import User

    ranks = model_ranks(results.frame)
    model = next((name for name in ("joint", "user") if name in ranks), None)
    if model is None or count < 1:
        return [], {}
    reason = status(run.config, stage_of(model), run.folder)
    if reason:
        run.console.print(f"[yellow]warning[/yellow]  no sample users: stage '{model}' has changed since: {reason}")
        return [], {}
    trained = load_joint(run) if model == "joint" else load_users(run)
    ranker, variables = trained.ranker, trained.variables
    item_vectors = ranker.item_vectors(variables)

    rng = np.random.default_rng(0)
    found, cold = ranks[model] <= 10, results.frame["cold"].to_numpy()
    kinds = (found & ~cold, ~found & ~cold, cold)
    wanted = (count - count // 3 - count // 6, count // 3, count // 6)
    which = np.concatenate([
        rng.permutation(np.flatnonzero(kind))[:number] for kind, number in zip(kinds, wanted, strict=True)
    ])  # fmt: skip
    interactions, catalogue = run.dataset.interactions, run.dataset.catalogue
    cases = run.dataset.split.test if results.split == "test" else run.dataset.split.valid
    vectors = ranker.encode_cases(variables, interactions, run.features, cases, which)
    pasts = [interactions.items[interactions.offsets[cases.users[case]] : cases.cuts[case]] for case in which]
    left_out = pasts if results.mask_seen else [[]] * len(pasts)
    best = top_k(vectors, item_vectors, _SHOWN, left_out)
    weight = run.config.evaluation.cooccurrence_weight
    if model == "joint" and weight:
        pairs = weight * run.cooccurrence(cases).scores(newest_of_cases(interactions, cases, which))
        best = raise_some(best, vectors, item_vectors, pairs, left_out)
    rows = best[1]
    users = []
    for case, past, recommended in zip(which.tolist(), pasts, rows, strict=True):
        target = int(interactions.items[cases.cuts[case]])
        ids = [catalogue.item_ids[row] for row in [*past[1 - _SHOWN :], *recommended, target]]
        cards = item_cards(catalogue, ids)
        history, first, next_one = cards[: -_SHOWN - 1], cards[-_SHOWN - 1 : -1], cards[-1]
        rank = f"{ranks[model][case]:,.1f}".removesuffix(".0")
        kind = " unseen in training" if cold[case] else ""
        users.append(
            User(
                heading=f"User {interactions.user_ids[cases.users[case]]} · {len(past):,} items so far · "
                f"next item{kind} at rank {rank} of {results.items:,} ({model})",
                history=history,
                recommended=[
                    dataclasses.replace(card, note=f"rank {place}", marked=int(row) == target)
                    for place, (row, card) in enumerate(zip(recommended, first, strict=True), 1)
                ],
                target=dataclasses.replace(next_one, marked=True, note=f"rank {rank}"),
            )
        )
    return users, {f"{model}, item side of the score": item_vectors}


def _map(run: Run, vectors: dict[str, Any]) -> Map | None:
    """Items on the principal components of their vectors; a sample of large catalogues."""
    import numpy as np
    import polars as pl
    from sklearn.decomposition import PCA

    from nqf.tools.report.page import Map

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
    table = pl.scan_parquet(dataset.catalogue.path).select("item_id", "title", *first).collect()[rows]
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


if __name__ == "__main__":
    guard(main, sys.argv[1:])
