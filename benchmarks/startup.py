"""Compile time and start-up: imports, and the first step of each stage with an empty and a filled compilation cache.

    python benchmarks/startup.py [--quick]

Every figure is of a process of its own. The steps are those of nqf's default configuration on a catalogue of a thousand
items. Cold: the folder of the persistent cache is empty; warm: another process has compiled the same step before.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from common import ROOT, begin, file_rate, target

IMPORTS = {
    "Python alone": ["-c", "pass"],
    "import jax": ["-c", "import jax"],
    "import nqf": ["-c", "import nqf"],
    "nqf.train --help": ["-m", "nqf.train", "--help"],
}


def child(stage: str) -> None:
    """Makes the step of a stage and runs it once; prints the seconds of both."""
    start = time.perf_counter()
    import jax
    import numpy as np
    from world import configuration, make_world, training

    imported = time.perf_counter()
    config = configuration(batch=128)
    world = make_world(items=1_000, lengths=np.full(200, 30), seed=0)
    batch = world.data(config, stage).batches[0]
    made = training(world, config, stage)
    jax.block_until_ready(made.state)
    ready = time.perf_counter()
    compiled = made.compiled.lower(made.state, made.frozen, batch).compile()
    done = time.perf_counter()
    del compiled
    print(json.dumps({"import": imported - start, "init": ready - imported, "compile": done - ready}))


def timed(command: list[str], environment: dict[str, str]) -> tuple[float, str]:
    """Seconds of a process, and what it printed."""
    start = time.perf_counter()
    done = subprocess.run(command, check=True, cwd=ROOT, env=environment, capture_output=True, text=True)
    return time.perf_counter() - start, done.stdout


def main() -> None:
    def arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--child", help=argparse.SUPPRESS)

    bench = begin(__file__, __doc__, arguments)
    if bench.options.child:
        return child(bench.options.child)
    repeats = 1 if bench.options.quick else max(2, bench.options.repeats // 2)
    names = dict(list(IMPORTS.items())[:3]) if bench.options.quick else IMPORTS
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(repeats):
        for name, command in names.items():
            seconds[name].append(timed([sys.executable, *command], dict(os.environ))[0])
    imports = [[name, statistics.median(found), max(found) / min(found)] for name, found in seconds.items()]

    rows: list[list[Any]] = []
    stages, faster = ("user",) if bench.options.quick else ("user", "joint"), {}
    for stage in stages:
        runs: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
        for _ in range(repeats):
            with tempfile.TemporaryDirectory() as folder:
                environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": folder}
                for found in runs.values():
                    command = [sys.executable, __file__, "--device", bench.options.device, "--child", stage]
                    whole, output = timed(command, environment)
                    found.append(json.loads(output.splitlines()[-1]) | {"whole": whole})
        for kind, found in runs.items():
            middle = {key: statistics.median(run[key] for run in found) for key in found[0]}
            spread = max(run["whole"] for run in found) / min(run["whole"] for run in found)
            rows.append([stage, kind, middle["import"], middle["init"], middle["compile"], middle["whole"], spread])
        faster[stage] = rows[-2][4] / rows[-1][4]
    bench.finish(
        [
            {"title": "Processes until they end", "columns": ["what", "s", "max/min"], "rows": imports},
            {
                "title": "Until a stage's first step can run",
                "columns": [
                    "stage",
                    "compilation cache",
                    "imports, s",
                    "parameters, s",
                    "step, s",
                    "process, s",
                    "max/min",
                ],
                "rows": rows,
            },
        ],
        targets=[
            target(f"{stage} stage: step compiled cold over warm", value, "≥", 2.0, "tracing, which no cache spares")
            for stage, value in faster.items()
        ],
        limits={"file in the page cache, bytes/s": file_rate(16 if bench.options.quick else 256)},
        notes=[f"Medians of {repeats} processes."],
    )


if __name__ == "__main__":
    main()
