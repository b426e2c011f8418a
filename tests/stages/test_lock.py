"""The lock on a run folder: one owner, named to others, gone with its process however that ends."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nqf.files import InUseError
from nqf.stages.graph import lock_run

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from pathlib import Path
from nqf.stages.graph import lock_run
with lock_run(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def holder(folder: Path) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "held\n"
    return process


def test_second_process_is_told_who_holds_the_folder(tmp_path: Path, record: Callable[..., None]) -> None:
    process = holder(tmp_path / "run")
    try:
        with pytest.raises(InUseError, match=rf"in use by process {process.pid} on .*{tmp_path}") as raised:
            with lock_run(tmp_path / "run"):
                pass
        # A killed owner cannot clean up; the kernel does.
        process.kill()
        process.wait()
        with lock_run(tmp_path / "run"):
            assert str(os.getpid()) in (tmp_path / "run" / ".lock-owner").read_text()
    finally:
        process.kill()
        process.wait()
    record(
        "a second process on one run folder, and an owner that was killed",
        tried=2,
        survived=2,
        seen=str(raised.value).replace(str(tmp_path), "runs").split(" (")[0]
        + " (…); wait until it has finished, or end it",
    )


def test_lock_is_given_back(tmp_path: Path) -> None:
    for _ in range(2):
        with lock_run(tmp_path):
            with pytest.raises(InUseError, match=f"in use by process {os.getpid()}"), lock_run(tmp_path):
                pass
    assert not (tmp_path / ".lock-owner").exists()


def test_lock_follows_no_link(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("content")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(precious)
    with pytest.raises(OSError), lock_run(tmp_path / "run"):
        pass
    assert precious.read_text() == "content"


@pytest.mark.slow
def test_commands_respect_the_lock(tmp_path: Path) -> None:
    config = ROOT / "tests" / "tiny.yaml"
    with lock_run(tmp_path):
        done = subprocess.run(
            [sys.executable, "-m", "nqf.train", "--config", str(config), "--run", str(tmp_path)],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
    assert done.returncode == 1 and f"in use by process {os.getpid()}" in done.stderr
    # Not even the configuration was written.
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock"]
