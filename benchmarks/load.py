"""A service under load: requests per second and latency at 1, 8 and 64 users at a time, beside a plain faiss lookup.

    python benchmarks/load.py --run runs/quickstart [--seconds 10]

A process of its own serves; this one asks, with as many connections as users, one request after the other on each. The
lookup is faiss's flat index of the same item vectors, asked with user vectors that stand ready: what no model costs.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from common import ROOT, begin


def main() -> None:
    def arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--run", type=Path, required=True, help="finished run folder")
        parser.add_argument("--seconds", type=float, default=10.0, help="time at each number of users")

    # As a process that serves, which does not keep freed memory.
    bench = begin(__file__, __doc__, arguments, keep_memory=False)
    import numpy as np

    from nqf import Recommender

    rec = Recommender.load(bench.options.run)
    ids, rng = rec.item_ids, np.random.default_rng(bench.options.seed)
    bodies = [
        json.dumps({"history": [ids[row] for row in rng.choice(len(ids), rng.integers(1, 40))]}).encode()
        for _ in range(1_000)
    ]
    seconds = 1.0 if bench.options.quick else bench.options.seconds
    rows = []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "nqf.serve", str(bench.options.run), "--port", str(port), "--read-only"]
    server = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        wait(port)
        for users in (1, 8, 64):
            # Each size of a batch is compiled once, before it is measured.
            ask(port, users, bodies, min(seconds, 5.0))
            times = ask(port, users, bodies, seconds)
            rows.append({"users": users, **summary(times, seconds)})
            bench.say(f"{users:>3} users: {rows[-1]['per_second']:,.0f}/s, p50 {1e3 * rows[-1]['p50']:.1f} ms, "
                      f"p99 {1e3 * rows[-1]['p99']:.1f} ms")  # fmt: skip
    finally:
        server.terminate()
        server.wait()
    plain = lookup(rec, rng, seconds)
    bench.finish(
        [
            {
                "title": f"{title}, {len(ids):,} items",
                "columns": ["users at a time", "requests/s", "p50, ms", "p99, ms"],
                "rows": [
                    [row["users"], f"{row['per_second']:,.0f}", f"{1e3 * row['p50']:.2f}", f"{1e3 * row['p99']:.2f}"]
                    for row in of
                ],
            }
            for title, of in (("nqf serve", rows), ("faiss's flat index alone", plain))
            if of
        ],
        details={"service": rows, "faiss": plain},
    )


def wait(port: int) -> None:
    """Until the service answers."""
    for _ in range(1_200):
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.25)
    raise RuntimeError("the service did not start")


def ask(port: int, users: int, bodies: list[bytes], seconds: float) -> list[float]:
    """Times of all answers, in seconds."""
    times: list[float] = []
    end = time.perf_counter() + seconds

    def user(number: int) -> None:
        connection, at = http.client.HTTPConnection("127.0.0.1", port, timeout=120), number
        while time.perf_counter() < end:
            begun = time.perf_counter()
            connection.request("POST", "/v1/recommend", bodies[at % len(bodies)], {"Content-Type": "application/json"})
            answer = connection.getresponse()
            content = answer.read()
            assert answer.status == 200, content
            times.append(time.perf_counter() - begun)
            at += users
        connection.close()

    threads = [threading.Thread(target=user, args=(number,)) for number in range(users)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return times


def summary(times: list[float], seconds: float) -> dict[str, float]:
    """Requests per second and percentiles."""
    ordered = sorted(times)
    return {"per_second": len(times) / seconds, "p50": statistics.median(ordered),
            "p99": ordered[int(0.99 * (len(ordered) - 1))]}  # fmt: skip


def lookup(rec: Any, rng: Any, seconds: float) -> list[dict[str, float]]:
    """The flat index alone."""
    try:
        import faiss
    except ModuleNotFoundError:
        return []
    import numpy as np

    index = faiss.IndexFlatIP(rec.item_vectors.shape[1])
    index.add(np.ascontiguousarray(rec.item_vectors, np.float32))
    rows = []
    for users in (1, 8, 64):
        queries, times = rng.normal(size=(users, rec.item_vectors.shape[1])).astype(np.float32), []
        end = time.perf_counter() + min(seconds, 3.0)
        while time.perf_counter() < end:
            begun = time.perf_counter()
            index.search(queries, 10)
            times.append(time.perf_counter() - begun)
        rows.append({"users": users, **summary(times, sum(times) / users)})
    return rows


if __name__ == "__main__":
    main()
