"""Puts what a run gave into the head of its configuration: `python docs/config_head.py configs/ml-100k.yaml RUN`.

Refuses a run whose configuration is not the file's, data paths aside.
"""

import dataclasses
import json
import sys
import textwrap
from pathlib import Path

from nqf.config import DataConfig, load_config
from nqf.stages.graph import NAMES
from nqf.stages.records import read_artifact


def main(config: str, run: str) -> None:
    """Replaces the comment lines before the first key."""
    path, folder = Path(config), Path(run)
    mine, used = (dataclasses.replace(load_config(file), data=DataConfig()) for file in (path, folder / "config.yaml"))
    if mine != used:
        raise SystemExit(f"{folder} was not trained with {path}: {mine}\n{used}")
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    first = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    head = "".join(f"# {line}\n" for line in head_lines(path, folder))
    path.write_text(head + "".join(lines[first:]), encoding="utf-8")


def head_lines(path: Path, run: Path) -> list[str]:
    """Command, time per stage, test results and reconstruction of a run."""
    results = json.loads((run / "eval" / "results.json").read_text(encoding="utf-8"))
    stages = {stage: read_artifact(run, stage).result for stage in NAMES if read_artifact(run, stage)}
    minutes = ", ".join(f"{stage} {result['wall_seconds'] / 60:.1f}" for stage, result in stages.items())
    total = sum(result["wall_seconds"] for result in stages.values()) / 60
    made = results["provenance"]
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    scores = "; ".join(
        f"{name} {entry['all']['hr@10'][0]:.4f} / {entry['all']['ndcg@10'][0]:.4f}"
        for name, entry in results["models"].items()
    )
    errors = ", ".join(
        f"{name} {entry['mse'] / entry['mean_mse']:.2f}" for name, entry in stages["item"]["reconstruction"].items()
    )
    masked = "seen items not masked" if results["repeats"] else "seen items masked"
    paragraphs = [
        f"Command: python -m nqf.train --config configs/{path.name} --stage all",
        f"Time: {total:.0f} minutes ({minutes}) on {made['machine']}; {made['date'][:10]}, seed "
        f"{made['seed']}, {versions}.",
        f"Test split, {results['users']:,} users, {results['items']:,} items, {masked}, HR@10 / NDCG@10: {scores}.",
        f"Reconstruction error as a share of the mean vector's, {stages['item']['validated_on']}: {errors}.",
        "Written by docs/config_head.py. Sources: see data in this file.",
    ]
    return [line for paragraph in paragraphs for line in textwrap.wrap(paragraph, 116, subsequent_indent="  ")]


if __name__ == "__main__":
    main(*sys.argv[1:])
