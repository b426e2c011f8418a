"""What an index of dense vectors alone loses, and how many values of an item it takes.

    python benchmarks/dense_vectors.py RUN [RUN ...]

For each trained and evaluated run, the validation NDCG@10 of what was learned, of dense vectors with factors of several
ranks (`nqf.evaluation.factors`), each with weights of its own, and of the whole score; then the test figures of the
shipped rank as the run's evaluation has them, with paired differences. Nothing is trained. Writes docs/dense-vectors.md
with the runs of this call and those that other calls have kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import sys
import time
from pathlib import Path
from typing import Any

from common import machine

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
PAGE, RESULTS = ROOT / "docs" / "dense-vectors.md", ROOT / "benchmarks" / "results" / "dense_vectors.json"
RANKS = (64, 128, 256, 512)
RIVALS = ("joint", "cooccurrence_text", "sasrec", "sasrec_cooccurrence")
HEAD = """\
# What an index of dense vectors loses

Written by `python benchmarks/dense_vectors.py`; do not edit. The whole score adds sparse counts to an inner product;
an index of dense vectors has the truncated singular value decomposition of these counts in their place, so many more
values of each item ("rank"). *learned* is what training made, without either.

## On validation cases, by rank

NDCG@10 on at most 4,000 cases. Weights are chosen on the same cases, for each rank by itself.

"""
TEST = """
## On the test split, at rank {rank}

With what was chosen on validation. Brackets are 95 % bootstrap intervals over users, in the last column those of paired
differences in NDCG@10.

| data | score | HR@10 | NDCG@10 | against |
|---|---|---:|---:|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    runs = parser.parse_args().runs
    everything = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for folder in runs:
        found = measured(folder)
        everything[found["name"]] = found
        RESULTS.write_text(json.dumps(everything, indent=1) + "\n")
        PAGE.write_text(page(everything), encoding="utf-8")


def measured(folder: Path) -> dict[str, Any]:
    """Figures of one run, and where they come from."""
    from nqf.config import CountingConfig
    from nqf.evaluation.choice import Score
    from nqf.evaluation.factors import factorize
    from nqf.evaluation.metrics import paired_difference
    from nqf.evaluation.results import model_ranks, read_results
    from nqf.stages.run import open_run
    from nqf.stages.score import make_score, memory_of, score_of

    run = open_run(folder)
    # How pairs count does not depend on the rank.
    counting = {name: value for name, value in vars(score_of(run).counting).items() if name != "stand_ins"}
    evaluation = dataclasses.replace(run.config.evaluation, counting=CountingConfig(**counting))
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, evaluation=evaluation))
    rows: dict[str, Any] = {}
    for rank in RANKS:
        record = make_score(run, rank)
        begun = time.process_time()
        factorize(memory_of(run, run.dataset.split.test, Score.of(record["dense"]).counting), rank)
        seconds = time.process_time() - begun
        rows[str(rank)] = {"ndcg": record["dense"]["ndcg"], "cpu_seconds": seconds}
        rows |= {"learned": {"ndcg": record["alone"]}, "whole": {"ndcg": record["ndcg"]}}
    results = read_results(folder)
    ranks = model_ranks(results.frame)
    test = {
        name: {metric: results.models[name]["all"][metric] for metric in ("hr@10", "ndcg@10")}
        for name in ("joint", "joint_vectors", "joint_learned", *RIVALS)
        if name in results.models
    }
    against = {
        name: paired_difference(ranks["joint_vectors"], ranks[name], (10,))["ndcg@10"]
        for name in (*RIVALS, "joint_learned")
        if name in ranks
    }
    return {
        "name": run.config.name,
        "encoder": "/".join(Path(run.config.fields.text_encoder).parts[-2:]),
        "items": results.items,
        "users": results.users,
        "valid": rows,
        "test": test,
        "against": against,
        "seed": run.config.seed,
        "machine": machine("cpu"),
        "date": datetime.date.today().isoformat(),
    }


def page(everything: dict[str, Any]) -> str:
    from nqf.evaluation.factors import RANK
    from nqf.evaluation.results import format_interval

    columns = ("learned", *map(str, RANKS), "whole")
    heads = ("learned", *(f"rank {rank}" for rank in RANKS), "whole")
    lines = ["| data | items | " + " | ".join(heads) + " | CPU seconds of each rank |", "|---|" + "---:|" * 8]
    for found in everything.values():
        cells = [f"{found['valid'][name]['ndcg']:.4f}" for name in columns]
        seconds = " / ".join(f"{found['valid'][str(rank)]['cpu_seconds']:.0f}" for rank in RANKS)
        lines.append(f"| {found['name']} | {found['items']:,} | {' | '.join(cells)} | {seconds} |")
    lines.append(TEST.format(rank=RANK).rstrip("\n"))
    for found in everything.values():
        for name, row in found["test"].items():
            against = ""
            if name == "joint_vectors":
                parts = found["against"].items()
                against = ", ".join(f"{format_interval(value, signed=True)} {rival}" for rival, value in parts)
            figures = " | ".join(format_interval(row[metric]) for metric in ("hr@10", "ndcg@10"))
            lines.append(f"| {found['name']} | {name} | {figures} | {against} |")
    lines += [
        "",
        *(
            f"{found['name']}: {found['users']:,} users, texts by {found['encoder']}, seed {found['seed']}, machine "
            f"{found['machine']}, date {found['date']}.\n"
            for found in everything.values()
        ),
    ]
    return HEAD + "\n".join(lines).rstrip("\n") + "\n"


if __name__ == "__main__":
    main()
