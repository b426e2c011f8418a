"""The joint step with Qwen3-Embedding of true size, compiled for TPUs that are not here; needs `pip install libtpu`.

Minutes each: `python -m pytest -m targets`. `make test` leaves them out, and CI has no libtpu.
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


@pytest.mark.targets
@pytest.mark.ci
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("model", WEIGHTS)
@pytest.mark.parametrize("device", ["v5e-8", "v6e-8", "v5p-8"])
def test_a_step_fits_and_moves_weights_alone(device: str, model: str) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "topologies.py"), "--device", "cpu", "--one"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([*command, device, model, "fsdp"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["by"] == "libtpu"
    assert found["peak"] < TARGETS[device].memory
    # The weights, for the forward pass and for what is computed again, and nothing of the size of the batch.
    assert found["sent"] < 3 * WEIGHTS[model] * 2**30
