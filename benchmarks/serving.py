"""A request to a loaded recommender: latency, CPU time beside the compiled function's, and a long life.

    python benchmarks/serving.py --run runs/quickstart [--lives 10000]

The compiled function is called with what the request makes of the history; what is above it is nqf's own. Life: adds
and requests of varied length in turns, with resident memory and compilations after each tenth.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import Bench, begin


def main() -> None:
    def arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--run", type=Path, required=True, help="finished run folder")
        parser.add_argument("--lives", type=int, default=10_000, help="adds and requests of the long life")

    # As a process that serves, which does not keep freed memory.
    bench = begin(__file__, __doc__, arguments, keep_memory=False)
    import jax
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
    lives = life(rec, 40 if bench.options.quick else bench.options.lives, rng, jax, bench)
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
            {
                "title": "Items added one by one, a request of varied length after each",
                "columns": ["done", "resident, MiB", "compilations", "seconds"],
                "rows": [
                    [f"{row['done']:,}", f"{row['resident_mib']:,.0f}", row["compilations"], f"{row['seconds']:.0f}"]
                    for row in lives
                ],
            },
        ],
        details={"requests": rows, "life": lives},
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


def life(rec: Any, lives: int, rng: Any, jax: Any, bench: Bench) -> list[dict[str, float]]:
    """Adds items one by one between requests of varied length."""
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    found, begun = [], time.perf_counter()
    for number in range(lives):
        rec.add_items([{"item_id": f"new-{number}", "title": f"Walnut desk {number}"}])
        count = len(rec._stock.item_ids)
        history = [rec._stock.item_ids[row] for row in rng.integers(0, count, rng.integers(1, 80))]
        rec.recommend(history=history, k=int(rng.integers(1, 100)))
        if (number + 1) % max(1, lives // 10) == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            mib = pages * resource.getpagesize() / 2**20
            found.append({"done": number + 1, "resident_mib": mib, "compilations": len(compiled),
                          "seconds": time.perf_counter() - begun})  # fmt: skip
            bench.say(f"{number + 1:>6}: {mib:,.0f} MiB, {len(compiled)} compilations")
    return found


if __name__ == "__main__":
    main()
