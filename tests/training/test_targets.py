"""The joint step with Qwen3-Embedding of true size, compiled for TPUs that are not here; needs `pip install libtpu`.

`python -m pytest -m targets` takes minutes for each program. `make test` leaves them out, and CI has no libtpu. The
rows are those that `python benchmarks/topologies.py` writes.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nqf.training.devices import TARGETS

ROOT = Path(__file__).parents[2]
# bfloat16 weights of the checkpoints on the hub, in GiB.
WEIGHTS = {"0_6b": 1.11, "4b": 7.49, "8b": 14.1}

pytestmark = [
    pytest.mark.targets,
    pytest.mark.ci,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
]


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], dict]:
    """The rows of the table, by device, model and mesh."""
    folder = tmp_path_factory.mktemp("topologies")
    command = [sys.executable, str(ROOT / "benchmarks" / "topologies.py"), "--device", "cpu", "--results", str(folder)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    # As its users run it, not as the tests of this process are compiled.
    environment.pop("XLA_FLAGS", None)
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    table = json.loads((folder / "topologies.json").read_text())["tables"][0]
    return {tuple(row[:3]): dict(zip(table["columns"][3:], row[3:], strict=True)) for row in table["rows"]}


@pytest.mark.parametrize("model", WEIGHTS)
@pytest.mark.parametrize("device", ["v5e-8", "v6e-8", "v5p-8"])
def test_a_step_fits_and_moves_weights_alone(device: str, model: str, steps: dict[tuple[str, str, str], dict]) -> None:
    target = TARGETS[device]
    found = steps[device, model, f"fsdp {target.count}"]
    assert found["compiled by"] == "libtpu", found
    assert found["peak, GiB"] * 2**30 < target.memory
    # The weights, for the forward pass and for what is computed again, and nothing of the size of the batch.
    assert found["sent, GiB"] < 3 * WEIGHTS[model]


def test_data_parallelism_moves_gradients_alone(steps: dict[tuple[str, str, str], dict]) -> None:
    found = steps["v5e-8", "0_6b", "data 8"]
    assert found["compiled by"] == "libtpu" and found["peak, GiB"] * 2**30 < TARGETS["v5e-8"].memory
    assert found["sent, GiB"] < WEIGHTS["0_6b"]


def test_a_mesh_of_all_axes_fits(steps: dict[tuple[str, str, str], dict]) -> None:
    found = steps["v5e-8", "0_6b", "data 2 x fsdp 2 x tensor 2"]
    assert found["compiled by"] == "libtpu" and found["peak, GiB"] * 2**30 < TARGETS["v5e-8"].memory
