"""What configs/amazon-2023-qwen3.yaml takes on devices that need not be here: its plan, at the size of All_Beauty.

    python benchmarks/recipe_plan.py [--run FOLDER] [--only NAME ...]

Neither the data nor the weights are needed. Items, users and reviews are invented, as many as All_Beauty has (112,600,
632,000 and 701,500); how many reviews a user wrote follows Zipf's law with the exponent that these totals give, and
every item has every text and a picture, which is more than there is. Folders of models hold the published config.json
and no weights, so that vectors of texts and pictures are random numbers of the published widths: no size depends on
them. Steps are compiled for a simulated CPU and not run, as in `nqf train --plan --device`. A run FOLDER is kept and
can be planned again with that command.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import gzip
import json
import multiprocessing
import os
import re
import shlex
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, begin

RECIPE = ROOT / "configs" / "amazon-2023-qwen3.yaml"
ITEMS, USERS, REVIEWS = 112_600, 632_000, 701_500
# The exponent at which the mean of Zipf's law is REVIEWS / USERS.
EXPONENT = 4.0
# The line of the recipe's head that is planned, for which devices, and which stages of it differ from the recipe's own.
PLANS = (
    ("", ("l4", "rtx4090"), ("item", "user", "joint")),
    ("one H200", ("h200",), ("joint",)),
    ("4B, one H200", ("h200",), ("joint",)),
    ("8B, one H200", ("h200",), ("joint",)),
)
DAY = 86_400_000


def variant(line: str) -> list[str]:
    """The options that the recipe's head gives for a machine; none for the recipe itself."""
    if not line:
        return []
    found = re.search(rf"^#   {line}: +(--.+)$", RECIPE.read_text(encoding="utf-8"), re.MULTILINE)
    assert found, f"{RECIPE.name}: no line '{line}'"
    return shlex.split(found[1])


def write_tables(folder: Path, share: float, seed: int) -> None:
    """Metadata and reviews as they are downloaded; `share` of the true counts."""
    rng = np.random.default_rng(seed)
    words = [f"word{number}" for number in range(20_000)]

    def text(count: int) -> str:
        return " ".join(words[at] for at in rng.zipf(1.3, count) % len(words))

    items, users, reviews = (int(share * count) for count in (ITEMS, USERS, REVIEWS))
    with gzip.open(folder / "meta_All_Beauty.jsonl.gz", "wt", compresslevel=1) as file:
        for number in range(items):
            row = {
                "parent_asin": f"B{number:09d}",
                "title": text(15),
                "description": [text(10)],
                "features": [text(10)],
                "main_category": "All Beauty",
                "store": f"store {rng.integers(20_000)}",
                "price": float(rng.integers(3, 60)),
                "images": [{"variant": "MAIN", "large": f"https://pictures.invalid/{number}.jpg", "hi_res": None}],
                "details": {"Brand": f"brand {rng.integers(20_000)}", "Color": words[rng.integers(200)]},
            }
            file.write(json.dumps(row) + "\n")
    # As the draws come, up to the totals.
    lengths = np.minimum(rng.zipf(EXPONENT, users), 200)
    writers = np.repeat(np.arange(users), lengths)[:reviews]
    which = rng.zipf(1.3, len(writers)) % items
    starts = rng.integers(0, 3_000, users)
    with gzip.open(folder / "All_Beauty.jsonl.gz", "wt", compresslevel=1) as file:
        for number, (user, item) in enumerate(zip(writers.tolist(), which.tolist(), strict=True)):
            row = {
                "rating": float(1 + number % 5),
                "title": words[number % 500],
                "text": f"review {number}",
                "user_id": f"A{user}",
                "parent_asin": f"B{item:09d}",
                "timestamp": 1_420_000_000_000 + (int(starts[user]) + number % 300) * DAY,
            }
            file.write(json.dumps(row) + "\n")


def model_folders(folder: Path, tokenizer: str) -> dict[str, Path]:
    """Folders with the published sizes and a tokenizer; a small BPE stands in where none is given."""
    import shutil

    import jax.numpy as jnp

    from nqf.interop.huggingface import hf_config
    from nqf.interop.tokenizer import train_byte_bpe
    from nqf.models.qwen3 import Qwen3Config

    found = {}
    for size in ("0.6B", "4B", "8B"):
        base = found[f"Qwen/Qwen3-Embedding-{size}"] = folder / f"Qwen3-Embedding-{size}"
        base.mkdir(parents=True)
        config = getattr(Qwen3Config, f"qwen3_embedding_{size.lower().replace('.', '_')}")()
        tree = hf_config(config, architecture="Qwen3Model", dtype=jnp.bfloat16)
        (base / "config.json").write_text(json.dumps(tree))
        if tokenizer:
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(Path(tokenizer) / name, base / name)
        else:
            train_byte_bpe(["a lamp for the deep sea", "the old garden chair"] * 3, 300).save(base)
    return found


