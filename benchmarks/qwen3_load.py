"""Loading a Qwen3 of 0.6B's true shape beside torch's `from_pretrained`: same numbers, time and peak memory.

    python benchmarks/qwen3_load.py [--seed 0] [--repeats 3]

A random model of the published shape is saved by transformers in bfloat16, as the published one is. Each load runs
in a process of its own, by turns; time is of the call alone, files in the page cache on both sides. Peak memory is the
process's high-water mark (VmHWM of /proc/self/status, Linux only), interpreter and libraries included; what they take
before the call is given beside it. Hidden states of both are compared in float32. The results go to
benchmarks/results/qwen3_load.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

RESULT = Path(__file__).parent / "results" / "qwen3_load.json"
TARGET_RATIO, TARGET_DIFFERENCE = 1.3, 1e-4
IDS = np.random.default_rng(0).integers(0, 151_936, (2, 24))


def memory(key: str) -> int:
    """VmHWM (peak) or VmRSS (now) of this process, in bytes."""
    return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


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


def measure_nqf(folder: Path, dtype: str) -> tuple[float, int, int, int, np.ndarray | None]:
    """Seconds, memory before, peak, bytes of the parameters, and hidden states in float32."""
    import jax

    import nqf
    from nqf.models.qwen3 import Qwen3Config

    # The backend starts, and one layer's worth of code is imported, before the clock does.
    jax.config.update("jax_default_matmul_precision", "float32")
    jax.block_until_ready(jax.numpy.zeros(1))
    assert Qwen3Config and nqf.load_qwen3
    before, start = memory("VmRSS"), time.perf_counter()
    model, params = nqf.load_qwen3(folder, dtype=dtype)
    jax.block_until_ready(params)
    seconds, peak = time.perf_counter() - start, memory("VmHWM")
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    hidden = None
    if dtype == "float32":
        hidden = np.asarray(jax.jit(lambda params, ids: model.apply({"params": params}, ids))(params, IDS))
    return seconds, before, peak, size, hidden


def measure_torch(folder: Path, dtype: str) -> tuple[float, int, int, int, np.ndarray | None]:
    """As `measure_nqf`."""
    import torch
    import transformers
    from transformers.models.qwen3 import modeling_qwen3

    assert modeling_qwen3
    before, start = memory("VmRSS"), time.perf_counter()
    model = transformers.AutoModel.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    # Parameters are mapped from the file; reading them once is part of having them.
    checksum = sum(parameter.view(-1)[::1024].float().sum().item() for parameter in model.parameters())
    seconds, peak = time.perf_counter() - start, memory("VmHWM")
    assert np.isfinite(checksum)
    size = sum(parameter.nbytes for parameter in model.parameters())
    hidden = None
    if dtype == "float32":
        with torch.inference_mode():
            hidden = model(input_ids=torch.tensor(IDS)).last_hidden_state.numpy()
    return seconds, before, peak, size, hidden


def in_process(side: str, folder: Path, dtype: str, output: Path) -> dict:
    """Runs one measurement in a fresh process."""
    command = [sys.executable, __file__, "--side", side, "--folder", folder, "--dtype", dtype, "--output", output]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    subprocess.run([str(part) for part in command], check=True, env=environment)
    with np.load(output) as found:
        return {name: found[name] for name in found.files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3)
    for name in ("--side", "--folder", "--dtype", "--output"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side == "make":
        make(Path(options.folder), options.seed)
        return
    if options.side:
        measure = {"nqf": measure_nqf, "torch": measure_torch}[options.side]
        seconds, before, peak, size, hidden = measure(Path(options.folder), options.dtype)
        arrays = {"seconds": seconds, "before": before, "peak": peak, "size": size}
        np.savez(options.output, **arrays, **({} if hidden is None else {"hidden": hidden}))
        return

    with tempfile.TemporaryDirectory() as temporary:
        folder, output = Path(temporary) / "model", Path(temporary) / "result.npz"
        command = [sys.executable, __file__, "--side", "make", "--folder", str(folder), "--seed", str(options.seed)]
        subprocess.run(command, check=True)
        loads, hidden = {}, {}
        for dtype in ("bfloat16", "float32"):
            found = {"nqf": [], "torch": []}
            for _ in range(options.repeats):
                for side, runs in found.items():
                    runs.append(in_process(side, folder, dtype, output))
            for side, runs in found.items():
                size, peak = int(runs[0]["size"]), max(int(run["peak"]) for run in runs)
                before = max(int(run["before"]) for run in runs)
                loads.setdefault(dtype, {})[side] = {
                    "model_bytes": size,
                    "seconds": [round(float(run["seconds"]), 3) for run in runs],
                    "peak_bytes": peak,
                    "bytes_before_the_call": before,
                    "peak_over_model_bytes": round(peak / size, 3),
                    "peak_over_model_bytes_without_libraries": round((peak - before) / size, 3),
                }
                hidden[side] = runs[0].get("hidden")
    result = {
        "command": shlex.join(["python", "benchmarks/qwen3_load.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "seed": options.seed,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("jax", "flax", "torch", "transformers", "safetensors")},
        "file_dtype": "bfloat16",
        "loads": loads,
        "largest_difference_of_hidden_states": float(np.max(np.abs(hidden["nqf"] - hidden["torch"]))),
        "standard_deviation_of_hidden_states": float(np.std(hidden["torch"])),
        "target": {"peak_over_model_bytes": TARGET_RATIO, "difference": TARGET_DIFFERENCE},
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
