"""Loading a Qwen3 of 0.6B's true shape beside torch's `from_pretrained`: same numbers, time and peak memory.

    python benchmarks/qwen3_load.py [--repeats 3]

A random model of the published shape is saved by transformers in bfloat16, as the published one is. Each load runs
in a process of its own, by turns; time is of the call alone, files in the page cache on both sides. Peak memory is the
process's high-water mark (VmHWM of /proc/self/status, Linux only), interpreter and libraries included. Hidden states of
both are compared in float32.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import begin, file_rate, status_bytes, target

IDS = np.random.default_rng(0).integers(0, 151_936, (2, 24))


def make(folder: Path, seed: int) -> None:
    """Saves a random model of the published shape."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.Qwen3Config(
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
    )
    model = transformers.Qwen3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
    model.to(torch.bfloat16).save_pretrained(folder)


def measure_nqf(folder: Path, dtype: str) -> tuple[float, int, int, int, Any]:
    """Seconds, memory before, peak, bytes of the parameters, and hidden states in float32."""
    import jax

    import nqf
    from nqf.models.qwen3 import Qwen3Config

    # The backend starts, and one layer's worth of code is imported, before the clock does.
    jax.config.update("jax_default_matmul_precision", "float32")
    jax.block_until_ready(jax.numpy.zeros(1))
    assert Qwen3Config and nqf.load_qwen3
    before, start = status_bytes("VmRSS"), time.perf_counter()
    model, params = nqf.load_qwen3(folder, dtype=dtype)
    jax.block_until_ready(params)
    seconds, peak = time.perf_counter() - start, status_bytes("VmHWM")
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    hidden = None
    if dtype == "float32":
        hidden = np.asarray(jax.jit(lambda params, ids: model.apply({"params": params}, ids))(params, IDS))
    return seconds, before, peak, size, hidden


def measure_torch(folder: Path, dtype: str) -> tuple[float, int, int, int, Any]:
    """As `measure_nqf`."""
    import torch
    import transformers
    from transformers.models.qwen3 import modeling_qwen3

    assert modeling_qwen3
    before, start = status_bytes("VmRSS"), time.perf_counter()
    model = transformers.AutoModel.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    # Parameters are mapped from the file; reading them once is part of having them.
    checksum = sum(parameter.view(-1)[::1024].float().sum().item() for parameter in model.parameters())
    seconds, peak = time.perf_counter() - start, status_bytes("VmHWM")
    assert np.isfinite(checksum)
    size = sum(parameter.nbytes for parameter in model.parameters())
    hidden = None
    if dtype == "float32":
        with torch.inference_mode():
            hidden = model(input_ids=torch.tensor(IDS)).last_hidden_state.numpy()
    return seconds, before, peak, size, hidden


def in_process(*arguments: object) -> None:
    """Runs this file in a fresh process."""
    subprocess.run([sys.executable, __file__, "--device", "cpu", *map(str, arguments)], check=True)


def main() -> None:
    def arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--side", nargs=4, metavar=("SIDE", "FOLDER", "DTYPE", "OUTPUT"), help=argparse.SUPPRESS)

    bench = begin(__file__, __doc__, arguments)
    if bench.options.side:
        side, folder, dtype, output = bench.options.side
        if side == "make":
            return make(Path(folder), bench.options.seed)
        *found, hidden = {"nqf": measure_nqf, "torch": measure_torch}[side](Path(folder), dtype)
        return np.savez(output, found=found, **({} if hidden is None else {"hidden": hidden}))

    rate, rows, ratios, hidden, repeats = file_rate(), [], [], {}, min(3, bench.options.repeats)
    with tempfile.TemporaryDirectory() as temporary:
        folder, output = Path(temporary) / "model", Path(temporary) / "result.npz"
        in_process("--side", "make", folder, "bfloat16", output)
        for dtype in ("bfloat16", "float32"):
            runs: dict[str, list[np.ndarray]] = {"nqf": [], "torch": []}
            for _ in range(repeats):
                for side, found in runs.items():
                    in_process("--side", side, folder, dtype, output)
                    with np.load(output) as arrays:
                        found.append(arrays["found"])
                        hidden[side] = arrays.get("hidden")
            for side, found in runs.items():
                seconds = [run[0] for run in found]
                before, peak, size = (max(run[at] for run in found) for at in (1, 2, 3))
                median = statistics.median(seconds)
                spread, share = max(seconds) / min(seconds), found[0][3] / median / rate
                rows.append([side, dtype, median, spread, peak / 2**30, peak / size, (peak - before) / size, share])
                ratios += [peak / size] if side == "nqf" else []
    difference = float(np.max(np.abs(hidden["nqf"] - hidden["torch"])))
    columns = ["side", "type", "s", "max/min", "peak, GiB", "peak over model", "without libraries", "of reading a file"]
    bench.finish(
        [{"title": "From a file in bfloat16", "columns": columns, "rows": rows}],
        targets=[
            target("peak memory of loading over the model's bytes", max(ratios), "≤", 1.3, "libraries"),
            target("largest difference of hidden states to transformers", difference, "≤", 1e-4, "order of summation"),
        ],
        limits={"file in the page cache, bytes/s": rate},
        notes=[
            "transformers maps the file and reads a bfloat16 model when it is used; the time of a load is then of a "
            "sample of its elements.",
        ],
    )


if __name__ == "__main__":
    main()
