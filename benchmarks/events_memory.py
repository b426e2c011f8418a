"""Interactions from 1 to 30 million: memory and processor time of preparing them, and of each process that opens them.

    python benchmarks/events_memory.py [--events N ...] [--work DIR]

Users have twenty events in the mean, in no order; 100,000 items, drawn by Zipf's law. The table is written by one
process, prepared by another (checked, put in order, split), and opened by a third, which also cuts the training windows
and reads a batch of histories, as a training process does; then by two at a time. Peaks are resident sets: Python,
polars and NumPy, the pages of mapped files and everything else included.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import begin, file_rate, target

LIMIT_GIB = 1.0
BLOCK = 1_000_000
ITEMS = 100_000
EVENTS_OF_A_USER = 20
TARGET_EVENTS = 10_000_000


def generate(folder: Path, events: int, seed: int) -> None:
    """Writes tables of items and events, block by block."""
    import numpy as np
    import polars as pl

    parts, users = [], max(events // EVENTS_OF_A_USER, 1)
    for start in range(0, events, BLOCK):
        rng, size = np.random.default_rng([seed, start]), min(BLOCK, events - start)
        parts.append(folder / f"part-{start}.parquet")
        pl.DataFrame(
            {
                "user_id": "user-" + pl.Series(rng.integers(0, users, size)).cast(pl.String),
                "item_id": "item-" + pl.Series((rng.zipf(1.3, size) - 1) % ITEMS).cast(pl.String),
                "timestamp": rng.integers(1_500_000_000, 1_700_000_000, size),
                "rating": rng.integers(1, 6, size).astype(np.float32),
            }
        ).write_parquet(parts[-1])
    pl.scan_parquet(parts, glob=False).sink_parquet(folder / "events.parquet")
    for part in parts:
        part.unlink()
    ids = [f"item-{row}" for row in range(ITEMS)]
    pl.DataFrame({"item_id": ids, "title": ids}).write_parquet(folder / "items.parquet")
    (folder / "schema.yaml").write_text("title: title\nfields: {title: text}\n")


def prepare_tables(folder: Path) -> None:
    """Prepares the tables."""
    from nqf.config import DataConfig
    from nqf.data.load import prepare

    names = {"items": "items.parquet", "interactions": "events.parquet", "schema": "schema.yaml"}
    prepare(DataConfig(format="table", **{key: str(folder / name) for key, name in names.items()}), folder / "data")


def open_and_read(folder: Path) -> None:
    """Opens what was prepared, and reads a batch of histories."""
    import numpy as np

    from nqf.data.load import open_dataset
    from nqf.pipelines.histories import event_features, gather_history, training_windows, window_events

    dataset = open_dataset(folder / "data")
    features = event_features(dataset.interactions, dataset.split, None)
    windows = training_windows(dataset.interactions, dataset.split, 20)
    examples = np.random.default_rng(0).integers(0, len(windows.ends), 1_024)
    gather_history(features, window_events(windows, examples, 20)[0])


STEPS = {"prepare": prepare_tables, "open": open_and_read}


def steps(name: str, folder: Path, processes: int) -> dict[str, float]:
    """Runs a step in processes of its own, all at a time: the largest peak and processor time among them."""
    command = [sys.executable, __file__, "--device", "cpu", "--step", name, str(folder)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    found = [json.loads(one.communicate()[0]) for one in running]
    if any(one.returncode for one in running):
        raise SystemExit(f"{name} failed")
    return {key: max(one[key] for one in found) for key in found[0]}


def one_step(name: str, folder: Path) -> None:
    """Runs a step and prints its figures as JSON."""
    begun = time.process_time()
    STEPS[name](folder)
    # Linux counts in KiB.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30
    print(json.dumps({"cpu": time.process_time() - begun, "peak": peak}))


def main() -> None:
    def arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--events", type=int, nargs="+", default=[1_000_000, TARGET_EVENTS, 30_000_000])
        parser.add_argument("--work", help="folder for the tables; a temporary one by default")
        parser.add_argument("--generate", nargs=2, metavar=("FOLDER", "EVENTS"), help=argparse.SUPPRESS)
        parser.add_argument("--step", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)

    bench = begin(__file__, __doc__, arguments)
    options = bench.options
    if options.generate:
        return generate(Path(options.generate[0]), int(options.generate[1]), options.seed)
    if options.step:
        return one_step(options.step[0], Path(options.step[1]))
    rows: list[list[Any]] = []
    for count in [2_000] if options.quick else options.events:
        with tempfile.TemporaryDirectory(dir=options.work) as folder:
            command = [sys.executable, __file__, "--device", "cpu", "--seed", str(options.seed)]
            subprocess.run([*command, "--generate", folder, str(count)], check=True)
            for name, processes in (("prepare", 1), ("open", 1), ("open", 2)):
                found = steps(name, Path(folder), processes)
                rows.append([count, name, processes, found["cpu"], found["peak"]])
                bench.say(f"{count:,} events, {name}, {processes}: {found['cpu']:.1f} s, {found['peak']:.3f} GiB")
    bench.finish(
        [
            {
                "title": "Preparing and opening interactions",
                "columns": ["events", "what", "processes at a time", "CPU s of each", "peak of each, GiB"],
                "rows": rows,
            }
        ],
        targets=[
            target(
                f"peak memory of preparing or opening {count:,} interactions, GiB",
                max(row[4] for row in rows if row[0] == count),
                "≤",
                LIMIT_GIB,
                "the ids of the users, and the pieces in which events are put in order",
            )
            for count in dict.fromkeys(row[0] for row in rows if row[0] >= TARGET_EVENTS)
        ],
        limits={"file in the page cache, bytes/s": file_rate(16 if options.quick else 256)},
        notes=["Each step is measured once. Processor time counts all threads."],
    )


if __name__ == "__main__":
    main()
