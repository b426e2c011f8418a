"""Our SASRec beside those of RecTools: same split, mask and metrics, quality and time to it.

    python benchmarks/sasrec_peers.py --python PYTHON --name NAME --config CONFIG [--epochs N] [-- OPTION ...]

PYTHON is an interpreter with `rectools[torch]`, which wants another pandas than the tests. OPTIONs go to `nqf train`.
The networks have the size of `baselines.sasrec_options`; what else RecTools needs is its own default. *softmax* is its
SASRec with a softmax over the catalogue, *eSASRec* the recipe of Tikhonovich et al. 2025 (RecSys '25): LiGR layers and
a softmax over 256 sampled negatives. Each is validated after each epoch and stops after the same number of epochs
without a better NDCG@10; the test split is opened once each, for the best epoch. They run one after the other, on the
cores that the process may use. Keeps what it found in benchmarks/results/sasrec_peers.json and writes docs/sasrec.md.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE, RESULTS = ROOT / "docs" / "sasrec.md", ROOT / "benchmarks" / "results" / "sasrec_peers.json"
K, NEGATIVES = 10, 256
HEAD = """\
# Our SASRec beside RecTools'

Written by `python benchmarks/sasrec_peers.py`; do not edit. The baseline of nqf's tables beside SASRec (softmax) and
eSASRec (LiGR layers, sampled softmax) of [RecTools](https://github.com/MobileTeleSystems/RecTools), on the same split
and mask, at the same size; the rest is each one's own default. The best epoch is chosen on validation and the test
split opened once a row. Brackets are 95 % bootstrap intervals over users, *against* is the paired difference in NDCG@10
to ours. *To 95 %* is the CPU time, compilation and validation included, until validation NDCG@10 reached 95 % of the
best of all rows of its data set; a dash where it never did. What was *cut off* took all epochs that it was allowed, and
may rank better after more.

| data | model | epochs | validation NDCG@10 | test HR@10 | test NDCG@10 | against | CPU seconds | to 95 % |
|---|---|---:|---:|---:|---:|---:|---:|---:|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--config", required=True)
    parser.add_argument("--epochs", type=int, help="of RecTools' networks; by default those that ours may take")
    parser.add_argument("options", nargs="*")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = compared(options, Path(scratch))
    everything = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    everything[options.name] = found
    RESULTS.write_text(json.dumps(everything, indent=1) + "\n")
    PAGE.write_text(page(everything), encoding="utf-8")


def compared(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Trains all of them on one data set; curves, figures and where they come from."""
    import polars as pl

    run, nqf = scratch / "run", [sys.executable, "-m", "nqf"]
    setting = ["--config", options.config, "--run", str(run), *options.options]
    subprocess.run([*nqf, "train", *setting, "--stage", "fields"], cwd=ROOT, check=True)
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    subprocess.run([*nqf, "train", "--run", str(run), "--stage", "sasrec"], cwd=ROOT, check=True)
    spent = _spent(before)
    wall = time.time() - began
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # CPU time is known of the whole stage alone; its curve is in wall time, which shares it out.
    curve = [
        [(line["time"] - began) / wall * spent, line["valid/ndcg@10"]]
        for line in lines
        if line["stage"] == "sasrec" and "valid/ndcg@10" in line
    ]
    subprocess.run([*nqf, "evaluate", str(run), "--sasrec"], cwd=ROOT, check=True)
    ranks = {"nqf": pl.read_parquet(run / "eval" / "per_user.parquet")["rank:sasrec"].to_numpy()}
    sizes = write_data(run, scratch / "data.npz")
    rows = {"nqf": {"curve": curve, "cpu_seconds": spent, "limit": sizes.pop("epochs")}}
    for name in ("softmax", "eSASRec"):
        limit = options.epochs or rows["nqf"]["limit"]
        settings = sizes | {"model": name, "epochs": limit, "data": str(scratch / "data.npz")}
        made = subprocess.run(
            [options.python, __file__, "--worker", json.dumps(settings)], stdout=subprocess.PIPE, text=True, check=True
        )
        rows[name] = json.loads(made.stdout.splitlines()[-1]) | {"limit": limit}
        ranks[name], version = rows[name].pop("ranks"), rows[name].pop("version")
    for name, ranks_N in ranks.items():
        rows[name] |= figures(ranks_N, ranks["nqf"])
    from common import machine

    provenance = {
        "command": f"python benchmarks/sasrec_peers.py --name {options.name} --config {options.config}",
        "machine": machine("cpu"), "cores used": len(os.sched_getaffinity(0)), "load": f"{os.getloadavg()[0]:.1f}",
        "date": f"{datetime.date.today()}", "RecTools": version, "jax": importlib.metadata.version("jax"),
    }  # fmt: skip
    return {"rows": rows, "sizes": sizes, "users": len(ranks["nqf"]), "provenance": provenance}


def write_data(run: Path, path: Path) -> dict[str, Any]:
    """The split as arrays, and the sizes of the network."""
    import numpy as np

    from nqf.data.splits import rankable
    from nqf.stages.run import open_run

    opened = open_run(run)
    dataset, size = opened.dataset, opened.config.baselines.sasrec_options
    events, arrays = dataset.interactions, {"train": dataset.split.train}
    for split, cases in (("valid", dataset.split.valid), ("test", dataset.split.test)):
        kept = cases[rankable(events, cases, repeats=opened.config.evaluation.repeats)]
        arrays |= {f"{split}_users": kept.users, f"{split}_cuts": kept.cuts}
    np.savez(path, users=events.users, items=events.items, **arrays)
    return {
        "width": size.width, "layers": size.layers, "heads": size.heads, "length": size.max_history,
        "dropout": size.dropout, "patience": size.patience, "epochs": size.epochs,
        "seed": opened.config.seed,
    }  # fmt: skip


def figures(ranks_N: Any, ours_N: Any) -> dict[str, Any]:
    """HR@10, NDCG@10 and the difference to ours, each with its interval."""
    import numpy as np

    from nqf.evaluation.metrics import mean_intervals, per_user

    values, ours = (per_user(np.asarray(ranks, np.float64), (K,)) for ranks in (ranks_N, ours_N))
    values = {key: values[key] for key in (f"hr@{K}", f"ndcg@{K}")}
    values["against"] = values[f"ndcg@{K}"] - ours[f"ndcg@{K}"]
    return {key: list(value) for key, value in mean_intervals(values, bootstrap=1000, seed=0).items()}


def page(everything: dict[str, Any]) -> str:
    """The page of all data sets."""
    from nqf.evaluation.results import format_interval

    lines = []
    for data, found in everything.items():
        best = max(value for row in found["rows"].values() for _, value in row["curve"])
        for name, row in found["rows"].items():
            reached = [seconds for seconds, value in row["curve"] if value >= 0.95 * best]
            cells = (
                data, name if name == "nqf" else f"RecTools {name}",
                f"{len(row['curve'])}{', cut off' if len(row['curve']) >= row['limit'] else ''}",
                f"{max(value for _, value in row['curve']):.4f}", format_interval(row["hr@10"]),
                format_interval(row["ndcg@10"]),
                "" if name == "nqf" else format_interval(row["against"], signed=True), f"{row['cpu_seconds']:,.0f}",
                f"{reached[0]:,.0f}" if reached else "–",
            )  # fmt: skip
            lines.append(f"| {' | '.join(map(str, cells))} |")
    notes = [
        f"{data}: {found['users']:,} users ranked; width {found['sizes']['width']}, {found['sizes']['layers']} layers, "
        f"{found['sizes']['heads']} heads, {found['sizes']['length']} items, dropout {found['sizes']['dropout']:g}, "
        f"seed {found['sizes']['seed']}; {', '.join(f'{key} {value}' for key, value in found['provenance'].items())}.\n"
        for data, found in everything.items()
    ]
    return HEAD + "\n".join([*lines, "", *notes]) + "\n"


def worker(settings: dict[str, Any]) -> None:
    """Trains one of RecTools' networks in this process and prints what came out as JSON."""
    import copy
    import logging
    import warnings

    import numpy as np
    import pandas as pd
    import torch
    from pytorch_lightning import Trainer, seed_everything
    from rectools import Columns
    from rectools.dataset import Dataset
    from rectools.models import SASRecModel
    from rectools.models.nn.transformers.ligr import LiGRLayers

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # The cores that jax takes.
    seed_everything(settings["seed"], verbose=False)
    data = np.load(settings["data"])

    def dataset(kept: np.ndarray) -> Dataset:
        # The order of the events is their time: RecTools sorts by it.
        frame = {Columns.User: data["users"][kept], Columns.Item: data["items"][kept], Columns.Weight: 1.0}
        return Dataset.construct(pd.DataFrame(frame | {Columns.Datetime: pd.to_datetime(kept, unit="s")}))

    offsets = np.searchsorted(data["users"], np.arange(data["users"].max() + 2))

    def ranks(split: str) -> np.ndarray:
        """Ranks of the targets among all items but those of the user's past; infinite beyond the tenth."""
        users, cuts = data[f"{split}_users"], data[f"{split}_cuts"]
        pasts = [np.arange(offsets[user], cut) for user, cut in zip(users, cuts, strict=True)]
        history = dataset(np.concatenate(pasts))
        known = np.isin(users, history.user_id_map.external_ids)
        top = model.recommend(users[known], history, K, filter_viewed=True, on_unsupported_targets="ignore")
        targets = pd.Series(data["items"][cuts], index=users)
        hits = top[top[Columns.Item] == top[Columns.User].map(targets)]
        return pd.Series(np.inf, index=users).mask(
            pd.Series(users, index=users).isin(hits[Columns.User]), hits.set_index(Columns.User)[Columns.Rank]
        ).to_numpy(np.float64)  # fmt: skip

    options: dict[str, Any] = {"loss": "softmax"}
    if settings["model"] == "eSASRec":
        options = {"loss": "sampled_softmax", "n_negatives": NEGATIVES, "transformer_layers_type": LiGRLayers}
    model = SASRecModel(
        n_factors=settings["width"], n_blocks=settings["layers"], n_heads=settings["heads"],
        session_max_len=settings["length"], dropout_rate=settings["dropout"],
        get_trainer_func=lambda: Trainer(
            accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        ),
        **options,
    )  # fmt: skip
    training, curve, best = dataset(np.flatnonzero(data["train"])), [], (-1.0, 0, None)
    for epoch in range(settings["epochs"]):
        model.fit_partial(training, 1, 1)
        value = float(np.mean(_discounted(ranks("valid"))))
        curve.append([_spent(), value])
        print(f"{settings['model']} epoch {epoch + 1}: {value:.4f}", file=sys.stderr, flush=True)
        if value > best[0]:
            best = value, epoch, copy.deepcopy(model.torch_model.state_dict())
        elif epoch - best[1] >= settings["patience"] > 0:
            break
    spent = _spent()
    model.torch_model.load_state_dict(best[2])
    found = {"curve": curve, "cpu_seconds": spent, "ranks": ranks("test").tolist()}
    print(json.dumps(found | {"version": importlib.metadata.version("rectools")}))


def _discounted(ranks: Any) -> Any:
    import numpy as np

    return 1 / np.log2(1 + ranks)


def _spent(before: Any = None) -> float:
    """CPU seconds of this process, or of the children since `before`."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN if before else resource.RUSAGE_SELF)
    seconds = used.ru_utime + used.ru_stime
    return seconds - (before.ru_utime + before.ru_stime if before else 0.0)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if sys.argv[1:2] == ["--worker"]:
        worker(json.loads(sys.argv[2]))
    else:
        sys.path.insert(0, str(ROOT))
        main()
