"""Runs of smallest.yaml in subprocesses: started, killed, copied and compared."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

ROOT = Path(__file__).parents[2]
CONFIG = Path(__file__).with_name("smallest.yaml")
STAGES = ("fields", "counts", "item", "tokens", "user", "joint", "score")
WALL_TIME = {"time", "items_per_second", "seconds", "wall_seconds", "finished"}


def command(folder: Path, *options: str, module: str = "nqf.train") -> list[str]:
    """The command line of a run."""
    if module == "nqf.train":
        return [sys.executable, "-m", module, "--config", str(CONFIG), "--run", str(folder), *options]
    return [sys.executable, "-m", module, str(folder), *options]


def start(
    folder: Path, *options: str, module: str = "nqf.train", devices: int = 1, **environment: str
) -> subprocess.Popen:
    """Starts a command on simulated devices; its output goes to the pipe of the returned process."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        command(folder, *options, module=module),
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen, code: int = 0) -> str:
    """Waits for a command; its output. It takes a minute, and many on a machine that does other things."""
    try:
        output = process.communicate(timeout=2_400)[0]
    finally:
        process.kill()
    assert process.returncode == code, f"exit code {process.returncode}, expected {code}:\n{output}"
    return output


def copy_run(source: Path, target: Path, *, until: str) -> Path:
    """Copies a finished run as it was before a stage began."""
    later = STAGES[STAGES.index(until) :]
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("eval", "tensorboard", "sasrec", "README.md"))
    for stage in later:
        shutil.rmtree(target / stage)
    if until == "fields":
        shutil.rmtree(target / "data")
    path = target / "metrics.jsonl"
    kept = [line for line in path.read_text().splitlines() if json.loads(line)["stage"] not in later]
    path.write_text("".join(f"{line}\n" for line in kept))
    return target


def without_wall_time(tree: dict) -> dict:
    """A record without what depends on the clock."""
    return {key: value for key, value in tree.items() if key not in WALL_TIME}


def metrics(folder: Path, stage: str) -> list[dict]:
    """A stage's lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [without_wall_time(line) for line in lines if line["stage"] == stage]


def result(folder: Path, stage: str) -> dict:
    """A stage's record without what depends on the clock."""
    return without_wall_time(json.loads((folder / stage / "stage.json").read_text())["result"])


def checkpoint_steps(folder: Path, stage: str) -> list[int]:
    """Steps of the whole checkpoints."""
    checkpoints = folder / stage / "checkpoints"
    if not checkpoints.is_dir():
        return []
    return sorted(int(path.name) for path in checkpoints.iterdir() if path.name.isdecimal())


def states(folder: Path, stage: str) -> dict[str, bytes]:
    """Every array of the best and of the newest checkpoint, byte for byte."""
    best = json.loads((folder / stage / "stage.json").read_text())["result"]["best_step"]
    arrays, here = {}, jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for step in {best, checkpoint_steps(folder, stage)[-1]}:
        path = folder / stage / "checkpoints" / str(step)
        # The devices that wrote it may be other processes', which are not here.
        tree = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
            ocp.metadata(path, "state").metadata,
        )
        _collect(ocp.load_checkpointables(path, {"state": tree})["state"], f"{step}", arrays)
    return arrays


def _collect(tree: object, path: str, arrays: dict[str, bytes]) -> None:
    if isinstance(tree, dict | list | tuple):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            _collect(value, f"{path}/{key}", arrays)
    elif tree is not None:
        arrays[path] = np.asarray(tree).tobytes()


def files(folder: Path, *parts: str) -> dict[str, str]:
    """SHA-256 of every file below some parts of a run, those that name times left out."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for part in parts
        for path in sorted((folder / part).rglob("*"))
        if path.is_file() and path.name != "stage.json"
    }


def outcome(folder: Path, stage: str) -> dict[str, object]:
    """All that a stage leaves, for comparison with another run."""
    if stage == "fields":
        return {"files": files(folder, "data", "fields"), "result": result(folder, stage)}
    if stage in ("counts", "tokens", "score"):
        return {"files": files(folder, stage), "result": result(folder, stage)}
    left = {"state": states(folder, stage), "metrics": metrics(folder, stage), "result": result(folder, stage)}
    return left | ({"files": files(folder, "joint/tokenizer")} if stage == "joint" else {})
