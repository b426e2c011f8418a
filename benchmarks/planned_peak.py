"""Planned peak memory of training steps beside the measured one, on a CPU under Linux.

    python benchmarks/planned_peak.py [RUN] [--users N]

An item step as `--plan` predicts it: RUN has finished its fields stage (by default that of the tiny catalogue of
tests/tiny.yaml is run first), and the step is widened to 256 so that it can be told from the interpreter's own memory.
A joint step at the true shape of Qwen3-Embedding-0.6B with adapters, from the compiler's account, as the planner's.
Peaks are resident sets above what the process held before (VmHWM of proc). Malloc may keep what was freed, which would
hide or inflate a peak, so it is told to return it before each reading.
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


def peaks(step: Any, state: Any, frozen: Any, batch: Any, repeats: int) -> list[int]:
    """Measured peaks of some steps, dispatched as training does, from the shapes of state and tables."""
    import jax
    import numpy as np

    def zeros(tree: Any) -> Any:
        # A buffer of its own for every leaf, as a donated state needs; written to, so that it is resident.
        return jax.tree.map(lambda x: jax.device_put(np.full(x.shape, 0, x.dtype)), tree)

    found = []
    # Everything is compiled before the first measurement: the compiler's own memory is not the step's.
    for attempt in range(repeats + 1):
        settle()
        before = status_bytes("VmRSS")
        now, held = zeros(state), zeros(frozen)
        jax.block_until_ready((now, held))
        settle()
        for _ in range(6):
            now, metrics = step(now, held, batch)
            # As in `fit` on a CPU.
            jax.block_until_ready(metrics)
        if attempt:
            found.append(status_bytes("VmHWM") - before)
        del now, held, metrics
    return found


def item_step(folder: str, repeats: int) -> tuple[int, list[int]]:
    """The planner's peak of the widened item step, and the measured ones."""
    import jax
    import numpy as np

    from nqf.stages.plan import plan, program_of
    from nqf.stages.run import open_run
    from nqf.training.loop import make_state, make_train_step
    from nqf.training.optimizer import make_optimizer

    run = open_run(folder)
    item = run.config.item
    qformer = dataclasses.replace(item.qformer, width=256, mlp_width=1024)
    item = dataclasses.replace(item, qformer=qformer, optim=dataclasses.replace(item.optim, batch_size=256))
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, item=item))
    program = program_of(run, "item")
    data = program.data(item.optim)
    optimizer = make_optimizer(item.optim, data.steps)
    step = make_train_step(program.loss_fn, optimizer, seed=0, skip=0)
    state = jax.eval_shape(lambda: make_state(program.init(), optimizer))
    frozen = jax.tree.map(np.asarray, program.frozen())
    planned = plan(program, run, "item").peak
    return planned, peaks(step, state, frozen, data.batches[0], repeats)


def joint_step(users: int, repeats: int, **sizes: Any) -> tuple[int, list[int]]:
    """The planned and the measured peaks of the joint step at 0.6B's true shape, adapters of rank 16, 20 items."""
    import numpy as np
    from world import configuration, make_world, training

    from nqf.models.qwen3 import Qwen3Config
    from nqf.stages.plan import step_memory

    world = make_world(items=1_000, lengths=np.full(users, 21), seed=0)
    config = configuration(batch=users, history=20, negatives="in-batch")
    backbone = Qwen3Config.qwen3_embedding_0_6b(lora_rank=16, lora_dropout=0.1, **sizes)
    made = training(world, config, "joint", backbone=backbone, abstract=True)
    batch = world.data(config, "joint").batches[0]
    planned = step_memory(made.compiled.lower(made.state, made.frozen, batch).compile())["peak"]
    return planned, peaks(made.compiled, made.state, made.frozen, batch, repeats)


def main() -> None:
    def arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("run", nargs="?")
        parser.add_argument("--users", type=int, default=2, help="histories of the joint step")

    # Memory has to go back to the kernel here, so the allocator stays as it comes.
    bench = begin(__file__, __doc__, arguments, keep_memory=False)
    from nqf import train

    quick, repeats = bench.options.quick, bench.options.repeats
    with tempfile.TemporaryDirectory() as folder:
        if not bench.options.run:
            train.main(["--config", str(ROOT / "tests" / "tiny.yaml"), "--run", folder, "--stage", "fields"])
        found = {"item step, width 256": item_step(bench.options.run or folder, repeats)}
    small = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, vocab_size=500) if quick else {}
    name = f"joint step, Qwen3-Embedding-0.6B, {bench.options.users} histories of 20 items"
    found[name] = joint_step(bench.options.users, min(repeats, 3), **small)
    rows = []
    for what, (planned, measured) in found.items():
        # A run has to fit at its worst step: of what was measured the most counts.
        sizes = (planned, statistics.median(measured), min(measured), max(measured))
        rows.append([what, *(size / 2**20 for size in sizes), planned / max(measured)])
    bench.finish(
        [
            {
                "title": "Peak memory of a step, MiB",
                "columns": ["what", "planned", "measured, median", "least", "most", "planned over most"],
                "rows": rows,
            }
        ],
        targets=[
            target(f"{row[0]}: planned over measured peak, away from 1", abs(row[-1] - 1), "≤", 0.15,
                   "the plan counts the temporaries of two steps, since the last one's are often given back only after "
                   "the next one has its own; the allocator's own overhead is not in it")
            for row in rows
        ],
        limits={"memory copy, bytes/s": copy_rate()},
    )  # fmt: skip


if __name__ == "__main__":
    main()
