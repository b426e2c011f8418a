"""SIGKILL at random moments of every stage: the resumed run ends as the uninterrupted one, bit for bit."""

import json
import random
import resource
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from run_folders import STAGES, checkpoint_steps, copy_run, finish, outcome, start

# Kills per stage; with those below at least 20 in all.
KILLS = {"fields": 3, "counts": 2, "item": 4, "tokens": 2, "user": 4, "joint": 4, "score": 1}
SEED = 5


def killed(
    process: subprocess.Popen, folder: Path, stage: str, moment: random.Random, last: int, seconds: float
) -> bool:
    """Kills a command at a random moment; False if it was faster.

    The moment of a stage that trains is a random step from a random one of its checkpoints on, or any time after its
    start; that of the others any time of the `seconds` that they take, after they have begun to write.
    """
    begun = folder / stage / "started.json"
    while not begun.exists() and process.poll() is None:
        time.sleep(0.005)
    if not last or moment.random() < 0.2:
        delay = moment.uniform(0, seconds)
    else:
        done = max(checkpoint_steps(folder, stage), default=0)
        target = moment.randint(done + 1, max(done + 1, last - 1))
        while max(checkpoint_steps(folder, stage), default=0) < target and process.poll() is None:
            time.sleep(0.005)
        delay = moment.uniform(0, 0.2)
    time.sleep(delay)
    process.kill()
    process.communicate()
    return process.returncode == -9


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("stage", STAGES)
def test_killed_stage_ends_as_if_nothing_had_happened(
    stage: str, smallest_run: Path, tmp_path: Path, record: Callable[..., None]
) -> None:
    folder = copy_run(smallest_run, tmp_path / "run", until=stage)
    moment = random.Random(f"{SEED} {stage}")
    last = max(checkpoint_steps(smallest_run, stage), default=0)
    seconds = json.loads((smallest_run / stage / "stage.json").read_text())["result"]["wall_seconds"]
    kills = 0
    # Some stages are so short that most kills come late.
    for _ in range(3 * KILLS[stage] + 6):
        if kills == KILLS[stage]:
            break
        dead = killed(start(folder, "--stage", stage), folder, stage, moment, last, seconds)
        if dead and not (folder / stage / "stage.json").exists():
            kills += 1
        else:
            # The stage was faster than the kill, which may have met the process on its way out. What looks finished
            # has to be; then again from the start of the stage.
            assert outcome(folder, stage) == outcome(smallest_run, stage), "a killed stage looks finished and is not"
            folder = copy_run(smallest_run, tmp_path / f"run-{kills}-{time.monotonic_ns()}", until=stage)
    assert kills == KILLS[stage]
    finish(start(folder, "--stage", stage))
    assert outcome(folder, stage) == outcome(smallest_run, stage)
    record(
        f"SIGKILL in stage `{stage}` at random moments, again and again on one run",
        tried=kills,
        survived=kills,
        seen="nothing: the same command continues, and ends with the same bytes as the uninterrupted run",
    )


@pytest.mark.slow
@pytest.mark.ci
def test_stage_without_memory_continues(smallest_run: Path, tmp_path: Path, record: Callable[..., None]) -> None:
    """Memory ends in the middle of a stage, which is what a container's limit does to it; then there is some again."""
    folder = copy_run(smallest_run, tmp_path / "run", until="item")
    ended = 0
    # When the stage has begun and has all of its programs to compile, and when it trains.
    for begun in (lambda: (folder / "item" / "started.json").exists(), lambda: checkpoint_steps(folder, "item")):
        process = start(folder, "--stage", "item")
        while not begun() and process.poll() is None:
            time.sleep(0.005)
        if process.poll() is None:
            pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[0])
            resource.prlimit(process.pid, resource.RLIMIT_AS, (pages * resource.getpagesize(),) * 2)
        try:
            process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            # A thread of XLA or TensorStore that gets no memory may leave the others waiting for it. Whoever runs the
            # command ends it then, as a container does.
            process.kill()
            process.communicate()
        # One that had all the memory that it needed has finished; what looks finished has to be.
        ended += process.returncode != 0
        assert (process.returncode == 0) == (folder / "item" / "stage.json").exists()
    assert ended >= 1
    finish(start(folder, "--stage", "item"))
    assert outcome(folder, "item") == outcome(smallest_run, "item")
    record(
        "a stage whose memory ends, when it begins and when it trains",
        tried=2,
        survived=2,
        seen="the stage does not look finished; with memory again, the same command ends with the same bytes",
    )
