"""A loaded recommender that lives long: memory and compiled programs over adds and requests without end.

    python benchmarks/long_life.py --run runs/quickstart [--lives 10000]

Items are added one by one, every tenth of them is updated, and a request of varied length and number of items follows
each; figures after each tenth. What is allocated grows by the items that are there and by nothing else; resident is
what the process keeps of the kernel's, freed memory of compilations included.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
from pathlib import Path

from common import begin, status_bytes


class _Info(ctypes.Structure):
    """`struct mallinfo2` of glibc 2.33."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    )


def allocated() -> int:
    """Bytes that are allocated and not freed: Python's, numpy's and XLA's."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _Info
    found = mallinfo()
    return found.uordblks + found.hblkhd


def main() -> None:
    def arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--run", type=Path, required=True, help="finished run folder")
        parser.add_argument("--lives", type=int, default=10_000, help="adds, and requests")

    # As a process that serves, which does not keep freed memory.
    bench = begin(__file__, __doc__, arguments, keep_memory=False)
    import jax
    import numpy as np

    from nqf import Recommender

    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    rec = Recommender.load(bench.options.run)
    ids, rng = rec.item_ids, np.random.default_rng(bench.options.seed)
    loaded, lives = len(compiled), 40 if bench.options.quick else bench.options.lives
    rows = []

    def note(done: int) -> None:
        gc.collect()
        arrays = jax.live_arrays()
        mib = [status_bytes("VmRSS"), allocated(), sum(array.nbytes for array in arrays)]
        rows.append([done, *(size / 2**20 for size in mib), len(arrays), len(compiled) - loaded])
        bench.say(f"{done:>6}: {mib[0] / 2**20:,.0f} MiB resident, {len(compiled) - loaded} programs")

    note(0)
    for number in range(lives):
        ids.append(f"new-{number}")
        rec.add_items([{"item_id": ids[-1], "title": f"Walnut desk {number}"}])
        if number % 10 == 9:
            rec.update_items([{"item_id": ids[rng.integers(len(ids))], "title": f"Oak desk {number}"}])
        history = [ids[row] for row in rng.integers(0, len(ids), rng.integers(1, 80))]
        rec.recommend(history=history, k=int(rng.integers(1, 100)))
        if (number + 1) % max(1, lives // 10) == 0:
            note(number + 1)
    bench.finish(
        [
            {
                "title": f"A catalogue of {len(ids) - lives:,} items that grows",
                "columns": ["adds and requests", "resident, MiB", "allocated, MiB", "device arrays, MiB",
                            "device arrays", "programs compiled"],
                "rows": rows,
            }
        ]
    )  # fmt: skip


if __name__ == "__main__":
    main()
