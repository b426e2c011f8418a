"""What user tokens are worth where a history is longer than the prompt.

    python benchmarks/long_histories.py [--planted FOLDER] [--config CONFIG --runs FOLDER] [-- OPTION ...]

Three ways to read a history of at most 100 items: the newest 20 of them in the prompt, the same with user tokens of all
100, and all 100 in the prompt without user tokens. Each trains for the same number of steps on the same number of
supervised positions a step; the stages before the joint one are shared, but for the User Q-Former, which is trained on
windows as long as the prompt. `--planted` makes a catalogue in which what is to be ranked follows from a taste that the
newest 20 items do not show, and trains small models in that folder; CONFIG is trained as it is, OPTIONs go to `nqf
train`. Writes docs/long-histories.md with the rows of this call and those that other calls have kept.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import machine, table_options

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
PAGE, RESULTS = ROOT / "docs" / "long-histories.md", ROOT / "benchmarks" / "results" / "long_histories.json"
HEAD = """\
# What user tokens are worth for long histories

Written by `python benchmarks/long_histories.py`; do not edit. A history of at most 100 items is read in three ways: its
newest 20 items in the prompt, the same with the User Q-Former's tokens of all 100, and all 100 in the prompt. Equal
steps, and equal supervised positions in each. NDCG@10 of the joint stage's vectors on the validation cases (of those
with more than 20 items in the second column), with 95 % intervals over users of the difference to the first way;
*encoding* is the CPU time of a user's vector.

In the *planted* catalogue the first ten items show a taste, then come items that say nothing, and after each 25th of
these one of the taste: the newest 20 items never show it, so a model that reads these alone can only guess among eight
tastes.

| data | way | prompt, tokens | NDCG@10 | of long histories | difference | encoding, ms |
|---|---|---:|---:|---:|---:|---:|
"""
LONG, SHORT = 100, 20
WAYS = {
    "20 items": (SHORT, False),
    "20 items, user tokens of 100": (SHORT, True),
    "100 items": (LONG, False),
}
TASTES, PER_TASTE, FILLERS, USERS, SHOWN, BLOCKS, BETWEEN = 8, 16, 96, 1_500, 10, 3, 24
PLANTED = """
    --data.min-interactions 3 --fields.text-width 16 --fields.category-width 16 --item.qformer.width 16
    --item.qformer.layers 1 --item.qformer.heads 2 --item.qformer.mlp-width 32 --item.optim.epochs 2
    --candidates.width 32 --user.qformer.width 32 --user.qformer.heads 2 --user.qformer.mlp-width 64
    --user.optim.epochs 2 --user.optim.learning-rate 0.004 --user.optim.batch-size 60
    --joint.backbone.width 32 --joint.backbone.heads 2 --joint.backbone.kv-heads 1 --joint.backbone.mlp-width 64
    --joint.backbone.vocabulary 300 --joint.optim.epochs 8 --joint.optim.learning-rate 0.004 --joint.optim.batch-size 60
""".split()


def plant(folder: Path, seed: int = 0) -> None:
    """Writes the tables and a schema. The last event is for the test split, which is not opened."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    kinds = {f"taste {taste}": PER_TASTE for taste in range(TASTES)} | {"filler": FILLERS, "sign": BLOCKS + 1}
    items = ["item_id,title,kind"]
    items += [f"{kind} {n},{kind} number {n},{kind}" for kind, count in kinds.items() for n in range(count)]
    (folder / "items.csv").write_text("\n".join(items))
    (folder / "schema.yaml").write_text("title: title\nfields: {title: text, kind: category}\n")
    events = ["user_id,item_id,timestamp"]
    for user in range(USERS):
        # Nobody has an item twice.
        order = {kind: rng.sample(range(count), count) for kind, count in kinds.items()}
        taste, at = f"taste {rng.randrange(TASTES)}", 1_600_000_000
        rows = [taste] * SHOWN + [*["filler"] * BETWEEN, "sign", taste] * BLOCKS + ["sign"]
        for kind in rows:
            at += 86_400
            events.append(f"u{user},{kind} {order[kind].pop()},{at}")
    (folder / "interactions.csv").write_text("\n".join(events))


