"""Run by test_topology.py in a process of eight simulated devices: `python eight_devices.py RUN FOLDER`.

Writes report.json, and a checkpoint of all eight devices, into the folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import numpy as np
import optax
from captured import arguments_of_fit

from nqf.config import MeshConfig
from nqf.evaluation.ranking import rank_vectors, top_k
from nqf.ops.attention import dot_product_attention
from nqf.ops.pins import on_examples_and_heads
from nqf.stages import tokens as stage_tokens
from nqf.stages.item import load_items
from nqf.stages.run import open_run
from nqf.training.checkpoint import Checkpointer
from nqf.training.loop import make_state, make_train_step
from nqf.training.mesh import layout, leaf_name, make_mesh, place, place_batch

MESHES = {
    "data": (8, 1, 1),
    "fsdp": (1, 8, 1),
    "tensor": (1, 1, 8),
    "mixed": (2, 2, 2),
}


def mesh_of(data: int, fsdp: int, tensor: int) -> jax.sharding.Mesh:
    devices = jax.devices()[: data * fsdp * tensor]
    return make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), devices)


def steps(fit: dict, mesh: jax.sharding.Mesh) -> dict:
    """Two steps on one batch: losses, gradients of both, the state, and how often the step was compiled."""
    # Its state is the gradient itself.
    optimizer = optax.chain(optax.trace(decay=0.0), optax.scale(-0.1))
    state = make_state(fit["params"], optimizer)
    shardings = layout(state, mesh)
    state = place(state, shardings)
    frozen = place(fit["frozen"], layout(fit["frozen"], mesh))
    step = make_train_step(fit["loss_fn"], optimizer, seed=3, skip=0, shardings=shardings)
    losses, gradients = [], []
    for _ in range(2):
        state, metrics = step(state, frozen, place_batch(fit["data"].batches[0], mesh))
        losses.append(float(metrics["loss"]))
        gradients.append(jax.device_get(state.opt_state[0].trace))
    return {"losses": losses, "gradients": gradients, "state": state, "compilations": step._cache_size()}


def difference(one: list, other: list) -> float:
    """Norm of the difference of two gradients over the norm of the first."""
    one, other = (np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)]) for tree in (one, other))
    return float(np.linalg.norm(one - other) / np.linalg.norm(one))


def shares(state: object) -> float:
    """Bytes of the state that the first device holds, as a share of all."""
    leaves = jax.tree.leaves(state)
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves) / sum(leaf.nbytes for leaf in leaves)


def compare_meshes(run: Path, stage: str) -> tuple[dict, object]:
    """Per mesh, what differs from one device in the step of a stage; and the state on the last mesh."""
    report = {}
    fit = arguments_of_fit(run, stage)
    alone = steps(fit, mesh_of(1, 1, 1))
    for name, sizes in MESHES.items():
        spread = steps(fit, mesh_of(*sizes))
        report[name] = {
            "loss": max(abs(a - b) / abs(a) for a, b in zip(alone["losses"], spread["losses"], strict=True)),
            "gradient": difference(alone["gradients"], spread["gradients"]),
            "compilations": spread["compilations"],
            "share": shares(spread["state"].params),
        }
    report["one step on"] = difference(alone["gradients"][:1], alone["gradients"][1:])
    return report, spread["state"]


def restore_elsewhere(state: object, folder: Path) -> dict:
    """Saves a state of eight devices and restores it on fewer; whether every bit came back, and on how many devices."""
    report = {}
    with Checkpointer(folder) as checkpointer:
        checkpointer.save(2, state, best_step=0)
    written = {device for leaf in jax.tree.leaves(state) for device in leaf.sharding.device_set}
    for sizes in ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 2, 2), (4, 1, 1)):
        mesh = mesh_of(*sizes)
        wanted = place(jax.tree.map(np.zeros_like, jax.device_get(state)), layout(state, mesh))
        with Checkpointer(folder) as checkpointer:
            restored = checkpointer.restore(2, wanted)
        pairs = zip(jax.tree.leaves(jax.device_get(state)), jax.tree.leaves(jax.device_get(restored)), strict=True)
        devices = {device for leaf in jax.tree.leaves(restored) for device in leaf.sharding.device_set}
        equal = all(a.tobytes() == b.tobytes() for a, b in pairs)
        report["x".join(map(str, sizes))] = {"equal": equal, "from": len(written), "to": len(devices)}
    return report


def ranking() -> dict:
    """Ranks and best items over a catalogue with ties, computed on all devices."""
    random = np.random.default_rng(0)
    users, items = (random.standard_normal((count, 16)).astype(np.float32) for count in (300, 5_000))
    items[2_500:2_600] = items[:100]
    targets = random.integers(0, len(items), len(users))
    seen = [random.integers(0, len(items), 20) for _ in users]
    scores, rows = top_k(users, items, 20, seen)
    ranks = {
        f"chunk {chunk}": rank_vectors(users, items, targets, seen, chunk=chunk).tolist() for chunk in (1_024, 8_192)
    }
    return {"ranks": ranks, "rows": rows.tolist(), "scores": scores.tolist()}


def attention(mesh: jax.sharding.Mesh) -> dict:
    """What a kernel that the compiler can't split is given on each device, and the difference to attention of all."""
    random, seen = np.random.default_rng(0), []
    qkv = [random.standard_normal((8, 5, heads, 4)).astype(np.float32) for heads in (4, 2, 2)]

    def kernel(*qkv: jax.Array) -> jax.Array:
        seen.extend(list(one.shape) for one in qkv)
        return dot_product_attention(*qkv, is_causal=True)

    with jax.set_mesh(mesh):
        found = jax.jit(lambda *qkv: on_examples_and_heads(kernel, *qkv))(*qkv)
    wanted = dot_product_attention(*map(jax.numpy.asarray, qkv), is_causal=True)
    return {"seen": seen[:2], "difference": float(abs(np.asarray(found) - np.asarray(wanted)).max())}


def tokens(run: Path, folder: Path) -> None:
    """Writes the catalogue's tokens, computed in pieces on all devices."""
    opened = open_run(run)
    stage_tokens.ENCODE_CHUNK = 20
    stage_tokens.write_tokens(opened, *load_items(opened), folder)


def main() -> None:
    run, folder = map(Path, sys.argv[1:3])
    report = {"devices": jax.device_count(), "ranking": ranking(), "stages": {}}
    report["attention"] = {name: attention(mesh_of(*sizes)) for name, sizes in MESHES.items()}
    for stage in ("item", "joint"):
        report["stages"][stage], state = compare_meshes(run, stage)
    tokens(run, folder)
    report["restored"] = restore_elsewhere(state, folder / "checkpoints")
    # For the comparison with what a process of one device reads.
    names = {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)}
    np.savez(folder / "params.npz", **jax.device_get(names))
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    main()
