"""What times, ratings and reviews are worth: each hidden in turn from the validation cases, nothing trained again.

    python benchmarks/inputs.py [--planted FOLDER] RUN ...

`--planted` first makes a catalogue in which what comes next follows from the rating, the review or the time of the last
interaction (a third of the interactions each, and from nothing else), and trains it in three ways in that folder: user
tokens in the prompt alone, the interactions on the prompt's item tokens alone, and neither, which must not move at all.
Writes docs/inputs.md with the rows of this call alone, and fails where a planted effect does not show.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
from common import machine, table_options

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
PAGE = ROOT / "docs" / "inputs.md"
HEAD = """\
# What times, ratings and reviews are worth

Written by `python benchmarks/inputs.py`, which says how; do not edit. NDCG@10 of the validation cases with everything
that is known of their histories, and the difference when times, ratings or reviews are hidden from these histories,
with 95 % intervals over users; nothing is trained again, so it is what the trained model makes of them.

"""
PLANTED = """\
In the *planted* catalogue what comes next follows from the rating, the review or the time of the last interaction, a
third each, and from nothing else: *user tokens* reads them in the User Q-Former alone, *item tokens* on the prompt's
item tokens alone (`joint.prompt.interactions`), and *neither* in neither, where nothing may move. The user stage is the
same for all three.

"""
TOPICS, PER_TOPIC, USERS, EVENTS = 8, 12, 1_000, 10
WORDS = ("lamps", "ropes", "tents", "boots", "knives", "maps", "stoves", "bottles")
MINUTE, DAY = 60, 86_400
CONFIG = """
    --data.min-interactions 3 --fields.text-width 16 --fields.category-width 16 --item.qformer.width 16
    --item.qformer.layers 1 --item.qformer.heads 2 --item.qformer.mlp-width 32 --item.optim.epochs 2
    --candidates.width 32 --user.qformer.width 32 --user.qformer.heads 2 --user.qformer.mlp-width 64
    --user.optim.epochs 12 --user.optim.learning-rate 0.004 --user.optim.batch-size 64 --user.optim.validate-every 4
    --joint.prompt.history-items 8 --joint.backbone.width 32 --joint.backbone.heads 2 --joint.backbone.kv-heads 1
    --joint.backbone.mlp-width 64 --joint.backbone.vocabulary 300 --joint.optim.epochs 8 --joint.optim.learning-rate
    0.004 --joint.optim.batch-size 64 --joint.optim.validate-every 4
""".split()
WAYS = {
    "planted, user tokens": [],
    "planted, item tokens": ["--joint.prompt.no-user-tokens", "--joint.prompt.interactions"],
    "planted, neither": ["--joint.prompt.no-user-tokens"],
}


def plant(folder: Path, seed: int = 0) -> None:
    """Writes the tables and a schema."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    items = ["item_id,title,topic"]
    items += [f"i{t}-{n},{WORDS[t]} number {n},{WORDS[t]}" for t in range(TOPICS) for n in range(PER_TOPIC)]
    (folder / "items.csv").write_text("\n".join(items))
    (folder / "schema.yaml").write_text("title: title\nfields: {title: text, topic: category}\n")
    events = ["user_id,item_id,timestamp,rating,review"]
    for user in range(USERS):
        topic, time = rng.randrange(TOPICS), 1_600_000_000 + rng.randrange(365 * DAY)
        for _ in range(EVENTS):
            kind, rating, review, gap = rng.randrange(3), 3, "", DAY
            item, now = f"i{topic}-{rng.randrange(PER_TOPIC)}", topic
            if kind == 0:
                rating = rng.choice((1, 5))
                topic = (now + (rating == 1)) % TOPICS
            elif kind == 1:
                topic = rng.randrange(TOPICS)
                review = f"next I need some {WORDS[topic]}"
            else:
                gap = rng.choice((MINUTE, 60 * DAY))
                topic = (now + (2 if gap == MINUTE else 3)) % TOPICS
            time += gap
            events.append(f"u{user},{item},{time},{rating},{review}")
    (folder / "interactions.csv").write_text("\n".join(events))


def train_planted(folder: Path) -> list[Path]:
    """Trains the three ways; the stages before the joint one are shared."""
    import shutil

    from nqf import train

    plant(folder)
    (folder / "planted.yaml").write_text("name: planted\n")
    first, runs = None, []
    for way, options in WAYS.items():
        run = folder / way.replace(", ", "-").replace(" ", "-")
        if first is not None and not run.exists():
            shutil.copytree(first, run, ignore=lambda path, names: ["joint", "eval"])
        train.main(
            [
                "--config",
                str(folder / "planted.yaml"),
                "--run",
                str(run),
                *table_options(folder),
                *CONFIG,
                *options,
            ]
        )
        first = first or run
        runs.append(run)
    return runs


