"""A request to a loaded recommender: latency, and CPU time beside the compiled function's.

    python benchmarks/serving.py --run runs/quickstart

The compiled function is called with what the request makes of the history; what is above it is nqf's own.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from common import begin


def main() -> None:
    def arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--run", type=Path, required=True, help="finished run folder")

    # As a process that serves, which does not keep freed memory.
    bench = begin(__file__, __doc__, arguments, keep_memory=False)
    import numpy as np

    from nqf import Recommender

    rec = Recommender.load(bench.options.run)
    rng = np.random.default_rng(bench.options.seed)
    ids = rec.item_ids
    calls: list[tuple] = []
    users = rec._ranker.users

    def noted(*arguments: object) -> object:
        calls.append(arguments)
        return users(*arguments)

    object.__setattr__(rec._ranker, "users", noted)
    rows = []
    for size in (1, 8, 64, 512):
        histories = [[ids[row] for row in rng.choice(len(ids), 20)] for _ in range(size)]
        rec.recommend(histories=histories)
        calls.clear()
        rec.recommend(histories=histories)
        inner = list(calls)

        def alone(inner: list[tuple] = inner) -> None:
            for arguments in inner:
                np.asarray(users(*arguments))

        whole = timed(lambda histories=histories: rec.recommend(histories=histories), 5 if bench.options.quick else 50)
        function = timed(alone, 5 if bench.options.quick else 50)
        rows.append(
            {"users": size, "request": whole, "compiled": function, "cpu_ratio": whole["cpu"] / function["cpu"]}
        )
        ratio = rows[-1]["cpu_ratio"]
        bench.say(f"{size:>4} users: {1e3 * whole['median']:.2f} ms, {ratio:.2f} x the compiled function's CPU time")
    bench.finish(
        [
            {
                "title": f"A call of recommend, histories of 20 of {len(ids):,} items",
                "columns": ["users", "median, ms", "p99, ms", "compiled function, ms", "CPU time / the function's"],
                "rows": [
                    [row["users"], *(f"{1e3 * row['request'][key]:.2f}" for key in ("median", "p99")),
                     f"{1e3 * row['compiled']['median']:.2f}", f"{row['cpu_ratio']:.2f}"]
                    for row in rows
                ],
            },
        ],
        details={"requests": rows},
    )  # fmt: skip


def timed(call: Callable[[], object], repeats: int) -> dict[str, float]:
    """Seconds of a call: median and 99th percentile of the wall, and CPU time of all threads."""
    call()
    cpu, walls = time.process_time(), []
    for _ in range(repeats):
        begun = time.perf_counter()
        call()
        walls.append(time.perf_counter() - begun)
    cpu = (time.process_time() - cpu) / repeats
    return {"median": statistics.median(walls), "p99": sorted(walls)[int(0.99 * (repeats - 1))], "cpu": cpu}


if __name__ == "__main__":
    main()
