"""What a training step of the joint stage holds, sends and takes at least on devices that need not be here.

    python benchmarks/topologies.py [--programs v5e-8:0_6b:fsdp ...]

A program is a target, a model and a mesh: an axis that all devices are on, or the sizes of data, fsdp and tensor.

Qwen3-Embedding with adapters of rank 16, width 1,024, 100,000 items, 64 histories with prompts of 16 and 420 tokens,
4,096 sampled negatives. Nothing runs: with libtpu, programs for TPUs are compiled by its compiler, else for as many
simulated CPUs, where bfloat16 weights are gathered as float32. Each program is compiled in a process of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from common import begin

BATCH, POSITIONS, INSTRUCTION = 64, 20, 16
PROGRAMS = [f"{target}:{model}:fsdp" for target in ("v5e-8", "v6e-8", "v5p-8") for model in ("0_6b", "4b", "8b")]
PROGRAMS += ["v5e-8:0_6b:data", "v5e-8:0_6b:2x2x2"]


def axes_of(mesh: str, count: int) -> dict[str, int]:
    """Sizes of a mesh's axes, of so many devices."""
    from nqf.ops.pins import AXES

    return dict(zip(AXES, map(int, mesh.split("x")), strict=True)) if "x" in mesh else {mesh: count}


def compiled(program: str, quick: bool) -> dict[str, Any]:
    """Compiles one program, and reads it."""
    import jax.numpy as jnp
    import numpy as np
    from world import configuration, make_world, training

    from nqf.config import MeshConfig
    from nqf.models.qwen3 import Qwen3Config
    from nqf.stages.plan import step_memory
    from nqf.training.compiled import collectives, product_flops
    from nqf.training.devices import TARGETS, mesh_of
    from nqf.training.mesh import batch_layout, bytes_on_device, placed

    name, model, axes = program.split(":")
    target = TARGETS[name]
    mesh, why = mesh_of(target, MeshConfig(**axes_of(axes, target.count)))
    items, width = (1_000, 64) if quick else (100_000, 1_024)
    world = make_world(items=items, lengths=np.full(BATCH, POSITIONS + 1), seed=0, text=width, tokens=(4, width // 4))
    config = configuration(batch=BATCH, positions=POSITIONS, negatives="sampled", width=width // 4)
    user = dataclasses.replace(config.user, qformer=dataclasses.replace(config.user.qformer, queries=16))
    candidates = dataclasses.replace(config.candidates, width=width)
    config = dataclasses.replace(config, user=user, candidates=candidates)
    small = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=9, vocab_size=2_000) if quick else {}
    backbone = getattr(Qwen3Config, f"qwen3_embedding_{model}")(
        lora_rank=16, remat=True, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, **small
    )
    made = training(world, config, "joint", backbone=backbone, instruction=INSTRUCTION, abstract=True, mesh=mesh)
    batch = world.data(config, "joint").batches[0]
    traced = made.compiled.trace(made.state, made.frozen, placed(batch, batch_layout(batch, mesh)))
    step = traced.lower().compile()
    return step_memory(step, here=False) | {
        "held": bytes_on_device(made.state) + bytes_on_device(made.frozen),
        "flops": product_flops(traced.jaxpr.jaxpr),
        "sent": sum(one.sent for one in collectives(step.as_text())),
        "by": "simulated CPUs" if why else "libtpu",
    }


def main() -> None:
    def arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--programs", nargs="+", default=PROGRAMS)
        parser.add_argument("--one", help=argparse.SUPPRESS)

    bench = begin(__file__, __doc__, arguments)
    options = bench.options
    if options.one:
        print(json.dumps(compiled(options.one, options.quick)))
        return
    from nqf.training.devices import TARGETS

    def row(program: str) -> list[Any]:
        name, model, mesh = program.split(":")
        target = TARGETS[name]
        axes = " x ".join(f"{axis} {size}" for axis, size in axes_of(mesh, target.count).items())
        command = [sys.executable, __file__, "--device", "cpu", "--one", program]
        done = subprocess.run(
            [*command, *(["--quick"] if options.quick else [])],
            capture_output=True,
            text=True,
            # libtpu lets one process in, as if there were devices to share.
            env={**os.environ, "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "true"},
        )
        if done.returncode:
            # What does not fit is said by the compiler, in its last line.
            return [name, model, axes, *[""] * 6, done.stderr.strip().splitlines()[-1][:90]]
        found = json.loads(done.stdout.splitlines()[-1])
        times = (found["flops"] / target.count / target.flops, found["sent"] / target.link)
        gib = [found[key] / 2**30 for key in ("held", "temporaries", "peak", "sent")]
        bench.say(f"{name}, {model}, {axes}: {gib[-1]:.2f} GiB sent")
        return [name, model, axes, *gib, *(1e3 * seconds for seconds in times), found["by"]]

    # A compiler of one program uses one core.
    with ThreadPoolExecutor(os.cpu_count()) as compilers:
        rows = list(compilers.map(row, options.programs))
    columns = ["devices", "model", "mesh", "held, GiB", "temporaries, GiB", "peak, GiB", "sent, GiB"]
    columns += ["products, ms", "traffic, ms", "compiled by"]
    bench.finish([{"title": "A step on each device", "columns": columns, "rows": rows}])


if __name__ == "__main__":
    main()