def hidden(features: Any, name: str) -> Any:
    """Features of which one is unknown everywhere."""
    from nqf.data.interactions import MISSING_TIME

    if name == "times":
        return dataclasses.replace(features, times=np.full(len(features.times), MISSING_TIME))
    if name == "ratings":
        return dataclasses.replace(features, ratings=np.full_like(features.ratings, np.nan))
    reviews = dataclasses.replace(features.reviews, rows=np.full_like(features.reviews.rows, -1))
    return dataclasses.replace(features, reviews=reviews)


def worth(folder: Path, name: str, stages: tuple[str, ...]) -> list[dict[str, Any]]:
    """NDCG@10 on the validation cases with everything, and what is lost without each input, with 95 % intervals."""
    from nqf.data.interactions import MISSING_TIME
    from nqf.data.splits import pasts, rankable
    from nqf.evaluation.metrics import mean_intervals, per_user
    from nqf.evaluation.ranking import rank_vectors
    from nqf.stages.joint import load_joint
    from nqf.stages.run import open_run
    from nqf.stages.user import load_users

    run = open_run(folder)
    interactions, cases, features = run.dataset.interactions, run.dataset.split.valid, run.features
    evaluation = run.config.evaluation
    kept = rankable(interactions, cases, repeats=evaluation.repeats)[:5_000]
    cases = cases[kept]
    which, targets = np.arange(len(kept)), interactions.items[cases.cuts]
    seen = None if evaluation.repeats else pasts(interactions, cases)
    there = {
        "times": bool((interactions.times != MISSING_TIME).any()),
        "ratings": len(np.unique(features.rated)) > 1,
        "reviews": features.reviews is not None,
    }
    rows = []
    for stage, load in (("user", load_users), ("joint", load_joint)):
        if stage not in stages or not (folder / stage / "stage.json").is_file():
            continue
        trained = load(run)
        items = trained.ranker.item_vectors(trained.variables)

        def scores(features: Any, trained: Any = trained, items: np.ndarray = items) -> np.ndarray:
            users = trained.ranker.encode_cases(trained.variables, interactions, features, cases, which)
            return per_user(rank_vectors(users, items, targets, seen), (10,))["ndcg@10"]

        whole = scores(features)
        lost = {"all": whole} | {part: whole - scores(hidden(features, part)) for part, has in there.items() if has}
        figures = mean_intervals(lost, bootstrap=1_000, seed=0)
        rows.append({"run": name or run.config.name, "stage": stage, "cases": len(kept)} | figures)
        print(rows[-1], flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = ["| run | stage | cases | NDCG@10 | without times | without ratings | without reviews |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|")

    def lost(row: dict[str, Any], part: str) -> str:
        if part not in row:
            return "not in the data"
        value, low, high = (0.0 - figure for figure in row[part])
        # Of a loss, so the ends change places.
        return f"{value:+.4f} [{high:+.4f}, {low:+.4f}]"

    for row in rows:
        parts = " | ".join(lost(row, part) for part in ("times", "ratings", "reviews"))
        lines.append(f"| {row['run']} | {row['stage']} | {row['cases']:,} | {row['all'][0]:.4f} | {parts} |")
    return "\n".join(lines) + "\n"


def check_planted(rows: list[dict[str, Any]]) -> None:
    """What is planted has to show where it is read, and nothing may move where it is not."""
    for row in rows:
        parts = [row[part] for part in ("times", "ratings", "reviews") if row["run"] in WAYS]
        if row["run"] == "planted, neither":
            assert all(figure == 0 for part in parts for figure in part), f"moves: {row}"
        else:
            assert all(low > 0 for _, low, _ in parts), f"does not move: {row}"


def main() -> None:
    """Hides, measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--planted", type=Path)
    options = parser.parse_args()
    named = [(run, "", ("user", "joint")) for run in options.runs]
    if options.planted:
        runs = train_planted(options.planted)
        stages = [("user", "joint"), ("joint",), ("joint",)]
        named = [*zip(runs, WAYS, stages, strict=True), *named]
    rows = [row for run, name, stages in named for row in worth(run, name, stages)]
    command = " ".join([*(["--planted FOLDER"] if options.planted else []), *(["RUN"] * len(options.runs))])
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    made = f"`python benchmarks/inputs.py {command}`: seed 0 of the planted catalogue and of the intervals, each run's "
    made += f"own of its training; {machine('cpu')}, {date}."
    PAGE.write_text(f"{HEAD}{PLANTED if options.planted else ''}{table(rows)}\n{made}\n", encoding="utf-8")
    check_planted(rows)


if __name__ == "__main__":
    main()
