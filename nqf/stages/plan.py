"""What a training stage will take, from shapes and the compiled step: nothing is trained and no weight is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from nqf.config import OptimConfig
from nqf.interop.tensors import read_json, resolve_folder
from nqf.models.qwen3 import Qwen3Config
from nqf.models.recommender import ItemTables, JointModel
from nqf.pipelines.datasets import TrainingData
from nqf.pipelines.pairs import pair_source
from nqf.stages.artifacts import StageError, status
from nqf.stages.item import (
    device_fields,
    empty_fields,
    held_out_items,
    item_data,
    item_module,
    make_item_loss,
)
from nqf.stages.joint import (
    Joint,
    catalogue_tokenizer,
    init_joint,
    make_joint_loss,
    prompt_ids,
    run_tokenizer,
    small_qwen3,
    with_adapters,
)
from nqf.stages.ranker import compute_dtype
from nqf.stages.run import Run
from nqf.stages.user import frozen_tables, history_data, init_user, log_popularity, make_user_loss, user_module
from nqf.training.loop import LossFn, make_state, make_train_step
from nqf.training.mesh import layout, make_mesh, place_batch
from nqf.training.optimizer import make_optimizer

_SAMPLED_BATCHES = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A stage's training step without any array on a device.

    Attributes:
      loss_fn: As `loop.fit` takes it.
      params: Shapes of the trainable parameters.
      frozen: Shapes of what the loss reads and nobody changes.
      data: Batches for an `OptimConfig`.
      optim: The stage's.
    """

    loss_fn: LossFn
    params: Any
    frozen: Any
    data: Callable[[OptimConfig], TrainingData]
    optim: OptimConfig


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
    if reason := status(run.config, "fields", run.folder):
        raise StageError(
            f"--plan reads the catalogue's shapes from stage 'fields', but {reason}; run --stage fields first"
        )
    return {"item": _item_program, "user": _user_program, "joint": _joint_program}[stage](run)


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
    frozen = program.frozen["params"] if isinstance(program.frozen, dict) and "params" in program.frozen else {}
    return Plan(
        stage=stage,
        trainable=_count(program.params),
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
    state = jax.eval_shape(lambda params: make_state(params, optimizer), program.params)
    shardings = layout(state, mesh)
    state, frozen = _placed(state, shardings), _placed(program.frozen, layout(program.frozen, mesh))
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
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype), tree)


def _item_program(run: Run) -> Program:
    module = item_module(run)
    held = held_out_items(run)
    source = pair_source(run.dataset.interactions, run.dataset.split, len(held), held)
    frozen, _ = item_data(run, source, run.config.item.optim)
    ones = dict.fromkeys(run.cache.names, 1.0)
    return Program(
        loss_fn=make_item_loss(module, run.config.item, ones, ones),
        params=jax.eval_shape(module.init, jax.random.key(0), *empty_fields(run.cache, 1))["params"],
        frozen=_shapes(frozen),
        data=lambda optim: item_data(run, source, optim)[1],
        optim=run.config.item.optim,
    )


def _tables(run: Run, words: int) -> ItemTables:
    """Item tables of the run's shapes that take no memory: every element is the same zero."""
    items, qformer, candidates = len(run.dataset.catalogue.item_ids), run.config.item.qformer, run.cache.candidates
    text = candidates.values.shape[1] if candidates is not None else 1
    if run.config.candidates.text_width and candidates is not None:
        text = min(text, run.config.candidates.text_width)
    fields = 0
    if "fields" in run.config.candidates.sources:
        fields = sum(min(width, run.config.candidates.text_width or width) for width in run.cache.widths.values())

    def zeros(dtype: Any, *shape: int) -> np.ndarray:
        return np.broadcast_to(np.zeros((), dtype), shape)

    return ItemTables(
        tokens=zeros(np.float16, items, qformer.queries, qformer.width),
        vectors=zeros(np.float16, items, qformer.width),
        fields=zeros(np.float16, items, fields),
        text=zeros(np.float32, items, text),
        has_text=zeros(bool, items),
        trained=zeros(bool, items),
        titles=zeros(np.int32, items, words),
    )


def _user_program(run: Run) -> Program:
    config, tables = run.config, _tables(run, 0)
    module = user_module(config, tables)
    on_device = frozen_tables(run, tables, config.user.loss)
    return Program(
        loss_fn=make_user_loss(config, module),
        params=jax.eval_shape(lambda: init_user(run, module, tables)),
        frozen=_shapes({"tables": on_device, "log_popularity": log_popularity(run)}),
        data=lambda optim: history_data(run, config.user.loss, optim, None if on_device else tables, 0),
        optim=config.user.optim,
    )


def _joint_program(run: Run) -> Program:
    config, stage = run.config, run.config.joint
    backbone, dtype = stage.backbone, compute_dtype(config.training.dtype)
    names = ["qwen3"] if backbone.path else []
    if stage.prompt.user_tokens and not stage.train_user_qformer:
        names.append("user_qformer")
    if backbone.path:
        tokenizer = run_tokenizer(run)
        tree = read_json(resolve_folder(backbone.path) / "config.json")
        qwen3 = with_adapters(Qwen3Config.from_hf(tree, dtype=dtype, param_dtype=dtype), backbone, dtype)
    else:
        # Not the stage's own, which it keeps in its folder.
        tokenizer = catalogue_tokenizer(run)
        qwen3 = small_qwen3(backbone, tokenizer.rows, dtype)
    tables = _tables(run, stage.prompt.title_tokens)
    module = JointModel(
        config=config, backbone=qwen3, items=len(tables.has_text), item_tokens=tables.tokens.shape[1:], dtype=dtype
    )
    prompt = prompt_ids(config, tokenizer)

    def shapes(frozen: list[str]) -> Any:
        joint = Joint(module=module, frozen=dict.fromkeys(frozen), prompt=prompt, tables=tables, tokenizer=tokenizer)
        return jax.eval_shape(lambda: init_joint(run, joint))

    params = shapes(names)
    on_device = frozen_tables(run, tables, stage.loss)
    frozen = {"tables": on_device, "prompt": prompt, "log_popularity": log_popularity(run)}
    items = None
    if stage.train_item_qformer:
        items, frozen["fields"] = item_module(run), device_fields(run.cache)
        params["item_qformer"] = jax.eval_shape(items.init, jax.random.key(0), *empty_fields(run.cache, 1))["params"]
    everything = shapes([])["params"]
    return Program(
        loss_fn=make_joint_loss(config, module, items),
        params=params,
        frozen=_shapes(frozen) | {"params": {name: everything[name] for name in names}},
        data=lambda optim: history_data(run, stage.loss, optim, None if on_device else tables, 0),
        optim=stage.optim,
    )


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
    plans = [plan(program_of(run, stage), run, stage) for stage in stages if stage in ("item", "user", "joint")]
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
