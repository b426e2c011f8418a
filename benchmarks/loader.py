"""Loader throughput beside what the step consumes, and resident memory of both ways to hold the tables.

    python benchmarks/loader.py [--quick]

Batches are read as training reads them (Grain, two threads, read ahead), without a step; the step is timed on one batch
that is there already. Tables on the device: a batch carries numbers only. Tables on the host: it carries the rows of
its distinct items, gathered from memory maps. Resident memory is that of a process of its own that reads batches from
a field table of several GiB: what it allocated, and the pages of the file that are mapped at the end, which the kernel
takes back when it needs them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import Bench, alternate, begin, copy_rate, file_rate, ratio, status_bytes, target

LIMIT_GIB = 2.0


def reader(data: Any, batches: int) -> Any:
    """Reads some batches, from the first one each time."""

    def read() -> None:
        stream = data.iterate(0)
        for _ in range(batches):
            next(stream)

    return read


def pairs(bench: Bench, tables: dict[str, Any] | None, items: int, batch: int, epochs: int = 1) -> Any:
    """The item stage's batches; with tables, each carries its rows."""
    import numpy as np

    from nqf.pipelines.datasets import pair_dataset
    from nqf.pipelines.pairs import PairSource

    rng = np.random.default_rng(bench.options.seed)
    count = max(items // 10, 40 * batch)
    keys = np.unique(rng.integers(0, count // 8 * items, count))
    source = PairSource(
        users=keys // items,
        anchors=(keys % items).astype(np.int32),
        positives=rng.integers(0, items, len(keys)).astype(np.int32),
        trainable=np.arange(items, dtype=np.int32),
        owned=keys,
        items=items,
    )

    def gather(at: np.ndarray) -> tuple[dict, dict]:
        found = {name: table.gather(at) for name, table in tables.items()}
        return {name: pair[0] for name, pair in found.items()}, {name: pair[1] for name, pair in found.items()}

    return pair_dataset(
        source, batch_size=batch, epochs=epochs, seed=0, workers=0, gather=gather if tables is not None else None
    )


def field_table(folder: Path, items: int, width: int) -> Any:
    """A memory-mapped table; the file is sparse, so that it takes no room on the disk."""
    import numpy as np

    from nqf.fields.tables import open_table

    values = np.lib.format.open_memmap(folder / "values.npy", "w+", np.float16, (items, width))
    del values
    np.save(folder / "rows.npy", np.arange(items, dtype=np.int32))
    return open_table(folder / "values.npy", folder / "rows.npy", "text")


def child(bench: Bench) -> None:
    """Reads batches in one of two ways and prints this process's memory."""

    mode, items, width, batches = bench.options.child[0], *map(int, bench.options.child[1:])
    with tempfile.TemporaryDirectory() as folder:
        table = field_table(Path(folder), items, width)
        held = None
        if mode == "device":
            import jax

            held = jax.block_until_ready(jax.numpy.array(table.values, copy=True))
        data = pairs(bench, {"text": table} if mode == "host" else None, items, 512, epochs=100)
        reader(data, batches)()
        found = {key: status_bytes(key) for key in ("RssAnon", "RssFile", "VmHWM")}
        print(json.dumps(found))
        del held


def memory_rows(bench: Bench, items: int, width: int, batches: int) -> list[list[Any]]:
    """Runs the child in both ways."""
    rows = []
    for mode, label in (("device", "on the device (a CPU's is the process)"), ("host", "on the host, memory-mapped")):
        command = [sys.executable, __file__, "--device", "cpu", "--child", mode, str(items), str(width), str(batches)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        table = 2 * items * width / 2**30
        rows.append([label, table, batches, *(found[key] / 2**30 for key in ("RssAnon", "RssFile", "VmHWM"))])
    return rows


def main() -> None:
    def arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)

    bench = begin(__file__, __doc__, arguments)
    if bench.options.child:
        return child(bench)
    import jax
    import numpy as np
    from world import configuration, make_world, training

    quick = bench.options.quick
    items, users, batches = (500, 200, 2) if quick else (100_000, 4_000, 15)
    rows, targets, notes = [], [], []
    world = make_world(items=items, lengths=np.full(users, 30), seed=bench.options.seed)
    table = 0
    for stage in ("user", "joint"):
        for on_device in (True, False):
            config = configuration(
                batch=16 if quick else 128, history=30, negatives="sampled", samples=64 if quick else 4_096
            )
            data = world.data(config, stage, on_device=on_device, epochs=20)
            made = training(world, config, stage, on_device=on_device)
            batch = jax.device_put(data.batches[0])
            timings = alternate(
                {"loader": reader(data, batches), "step": lambda made=made, batch=batch: made.step(batch)},
                bench.options.repeats,
                least=0 if quick else 0.5,
            )
            loader, step = timings["loader"].median / batches, timings["step"].median
            size = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(data.batches[0]))
            where = "device" if on_device else "host"
            over = ratio(timings["step"], timings["loader"]) * batches
            rows.append([stage, where, size / 2**10, config.user.optim.batch_size / loader, size / loader / 2**20,
                         config.user.optim.batch_size / step, timings["loader"].spread, over])  # fmt: skip
            targets.append(
                target(f"loader over the {stage} stage's step, tables on the {where}", over, "≥", 5.0,
                       "numbering a batch by its distinct items and gathering their rows is NumPy on one core")
            )  # fmt: skip
    copy, file = copy_rate(16 if quick else 256), file_rate(16 if quick else 256)
    for row in rows:
        row.insert(5, row[4] * 2**20 / copy)
    shape = (4_000, 64, 3) if quick else (4_000_000, 512, 500)
    memory = memory_rows(bench, *shape)
    table = memory[1]
    targets.append(
        target("resident memory of the loader, tables on the host, GiB", table[3] + table[4], "≤", LIMIT_GIB,
               "pages of the memory map that were read stay mapped until the kernel wants them back")
    )  # fmt: skip
    bench.finish(
        [
            {
                "title": "Reading batches",
                "columns": ["stage", "tables", "KiB/batch", "loader, examples/s", "loader, MiB/s", "of a memory copy",
                            "step, examples/s", "max/min", "loader over step"],
                "rows": rows,
            },
            {
                "title": "Resident memory after reading, GiB",
                "columns": ["tables", "table", "batches", "allocated", "mapped pages of files", "peak"],
                "rows": memory,
            },
        ],
        targets=targets,
        limits={"memory copy, bytes/s": copy, "file in the page cache, bytes/s": file},
        notes=notes,
    )  # fmt: skip


if __name__ == "__main__":
    main()
