"""Bad moments of a loop: a kill at every rename of a checkpoint, and a clock that goes backwards."""

import itertools
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from test_loop import assert_equal, lines, run_fit

from nqf.training.loop import FitResult

ROOT = Path(__file__).parents[2]
# Renames that belong to checkpoints, counted over the process; the one of that number does not return.
KILLED = """
import os, sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]).parent)]
import conftest
from test_loop import run_fit

count, at = 0, int(sys.argv[3])

def dying(real):
    def call(source, target, *rest, **options):
        global count
        if "checkpoints" in str(target):
            count += 1
            if count == at:
                os.kill(os.getpid(), 9)
        return real(source, target, *rest, **options)
    return call

os.rename, os.replace = dying(os.rename), dying(os.replace)
run_fit(Path(sys.argv[2]), save_every_seconds=1e9)
print("renames", count)
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FitResult]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, run_fit(folder, save_every_seconds=1e9)


@pytest.mark.slow
@pytest.mark.ci
def test_a_kill_at_the_rename_of_a_checkpoint_loses_nothing(
    whole: tuple[Path, FitResult], tmp_path: Path, record: Callable[..., None]
) -> None:
    tried = 0
    for at in itertools.count(1):
        folder = tmp_path / str(at)
        command = [sys.executable, "-c", KILLED, str(ROOT / "tests" / "training"), str(folder), str(at)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if done.returncode == 0:
            break
        assert done.returncode == -9, done.stderr
        tried += 1
        result = run_fit(folder, save_every_seconds=1e9)
        assert_equal(result.params, whole[1].params)
        assert lines(folder) == lines(whole[0])
    assert tried >= 3
    record(
        "SIGKILL at each rename of a checkpoint, one after the other",
        tried=tried,
        survived=tried,
        seen="nothing: the same command resumes, and parameters and metrics are those of the uninterrupted run",
    )


def test_a_clock_that_goes_backwards_changes_nothing(
    whole: tuple[Path, FitResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: Callable[..., None]
) -> None:
    now = itertools.count(1_700_000_000, -1_000)
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    monkeypatch.setattr(time, "time_ns", lambda: next(now) * 10**9)
    result = run_fit(tmp_path, save_every_seconds=1e9)
    assert_equal(result.params, whole[1].params)
    assert lines(tmp_path) == lines(whole[0])
    record(
        "a clock that goes back by a quarter of an hour at each look",
        tried=1,
        survived=1,
        seen="nothing: parameters and metrics are the same, but for the times in them",
    )
