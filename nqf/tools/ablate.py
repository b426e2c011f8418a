"""Trains every variant of a study and writes its table; nothing in it is typed by hand.

A study is a YAML file: `config`, the configuration that it varies, and `variants`, a name for each set of dotted keys
that differ. Stages whose inputs and settings are those of another variant are taken over from it, not run again.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import tyro
from annotated_types import Len

from nqf.cli import configuration, parse, program, terminal
from nqf.config import (
    Config,
    ConfigError,
    Few,
    Seed,
    config_text,
    from_tree,
    load_config,
    read_yaml,
    section,
    shown,
)
from nqf.files import write_json, write_text

METRICS = ("hr@10", "ndcg@10")
RIVALS = ("sasrec", "sasrec_cooccurrence", "cooccurrence_text")
"""Baselines that a variant's models are compared with user by user."""


@section
class AblateArguments:
    """Trains and tests every variant of a study, then writes its results and docs/results.md.

    Attributes:
      study: YAML file with `config` and `variants`.
      runs: Folder of the run folders; `runs/<name of the study>` by default.
      seeds: Seeds of every variant.
      only: Names of the variants to run; all by default.
      parallel: Runs at a time. Seconds in the table are of runs that shared the machine if it is above 1.
      results: Folder of the collected results, one JSON file per study; results.md is written beside it.
      debug: Show the traceback of an error.
    """

    study: Annotated[Path, tyro.conf.Positional]
    runs: Path | None = None
    seeds: Annotated[tuple[Seed, ...], Len(1)] = (0,)
    only: tuple[str, ...] = ()
    parallel: Few = 1
    results: Path = Path("docs/results")
    debug: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """A configuration of a study under one seed.

    Attributes:
      name: Name of the variant.
      changes: Dotted keys and their values.
      seed: Seed.
      config: The configuration that follows.
      folder: Run folder.
    """

    name: str
    changes: dict[str, Any]
    seed: int
    config: Config
    folder: Path


