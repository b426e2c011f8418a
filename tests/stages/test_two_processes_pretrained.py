"""Two processes of two devices each, a pretrained base split over all four: the training of one process and device.

Each reads its parts of the base alone. `watched_process.py` is what they run.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from published import qwen3_folder

from nqf.stages import joint
from nqf.stages.run import open_run
from nqf.training.checkpoint import restore_params
from nqf.training.mesh import leaf_name

pytestmark = [pytest.mark.slow, pytest.mark.ci]
ROOT = Path(__file__).parents[2]
# As in test_topology.py, the first of losses and the second of all parameters; and the absolute one of CONTRIBUTING.md.
LOSS, NORM, ABSOLUTE = 1e-6, 5e-6, 1e-5
OPTIONS = {
    "joint.backbone.lora-rank": 4,
    "joint.optim.epochs": 2,
    "joint.optim.learning-rate": 3e-3,
    "joint.optim.adapter-learning-rate": 1e-2,
}


def start(run: Path, report: Path, base: Path, *options: str, devices: int, **environment: str) -> subprocess.Popen:
    """Starts the joint stage of a run in a process of its own; what it says is in a file beside its report."""
    given = OPTIONS | {"joint.backbone.path": base}
    arguments = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    program = [sys.executable, str(Path(__file__).with_name("watched_process.py")), str(report)]
    with open(report.with_suffix(".log"), "w") as log:
        return subprocess.Popen(
            [*program, "--run", str(run), "--stage", "joint", *arguments, *options],
            env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), **environment},
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def finish(processes: list[subprocess.Popen], folder: Path) -> None:
    try:
        for process in processes:
            process.wait(timeout=2_400)
    finally:
        # The other one waits for a process that failed.
        for process in processes:
            process.kill()
    said = "\n".join(log.read_text() for log in sorted(folder.glob("*.log")))
    assert all(process.returncode == 0 for process in processes), said


@pytest.fixture(scope="module")
def trained(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs `one` and `two`, and the reports one.json, two-0.json and two-1.json."""
    folder = tmp_path_factory.mktemp("pretrained")
    base = qwen3_folder(folder / "base")
    for name in ("one", "two"):
        shutil.copytree(tiny_run, folder / name)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{server.getsockname()[1]}"
    together = [
        start(
            folder / "two",
            folder / f"two-{index}.json",
            base,
            "--training.distributed",
            *("--training.mesh.fsdp", "4"),
            devices=2,
            JAX_COORDINATOR_ADDRESS=address,
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(index),
        )
        for index in range(2)
    ]
    finish(together, folder)
    finish([start(folder / "one", folder / "one.json", base, devices=1)], folder)
    return folder


def losses(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if line["stage"] == "joint" and "loss" in line]


def parameters(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What the joint stage of a run started from, and its parameters after the last step."""
    run = open_run(folder)
    parts = joint.joint_parts(run)
    first = joint.start_joint(run, joint.init_joint(run, parts))
    checkpoints = folder / "joint" / "checkpoints"
    step = max(int(path.name) for path in checkpoints.iterdir() if path.name.isdecimal())
    last = restore_params(checkpoints, step, jax.eval_shape(lambda: joint.init_joint(run, parts)))
    return named(first), named(last)


def named(tree: Any) -> dict[str, np.ndarray]:
    return {leaf_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def norm(tree: dict[str, np.ndarray]) -> float:
    return float(np.sqrt(sum(np.square(leaf, dtype=np.float64).sum() for leaf in tree.values())))


def test_parameters_are_those_of_one_process(trained: Path) -> None:
    # The parameters themselves are compared, so none of the two may have been left out of the training.
    (first, one), (_, two) = (parameters(trained / name) for name in ("one", "two"))
    assert one.keys() == two.keys() and any("lora_b" in name for name in one)
    for name, leaf in one.items():
        if "lora_b" in name:
            assert np.abs(leaf - first[name]).max() > 100 * ABSOLUTE, name
            np.testing.assert_allclose(two[name], leaf, rtol=0, atol=ABSOLUTE, err_msg=name)
    first, one, two = (seen(tree) for tree in (first, one, two))
    assert norm({name: one[name] - two[name] for name in one}) <= NORM * norm(one)
    assert norm({name: one[name] - first[name] for name in one}) > 1_000 * NORM * norm(one)


def seen(tree: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Without biases that all keys of a softmax share, which it does not see: the gradient is rounding alone, of which
    Adam makes steps. They are the keys' own, and that of the unknown gap (the last one), which only padding has."""
    kept = {name: leaf for name, leaf in tree.items() if not name.endswith("key/bias")}
    return {name: leaf[:-1] if "gap_bias" in name else leaf for name, leaf in kept.items()}


def test_losses_are_those_of_one_process(trained: Path) -> None:
    one, two = (losses(trained / name) for name in ("one", "two"))
    assert len(one) >= 2 and [step for step, _ in one] == [step for step, _ in two]
    np.testing.assert_allclose([loss for _, loss in two], [loss for _, loss in one], rtol=LOSS)
    # One process writes.
    assert len(set(two)) == len(two)


def parts_of(rows: list[dict[str, Any]]) -> set[str]:
    return {json.dumps(row["part"]) for row in rows}


def test_a_process_reads_and_holds_its_parts_of_the_base_alone(trained: Path) -> None:
    alone = {row["name"]: row for row in json.loads((trained / "one.json").read_text())["parameters"]}
    reports = [json.loads((trained / f"two-{index}.json").read_text()) for index in range(2)]
    assert [report["devices"] for report in reports] == [4, 4]
    split = 0
    for first, second in zip(*(report["parameters"] for report in reports), strict=True):
        whole = alone[first["name"]]
        assert first["name"] == second["name"] and first["split"] == second["split"]
        assert sum(row["bytes"] for row in whole["read"]) == whole["bytes"] == first["bytes"]
        for row in (first, second):
            # Read once each, what lies on its devices and nothing else.
            assert parts_of(row["read"]) == parts_of(row["held"]) and len(parts_of(row["read"])) == len(row["read"])
        if first["split"]:
            split += first["bytes"]
            # Quarters, of which nobody has the other's.
            assert not parts_of(first["read"]) & parts_of(second["read"])
            assert {part["bytes"] for part in first["read"] + second["read"]} == {first["bytes"] // 4}
            assert len(first["read"]) == len(second["read"]) == 2
        else:
            assert parts_of(first["read"]) == parts_of(second["read"]) == parts_of(whole["read"])
    # What is not split are the scales of norms.
    assert split > 0.98 * sum(row["bytes"] for row in alone.values())
