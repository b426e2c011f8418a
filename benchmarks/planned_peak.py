"""The planner's peak memory of an item step beside the measured one, on a CPU under Linux.

    python benchmarks/planned_peak.py RUN

RUN has finished its fields stage; the step is widened to 256 so that it can be told from the interpreter's own memory.
Peaks are resident sets above what the process held before (VmHWM of proc). Malloc may keep what was freed, which would
hide or inflate a peak, so it is told to return it before each reading. The result goes to
benchmarks/results/planned_peak.json.
"""

import ctypes
import dataclasses
import datetime
import gc
import json
import os
import platform
import re
import statistics
import sys
from pathlib import Path

import jax
import numpy as np

from nqf.training.loop import make_state, make_train_step
from nqf.training.optimizer import make_optimizer
from nqf.training.plan import plan, program_of
from nqf.training.run import open_run

RESULT = Path(__file__).parent / "results" / "planned_peak.json"
REPEATS = 9


def memory(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def settle() -> None:
    """Returns freed memory and sets the high-water mark back (man proc_pid_clear_refs)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def zeros(tree):
    """A buffer of its own for every leaf, as a donated state needs."""
    return jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype)), tree)


def main(folder: str) -> None:
    """Measures and writes the result."""
    run = open_run(folder)
    item = run.config.item
    qformer = dataclasses.replace(item.qformer, width=256, mlp_width=1024)
    optim = dataclasses.replace(item.optim, batch_size=256)
    item = dataclasses.replace(item, qformer=qformer, optim=optim)
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, item=item))
    program = program_of(run, "item")
    planned = plan(program, run, "item")
    data = program.data(optim)
    optimizer = make_optimizer(optim, data.steps)
    step = make_train_step(program.loss_fn, optimizer, seed=0, skip=0)
    batch = data.batches[0]

    def state():
        return jax.tree.map(jax.numpy.copy, make_state(zeros(program.params), optimizer))

    # Everything is compiled before the measurement: the compiler's own memory is not the step's.
    jax.block_until_ready(step(state(), zeros(program.frozen), batch))
    held, peaks = [], []
    for _ in range(REPEATS):
        settle()
        before = memory("VmRSS")
        now, frozen = state(), zeros(program.frozen)
        jax.block_until_ready((now, frozen))
        settle()
        held.append(memory("VmRSS") - before)
        for _ in range(2):
            now, metrics = step(now, frozen, batch)
            jax.block_until_ready(metrics)
        peaks.append(memory("VmHWM") - before)
        del now, frozen, metrics
    measured = statistics.median(peaks)
    result = {
        "command": "python benchmarks/planned_peak.py RUN",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()})",
        "jax": jax.__version__,
        "batch": planned.batch_size,
        "planned_bytes": {"peak": planned.peak, "state": planned.state, "tables": planned.tables},
        "measured_peak_bytes": {"median": measured, "low": min(peaks), "high": max(peaks), "all": peaks},
        "measured_state_and_tables_bytes": {"median": statistics.median(held), "low": min(held), "high": max(held)},
        "planned_over_measured": round(planned.peak / measured, 3),
        "target": "within 15 %",
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(sys.argv[1])
