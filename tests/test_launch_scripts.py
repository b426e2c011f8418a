"""The launch scripts: a dry run of each prints a command that nqf.train understands, arguments untouched."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from nqf.train import parse

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "launch_scripts").glob("*.sh"))
# Spaces, quotes and what a shell would expand have to arrive as they are.
ARGUMENTS = ["--config", "configs/quickstart.yaml", "--name", "a b'c\"$HOME*", "--training.mesh.fsdp", "1"]
ENVIRONMENT = {"TPU": "my pod", "ZONE": "zone-b", "GPUS": "0,1", "GPU": "3", "FOLDER": "my folder"}


def dry_run(script: Path, *arguments: str) -> list[str]:
    """The words of the command that a dry run prints; those for another host unpacked."""
    done = subprocess.run(
        [script, *arguments],
        env={**os.environ, **ENVIRONMENT, "PYTHON": sys.executable, "DRY_RUN": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    words = shlex.split(done.stdout)
    return words[:-1] + shlex.split(words[-1]) if "--command" in words else words


def test_there_is_a_script_for_every_setting() -> None:
    assert [script.stem for script in SCRIPTS] == ["one_gpu", "one_host", "slurm", "tpu_pod"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_dry_run_passes_the_arguments_on(script: Path) -> None:
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail" in script.read_text()
    words = dry_run(script, *ARGUMENTS)
    assert words[-len(ARGUMENTS) :] == ARGUMENTS
    at = words.index("nqf.train")
    assert words[at - 2 : at] == [sys.executable, "-m"]
    options = parse(words[at + 1 :])
    assert options.name == ARGUMENTS[3]
    assert options.training.distributed == (script.stem in ("slurm", "tpu_pod"))


def test_devices_and_hosts_are_named() -> None:
    words = {script.stem: dry_run(script) for script in SCRIPTS}
    assert "CUDA_VISIBLE_DEVICES=3" in words["one_gpu"]
    assert "CUDA_VISIBLE_DEVICES=0,1" in words["one_host"]
    assert words["slurm"][0] == "srun"
    assert words["tpu_pod"][:8] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "my pod", "--zone", "zone-b"]
    assert ["cd", "my folder", "&&"] == words["tpu_pod"][10:13]


def test_a_pod_without_a_name_is_refused() -> None:
    done = subprocess.run(
        [ROOT / "launch_scripts" / "tpu_pod.sh"],
        env={"PATH": os.environ["PATH"], "DRY_RUN": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode and "name of the TPU slice" in done.stderr


def test_a_script_runs_the_command_and_reports_its_exit_code() -> None:
    done = subprocess.run(
        [ROOT / "launch_scripts" / "one_gpu.sh", "--config", "nowhere.yaml"],
        env={**os.environ, "PYTHON": sys.executable},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "nowhere.yaml: no such configuration file" in done.stderr
