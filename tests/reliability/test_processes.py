"""Two real processes of one run, joined by jax.distributed, end as one process with two devices."""

import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from run_folders import STAGES, finish, metrics, outcome, start


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.mark.slow
@pytest.mark.ci
def test_two_processes_end_as_one_process_with_two_devices(tmp_path: Path, record: Callable[..., None]) -> None:
    # A checkpoint takes longer than a step of these models.
    address, seldom = f"127.0.0.1:{free_port()}", ("--training.save_every_seconds", "600")
    together = [
        start(
            tmp_path / "two",
            "--training.distributed",
            *seldom,
            JAX_COORDINATOR_ADDRESS=address,
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(index),
        )
        for index in range(2)
    ]
    try:
        first, second = (finish(process) for process in together)
    finally:
        # The other one waits for a process that failed.
        for process in together:
            process.kill()
    finish(start(tmp_path / "one", *seldom, devices=2))
    for stage in STAGES:
        assert outcome(tmp_path / "two", stage) == outcome(tmp_path / "one", stage), stage
    # One process writes: every line of the metrics is there once, and the second one is silent.
    for stage in ("item", "user", "joint"):
        steps = [(line["step"], "loss" in line) for line in metrics(tmp_path / "two", stage)]
        assert steps and len(steps) == len(set(steps))
    results = [json.loads((tmp_path / name / "eval" / "results.json").read_text())["models"] for name in ("two", "one")]
    assert results[0] == results[1]
    assert "joint  done" in first and "done" not in second
    record(
        "two processes over `jax.distributed` instead of one with two devices",
        tried=1,
        survived=1,
        seen="nothing: parameters, metrics and results are the same, byte for byte",
    )
