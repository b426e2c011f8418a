"""Run by test_plan.py in a process of its own: the planned and the measured peak memory of an item step, as JSON."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import jax
import numpy as np

from nqf.training.loop import make_state, make_train_step
from nqf.training.optimizer import make_optimizer
from nqf.training.plan import plan, program_of
from nqf.training.run import open_run


def memory(key: str) -> int:
    return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


run = open_run(sys.argv[1])
item = run.config.item
qformer = dataclasses.replace(item.qformer, width=256, mlp_width=1024)
optim = dataclasses.replace(item.optim, batch_size=256)
run = dataclasses.replace(
    run, config=dataclasses.replace(run.config, item=dataclasses.replace(item, qformer=qformer, optim=optim))
)
program = program_of(run, "item")
planned = plan(program, run, "item")

data = program.data(optim)
optimizer = make_optimizer(optim, data.steps)
step = make_train_step(program.loss_fn, optimizer, seed=0, skip=0)
batch = data.batches[0]


def zeros(tree):
    return jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype)), tree)


def state():
    # Values do not matter, but each leaf has to be a buffer of its own to be donated.
    return jax.tree.map(jax.numpy.copy, make_state(zeros(program.params), optimizer))


# Everything is compiled before the measurement: the compiler's own memory is not the step's.
jax.block_until_ready(step(state(), zeros(program.frozen), batch))
Path("/proc/self/clear_refs").write_text("5")  # Sets the high-water mark back (man proc_pid_clear_refs).
before = memory("VmRSS")
now, frozen = state(), zeros(program.frozen)
for _ in range(2):
    now, metrics = step(now, frozen, batch)
    jax.block_until_ready(metrics)
print(json.dumps({"planned": planned.peak, "measured": memory("VmHWM") - before, "batch": planned.batch_size}))
