"""What a training stage will take, from shapes and the compiled step: nothing is trained and no weight is read.

The step is compiled for the devices that are here, or for others that need not be (`nqf.training.devices`).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from nqf.pipelines.datasets import TrainingData
from nqf.stages.artifacts import status
from nqf.stages.graph import FIELDS, stage_of
from nqf.stages.records import StageError
from nqf.stages.run import Run
from nqf.training.compiled import collectives, product_flops
from nqf.training.devices import TARGETS, Target, mesh_of
from nqf.training.loop import make_state, make_train_step
from nqf.training.mesh import batch_layout, bytes_on_device, layout, make_mesh, placed
from nqf.training.optimizer import make_optimizer
from nqf.training.program import Program

_SAMPLED_BATCHES = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Prediction for one stage on one device; sizes in bytes.

    Attributes:
      stage: Name of the stage.
      trainable: Trainable parameters.
      frozen: Frozen parameters.
      batch_size: Examples per step.
      steps: Steps of the stage.
      flops: Floating-point operations of a step's matrix products, on all devices together, from the traced program.
      state: Parameters, optimizer and counters.
      tables: Frozen parameters and item tables.
      activations: Temporaries of the step, activations kept for the gradient above all.
      peak: Peak memory of the step.
      moved: Bytes that a step reads and writes at least: arguments, results, and temporaries once each way.
      sent: Bytes that a device sends to others in a step; not a number where the program does not tell.
      fixed: Part of the peak that does not grow with the batch.
      per_example: What each example of the batch adds.
      examples: Training examples, which no batch can exceed.
    """

    stage: str
    trainable: int
    frozen: int
    batch_size: int
    steps: int
    flops: float
    state: int
    tables: int
    activations: int
    peak: int
    moved: int
    sent: float
    fixed: int
    per_example: float
    examples: int

    def largest_batch(self, memory: int) -> int:
        """The largest batch whose peak is within `memory` bytes, by a straight line through two batch sizes; 0: none.

        What grows faster (the matrix of an in-batch softmax) or slower (distinct items) bends the line little.
        """
        return max(0, min(self.examples, int((memory - self.fixed) / max(self.per_example, 1.0))))

    def seconds(self, target: Target) -> tuple[float, str]:
        """Least time of a step on some devices, and what bounds it (the roofline, Williams et al. 2009)."""
        times = {
            "products": self.flops / target.count / target.flops,
            "memory": self.moved / target.bandwidth,
            "traffic": self.sent / target.link,
        }
        return max((value, name) for name, value in times.items() if not math.isnan(value))


def program_of(run: Run, stage: str) -> Program:
    """The training step of a stage of a run whose fields stage is finished.

    Raises:
      StageError: The fields stage is missing or stale: the catalogue's shapes are not known.
    """
    if reason := status(run.config, FIELDS, run.folder):
        raise StageError(
            f"--plan reads the catalogue's shapes from stage 'fields', but {reason}; run --stage fields first"
        )
    program = stage_of(stage).program
    assert program is not None
    return program(run, True)


