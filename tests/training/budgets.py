"""Run by test_budgets.py in a process of eight simulated devices: `python budgets.py RUN REPORT`.

Compiles every stage's step for several meshes, trains nothing, and writes what the programs cost as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from eight_devices import mesh_of
from world import configuration, make_world, small_backbone, training

from nqf.stages.plan import program_of
from nqf.stages.run import open_run
from nqf.training.compiled import arrays_in, collectives, instructions
from nqf.training.loop import make_state, make_train_step
from nqf.training.mesh import batch_layout, bytes_on_device, layout, placed
from nqf.training.optimizer import make_optimizer

MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (1, 1, 8), "mixed": (2, 2, 2)}
# The catalogue and the vocabulary are divided by nothing, and no other axis is as long as a batch or a prompt.
ITEMS, VOCABULARY, BATCH, HISTORY, POSITIONS, INSTRUCTION = 1_009, 2_003, 40, 11, 6, 5
# Of a prompt, what follows its instruction: two tokens of an item, and two user tokens and the end of a branch.
PROMPT = POSITIONS * 5
BACKBONE = dict(vocab_size=VOCABULARY, hidden_size=256, intermediate_size=768, num_hidden_layers=9, remat=True)
HEADS = dict(num_attention_heads=8, num_key_value_heads=8, head_dim=32)


def size(tree: Any) -> int:
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def costs(step: Any, state: Any, frozen: Any, batch: Any, lengths: tuple[int, ...]) -> dict[str, Any]:
    """What a step costs; `lengths` are the axes of a batch of activations that no device may hold in a loop."""
    text = step.lower(state, frozen, batch).compile().as_text()
    whole = [
        one.result[:80]
        for one in instructions(text)
        if lengths and one.loops and any(set(lengths) <= set(shape) for _, shape in arrays_in(one.result))
    ]
    found = collectives(text)
    return {
        "sent": sum(one.sent for one in found),
        "largest": max((one.bytes for one in found), default=0),
        "whole batches in loops": len(whole),
        "example": whole[:1],
        "state": bytes_on_device(state) / size(state),
        "frozen": bytes_on_device(frozen) / size(frozen),
    }


def rank_stage(stage: str, negatives: str, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Of the user stage, or of the joint stage with a base that is frozen but for its adapters."""
    world = make_world(items=ITEMS, lengths=np.full(BATCH, HISTORY + 1), seed=0)
    config = configuration(batch=BATCH, history=HISTORY, positions=POSITIONS, negatives=negatives, samples=64)
    backbone = small_backbone(lora_rank=4, **BACKBONE, **HEADS)
    made = training(world, config, stage, backbone=backbone, instruction=INSTRUCTION, abstract=True, mesh=mesh)
    batch = world.data(config, stage).batches[0]
    batch = placed(batch, batch_layout(batch, mesh))
    report = costs(made.compiled, made.state, made.frozen, batch, (BATCH, PROMPT) if stage == "joint" else ())
    return report | {"base": size(made.frozen.get("params", {})), "trained": size(made.state.params)}


def item_stage(run: Path, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Of the item stage, widened: that of the tiny run is all scalars and biases."""
    opened = open_run(run)
    item = opened.config.item
    item = dataclasses.replace(item, qformer=dataclasses.replace(item.qformer, width=128, mlp_width=512))
    opened = dataclasses.replace(opened, config=dataclasses.replace(opened.config, item=item))
    program = program_of(opened, "item")
    optimizer = make_optimizer(program.optim, 10)
    state, frozen = jax.eval_shape(lambda: make_state(program.init(), optimizer)), program.frozen()
    shardings = layout(state, mesh)
    step = make_train_step(program.loss_fn, optimizer, seed=0, skip=0, shardings=shardings)
    batch = program.data(program.optim).batches[0]
    batch = placed(batch, batch_layout(batch, mesh))
    state, frozen = placed(state, shardings), placed(frozen, layout(frozen, mesh))
    return costs(step, state, frozen, batch, ()) | {"base": 0, "trained": size(state.params)}


def main() -> None:
    run, report, found = Path(sys.argv[1]), Path(sys.argv[2]), {}
    for name, sizes in MESHES.items():
        mesh = mesh_of(*sizes)
        found[f"joint {name}"] = rank_stage("joint", "sampled", mesh)
        if name in ("fsdp", "mixed"):
            found[f"joint, full softmax, {name}"] = rank_stage("joint", "full", mesh)
            found[f"user {name}"] = rank_stage("user", "full", mesh)
            found[f"item {name}"] = item_stage(run, mesh)
        report.write_text(json.dumps(found, indent=1), encoding="utf-8")
        # What the compiler warns of belongs to the programs before.
        print(f"{name} done", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
