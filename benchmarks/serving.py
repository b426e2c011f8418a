"""A request to a loaded recommender: latency, and CPU time beside the compiled function's.

    python benchmarks/serving.py --run runs/quickstart

The compiled programs are called with what the request makes of the histories: one for a single history, and for more
one that encodes them and one that ranks the items. What is above them is nqf's own.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import begin


def main() -> None:
    def arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--run", type=Path, required=True, help="finished run folder")

    # As a process that serves, which does not keep freed memory.
    bench = begin(__file__, __doc__, arguments, keep_memory=False)
    import jax
    import numpy as np

    from nqf import Recommender
    from nqf.serving import stock

    rec = Recommender.load(bench.options.run)
    rng = np.random.default_rng(bench.options.seed)
    ids, rows, repeats = rec.item_ids, [], 5 if bench.options.quick else 200
    # What is called of the programs: for one history a single one, of which the others are parts.
    whole, parts = [(stock, "_best_of_one")], [(rec._ranker, "users"), (stock, "best_columns")]

    for size in (1, 8, 64, 512):
        histories = [[ids[row] for row in rng.choice(len(ids), 20)] for _ in range(size)]
        rec.recommend(histories=histories)
        noted: list[Callable[[], Any]] = []

        def noting(function: Callable, noted: list = noted) -> Callable:
            def call(*arguments: Any, **options: Any) -> Any:
                noted.append(lambda: jax.device_get(function(*arguments, **options)))
                return function(*arguments, **options)

            return call

        own = [(*place, getattr(*place)) for place in (whole if size == 1 else parts)]
        for *place, function in own:
            object.__setattr__(*place, noting(function))
        rec.recommend(histories=histories)
        for *place, function in own:
            object.__setattr__(*place, function)
        assert noted, "no compiled program was called"
        times = by_turns(
            {
                "request": lambda histories=histories: rec.recommend(histories=histories),
                "compiled": lambda noted=noted: [call() for call in noted],
            },
            repeats if size < 512 else repeats // 10 + 1,
        )
        ratio = times["request"]["cpu"] / times["compiled"]["cpu"]
        rows.append({"users": size, **times, "cpu_ratio": ratio})
        bench.say(f"{size:>4} users: {1e3 * times['request']['median']:.2f} ms; CPU time {ratio:.2f} x the programs'")
    bench.finish(
        [
            {
                "title": f"A call of recommend, histories of 20 of {len(ids):,} items",
                "columns": ["users", "median, ms", "p99, ms", "the programs alone, ms", "CPU time / the programs'"],
                "rows": [
                    [
                        row["users"],
                        *(f"{1e3 * row['request'][key]:.2f}" for key in ("median", "p99")),
                        f"{1e3 * row['compiled']['median']:.2f}",
                        f"{row['cpu_ratio']:.2f}",
                    ]
                    for row in rows
                ],
            },
        ],
        details={"requests": rows},
    )


def by_turns(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """Seconds of calls: median and 99th percentile of the wall, and median CPU time of all threads.

    By turns: what else the machine does meets all of them, and each finds the caches as the one before left them.
    """
    walls, cpus = ({name: [] for name in calls} for _ in range(2))
    for turn in range(repeats + 1):
        for name, call in calls.items():
            cpu, begun = time.process_time(), time.perf_counter()
            call()
            # The first compiles.
            if turn:
                walls[name].append(time.perf_counter() - begun)
                cpus[name].append(time.process_time() - cpu)
    return {
        name: {
            "median": statistics.median(walls[name]),
            "p99": sorted(walls[name])[int(0.99 * (repeats - 1))],
            "cpu": statistics.median(cpus[name]),
        }
        for name in calls
    }


if __name__ == "__main__":
    main()
