"""Settings and shared fixtures of all tests."""

import os

# Before jax starts its backend: parity needs full float32 products, and two test workers share two cores.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
import fcntl
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

# Programs of the tests run for milliseconds, and compiling them took most of a test's time. Newer versions of XLA have
# one kind of emitters, and end where they are told of another.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    if importlib.metadata.version("jaxlib").startswith("0.10.")
    else "--xla_backend_optimization_level=0",
)
# Programs of the tests' subprocesses are compiled once; the folder is this user's and this checkout's.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"nqf-tests-xla-{os.getuid()}"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import pytest

jax.config.update("jax_default_matmul_precision", "float32")

TESTS = Path(__file__).parent
RECORDS = TESTS.parent / "runs" / "reliability"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "slow: trains, opens a browser or compares with torch; left out on the newest Python"
    )
    config.addinivalue_line("markers", "targets: compiles steps of true size for TPUs; needs libtpu, minutes each")
    config.addinivalue_line(
        "markers", "ci: trains again or starts many processes; left out by `make test`, run by `make ci`"
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files in an order in which no worker waits for another one: neither at the end, for a file that takes minutes,
    nor at the beginning, while one of them trains what the others would read."""
    long = {item.path for item in items if item.get_closest_marker("ci")}
    users = [item for item in items if "tiny_run" in getattr(item, "fixturenames", ())]
    # One that runs wherever tests run, and is soon done, comes first; the other files that read the run come late.
    quick = [item.path for item in users if item.path not in long and not item.get_closest_marker("slow")]
    first, trained = min(quick, key=quick.count, default=None), {item.path for item in users}
    items.sort(key=lambda item: (item.path != first, item.path not in long, item.path in trained))


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A finished run of tests/tiny.yaml, trained once by the command line for all workers. Copy it to change it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "tiny"
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "eval" / "results.json").is_file():
            command = [sys.executable, "-m", "nqf.train", "--config", str(TESTS / "tiny.yaml"), "--run", str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent)
            assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Notes a fault that was tried for docs/reliability.md, which tests/reliability/table.py makes.

    What is seen begins with `refused` or `an error` where all ended so, or with `<number> refused`: these are counted.
    """
    rows: list[dict] = []

    def note(fault: str, *, tried: int, survived: int, seen: str) -> None:
        rows.append({"fault": fault, "tried": tried, "survived": survived, "seen": seen})
        RECORDS.mkdir(parents=True, exist_ok=True)
        name = f"{request.node.path.stem}--{request.node.name}".replace("/", "-")
        (RECORDS / f"{name}.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")

    return note