class RandomVectors:
    """Stands for a pretrained encoder: vectors of its width."""

    def __init__(self, width: int):
        self.width = width
        self.identity = {"kind": "random", "version": 1, "options": {"width": width}, "state": ""}

    def encode(self, values: Any) -> tuple[np.ndarray, np.ndarray]:
        """float32 [n, width], and that all could be read."""
        vectors = np.random.default_rng(len(values)).standard_normal((len(values), self.width), np.float32)
        return vectors / np.float32(self.width**0.5), np.ones(len(values), bool)

    def save(self, directory: Path) -> None:
        """Writes the identity."""
        (directory / "encoder.json").write_text(json.dumps(self.identity))


def make_fields(folder: Path, models: dict[str, Path], quick: bool, seed: int) -> None:
    """Runs the recipe's fields stage on invented tables, with random vectors."""
    from nqf import train
    from nqf.stages import fields, run

    downloads = folder / "data" / "amazon-2023-All_Beauty" / "downloads"
    downloads.mkdir(parents=True)
    write_tables(downloads, 0.003 if quick else 1.0, seed)
    widths = {"text": 1_024, "image": 512}
    factories = {kind: lambda field, config, width=width: RandomVectors(width) for kind, width in widths.items()}
    modules: tuple[Any, ...] = (fields, run)
    for module in modules:
        module.encoder_factories = lambda config: factories
    os.chdir(folder)
    base = str(models["Qwen/Qwen3-Embedding-0.6B"])
    paths = ["--fields.text-encoder", base, "--fields.image-encoder", str(folder / "clip"), "--joint.backbone.path"]
    train.main(["--config", str(RECIPE), "--run", str(folder / "run"), "--stage", "fields", *paths, base])


def planned(
    folder: Path, line: str, devices: tuple[str, ...], stages: tuple[str, ...], models: dict[str, Path]
) -> list[list[Any]]:
    """Rows of a variant: one for each stage and device. The devices are of one count, so that they share a program."""
    import dataclasses

    from nqf import train
    from nqf.config import Config
    from nqf.stages.plan import elsewhere, plan, program_of
    from nqf.stages.run import open_run
    from nqf.training.devices import TARGETS

    options = [str(models.get(word, word)) for word in variant(line)]
    parsed = train.parse(["--run", str(folder / "run"), *options])
    config = Config(**{field.name: getattr(parsed, field.name) for field in dataclasses.fields(Config)})
    run, mesh, _ = elsewhere(dataclasses.replace(open_run(folder / "run"), config=config), devices[0])
    rows = []
    for stage in stages:
        found = plan(program_of(run, stage), run, stage, mesh)
        gib = [size / 2**30 for size in (found.tables + found.state, found.activations, found.peak)]
        for target in (TARGETS[device] for device in devices):
            what = f"{line or target.kind}, {stage}"
            seconds, bound = found.seconds(target)
            largest = found.largest_batch(target.memory)
            times = [found.flops / 1e12, 1e3 * seconds, bound]
            rows.append([what, found.trainable, found.frozen, found.batch_size, *gib, largest, *times])
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    def arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--run", type=Path, help="folder that is kept; one that is there is planned again")
        parser.add_argument("--tokenizer", default="", help="folder of the published Qwen3 tokenizer")
        parser.add_argument("--only", nargs="+", help="lines of the recipe's head to plan; '' for the recipe itself")

    os.environ["JAX_PLATFORMS"] = "cpu"
    # Nothing is run, and buffers are assigned before this.
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    bench = begin(__file__, __doc__, arguments)
    options, rows = bench.options, []
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.run or Path(temporary)).resolve()
        models = {path.name: path for path in folder.glob("models/*")}
        # Which devices there are is said once to each process.
        processes = concurrent.futures.ProcessPoolExecutor(
            1, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1
        )
        if not models:
            models = model_folders(folder / "models", options.tokenizer)
            processes.submit(make_fields, folder, models, options.quick, options.seed).result()
            bench.say("the fields stage is finished")
        models = {f"Qwen/{path.name}": path for path in models.values()}
        for line, devices, stages in PLANS:
            if options.only is None or line in options.only:
                rows += processes.submit(planned, folder, line, devices, stages, models).result()
                bench.say(f"planned: {line or 'the recipe itself'}")
        from nqf.stages.run import open_run

        dataset = open_run(folder / "run").dataset
        counts = len(dataset.catalogue), len(dataset.interactions.user_ids), len(dataset.interactions.items)
    columns = ["device or variant, stage", "trained", "frozen", "batch", "held, GiB", "activations, GiB", "peak, GiB"]
    columns += ["largest batch", "TFLOP a step", "ms a step, at least", "bound by"]
    bench.finish(
        [{"title": "A step of each stage", "columns": columns, "rows": rows}],
        notes=[
            "The imitation has {:,} items; {:,} users with three reviews or more and {:,} reviews of theirs are left. "
            "Estimated from programs for a simulated CPU, whose activations are often larger than an accelerator's: "
            "XLA's CPU compiler computes products of bfloat16 in float32.".format(*counts)
        ],
    )


if __name__ == "__main__":
    main()
