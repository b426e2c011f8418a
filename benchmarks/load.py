"""A service under load: requests per second and latency at 1, 8 and 64 users at a time, beside a plain faiss lookup.

    python benchmarks/load.py --run runs/quickstart [--items 0 100000] [--seconds 10]

A process of its own serves; this one asks, with as many connections as users, one request after the other on each. The
lookup is faiss's flat index of the same item vectors, asked with user vectors that stand ready: what no model costs.
A larger catalogue is the run's own items again and again under other ids, added to a copy of the run.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import ROOT, Bench, begin

_LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)


def main() -> None:
    def arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--run", type=Path, required=True, help="finished run folder")
        parser.add_argument("--seconds", type=float, default=10.0, help="time at each number of users")
        parser.add_argument("--items", type=int, nargs="+", default=[0, 100_000], help="sizes; 0 for the run's own")

    # As a process that serves, which does not keep freed memory.
    bench = begin(__file__, __doc__, arguments, keep_memory=False)
    seconds, tables, details = 1.0 if bench.options.quick else bench.options.seconds, [], {}
    with tempfile.TemporaryDirectory() as scratch:
        for items in bench.options.items:
            run = grown(bench.options.run, items, Path(scratch) / f"{items}") if items else bench.options.run
            count, found = measure(bench, run, seconds)
            details[str(count)] = found
            for title, rows in found.items():
                cells = [
                    [row["users"], f"{row['per_second']:,.0f}", f"{1e3 * row['p50']:.2f}", f"{1e3 * row['p99']:.2f}"]
                    for row in rows
                ]
                columns = ["users at a time", "requests/s", "p50, ms", "p99, ms"]
                tables.append({"title": f"{title}, {count:,} items", "columns": columns, "rows": cells})
    bench.finish(tables, details=details)


def grown(run: Path, items: int, folder: Path) -> Path:
    """A copy of a run with more items: its own again, under other ids."""
    import polars as pl

    from nqf import Recommender

    rec = Recommender.load(run)
    own = rec.items(rec.item_ids)
    # As a person would write them; a list of categories is what a table calls a text with separators.
    own = own.with_columns(pl.col(pl.List(pl.String)).list.join("|"))
    names = {field: column for kind in ("text", "category", "number", "time", "image")
             for field, column in zip(rec.fields(kind), rec.columns(kind), strict=True)}  # fmt: skip
    own = own.select("item_id", *(pl.col(field).alias(column) for field, column in names.items()))
    for copy in range(1, -(-items // len(own))):
        left = items - copy * len(own)
        rec.add_items(own.with_columns(item_id=pl.col("item_id") + f"-{copy}").head(left))
    return rec.save(folder)


def measure(bench: Bench, run: Path, seconds: float) -> tuple[int, dict[str, list[dict[str, float]]]]:
    """Number of items, and what a service and the flat index alone did with them."""
    import numpy as np

    from nqf import Recommender

    rec = Recommender.load(run)
    ids, rng = rec.item_ids, np.random.default_rng(bench.options.seed)
    bodies = [
        json.dumps({"history": [ids[row] for row in rng.choice(len(ids), rng.integers(1, 40))]}).encode()
        for _ in range(1_000)
    ]
    rows = []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "nqf.serve", str(run), "--port", str(port), "--read-only"]
    server = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        wait(port)
        for users in (1, 8, 64):
            warm(port, users, bodies)
            times = ask(port, users, bodies, seconds)
            rows.append({"users": users, **summary(times, seconds)})
            bench.say(f"{len(ids):,} items, {users:>3} users: {rows[-1]['per_second']:,.0f}/s, "
                      f"p50 {1e3 * rows[-1]['p50']:.1f} ms, p99 {1e3 * rows[-1]['p99']:.1f} ms")  # fmt: skip
    finally:
        server.terminate()
        server.wait()
    return len(ids), {"nqf serve": rows, "faiss's flat index alone": lookup(rec, rng, seconds)}


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


def warm(port: int, users: int, bodies: list[bytes]) -> None:
    """Until no program is compiled any more, each size of a batch once: no answer takes much longer than most do."""
    for _ in range(30):
        # A slow machine may refuse a request that waits for a compilation.
        times = ask(port, users, bodies, 3.0, allowed=(200, 504))
        if times and max(times) < 1.0:
            return


def ask(port: int, users: int, bodies: list[bytes], seconds: float, allowed: tuple[int, ...] = (200,)) -> list[float]:
    """Times of all answers, in seconds."""
    # Written and read by hand, as an HTTP client in Python takes about as much of the two cores as the service does.
    asked = [
        b"POST /v1/recommend HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        for body in bodies
    ]
    times: list[float] = []
    end = time.perf_counter() + seconds

    async def user(at: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while time.perf_counter() < end:
            begun = time.perf_counter()
            writer.write(asked[at % len(asked)])
            head = await reader.readuntil(b"\r\n\r\n")
            content = await reader.readexactly(int(_LENGTH.search(head)[1]))
            assert int(head.split(b" ", 2)[1]) in allowed, content
            times.append(time.perf_counter() - begun)
            at += users
        writer.close()

    async def everybody() -> None:
        await asyncio.gather(*map(user, range(users)))

    asyncio.run(everybody())
    return times


def summary(times: list[float], seconds: float) -> dict[str, float]:
    """Requests per second and percentiles."""
    ordered = sorted(times)
    return {"per_second": len(times) / seconds, "p50": statistics.median(ordered),
            "p99": ordered[int(0.99 * (len(ordered) - 1))]}  # fmt: skip


def lookup(rec: Any, rng: Any, seconds: float) -> list[dict[str, float]]:
    """The flat index alone."""
    import faiss
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
