"""The planner's peak memory of an item step beside the measured one, on a CPU under Linux.

    python benchmarks/planned_peak.py [RUN]

RUN has finished its fields stage; by default that of the tiny catalogue of tests/tiny.yaml is run first. The step is
widened to 256 so that it can be told from the interpreter's own memory. Peaks are resident sets above what the process
held before (VmHWM of proc). Malloc may keep what was freed, which would hide or inflate a peak, so it is told to return
it before each reading.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import statistics
import tempfile
from pathlib import Path
from typing import Any

from common import ROOT, begin, copy_rate, status_bytes, target


def settle() -> None:
    """Returns freed memory and sets the high-water mark back (man proc_pid_clear_refs)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def measure(folder: str, repeats: int) -> tuple[Any, list[int]]:
    """The plan of the widened item step, and its measured peaks."""
    import jax
    import numpy as np

    from nqf.training.loop import make_state, make_train_step
    from nqf.training.optimizer import make_optimizer
    from nqf.training.plan import plan, program_of
    from nqf.training.run import open_run

    run = open_run(folder)
    item = run.config.item
    qformer = dataclasses.replace(item.qformer, width=256, mlp_width=1024)
    item = dataclasses.replace(item, qformer=qformer, optim=dataclasses.replace(item.optim, batch_size=256))
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, item=item))
    program = program_of(run, "item")
    planned, data = plan(program, run, "item"), program.data(item.optim)
    optimizer, batch = make_optimizer(item.optim, data.steps), data.batches[0]
    step = make_train_step(program.loss_fn, optimizer, seed=0, skip=0)

    def zeros(tree: Any) -> Any:
        # A buffer of its own for every leaf, as a donated state needs.
        return jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype)), tree)

    def state() -> Any:
        return jax.tree.map(jax.numpy.copy, make_state(zeros(program.params), optimizer))

    # Everything is compiled before the measurement: the compiler's own memory is not the step's.
    jax.block_until_ready(step(state(), zeros(program.frozen), batch))
    peaks = []
    for _ in range(repeats):
        settle()
        before = status_bytes("VmRSS")
        now, frozen = state(), zeros(program.frozen)
        jax.block_until_ready((now, frozen))
        settle()
        for _ in range(2):
            now, metrics = step(now, frozen, batch)
            jax.block_until_ready(metrics)
        peaks.append(status_bytes("VmHWM") - before)
        del now, frozen, metrics
    return planned, peaks


def main() -> None:
    def arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("run", nargs="?")

    # Memory has to go back to the kernel here, so the allocator stays as it comes.
    bench = begin(__file__, __doc__, arguments, keep_memory=False)
    from nqf import train

    with tempfile.TemporaryDirectory() as folder:
        if not bench.options.run:
            train.main(["--config", str(ROOT / "tests" / "tiny.yaml"), "--run", folder, "--stage", "fields"])
        planned, peaks = measure(bench.options.run or folder, max(bench.options.repeats, 9))
    measured = statistics.median(peaks)
    bench.finish(
        [
            {
                "title": "Peak of an item step, bytes",
                "columns": ["planned", "of it state", "measured, median", "least", "most", "planned over measured"],
                "rows": [[planned.peak, planned.state, measured, min(peaks), max(peaks), planned.peak / measured]],
            }
        ],
        targets=[
            target(
                "planned over measured peak, away from 1",
                abs(planned.peak / measured - 1),
                "≤",
                0.15,
                "what the allocator holds beside the program's buffers",
            )
        ],
        limits={"memory copy, bytes/s": copy_rate()},
        details={"peaks": peaks},
    )


if __name__ == "__main__":
    main()