def load_study(path: Path, runs: Path, seeds: tuple[int, ...], only: tuple[str, ...]) -> list[Variant]:
    """Reads a study.

    Raises:
      ConfigError: A missing file, key or variant, or a change that the configuration refuses.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such study")
    tree = read_yaml(path)
    given = tree.get("variants") if isinstance(tree, dict) and set(tree) == {"config", "variants"} else None
    if not isinstance(given, dict) or not given:
        raise ConfigError(f"{path}: a study has the keys 'config' and 'variants' with their values, and no others")
    changes_of = {str(name): changes or {} for name, changes in given.items()}
    names = list(changes_of)
    if len(names) < len(given):
        twice = next(name for name in names if sum(str(other) == name for other in given) > 1)
        raise ConfigError(f"{path}: two variants are called '{twice}'")
    if unknown := set(only) - set(names):
        raise ConfigError(f"{path}: no variant {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    base = load_config(path.parent / tree["config"])
    folders = folder_names(names)
    variants = []
    for name in only or names:
        changes, where = changes_of[name], f"{path}: variant '{name}'"
        for seed in seeds:
            plain: dict[str, Any] = {"seed": seed}
            try:
                for key, value in changes.items():
                    *parents, last = key.split(".")
                    functools.reduce(lambda node, part: node.setdefault(part, {}), parents, plain)[last] = value
            except (AttributeError, TypeError):
                raise ConfigError(f"expected dotted keys and values, found {shown(changes)}", where=where) from None
            config = from_tree(Config, plain, where=where, base=base)
            folder = runs / f"{folders[name]}-seed{seed}"
            variants.append(Variant(name=name, changes=changes, seed=seed, config=config, folder=folder))
    return variants


def folder_names(names: Sequence[str]) -> dict[str, str]:
    """Name of a variant to that of its folder: without separators, blanks and leading dots, and no two alike.

    A name that has to be altered, in more than its blanks or to one that another variant has, also on file systems
    that ignore case, ends in a digest of what it was.
    """
    plain = {name: re.sub(r"[^\w.+=@-]", "-", name, flags=re.ASCII)[:100].lstrip(".-") for name in names}
    folders: dict[str, str] = {}
    taken: set[str] = set()
    # Names that need no change come first: they keep theirs.
    for name in sorted(plain, key=lambda name: plain[name] != name):
        folder = plain[name]
        altered = not folder or folder != name.replace(" ", "-")
        while altered or folder.lower() in taken:
            digest = hashlib.sha256(f"{name}{folder}".encode("utf-8", "surrogatepass")).hexdigest()[:8]
            folder, altered = f"{folder or 'variant'}-{digest}", False
        folders[name] = folder
        taken.add(folder.lower())
    return folders


def run_variant(variant: Variant, others: list[Path]) -> dict[str, Any]:
    """Trains and tests a variant, seen items masked and kept; its row of the table.

    Raises:
      RuntimeError: The run failed; names its log.
    """
    from nqf.stages.graph import lock_run, take_over

    done = [other for other in others if other != variant.folder and (other / "eval" / "results.json").is_file()]
    with lock_run(variant.folder):
        take_over(variant.config, variant.folder, done)
    # A name may have a dot in it, which with_suffix would take for the start of a suffix.
    settings, log = (variant.folder.with_name(variant.folder.name + suffix) for suffix in (".yaml", ".log"))
    write_text(settings, config_text(variant.config))
    run = str(variant.folder)
    with log.open("w") as file:
        for command in (
            ["nqf.train", "--config", str(settings), "--run", run, "--stage", "all"],
            ["nqf.evaluate", run, "--keep-seen"],
        ):
            code = subprocess.run([sys.executable, "-m", *command], stdout=file, stderr=subprocess.STDOUT).returncode
            if code:
                raise RuntimeError(f"variant '{variant.name}' with seed {variant.seed} failed; see {log}")
    return row_of(variant)


def row_of(variant: Variant) -> dict[str, Any]:
    """What is kept of a finished run."""
    from nqf.evaluation.metrics import paired_difference
    from nqf.evaluation.results import TRAINED, model_ranks, read_results
    from nqf.stages.graph import NAMES
    from nqf.stages.records import read_artifact

    artifacts = {name: read_artifact(variant.folder, name) for name in NAMES}
    results, unmasked = read_results(variant.folder), read_results(variant.folder, "eval/test-keep-seen")
    ranks = model_ranks(results.frame)
    against = {
        model: {
            name: paired_difference(ranks[model], ranks[name], (10,))["ndcg@10"] for name in RIVALS if name in ranks
        }
        for model in TRAINED
        if model in ranks
    }

    def shown(models: dict[str, Any]) -> dict[str, Any]:
        return {
            name: {
                segment: {metric: summary[segment][metric] for metric in METRICS}
                for segment in ("all", "warm", "cold")
                if segment in summary
            }
            for name, summary in models.items()
        }

    return {
        "variant": variant.name,
        "seed": variant.seed,
        "changes": variant.changes,
        "split": results.split,
        "users": results.users,
        "items": results.items,
        "segments": {name: count for name, count in results.segments.items() if name in ("all", "warm", "cold")},
        "masked": shown(results.models),
        "unmasked": shown(unmasked.models),
        "against": against,
        "stage_seconds": {name: found.result["wall_seconds"] for name, found in artifacts.items() if found},
        # The folder of a model is often called "model".
        "text_encoder": "/".join(Path(variant.config.fields.text_encoder).parts[-2:]),
        "provenance": results.provenance,
    }


def main(arguments: list[str]) -> None:
    """Runs the command."""
    options = parse(AblateArguments, arguments, prog=program("ablate"))
    from nqf.tools.study import write_studies

    runs = options.runs or Path("runs") / options.study.stem
    variants = load_study(configuration(options.study, "studies"), runs, options.seeds, options.only)
    folders = [variant.folder for variant in variants]
    console = terminal()
    path = options.results / f"{options.study.stem}.json"
    stored = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    rows = {(row["variant"], row["seed"]): row for row in stored}
    writing = threading.Lock()

    def run(variant: Variant) -> None:
        row = run_variant(variant, folders)
        command = f"python -m nqf.ablate {options.study}"
        with writing:
            rows[variant.name, variant.seed] = row
            write_json(path, {"study": options.study.stem, "command": command, "rows": list(rows.values())})
        score = row["masked"]["joint"]["all"]["ndcg@10"][0]
        console.print(f"{variant.name}, seed {variant.seed}: joint NDCG@10 {score:.4f}", markup=False)

    # The first variant goes first: the others take over what they share with it.
    run(variants[0])
    with ThreadPoolExecutor(options.parallel) as pool:
        list(pool.map(run, variants[1:]))
    page = options.results.with_name(f"{options.results.name}.md")
    write_studies(options.results, page)
    console.print(f"wrote {path} and {page}", markup=False)
