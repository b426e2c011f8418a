"""Eight simulated devices: the step, the ranking and the checkpoints are those of one device."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import eight_devices
import jax
import numpy as np
import pytest

from nqf.training.checkpoint import restore_params

ROOT = Path(__file__).parents[2]
# Relative rounding of float32 sums in another order. The gradient's is the norm of the difference over the norm.
LOSS, GRADIENT = 1e-6, 5e-6


@pytest.fixture(scope="module")
def spread(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """What eight_devices.py wrote: its folder and its report."""
    folder = tmp_path_factory.mktemp("eight")
    # Optimizing the programs, which run for milliseconds, would take most of the time.
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("eight_devices.py")), str(tiny_run), str(folder)],
        env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((folder / "report.json").read_text())
    assert report["devices"] == 8
    return folder, report


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("stage", ["item", "joint"])
def test_loss_and_gradients_are_those_of_one_device(
    spread: tuple[Path, dict], stage: str, record: Callable[..., None]
) -> None:
    meshes = spread[1]["stages"][stage]
    # Gradients that hardly change from step to step would prove little.
    assert meshes.pop("one step on") > 100 * GRADIENT
    assert set(meshes) == {"data", "fsdp", "tensor", "mixed"}
    for name, found in meshes.items():
        assert found["loss"] <= LOSS and found["gradient"] <= GRADIENT, (name, found)
        assert found["compilations"] == 1, name
    # Split parameters are really split; small ones stay whole.
    # Of data parallelism the tables alone.
    assert 0.5 < meshes["data"]["share"] < 1 if stage == "joint" else meshes["data"]["share"] == 1
    assert all(meshes[name]["share"] < 0.5 for name in ("fsdp", "tensor", "mixed"))
    record(
        f"the step of stage `{stage}` on eight simulated devices instead of one: data, fsdp, tensor, all three",
        tried=len(meshes),
        survived=len(meshes),
        seen=f"nothing: one compilation, loss within {LOSS:g}, gradients within {GRADIENT:g} of one device's",
    )


@pytest.mark.slow
@pytest.mark.ci
def test_ranking_is_that_of_one_device(spread: tuple[Path, dict]) -> None:
    assert jax.device_count() == 1
    assert spread[1]["ranking"] == eight_devices.ranking()


@pytest.mark.slow
@pytest.mark.ci
def test_kernels_that_no_compiler_splits_run_on_shards(spread: tuple[Path, dict]) -> None:
    found = spread[1]["attention"]
    # Eight examples with four heads of two pairs; two heads are not split over eight devices.
    for name, (examples, heads) in {"data": (1, 4), "fsdp": (1, 4), "tensor": (8, 4), "mixed": (2, 2)}.items():
        assert found[name]["seen"] == [[examples, 5, heads, 4], [examples, 5, heads // 2, 4]]
        assert found[name]["difference"] < 1e-6


@pytest.mark.slow
@pytest.mark.ci
def test_tokens_are_the_bytes_of_one_device(spread: tuple[Path, dict], tiny_run: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nqf.stages.tokens.ENCODE_CHUNK", 20)
        eight_devices.tokens(tiny_run, tmp_path)
    for name in ("tokens.npy", "vectors.npy"):
        assert (spread[0] / name).read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.slow
@pytest.mark.ci
def test_checkpoint_of_eight_devices_is_restored_on_fewer(
    spread: tuple[Path, dict], record: Callable[..., None]
) -> None:
    folder, report = spread
    assert {found["to"] for found in report["restored"].values()} == {1, 2, 4}
    assert all(found["equal"] and found["from"] == 8 for found in report["restored"].values()), report["restored"]
    # And in a process that has one device only, as a laptop has.
    with np.load(folder / "params.npz", allow_pickle=False) as arrays:
        stored = {name: arrays[name] for name in arrays.files}
    wanted: dict = {}
    for name, array in stored.items():
        *parents, last = name.split("/")
        node = wanted
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = jax.ShapeDtypeStruct(array.shape, array.dtype)
    params = restore_params(folder / "checkpoints", 2, wanted)
    leaves = {"/".join(part.key for part in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    assert leaves.keys() == stored.keys()
    assert all(np.asarray(leaves[name]).tobytes() == stored[name].tobytes() for name in stored)
    record(
        "a checkpoint of eight devices restored on one, two and four, and in a process of one device",
        tried=len(report["restored"]) + 1,
        survived=len(report["restored"]) + 1,
        seen="nothing: every bit comes back",
    )
