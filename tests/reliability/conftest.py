"""A finished run of smallest.yaml."""

import fcntl
from pathlib import Path

import pytest
from run_folders import finish, start


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
