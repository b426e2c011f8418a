"""What a training stage will take, from shapes and the compiled step: nothing is trained and no weight is read."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from nqf.pipelines.datasets import TrainingData
from nqf.stages.artifacts import status
from nqf.stages.graph import FIELDS, stage_of
from nqf.stages.records import StageError
from nqf.stages.run import Run
from nqf.training.loop import make_state, make_train_step
from nqf.training.mesh import layout, make_mesh, place_batch
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
      flops: Floating-point operations of a step, as XLA counts them (the body of a loop once).
      state: Parameters, optimizer and counters.
      tables: Frozen parameters and item tables.
      activations: Temporaries of the step, activations kept for the gradient above all.
      peak: Peak memory of the step.
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
    fixed: int
    per_example: float
    examples: int

    def largest_batch(self, memory: int) -> int:
        """The largest batch whose peak is within `memory` bytes, by a straight line through two batch sizes; 0: none.

        What grows faster (the matrix of an in-batch softmax) or slower (distinct items) bends the line little.
        """
        return max(0, min(self.examples, int((memory - self.fixed) / max(self.per_example, 1.0))))


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


def plan(program: Program, run: Run, stage: str) -> Plan:
    """Compiles the step at the configured batch size and at half of it, and reads the compiler's accounts."""
    data = program.data(program.optim)
    size = data.batch_size
    half = max(1, size // 2)
    full, compiled = _compile(program, run, data)
    smaller = program.data(dataclasses.replace(program.optim, batch_size=half))
    less = _compile(program, run, smaller)[0] if half < size else full
    slope = (full["peak"] - less["peak"]) / max(size - half, 1)
    cost = compiled.cost_analysis() or {}
    frozen = program.frozen()
    frozen = frozen["params"] if isinstance(frozen, dict) and "params" in frozen else {}
    return Plan(
        stage=stage,
        trainable=_count(jax.eval_shape(program.init)),
        frozen=_count(frozen),
        batch_size=size,
        steps=data.steps,
        flops=float(cost.get("flops", 0.0)),
        state=full["state"],
        tables=full["tables"],
        activations=full["temporaries"],
        peak=full["peak"],
        fixed=int(full["peak"] - slope * size),
        per_example=slope,
        examples=len(data.users),
    )


def _compile(program: Program, run: Run, data: TrainingData) -> tuple[dict[str, int], Any]:
    config = run.config.training
    mesh = make_mesh(config.mesh)
    optimizer = make_optimizer(program.optim, data.steps)
    state = jax.eval_shape(lambda: make_state(program.init(), optimizer))
    shardings = layout(state, mesh)
    frozen = _shapes(program.frozen())
    state, frozen = _placed(state, shardings), _placed(frozen, layout(frozen, mesh))
    step = make_train_step(program.loss_fn, optimizer, seed=0, skip=config.skip_non_finite, shardings=shardings)
    # Batches of one stage differ in length; the largest decides.
    count = len(data.batches)
    at = np.unique(np.linspace(0, count - 1, min(count, _SAMPLED_BATCHES)).astype(int))
    batch = max((data.batches[int(index)] for index in at), key=_bytes)
    compiled = step.lower(state, frozen, place_batch(batch, mesh)).compile()
    return step_memory(compiled) | {"state": _bytes(state, mesh), "tables": _bytes(frozen, mesh)}, compiled


def step_memory(compiled: Any) -> dict[str, int]:
    """Bytes on one device of a compiled step: `temporaries`, and the `peak` of training with arguments and results."""
    memory = compiled.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak += memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    if jax.default_backend() == "cpu":
        # The runtime gives a step's temporaries back after its results are ready, when `fit` has already given the
        # next step its own; an accelerator's allocator hands them on in the order of the work.
        peak += memory.temp_size_in_bytes
    return {"temporaries": memory.temp_size_in_bytes, "peak": peak}


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, shardings)


def _bytes(tree: Any, mesh: Any = None) -> int:
    """Bytes of a tree's leaves; with a mesh, of the part on one device."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape) if mesh is not None else leaf.shape
        total += int(np.prod(shape, dtype=np.int64)) * leaf.dtype.itemsize
    return total


def _count(tree: Any) -> int:
    return sum(int(np.prod(leaf.shape, dtype=np.int64)) for leaf in jax.tree.leaves(tree))


def _shapes(tree: Any) -> Any:
    def shape(x: Any) -> jax.ShapeDtypeStruct:
        return x if isinstance(x, jax.ShapeDtypeStruct) else jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype)

    return jax.tree.map(shape, tree)


def device_memory() -> int:
    """Bytes that a device offers this process: an accelerator's limit, or what the machine's memory has left."""
    statistics = jax.local_devices()[0].memory_stats()
    if statistics and "bytes_limit" in statistics:
        return int(statistics["bytes_limit"])
    with open("/proc/meminfo", encoding="ascii") as file:
        kib = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    return kib * 1024


def print_plans(run: Run, stages: tuple[str, ...], memory: int, console: Console) -> None:
    """Plans the training stages among `stages` and prints them in a table.

    Args:
      run: A run whose fields stage is finished.
      stages: Names of stages; those that train nothing are passed over.
      memory: Bytes per device, for the largest batch.
      console: Terminal.
    """
    files = [file for file in (run.folder / "fields").rglob("*") if file.is_file()]
    plans = [plan(program_of(run, stage), run, stage) for stage in stages if stage_of(stage).program is not None]
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
    ):
        table.add_row(name, *map(shown, plans), style="bold" if name == "peak" else None)
    console.print(f"Plan of {run.folder}, per device of {_size(memory)}")
    console.print(table)
    items, qformer = len(run.dataset.catalogue.item_ids), run.config.item.qformer
    tokens = 2 * items * (qformer.queries + 1) * qformer.width
    console.print(
        f"field cache {_size(sum(file.stat().st_size for file in files))}, item tokens {_size(tokens)} on disk; "
        "the interpreter, its libraries and the host's data come on top of the peak"
    )


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.1f} MiB"
