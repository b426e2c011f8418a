"""A finished run of smallest.yaml, and the record from which docs/reliability.md is made."""

import fcntl
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from run_folders import ROOT, finish, start

RECORDS = ROOT / "runs" / "reliability"


@pytest.fixture(scope="session")
def smallest_run(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A finished run of smallest.yaml, trained once by the command line for all workers. Copy it to change it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "smallest"
    with open(f"{folder}.done", "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "eval" / "results.json").is_file():
            finish(start(folder))
    return folder


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Notes a fault that was tried: `record(fault, tried=, survived=, seen=)`; see tests/reliability/table.py."""
    rows: list[dict] = []

    def note(fault: str, *, tried: int, survived: int, seen: str) -> None:
        rows.append({"fault": fault, "tried": tried, "survived": survived, "seen": seen})
        RECORDS.mkdir(parents=True, exist_ok=True)
        name = f"{request.node.path.stem}--{request.node.name}".replace("/", "-")
        (RECORDS / f"{name}.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")

    return note
