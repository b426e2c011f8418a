"""What the steps may cost on eight devices, read from the programs that XLA compiles for simulated ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.ci]


@pytest.fixture(scope="module")
def budgets(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, dict], str]:
    """What budgets.py wrote, and what the compiler warned of."""
    path = tmp_path_factory.mktemp("budgets") / "report.json"
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    folders = [ROOT, ROOT / "benchmarks", ROOT / "tests", ROOT / "tests" / "training"]
    # A program that comes from a cache is not partitioned, and warns of nothing.
    quiet = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("budgets.py")), str(tiny_run), str(path)],
        env={**os.environ, **quiet, "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(map(str, folders))},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(path.read_text()), done.stderr


def test_weights_move_and_not_activations(budgets: tuple[dict[str, dict], str]) -> None:
    found = budgets[0]
    for name in ("fsdp", "mixed"):
        for stage in (f"joint {name}", f"joint, full softmax, {name}"):
            # The base is gathered by the forward and by the backward pass, a layer at a time.
            assert found[stage]["sent"] <= 3 * found[stage]["base"], (stage, found[stage])
            assert found[stage]["largest"] <= found[stage]["base"] / 9, (stage, found[stage])
        for stage in (f"user {name}", f"item {name}"):
            # Gathered twice, and a gradient; a batch's rows and small sums come on top.
            assert found[stage]["sent"] <= 6 * found[stage]["trained"], (stage, found[stage])
    # A gradient of what is trained, by two exchanges, and rows of the tables. The base stays where it is.
    assert found["joint data"]["sent"] <= 5 * found["joint data"]["trained"]


def test_no_device_holds_a_whole_batch_inside_the_loop_over_layers(budgets: tuple[dict[str, dict], str]) -> None:
    joint = {stage: found for stage, found in budgets[0].items() if stage.startswith("joint")}
    for stage, found in joint.items():
        # The axis `tensor` splits no batch.
        if stage != "joint tensor":
            assert not found["whole batches in loops"], (stage, found["example"])


def test_the_compiler_copies_nothing_whole_that_it_was_told_to_split(budgets: tuple[dict[str, dict], str]) -> None:
    assert "nvoluntary full rematerialization" not in budgets[1]


def test_tables_and_states_are_split(budgets: tuple[dict[str, dict], str]) -> None:
    for stage, found in budgets[0].items():
        if "fsdp" in stage:
            # An eighth, and vectors of a layer's width, which stay whole.
            assert found["state"] <= 0.4, (stage, found)
            # The fields of the tiny catalogue are more rows' numbers than vectors.
            assert found["frozen"] <= 0.25 or stage.startswith("item"), (stage, found)
