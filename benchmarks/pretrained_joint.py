"""The joint stage on a backbone of Qwen3-Embedding-0.6B's true widths, cut to two layers, up to the adapter in peft.

    python benchmarks/pretrained_joint.py [--layers 2] [--epochs 2]

A random model of the published shape (width 1024, 151,669 rows) is saved by transformers in bfloat16. On the tiny
catalogue of tests/tiny.yaml every stage runs, the joint one with adapters on that model; its adapter is exported,
loaded by peft, and fed with the exported prompts. Says how the loss fell, whether the base changed (bit for bit, in
memory and on disk), how far peft's vectors are from ours, and what a step takes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, begin, product, target


def make(folder: Path, layers: int, seed: int) -> None:
    """Saves a random model of the published widths and a small tokenizer beside it."""
    import torch
    import transformers

    from nqf.interop.tokenizer import train_byte_bpe

    torch.manual_seed(seed)
    config = transformers.Qwen3Config(
        vocab_size=151_669,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
    )
    transformers.Qwen3Model(config).to(torch.bfloat16).save_pretrained(folder)
    train_byte_bpe(["a lamp for the deep sea", "the old garden chair"] * 3, 300).save(folder)


def peft_difference(adapter: Path) -> float:
    """The largest difference between the exported vectors and those that peft makes of the exported prompts."""
    import peft
    import torch
    from safetensors.torch import load_file

    golden = load_file(adapter / "golden.safetensors")
    mask = golden["attention_mask"]
    model = peft.AutoPeftModelForFeatureExtraction.from_pretrained(adapter, dtype=torch.float32).eval()
    with torch.no_grad():
        hidden = model(inputs_embeds=golden["inputs_embeds"], attention_mask=mask).last_hidden_state
    vectors = torch.nn.functional.normalize(hidden[torch.arange(len(mask)), mask.sum(1) - 1], dim=-1)
    return float((vectors - golden["vectors"]).abs().max())


def main() -> None:
    def arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--layers", type=int, default=2)
        parser.add_argument("--epochs", type=int, default=2)

    bench = begin(__file__, __doc__, arguments)
    import jax

    from nqf import export, train
    from nqf.interop.tensors import folder_digest
    from nqf.training import loop

    # Vectors are compared with those of another library.
    jax.config.update("jax_default_matmul_precision", "float32")
    digests, fit = [], loop.fit

    def digest(tree: object) -> str:
        found = hashlib.sha256()
        for leaf in jax.tree.leaves(tree):
            found.update(np.ascontiguousarray(leaf))
        return found.hexdigest()

    def watched(program: Any, folder: Path, stage: str, **options: Any) -> object:
        if stage != "joint":
            return fit(program, folder, stage, **options)
        qwen3 = program.frozen()["params"]["qwen3"]
        digests.append(digest(qwen3))
        result = fit(program, folder, stage, **options)
        digests.append(digest(qwen3))
        return result

    loop.fit = watched
    with tempfile.TemporaryDirectory() as temporary:
        base, run, adapter = (Path(temporary) / name for name in ("base", "run", "adapter"))
        make(base, bench.options.layers, bench.options.seed)
        files = folder_digest(base)
        common = ["--config", str(ROOT / "tests" / "tiny.yaml"), "--run", str(run), "--seed", str(bench.options.seed)]
        # Every step's loss is compared with the first one's, so the rates are those of a short run.
        common += ["--joint.backbone.path", str(base), "--joint.optim.epochs", str(bench.options.epochs)]
        common += ["--joint.optim.adapter-learning-rate", "1e-3", "--joint.optim.learning-rate", "3e-3"]
        for stage in ("fields", "item", "tokens", "user"):
            train.main([*common, "--stage", stage])
        start = time.perf_counter()
        train.main([*common, "--stage", "joint"])
        seconds = time.perf_counter() - start
        export.main([str(run), "--format", "peft", "--output", str(adapter)])
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in lines if line["stage"] == "joint" and "loss" in line]
        stage = json.loads((run / "joint" / "stage.json").read_text())["result"]
        unchanged = digests[0] == digests[1], folder_digest(base) == files
        difference = peft_difference(adapter)
    limit = product()
    limit.run()
    start = time.perf_counter()
    limit.run()
    rate = limit.flops / (time.perf_counter() - start)
    bench.finish(
        [
            {
                "title": f"{bench.options.layers} layers of width 1024 with adapters",
                "columns": ["what", "found"],
                "rows": [
                    ["trained parameters", stage["trainable_parameters"]],
                    ["steps", stage["steps"]],
                    ["loss, first and last", f"{losses[0]:.4g}, {losses[-1]:.4g}"],
                    ["base unchanged in memory", unchanged[0]],
                    ["base unchanged on disk", unchanged[1]],
                    ["examples/s", stage["items_per_second"]],
                    ["stage with compilation, s", seconds],
                ],
            }
        ],
        targets=[
            target("largest difference of user vectors in peft", difference, "≤", 1e-4, "order of summation"),
            target("loss at the end over the loss at the start", losses[-1] / losses[0], "≤", 1.0, "too few steps"),
        ],
        limits={"matrix product float32, FLOP/s": rate},
    )


if __name__ == "__main__":
    main()