def plan(program: Program, run: Run, stage: str, mesh: Mesh | None = None) -> Plan:
    """Compiles the step at the configured batch size and at half of it, and reads the compiler's accounts.

    Args:
      program: What is trained.
      run: The run.
      stage: Name of the stage.
      mesh: Devices that it is compiled for; by default those that training takes.
    """
    here, mesh = mesh is None, mesh or make_mesh(run.config.training.mesh)
    data = program.data(program.optim)
    size = data.batch_size
    half = max(1, size // 2)
    full = _compile(program, run, data, mesh, here)
    smaller = program.data(dataclasses.replace(program.optim, batch_size=half))
    less = _compile(program, run, smaller, mesh, here) if half < size else full
    slope = (full["peak"] - less["peak"]) / max(size - half, 1)
    frozen = program.frozen()
    frozen = frozen["params"] if isinstance(frozen, dict) and "params" in frozen else {}
    return Plan(
        stage=stage,
        trainable=_count(jax.eval_shape(program.init)),
        frozen=_count(frozen),
        batch_size=size,
        steps=data.steps,
        flops=full["flops"],
        state=int(full["state"]),
        tables=int(full["tables"]),
        activations=int(full["temporaries"]),
        peak=int(full["peak"]),
        moved=int(full["moved"]),
        sent=full["sent"],
        fixed=int(full["peak"] - slope * size),
        per_example=slope,
        examples=len(data.users),
    )


def _compile(program: Program, run: Run, data: TrainingData, mesh: Mesh, here: bool) -> dict[str, float]:
    optimizer, average = make_optimizer(program.optim, data.steps), program.optim.average
    state = jax.eval_shape(lambda: make_state(program.init(), optimizer, average=average))
    shardings = layout(state, mesh)
    frozen = jax.tree.map(lambda x: x if hasattr(x, "dtype") else np.asarray(x), program.frozen())
    state, frozen = placed(state, shardings), placed(frozen, layout(frozen, mesh))
    skip = run.config.training.skip_non_finite
    step = make_train_step(program.loss_fn, optimizer, seed=0, skip=skip, average=average, shardings=shardings)
    # Batches of one stage differ in length; the largest decides.
    count = len(data.batches)
    at = np.unique(np.linspace(0, count - 1, min(count, _SAMPLED_BATCHES)).astype(int))
    batch = max(
        (data.batches[int(index)] for index in at),
        key=lambda batch: sum(leaf.nbytes for leaf in jax.tree.leaves(batch)),
    )
    traced = step.trace(state, frozen, placed(batch, batch_layout(batch, mesh)))
    compiled = traced.lower().compile()
    return step_memory(compiled, here=here) | {
        "state": bytes_on_device(state),
        "tables": bytes_on_device(frozen),
        "flops": product_flops(traced.jaxpr.jaxpr),
        "sent": sum(one.sent for one in collectives(compiled.as_text())),
    }


def step_memory(compiled: Any, *, here: bool = True) -> dict[str, float]:
    """Bytes on one device of a compiled step: `temporaries`, the `peak` of training with arguments and results, and
    what is `moved` at least. It runs on the devices that are `here`, or on accelerators that are not.
    """
    memory = compiled.memory_analysis()
    moved = memory.argument_size_in_bytes + memory.output_size_in_bytes + 2 * memory.temp_size_in_bytes
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak += memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    if here and jax.default_backend() == "cpu":
        # The runtime gives a step's temporaries back after its results are ready, when `fit` has already given the
        # next step its own; an accelerator's allocator hands them on in the order of the work.
        peak += memory.temp_size_in_bytes
    return {"temporaries": memory.temp_size_in_bytes, "peak": peak, "moved": moved}


def _count(tree: Any) -> int:
    return sum(int(np.prod(leaf.shape, dtype=np.int64)) for leaf in jax.tree.leaves(tree))


def device_memory() -> int:
    """Bytes that a device offers this process: an accelerator's limit, or what the machine's memory has left."""
    statistics = jax.local_devices()[0].memory_stats()
    if statistics and "bytes_limit" in statistics:
        return int(statistics["bytes_limit"])
    with open("/proc/meminfo", encoding="ascii") as file:
        kib = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    return kib * 1024


def print_plans(run: Run, stages: tuple[str, ...], memory: int, console: Console, device: str = "") -> None:
    """Plans the training stages among `stages` and prints them in a table.

    Args:
      run: A run whose fields stage is finished.
      stages: Names of stages; those that train nothing are passed over.
      memory: Bytes per device, for the largest batch; 0 for what it has.
      console: Terminal.
      device: A name in `TARGETS`, or empty for the devices that are here.

    Raises:
      StageError: A step does not fit into a device's memory.
    """
    files = [file for file in (run.folder / "fields").rglob("*") if file.is_file()]
    target, words = TARGETS.get(device), "per device"
    run, mesh, why = elsewhere(run, device)
    if target is not None:
        words = f"for {target.count} x {target.kind}, " + (
            f"estimated from a program for {target.count} simulated CPUs ({why}), per device" if why else "per device"
        )
    memory = memory or (device_memory() if target is None else target.memory)
    plans = [_fitting(run, stage, mesh) for stage in stages if stage_of(stage).program is not None]
    # A column per stage and not a row: eleven columns are cut off on a terminal of 80.
    table = Table("")
    for found in plans:
        table.add_column(found.stage, justify="right")
    for name, shown in (
        ("trained parameters", lambda found: f"{found.trainable:,}"),
        ("frozen parameters", lambda found: f"{found.frozen:,}"),
        ("steps", lambda found: f"{found.steps:,}"),
        ("batch", lambda found: f"{found.batch_size:,}"),
        ("GFLOP per step", lambda found: f"{found.flops / 1e9:,.1f}"),
        ("state", lambda found: _size(found.state)),
        ("tables", lambda found: _size(found.tables)),
        ("activations", lambda found: _size(found.activations)),
        ("peak", lambda found: _size(found.peak)),
        ("largest batch", lambda found: f"{found.largest_batch(memory):,}"),
        *([("sent in a step", lambda found: _size(found.sent))] if mesh is not None else []),
        *([("ms a step, at least", lambda found: _least(found, target))] if target is not None else []),
    ):
        table.add_row(name, *map(shown, plans), style="bold" if name == "peak" else None)
    console.print(f"Plan of {run.folder}, {words} of {_size(memory)}")
    console.print(table)
    items, qformer = len(run.dataset.catalogue.item_ids), run.config.item.qformer
    tokens = 2 * items * (qformer.queries + 1) * qformer.width
    console.print(
        f"field cache {_size(sum(file.stat().st_size for file in files))}, item tokens {_size(tokens)} on disk; "
        "the interpreter, its libraries and the host's data come on top of the peak"
    )


def elsewhere(run: Run, device: str) -> tuple[Run, Mesh | None, str]:
    """A run as other devices would train it, a mesh of them, and why it is one of simulated CPUs, if it is.

    Args:
      run: A run.
      device: A name in `TARGETS`, or empty for the devices that are here, for which there is no mesh.
    """
    if not device:
        return run, None, ""
    mesh, why = mesh_of(TARGETS[device], run.config.training.mesh)
    # What `auto` is there, and not here.
    dtype = "bfloat16" if run.config.training.dtype == "auto" else run.config.training.dtype
    training = dataclasses.replace(run.config.training, dtype=dtype)
    return dataclasses.replace(run, config=dataclasses.replace(run.config, training=training)), mesh, why


def _fitting(run: Run, stage: str, mesh: Mesh | None) -> Plan:
    try:
        return plan(program_of(run, stage), run, stage, mesh)
    except jax.errors.JaxRuntimeError as error:
        # The compiler of TPUs places everything, and refuses what does not fit.
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise StageError(
            f"stage '{stage}' does not fit into the memory of a device ({str(error).splitlines()[0]}); lower "
            f"{stage}.optim.batch_size, or split more over devices with training.mesh"
        ) from error


def _least(found: Plan, target: Target) -> str:
    seconds, bound = found.seconds(target)
    return f"{seconds * 1e3:,.2f} ({bound})"


def _size(count: float) -> str:
    if math.isnan(count):
        return "unknown"
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.1f} MiB"
