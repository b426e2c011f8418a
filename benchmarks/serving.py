"""A request to a loaded recommender: latency, and CPU time beside the compiled function's.

    python benchmarks/serving.py --run runs/quickstart

The compiled functions are called with what the request makes of the history: `users`, which encodes it, and
`best_columns`, which ranks the items; what is above both is nqf's own.
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
    ids = rec.item_ids
    users, best_columns, rows = rec._ranker.users, stock.best_columns, []
    repeats = 5 if bench.options.quick else 50

    def replace(encode: Callable, rank: Callable) -> None:
        object.__setattr__(rec._ranker, "users", encode)
        stock.best_columns = rank

    for size in (1, 8, 64, 512):
        histories = [[ids[row] for row in rng.choice(len(ids), 20)] for _ in range(size)]
        rec.recommend(histories=histories)
        noted: dict[Callable, list[Callable[[], Any]]] = {users: [], best_columns: []}

        def noting(function: Callable, noted: dict = noted) -> Callable:
            def call(*arguments: Any, **options: Any) -> Any:
                noted[function].append(lambda: jax.tree.map(np.asarray, function(*arguments, **options)))
                return function(*arguments, **options)

            return call

        replace(noting(users), noting(best_columns))
        rec.recommend(histories=histories)
        replace(users, best_columns)
        times = by_turns(
            {
                "request": lambda histories=histories: rec.recommend(histories=histories),
                "encoding": lambda noted=noted: [call() for call in noted[users]],
                "both": lambda noted=noted: [call() for some in noted.values() for call in some],
            },
            repeats,
        )
        ratios = [times["request"]["cpu"] / times[name]["cpu"] for name in ("encoding", "both")]
        rows.append({"users": size, **times, "cpu_ratios": ratios})
        median = 1e3 * times["request"]["median"]
        bench.say(f"{size:>4} users: {median:.2f} ms; CPU time {ratios[0]:.2f} x encoding's, {ratios[1]:.2f} x both's")
    bench.finish(
        [
            {
                "title": f"A call of recommend, histories of 20 of {len(ids):,} items",
                "columns": ["users", "median, ms", "p99, ms", "encoding, ms", "CPU / encoding's", "CPU / both's"],
                "rows": [
                    [
                        row["users"],
                        *(f"{1e3 * row['request'][key]:.2f}" for key in ("median", "p99")),
                        f"{1e3 * row['encoding']['median']:.2f}",
                        *(f"{ratio:.2f}" for ratio in row["cpu_ratios"]),
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