def train(folder: Path, options: list[str], batch: int, user_batch: int) -> dict[str, Path]:
    """Trains the three ways of one data set; their runs."""
    runs: dict[str, Path] = {}
    for way, (prompt, tokens) in WAYS.items():
        run = folder / way.replace(", ", "-").replace(" ", "-")
        if runs and not run.exists():
            ignored = shutil.ignore_patterns("user", "joint", "score", "eval", "previous")
            shutil.copytree(next(iter(runs.values())), run, ignore=ignored)
        # As many supervised positions in a step, and so as many steps.
        share = prompt // SHORT
        setting = ["--user.max-history", f"{LONG}", "--joint.prompt.history-items", f"{prompt}"]
        setting += ["--joint.prompt.user-tokens" if tokens else "--joint.prompt.no-user-tokens"]
        setting += [
            "--joint.optim.batch-size",
            f"{batch // share}",
            "--user.optim.batch-size",
            f"{user_batch // share}",
        ]
        command = [sys.executable, "-m", "nqf", "train", "--run", str(run), *options, *setting]
        for stage in ("fields", "counts", "item", "tokens", "user", "joint"):
            if not (run / stage / "stage.json").is_file():
                subprocess.run([*command, "--stage", stage], check=True)
        runs[way] = run
    return runs


def measured(name: str, runs: dict[str, Path]) -> list[dict[str, Any]]:
    """NDCG@10 of each way on the validation cases, and the difference to the first."""
    from nqf.data.splits import pasts, rankable
    from nqf.evaluation.metrics import mean_intervals, per_user
    from nqf.evaluation.ranking import rank_vectors
    from nqf.stages.joint import load_joint
    from nqf.stages.run import open_run

    rows, first = [], None
    for way, folder in runs.items():
        run = open_run(folder)
        interactions, cases, repeats = run.dataset.interactions, run.dataset.split.valid, run.config.evaluation.repeats
        cases = cases[rankable(interactions, cases, repeats=repeats)]
        which, targets = np.arange(len(cases.users)), interactions.items[cases.cuts]
        trained = load_joint(run)
        items = trained.ranker.item_vectors(trained.variables)

        encode = functools.partial(
            trained.ranker.encode_cases, trained.variables, interactions, run.features, cases, which
        )
        users, begun = encode(), time.process_time()
        encode()
        spent = time.process_time() - begun
        seen = None if repeats else pasts(interactions, cases)
        values = per_user(rank_vectors(users, items, targets, seen), (10,))["ndcg@10"]
        first = values if first is None else first
        long = np.diff(interactions.offsets)[cases.users] - 2 > SHORT
        figures = mean_intervals({"difference": values - first}, bootstrap=1_000, seed=0)["difference"]
        prompt, tokens = WAYS[way]
        count = run.config.item.qformer.queries * prompt + tokens * run.config.user.qformer.queries + 1
        rows.append(
            {
                "data": name, "way": way, "tokens": count, "ndcg@10": float(values.mean()),
                "long": float(values[long].mean()), "long cases": int(long.sum()), "cases": len(values),
                "difference": list(figures), "encoding": 1e3 * spent / len(values),
            }
        )  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def page(everything: dict[str, Any]) -> str:
    """The page of all data sets."""
    from nqf.evaluation.results import format_interval

    lines, notes = [], []
    for name, found in everything.items():
        for row in found["rows"]:
            difference = "" if row["way"] == next(iter(WAYS)) else format_interval(row["difference"], signed=True)
            cells = (
                name, row["way"], row["tokens"], f"{row['ndcg@10']:.4f}", f"{row['long']:.4f}", difference,
                f"{row['encoding']:.2f}",
            )  # fmt: skip
            lines.append(f"| {' | '.join(map(str, cells))} |")
        row = found["rows"][0]
        notes.append(f"{name}: {row['cases']:,} cases, {row['long cases']:,} of them long; {found['provenance']}.\n")
    return HEAD + "\n".join([*lines, "", *notes])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--planted", type=Path)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--runs", type=Path)
    parser.add_argument("options", nargs="*")
    options = parser.parse_args()
    everything = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    jobs = []
    if options.planted:
        plant(options.planted)
        (options.planted / "planted.yaml").write_text("name: planted\n")
        setting = ["--config", str(options.planted / "planted.yaml"), *table_options(options.planted), *PLANTED]
        jobs.append(("planted", options.planted, setting, (60, 60), "--planted FOLDER"))
    if options.config:
        from nqf.config import load_config

        config = load_config(options.config)
        sizes = (config.joint.optim.batch_size, config.user.optim.batch_size)
        command = f"--config {options.config} --runs FOLDER"
        command += f" -- {' '.join(options.options)}" if options.options else ""
        jobs.append((config.name, options.runs, ["--config", str(options.config), *options.options], sizes, command))
    for name, folder, setting, sizes, command in jobs:
        rows = measured(name, train(folder, setting, *sizes))
        date, cores = datetime.datetime.now(datetime.UTC).date(), len(os.sched_getaffinity(0))
        made = (
            f"`python benchmarks/long_histories.py {command}`, seed 0, {machine('cpu')}, {cores} of its cores, {date}"
        )
        everything[name] = {"rows": rows, "provenance": made}
        RESULTS.write_text(json.dumps(everything, indent=1) + "\n")
        PAGE.write_text(page(everything), encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
