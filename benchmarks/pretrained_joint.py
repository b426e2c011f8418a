"""The joint stage on a backbone of Qwen3-Embedding-0.6B's true widths, cut to two layers, up to the adapter in peft.

    python benchmarks/pretrained_joint.py [--layers 2] [--epochs 2] [--seed 0]

A random model of the published shape (width 1024, 151,669 rows) is saved by transformers in bfloat16. On the tiny
catalogue of tests/tiny.yaml every stage runs, the joint one with adapters on that model; its adapter is exported,
loaded by peft, and fed with the exported prompts. Says how the loss fell, whether the base changed (bit for bit, in
memory and on disk), how far peft's vectors are from ours, and what a step takes. The results go to
benchmarks/results/pretrained_joint.json.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

RESULT = Path(__file__).parent / "results" / "pretrained_joint.json"
TARGET_DIFFERENCE = 1e-4


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    import jax

    from nqf import export, train
    from nqf.interop.tensors import folder_digest
    from nqf.training import joint_stage

    # Vectors are compared with those of another library.
    jax.config.update("jax_default_matmul_precision", "float32")
    digests, fit = [], joint_stage.fit

    def digest(tree: object) -> str:
        found = hashlib.sha256()
        for leaf in jax.tree.leaves(tree):
            found.update(np.ascontiguousarray(leaf))
        return found.hexdigest()

    def watched(**arguments: object) -> object:
        digests.append(digest(arguments["frozen"]["params"]["qwen3"]))
        result = fit(**arguments)
        digests.append(digest(arguments["frozen"]["params"]["qwen3"]))
        return result

    joint_stage.fit = watched
    with tempfile.TemporaryDirectory() as temporary:
        base, run, adapter = (Path(temporary) / name for name in ("base", "run", "adapter"))
        make(base, options.layers, options.seed)
        files = folder_digest(base)
        common = ["--config", str(ROOT / "tests" / "tiny.yaml"), "--run", str(run), "--seed", str(options.seed)]
        # Every step's loss is compared with the first one's, so the rates are those of a short run.
        common += ["--joint.backbone.path", str(base), "--joint.optim.epochs", str(options.epochs)]
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
        result = {
            "command": shlex.join(["python", "benchmarks/pretrained_joint.py", *sys.argv[1:]]),
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, jax on {jax.devices()[0].device_kind}",
            "versions": {name: version(name) for name in ("jax", "flax", "torch", "transformers", "peft")},
            "shape": {"layers": options.layers, "width": 1024, "rows": 151_669, "dtype_of_the_file": "bfloat16"},
            "trainable_parameters": stage["trainable_parameters"],
            "steps": stage["steps"],
            "losses": [round(value, 4) for value in losses],
            "loss_fell": losses[-1] < losses[0],
            "base_unchanged_in_memory": digests[0] == digests[1],
            "base_unchanged_on_disk": folder_digest(base) == files,
            "difference_in_peft": peft_difference(adapter),
            "examples_per_second": stage["items_per_second"],
            "stage_seconds": round(seconds, 1),
            "target": {"difference": TARGET_DIFFERENCE},
        }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
